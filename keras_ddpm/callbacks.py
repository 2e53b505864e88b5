"""Callbacks for `DiffusionModel.fit`."""

import contextlib
import io
import pathlib
import tempfile
import time
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops
from PIL import Image

from keras_ddpm import _checks
from keras_ddpm import _replicas
from keras_ddpm import checkpoints
from keras_ddpm import images
from keras_ddpm.checkpoints import Checkpoint as Checkpoint
from keras_ddpm.samplers import Sampler


class _Sampling(keras.callbacks.Callback):
    """Makes the same number of samples from the same noise every few epochs."""

    def __init__(self, every, num_samples, seed=0, sampler=None, **options):
        super().__init__()
        _checks.counts(every=every, num_samples=num_samples)
        self.every = every
        self.num_samples = num_samples
        self.seed = _checks.seed(seed)
        self.sampler = sampler
        self.options = options

    def on_train_begin(self, logs=None):
        """Takes the first step of the sampler, so that wrong options fail now and not after an epoch."""
        sampler = self.sampler or self.model.default_sampler
        _checks.require(isinstance(sampler, Sampler), "`sampler` must be one of `keras_ddpm.samplers`", sampler=sampler)
        steps = sampler.steps(self.model.diffusion.schedule)[:1]
        start = lambda indices: np.zeros((len(indices), *self.model.data_shape), "float32")  # noqa: E731
        self.model.run(steps, start, self.num_samples, self.seed, **self.options)

    def sample(self, **changes):
        return self.model.sample(self.num_samples, self.sampler, self.seed, **{**self.options, **changes})


class SampleGrid(_Sampling):
    """Writes a grid of samples every few epochs, from the same noise each time.

    Args:
        path: file name. `{epoch}` is replaced by the epoch, as in "samples/{epoch:04d}.png".
        every: number of epochs from one grid to the next.
        num_samples: number of images in a grid.
        compare_raw: whether to draw samples of the raw weights to the right of the samples of the average.
        scale: integer factor by which images are enlarged.
        tensorboard: folder of logs for TensorBoard, as in `keras.callbacks.TensorBoard`, or `None`.
        **options: `seed` (by default 0), `sampler`, and what to sample, such as `labels` and `guidance_scale`, as in
            `DiffusionModel.sample`.

    Raises:
        ModuleNotFoundError: before training, if `tensorboard` is given and not installed.
        ValueError: before training, if the data are not images, `path` has other names in braces or no ending of an
            image file, the sampler has more steps than the schedule, or an option is invalid.
        OSError: before training, if files cannot be written to the folder.
    """

    def __init__(
        self,
        path: Any,
        every: int = 1,
        num_samples: int = 16,
        *,
        compare_raw: bool = False,
        scale: int = 1,
        tensorboard: Any = None,
        **options,
    ):
        super().__init__(every, num_samples, **options)
        self.path = str(path)
        _checks.counts(scale=scale)
        self.compare_raw = compare_raw
        self.scale = scale
        self.tensorboard = tensorboard

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        shape = self.model.data_shape
        drawable = len(shape) == 3 and shape[-1] in (1, 3)
        _checks.require(drawable, "Only images of 1 or 3 channels can be drawn", shape=shape)
        try:
            self.path.format(epoch=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"`path` must have no name but {{epoch}} in braces. Received: path={self.path}") from error
        valid = pathlib.Path(self.path).suffix.lower() in Image.registered_extensions()
        _checks.require(valid, "`path` must end like an image file", path=self.path)
        self.writer = None
        if not _replicas.is_chief():
            return
        folder = pathlib.Path(self.path).parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if self.tensorboard is not None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self.writer = EventFileWriter(str(self.tensorboard))

    def on_train_end(self, logs=None):
        if self.writer:
            self.writer.close()

    def on_epoch_end(self, epoch, logs=None):
        epoch += 1
        if epoch % self.every:
            return
        columns = [{}, {"use_ema": False}] if self.compare_raw else [{}]
        grids = [images.grid(self.sample(**changes)) for changes in columns]
        if not _replicas.is_chief():  # but on JAX, all processes draw the samples
            return
        grid = np.concatenate(grids, axis=1)
        images.save(self.path.format(epoch=epoch), grid, self.scale)
        if self.writer:
            self.writer.add_event(_event(images.to_pil(grid), epoch))
            self.writer.flush()


def _event(image, step):
    """An image as TensorBoard reads it."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto import summary_pb2

    file = io.BytesIO()
    image.save(file, "PNG")
    entry = summary_pb2.Summary.Image(
        height=image.height,
        width=image.width,
        colorspace=len(image.getbands()),
        encoded_image_string=file.getvalue(),
    )
    value = summary_pb2.Summary.Value(tag="samples", image=entry)
    return event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=[value]))


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
            loss = self.model.compute_loss(y=diffusion.target(x_0, t, noise), y_pred=y)
            logs[f"loss_at_{at}"] = float(_replicas.undivided(loss))


class EMAWeights(keras.callbacks.Callback):
    """Evaluates the averaged weights: `evaluate(callbacks=[EMAWeights()])`, or validation during `fit`.

    `DiffusionModel.evaluate` looks for it. The raw weights stay where they are.
    """


class Turns(keras.callbacks.Callback):
    """Holds a lock during each step of training and evaluation. `DiffusionModel` adds it.

    So other threads sample between two steps. On JAX, Keras takes the values out of the variables before the first step
    of an epoch, and keeps them elsewhere until its end.

    Args:
        lock: the lock that `DiffusionModel.run` takes, too.
    """

    def __init__(self, lock: Any):
        super().__init__()
        self.lock = lock
        self.held = False
        self._values = []

    @contextlib.contextmanager
    def running(self):
        """A context in which Keras trains or evaluates. If a step fails, the model has its values again."""
        try:
            yield
        except BaseException:
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # those after the last step
            for v, value in self._values:
                if not value.is_deleted():  # by a step that failed while it was computed
                    v.assign(value)
            raise
        finally:
            self._end()

    def _begin(self, batch, logs=None):
        if not self.held:
            self.held = self.lock.acquire()
        if batch == 0 and hasattr(self.model, "jax_state_sync"):
            self._values = [(v, v.value) for v in checkpoints.variables_of(self.model)]

    def _end(self, batch=None, logs=None):
        self._values = []
        if self.held:
            self.held = False
            self.lock.release()

    on_train_batch_begin = on_test_batch_begin = _begin
    on_train_batch_end = on_test_batch_end = _end


class LossWatch(keras.callbacks.Callback):
    """Raises an error if the loss is not finite, and warns if it does not fall. `DiffusionModel.fit` adds it.

    Args:
        x_0: clean data. At most 256 examples are used.
        weighted: whether weights of examples or classes multiply the loss. It then warns of nothing.

    Raises:
        ValueError: within `every` steps after the loss has become NaN or infinite.
    """

    every = 5  # steps; reading the loss waits for an accelerator
    patience = 300  # optimizer updates

    def __init__(self, x_0: np.ndarray, weighted: bool = False):
        super().__init__()
        self.x_0 = x_0[:256]
        self.weighted = weighted

    def on_train_begin(self, logs=None):
        """Computes the loss of a network that always predicts zero."""
        diffusion = self.model.diffusion
        t = np.linspace(1, diffusion.timesteps, len(self.x_0)).round().astype("int32")
        noise = np.random.default_rng(0).standard_normal(self.x_0.shape)
        target = diffusion.target(self.x_0, t, noise)
        weight = self.model.weight_of(t)
        loss = self.model.compute_loss(y=target, y_pred=ops.zeros_like(target), sample_weight=weight)
        self.trivial = float(_replicas.undivided(loss))
        self.start = self._updates()
        self._recent = []

    def _updates(self):
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The loss is the mean of the epoch so far. Once it is NaN, it stays NaN.
        self._recent.append((batch, (logs or {}).get("loss", 0.0)))
        if len(self._recent) >= self.every:
            self._check()

    def _check(self):
        recent, self._recent = self._recent, []
        for batch, loss in recent:
            if not np.isfinite(float(loss)):
                raise ValueError(
                    f"The loss is {float(loss)} at step {batch + 1} of epoch {self._epoch + 1}: the data hold NaN, "
                    "values outside the `clip_range` or unknown labels, or the learning rate is too high. "
                    "The average is that of the step before."
                )

    def on_epoch_end(self, epoch, logs=None):
        self._check()
        loss = (logs or {}).get("loss", 0.0)
        if not self.weighted and loss > 0.9 * self.trivial and self._updates() - self.start >= self.patience:
            warnings.warn(
                f"After epoch {epoch + 1} the loss is {loss:.3f}; always predicting zero gives {self.trivial:.3f}. "
                "The network has learned next to nothing: check the learning rate and the data.",
                stacklevel=2,
            )
