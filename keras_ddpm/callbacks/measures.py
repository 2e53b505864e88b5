"""Measurements during training, which are added to Keras' logs."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.callbacks.sample_grid import _Sampling
from keras_ddpm.callbacks.watch import loss_of

__all__ = ["LossByTimestep", "SampleMetrics"]


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
        self._found: dict[str, float] = {}

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

    def get_state(self):  # for `Checkpoint`
        return self._found

    def set_state(self, state):
        self._found = state


class LossByTimestep(keras.callbacks.Callback):
    """Adds the loss at several times to Keras' logs, such as "loss_at_100", after every epoch.

    The loss is that of the averaged weights, without `loss_weight`, for the same noise each time. Put this callback
    before callbacks that read the logs, such as `keras.callbacks.TensorBoard`.

    Args:
        x_0: held-out data, `(num, ...)`. The more there are, the longer it takes.
        labels: the condition of each example, if the network has one.
        times: integers in 1..T, or their number: then they are the middles of as many equal parts of 1..T.

    Raises:
        ValueError: before training, if the data, the labels or the times are invalid.
    """

    def __init__(self, x_0: Any, labels: Any = None, times: Any = 5):
        super().__init__()
        valid = _checks.is_count(times) or isinstance(times, (list, tuple))
        _checks.require(valid, "`times` must be a positive integer or a list of times", times=times)
        self.x_0, self.labels, self.times = x_0, labels, times

    def on_train_begin(self, logs=None):
        self.on_epoch_end(0, {})  # so that wrong arguments fail now and not after an epoch

    def on_epoch_end(self, epoch, logs=None):
        diffusion, times = self.model.diffusion, self.times
        if _checks.is_count(times):
            times = np.round((np.arange(times) + 0.5) * diffusion.timesteps / times).clip(1).astype("int64").tolist()
        x_0 = _checks.data(self.x_0, self.model.data_shape, diffusion.clip_range, "x_0")
        noise = np.random.default_rng(0).standard_normal(x_0.shape).astype("float32")
        for at in times:
            t = np.full(len(x_0), at, "int32")
            x_t = ops.convert_to_numpy(diffusion.q_sample(x_0, t, noise))
            predicted = self.model.denoise(x_t, at, clip=False, labels=self.labels)
            y = diffusion.target(predicted, t, diffusion.predict_noise(x_t, t, predicted))
            logs[f"loss_at_{at}"] = loss_of(self.model, y, x_0, t, noise, self.labels)
