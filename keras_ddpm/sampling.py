"""The compiled loop that runs the table of any sampler.

It does not depend on the model. It gets rows, a function that predicts, the process, and the x to start from. Samplers
with noise share one compiled program for any number of steps, and samplers without noise share another. The noise of
sampling is drawn here.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import _devices
from keras_ddpm import samplers
from keras_ddpm.diffusion import GaussianDiffusion

MAX_BATCH_SIZE = 256


def noise(shape: tuple, seed: int, indices: np.ndarray) -> np.ndarray:
    """Standard Gaussian noise. The noise of each sample depends on the seed and the sample's index alone.

    Args:
        shape: shape of one sample.
        seed: a non-negative integer.
        indices: the indices of the samples, integers `(num,)`.

    Returns:
        float32 array `(num, *shape)`.
    """
    return np.stack([np.random.default_rng([seed, index]).standard_normal(shape, "float32") for index in indices])


def prior(diffusion: GaussianDiffusion, shape: tuple, seed: int, indices: np.ndarray) -> np.ndarray:
    """Draws x_T: `noise`, scaled to the standard deviation that x_T has for data of variance 1."""
    schedule = diffusion.schedule
    return np.hypot(schedule.alpha[-1], schedule.sigma[-1]).astype("float32") * noise(shape, seed, indices)


class Loop:
    """Runs tables of samplers in batches, and keeps the compiled programs.

    Args:
        diffusion: the `GaussianDiffusion` that turns predictions into x_0.
        shape: shape of one example.
        variables: every Keras variable that a predictor reads.
    """

    def __init__(self, diffusion: GaussianDiffusion, shape: tuple, variables: list):
        self.diffusion = diffusion
        self.shape = shape
        self.programs = functools.lru_cache(maxsize=8)(functools.partial(_Program, diffusion, variables))

    def run(
        self,
        predict: Callable,
        steps: list[np.ndarray],
        start: Callable,
        num: int,
        seed: int,
        *,
        inputs: tuple = (),
        columns: tuple = (),
        dynamic_threshold: float | None = None,
        clip: bool = True,
        known: tuple | None = None,
        batch_size: int | None = None,
        num_states: int | None = None,
        verbose: int | str = 0,
    ) -> Any:
        """Runs the steps of a sampler on `num` examples.

        Args:
            predict: function from x `(batch, ...)`, t `(batch,)`, then `inputs` and the values of `columns`, to the
                network's output. A program is compiled for each function object, so pass the same object each time.
            steps: list of rows, as `Sampler.steps` returns.
            start: function from indices of examples to the x at the start of the steps.
            num: number of examples.
            seed: seed of the noise of the steps.
            inputs: arrays `(num, ...)`. `predict` gets the examples of the batch.
            columns: arrays `(rows,)`. `predict` gets the entry of the current row.
            dynamic_threshold: as in `GaussianDiffusion.predict_x0`.
            clip: whether to clip the predicted x_0.
            known: pair of data x_0, `(num, ...)`, and a mask that broadcasts to them; or `None`. After each row, x is
                replaced by noisy data if the mask is 1, and after the last row by the data themselves.
            batch_size: examples in a batch; `None` for equal batches of at most 256.
            num_states: number of states to return, at the ends of evenly spaced steps; `None` for the last x only.
            verbose: 1 for a progress bar.

        Returns:
            float32 array `(num, ...)`. With `num_states`, two arrays `(num_states, num, ...)`: x and the predicted x_0.

        Raises:
            ValueError: if `batch_size` is not a positive integer.
        """
        _checks.counts(optional=True, batch_size=batch_size)
        num_batches = -(-num // (batch_size or MAX_BATCH_SIZE))
        batch_size = batch_size or -(-num // num_batches)
        table = np.concatenate(steps)
        arrival, schedule = np.append(table["t"][1:], 0).astype("int64"), self.diffusion.schedule
        job = {
            "rows": {name: _padded(table[name]) for name in table.dtype.names},
            "columns": tuple(map(_padded, columns)),  # in order, which JAX does not keep in a dict
            "arrival": [_padded(schedule.alpha[arrival]), _padded(schedule.sigma[arrival])],
            "calls": np.int32(num_batches * len(table)),
            "dynamic_threshold": np.float32(dynamic_threshold or 1.0),
        }
        kind = {"draws_noise": bool(np.any(table["std"])), "thresholds": dynamic_threshold is not None}
        program = self.programs(predict, clips=clip, masks=known is not None, **kind)
        arrays = {"inputs": inputs, "known": tuple(np.asarray(array, "float32") for array in known or ())}

        ends = np.cumsum([0, *map(len, steps)], dtype="int32")
        cuts = ends[np.linspace(0, len(steps), (num_states or 1) + 1).round().astype("int32")]
        bars = ends[np.linspace(0, len(steps), min(20, len(steps)) + 1).round().astype("int32")] if verbose else []
        stops = np.unique([*cuts, *bars]).astype("int32")
        progress = keras.utils.Progbar(num_batches * len(table), verbose=verbose, unit_name="step")
        states = np.empty((2 if num_states else 1, num_states or 1, num, *self.shape), "float32")
        for batch in range(num_batches):
            # The last batch is filled up with its last example.
            indices = np.minimum(np.arange(batch * batch_size, (batch + 1) * batch_size), num - 1)
            for name, several in arrays.items():
                job[name] = tuple(array[indices] for array in several)
            # On PyTorch, Keras adds the seed and the step as int32. The shift avoids an overflow.
            job["seed"] = np.int32(np.random.SeedSequence([seed, batch * batch_size]).generate_state(1)[0] >> 2)
            x = start(indices)
            previous = (np.zeros_like(x),) * samplers.NUM_PREVIOUS
            for first, last in itertools.pairwise(stops):
                x, previous = program.predict_on_batch(job | {"x": x, "previous": previous, "between": (first, last)})
                progress.update(batch * len(table) + last)
                if last in cuts:
                    part, rows = np.searchsorted(cuts, last) - 1, slice(indices[0], indices[-1] + 1)
                    for kept, state in zip(states, (x, previous[0])):
                        kept[part, rows] = state[: indices[-1] + 1 - indices[0]]
        return tuple(states) if num_states else states[0, 0]


def _padded(column, multiple=1024):
    """Pads the column with zeros to a multiple of 1024 rows, so that most tables share one program."""
    missing = -len(column) % multiple
    return np.pad(column.astype("float32"), [(0, missing)] + [(0, 0)] * (column.ndim - 1))


class _Program(keras.Model):
    """Runs a range of the rows of a table as one compiled loop."""

    def __init__(self, diffusion, variables, predict, *, draws_noise, thresholds, clips, masks):
        super().__init__(name="sampling", dtype="float32")
        self.diffusion = diffusion
        self.predicted_from = list(variables)  # so that Keras tracks them, which JAX needs
        self.predict_y = predict
        self.draws_noise = draws_noise
        self.thresholds = thresholds
        self.clips = clips
        self.masks = masks
        self.recordings = {}
        self.random = keras.random.SeedGenerator(0)
        self.jit_compile = _devices.jit_compile()
        self.built = True

    def call(self, job):
        """Returns x and the previous predictions after the rows of the range `between`."""
        predict = recorded(self.predict_y, self.recordings, job["calls"])
        threshold = job["dynamic_threshold"] if self.thresholds else None

        def step(index, state):
            x, previous = state
            take = functools.partial(ops.take, indices=index, axis=0)
            columns = [take(column) for column in job["columns"]]

            def denoise(x, t):
                t = ops.broadcast_to(ops.cast(t, "int32"), ops.shape(x)[:1])
                y = predict(x, t, *job["inputs"], *columns)
                return self.diffusion.predict_x0(x, t, y, threshold, self.clips)

            noise, noise_of_known = self._draw(ops.shape(x), job["seed"], index)
            row = {name: take(column) for name, column in job["rows"].items()}
            x, previous = samplers.step(row, denoise, x, noise, previous)
            if self.masks:
                (known, mask), (alpha, sigma) = job["known"], map(take, job["arrival"])
                x = ops.where(mask > 0, alpha * known + sigma * noise_of_known, x)
            return x, previous

        return ops.fori_loop(*job["between"], step, (job["x"], job["previous"]))

    def _draw(self, shape, seed, index):
        """Draws noise for the row and for the known data, or returns `None` if it is not needed.

        The noise depends on the seed and the number of the row alone, not on how the rows are cut into ranges.
        """
        state = ops.cast(ops.stack([seed, 2 * index]), self.random.state.dtype)  # each draw adds 1 to it
        with keras.StatelessScope([(self.random.state, state)]):
            wanted = self.draws_noise, self.masks
            return [keras.random.normal(shape, seed=self.random) if drawn else None for drawn in wanted]


@_devices.fast_on_torch
def recorded(function: Callable, recordings: dict, calls: Any) -> Callable:
    """Returns a version of the function for many calls with the same weights and without gradients.

    Args:
        function: function from tensors to a tensor.
        recordings: dict that belongs to the function. A backend may keep its recordings in it between jobs.
        calls: number of calls in the whole job, an integer or a tensor.
    """
    return function
