"""Callbacks for `DiffusionModel.fit`."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import images
from keras_ddpm.guidance import Guidance


class _Sampling(keras.callbacks.Callback):
    """Makes the same number of samples from the same noise every few epochs."""

    def __init__(self, every, num_samples, seed=0, sampler=None, **options):
        super().__init__()
        _checks.counts(every=every)
        self.every = every
        self.num_samples = num_samples
        self.seed = seed
        self.sampler = sampler
        self.options = options

    def on_train_begin(self, logs=None):
        """Checks the options before training starts."""
        sampler = self.sampler or self.model.default_sampler
        t = sampler.table(self.model.diffusion.schedule)["t"]
        Guidance(**self.options).resolve(self.model.condition, self.num_samples, t)

    def sample(self, use_ema=True):
        return self.model.sample(self.num_samples, self.sampler, self.seed, use_ema=use_ema, **self.options)


class SampleGrid(_Sampling):
    """Writes a grid of samples every few epochs, from the same noise each time.

    Args:
        path: file name. `{epoch}` is replaced by the epoch, as in "samples/{epoch:04d}.png".
        every: number of epochs from one grid to the next.
        num_samples: number of images in a grid.
        compare_raw: whether to draw samples of the raw weights to the right of the samples of the average.
        scale: integer factor by which images are enlarged.
        **options: `seed` (by default 0), `sampler`, and what to sample, such as `labels` and `guidance_scale`, as in
            `DiffusionModel.sample`.

    Raises:
        ValueError: before training, if the data are not images, `path` has other names in braces, the sampler has more
            steps than the schedule, or an option of guidance is invalid.
    """

    def __init__(
        self, path: Any, every: int = 1, num_samples: int = 16, *, compare_raw: bool = False, scale: int = 1, **options
    ):
        super().__init__(every, num_samples, **options)
        self.path = str(path)
        self.compare_raw = compare_raw
        self.scale = scale

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        shape = self.model.data_shape
        drawable = len(shape) == 3 and shape[-1] in (1, 3)
        _checks.require(drawable, "Only images of 1 or 3 channels can be drawn", shape=shape)
        try:
            self.path.format(epoch=1)
        except (KeyError, IndexError) as error:
            raise ValueError(f"`path` must have no name but {{epoch}} in braces. Received: path={self.path}") from error

    def on_epoch_end(self, epoch, logs=None):
        epoch += 1
        if epoch % self.every:
            return
        grids = [images.grid(self.sample(use_ema)) for use_ema in ((True, False) if self.compare_raw else (True,))]
        images.save(self.path.format(epoch=epoch), np.concatenate(grids, axis=1), self.scale)


class SampleMetrics(_Sampling):
    """Compares samples with real images every few epochs, and adds the result to Keras' logs.

    A metric "kid" appears as "val_kid", with its standard error as "val_kid_standard_error". It is measured in the
    first epoch and in every epoch that is a multiple of `every`. In other epochs the logs repeat the last value, and
    the `patience` of other callbacks counts these epochs, too. Put this callback before callbacks that read the logs:

    >>> kid = metrics.KernelInceptionDistance(classifier, subset_size=50)
    >>> kid.update_state(real_images=held_out)
    >>> model.fit(images, epochs=100, callbacks=[
    ...     SampleMetrics(kid, num_samples=500, every=5),
    ...     keras.callbacks.ModelCheckpoint("best.keras", monitor="val_kid", mode="min", save_best_only=True),
    ... ])

    Args:
        metric: a metric of `metrics` that has seen the real images.
        num_samples: number of samples.
        every: number of epochs from one measurement to the next.
        **options: `seed` (by default 0), `sampler`, and what to sample, such as `labels` and `guidance_scale`, as in
            `DiffusionModel.sample`.

    Raises:
        ValueError: before training, if the metric has no real images, the samples are too few for it, the data do not
            fit its extractor, the sampler has more steps than the schedule, or an option of guidance is invalid.
    """

    def __init__(self, metric: Any, num_samples: int = 1000, every: int = 1, **options):
        super().__init__(every, num_samples, **options)
        self.metric = metric
        self._found = {}

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        hint = f"The metric {self.metric.name} has no real images: call `update_state(real_images=...)`"
        _checks.require(self.metric.num_real, hint)
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

    During the evaluation, the network holds the average and the average holds the raw weights. Afterwards they are
    exchanged back, so a file saved after an epoch is not affected. An interrupted evaluation leaves them exchanged
    until the same callback is used again.
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
        if exchanged != self._exchanged:
            self._exchanged = exchanged
            self.model.average.exchange()


class LossWatch(keras.callbacks.Callback):
    """Raises an error if the loss is not finite, and warns if it does not fall. `DiffusionModel.fit` adds it.

    Args:
        x_0: clean data. At most 256 examples are used.

    Raises:
        ValueError: at the end of an epoch whose loss is not finite.
    """

    patience = 300  # optimizer updates

    def __init__(self, x_0: np.ndarray):
        super().__init__()
        self.x_0 = x_0[:256]

    def on_train_begin(self, logs=None):
        """Computes the loss of a network that always predicts zero."""
        diffusion = self.model.diffusion
        t = np.linspace(1, diffusion.timesteps, len(self.x_0)).round().astype("int32")
        noise = np.random.default_rng(0).standard_normal(self.x_0.shape)
        target = diffusion.target(self.x_0, t, noise)
        weight = self.model.weight_of(t)
        self.trivial = float(self.model.compute_loss(y=target, y_pred=ops.zeros_like(target), sample_weight=weight))
        self.start = int(self.model.optimizer.iterations)

    def on_epoch_end(self, epoch, logs=None):
        loss = (logs or {}).get("loss", 0.0)
        if not np.isfinite(loss):
            raise ValueError(
                f"The loss of epoch {epoch + 1} is {loss}: the data hold NaN or infinite values, or the learning "
                "rate is too high."
            )
        if loss > 0.9 * self.trivial and int(self.model.optimizer.iterations) - self.start >= self.patience:
            warnings.warn(
                f"After epoch {epoch + 1} the loss is {loss:.3f}; always predicting zero gives {self.trivial:.3f}. "
                "The network has learned next to nothing: check the learning rate and the data.",
                stacklevel=2,
            )
