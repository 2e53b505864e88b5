"""Samples during training: a base class, and grids of images."""

import io
import pathlib
import tempfile
import time
from typing import Any

import keras
import numpy as np
from PIL import Image

from keras_ddpm import _checks, images
from keras_ddpm._backend import replicas
from keras_ddpm.samplers import Sampler, loop

__all__ = ["SampleGrid"]


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

        def start(indices):
            return np.zeros((len(indices), *self.model.data_shape), "float32")

        self.model.run(loop.Job(steps, start, self.num_samples, self.seed), **self.options)

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
        ValueError: before training, if the data are not images, `path` has a placeholder other than `{epoch}` or
            an unknown image extension, the sampler has more steps than the schedule, or an option is invalid.
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
        if not replicas.is_chief():
            return
        folder = pathlib.Path(self.path).parent
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
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
        if not replicas.is_chief():  # but on JAX, all processes draw the samples
            return
        grid = np.concatenate(grids, axis=1)
        images.save(self.path.format(epoch=epoch), grid, self.scale)
        if self.writer:
            self.writer.add_event(_event(images.to_pil(grid), epoch))
            self.writer.flush()


def _event(image, step):
    """An image as TensorBoard reads it."""
    from tensorboard.compat.proto import event_pb2

    file = io.BytesIO()
    image.save(file, "PNG")
    entry = {"height": image.height, "width": image.width, "colorspace": len(image.getbands())}
    value = {"tag": "samples", "image": entry | {"encoded_image_string": file.getvalue()}}
    return event_pb2.Event(wall_time=time.time(), step=step, summary={"value": [value]})
