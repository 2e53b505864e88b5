"""Callbacks for `DiffusionModel.fit`."""

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import images
from keras_ddpm import sampling


class _Sampling(keras.callbacks.Callback):
    """Makes the same number of samples from the same noise every few epochs."""

    def __init__(self, every, num_samples, seed, sampler, labels, guidance_scale):
        super().__init__()
        if not _checks.is_count(every):
            raise ValueError(f"`every` must be at least 1. Received: every={every!r}")
        self.every = every
        self.num_samples = num_samples
        self.seed = seed
        self.sampler = sampler
        self.labels = labels
        self.guidance_scale = guidance_scale

    def on_train_begin(self, logs=None):
        """Checks what can be checked before hours of training."""
        if self.sampler is not None:
            self.sampler.table(self.model.diffusion.schedule)
        sampling.Guidance(self.guidance_scale).labels(self.model, self.labels, self.num_samples)

    def sample(self, use_ema=True):
        return self.model.sample(
            self.num_samples,
            self.sampler,
            self.seed,
            labels=self.labels,
            guidance_scale=self.guidance_scale,
            use_ema=use_ema,
        )


class SampleGrid(_Sampling):
    """Writes a grid of samples every few epochs, from the same noise each time.

    Args:
        path: file name, in which `{epoch}` is replaced, as in "samples/{epoch:04d}.png".
        every: epochs between grids.
        num_samples: images in a grid.
        seed: seed of the noise.
        sampler: a `samplers.Sampler`; by default that of `DiffusionModel.sample`.
        compare_raw: whether to draw the samples of the raw weights to the right of those of the average.
        scale: whole number by which every pixel is enlarged.
        labels: what a conditioned network is to draw, as in `DiffusionModel.sample`.
        guidance_scale: as in `DiffusionModel.sample`.

    Raises:
        ValueError: before training, for data that are no images, a path with other names in braces, a sampler
            with more steps than the schedule, wrong labels or a scale out of range.
    """

    def __init__(
        self,
        path,
        every=1,
        num_samples=16,
        seed=0,
        sampler=None,
        compare_raw=False,
        scale=1,
        labels=None,
        guidance_scale=1.0,
    ):
        super().__init__(every, num_samples, seed, sampler, labels, guidance_scale)
        self.path = str(path)
        self.compare_raw = compare_raw
        self.scale = scale

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        shape = self.model.data_shape
        if len(shape) != 3 or shape[-1] not in (1, 3):
            raise ValueError(f"Only images of 1 or 3 channels can be drawn. Received: data of shape {shape}")
        try:
            self.path.format(epoch=1)
        except (KeyError, IndexError) as error:
            raise ValueError(f"`path` may have {{epoch}} alone in braces. Received: path={self.path}") from error

    def on_epoch_end(self, epoch, logs=None):
        epoch += 1
        if epoch % self.every:
            return
        grids = [images.grid(self.sample(use_ema)) for use_ema in ((True, False) if self.compare_raw else (True,))]
        images.save(self.path.format(epoch=epoch), np.concatenate(grids, axis=1), self.scale)


class SampleMetrics(_Sampling):
    """Compares samples with real images every few epochs, and adds the result to Keras' logs.

    A metric "kid" appears as "val_kid", with its standard error as "val_kid_standard_error". It is measured in the
    first epoch and in those whose number is a multiple of `every`; in between, the logs repeat it (so that a `patience`
    counts these epochs, too). Put this callback before those that read the logs:

    >>> kid = metrics.KernelInceptionDistance(classifier, subset_size=50)
    >>> kid.update_state(real_images=held_out)
    >>> model.fit(images, epochs=100, callbacks=[
    ...     SampleMetrics(kid, num_samples=500, every=5),
    ...     keras.callbacks.ModelCheckpoint("best.keras", monitor="val_kid", mode="min", save_best_only=True),
    ... ])

    Args:
        metric: a metric of `metrics` that has been given the real images.
        num_samples: how many.
        every: epochs between samples.
        seed: seed of the noise.
        sampler: a `samplers.Sampler`; by default that of `DiffusionModel.sample`.
        labels: what a conditioned network is to draw, as in `DiffusionModel.sample`.
        guidance_scale: as in `DiffusionModel.sample`.

    Raises:
        ValueError: before training, for a metric without real images, too few samples for it, data that do not fit its
            extractor, a sampler with more steps than the schedule, wrong labels or a scale out of range.
    """

    def __init__(self, metric, num_samples=1000, every=1, seed=0, sampler=None, labels=None, guidance_scale=1.0):
        super().__init__(every, num_samples, seed, sampler, labels, guidance_scale)
        self.metric = metric
        self._found = {}

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if not self.metric.num_real:
            raise ValueError(f"The metric {self.metric.name} has no real images: call `update_state(real_images=...)`.")
        self.metric.compare(np.zeros((self.num_samples, *self.model.data_shape)))
        self.metric.values()
        self._found = {}

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0 or not self._found:
            self.metric.compare(self.sample())
            self._found = self.metric.values()
        logs.update({f"val_{name}": value for name, value in self._found.items()})


class EMAWeights(keras.callbacks.Callback):
    """Evaluates the averaged weights: `evaluate(callbacks=[EMAWeights()])`, or validation during `fit`.

    The network holds the average from the beginning of the evaluation to its end, and at no other time: a file
    saved after an epoch holds the raw weights in the network and the average in its own place. An evaluation that
    is interrupted leaves the two exchanged, until the same callback is used again.
    """

    def __init__(self):
        super().__init__()
        self._exchanged = False

    def on_train_begin(self, logs=None):
        self._exchange(False)

    def on_test_begin(self, logs=None):
        self._exchange(True)

    def on_test_end(self, logs=None):
        self._exchange(False)

    def _exchange(self, exchanged):
        if exchanged == self._exchanged:
            return
        self._exchanged = exchanged
        for average, v in zip(self.model.ema_weights, self.model.network.weights):
            averaged, raw = ops.copy(average), ops.copy(v)
            average.assign(raw)
            v.assign(averaged)
