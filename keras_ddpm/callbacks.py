"""Callbacks for `DiffusionModel.fit`."""

import functools

import keras
import numpy as np
from keras import ops

from keras_ddpm import images
from keras_ddpm import sampling


class SampleGrid(keras.callbacks.Callback):
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
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` must be at least 1. Received: every={every}")
        self.path = str(path)
        self.every = every
        self.num_samples = num_samples
        self.seed = seed
        self.sampler = sampler
        self.compare_raw = compare_raw
        self.scale = scale
        self.labels = labels
        self.guidance_scale = guidance_scale

    def on_train_begin(self, logs=None):
        shape, schedule = self.model.data_shape, self.model.diffusion.schedule
        if len(shape) != 3 or shape[-1] not in (1, 3):
            raise ValueError(f"Only images of 1 or 3 channels can be drawn. Received: data of shape {shape}")
        try:
            self.path.format(epoch=1)
        except (KeyError, IndexError) as error:
            raise ValueError(f"`path` may have {{epoch}} alone in braces. Received: path={self.path}") from error
        if self.sampler is not None:
            self.sampler.table(schedule)
        sampling.Guidance(self.guidance_scale).labels(self.model, self.labels, self.num_samples)

    def on_epoch_end(self, epoch, logs=None):
        epoch += 1
        if epoch % self.every:
            return
        sample = functools.partial(
            self.model.sample,
            self.num_samples,
            self.sampler,
            self.seed,
            labels=self.labels,
            guidance_scale=self.guidance_scale,
        )
        grids = [images.grid(sample(use_ema=use_ema)) for use_ema in ((True, False) if self.compare_raw else (True,))]
        images.save(self.path.format(epoch=epoch), np.concatenate(grids, axis=1), self.scale)


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
