"""The compiled loop that runs the table of any sampler.

It does not depend on the model. It gets rows, a function that predicts, the process, and the x to start from. Samplers
with noise share one compiled program for any number of steps, and samplers without noise share another. The noise of
sampling is drawn here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm._backend import devices, replicas
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.samplers import rows

__all__ = ["Job", "Loop", "noise", "prior"]

MAX_BATCH_SIZE = 256


def noise(shape: tuple, seed: int, indices: np.ndarray, stream: tuple = ()) -> np.ndarray:
    """Standard Gaussian noise. The noise of each sample depends on the seed and the sample's index alone.

    Args:
        shape: shape of one sample.
        seed: a non-negative integer.
        indices: the indices of the samples, integers `(num,)`.
        stream: positive integers for noise that is independent of that of x_T.

    Returns:
        float32 array `(num, *shape)`.
    """
    draws = (np.random.default_rng([seed, index, *stream]) for index in indices)
    return np.stack([draw.standard_normal(shape, "float32") for draw in draws])


def prior(diffusion: GaussianDiffusion, shape: tuple, seed: int, indices: np.ndarray) -> np.ndarray:
    """Draws x_T: `noise`, scaled to the standard deviation that x_T has for data of variance 1.

    Args:
        diffusion: the process.
        shape, seed, indices: as in `noise`.
    """
    schedule = diffusion.schedule
    return np.hypot(schedule.alpha[-1], schedule.sigma[-1]).astype("float32") * noise(shape, seed, indices)


def counted_noise(shape: tuple, keys: Any, number: Any) -> Any:
    """Standard Gaussian noise of a compiled step. The noise of an example depends on its key and the number alone.

    Two hashes of a counter give two uniform numbers for each normal one. They are the same on every backend.

    Args:
        shape: shape of the batch.
        keys: int32 tensor `(batch, 2)`.
        number: integer that counts the draws of a job.

    Returns:
        float32 tensor of the given shape.

    Reference: Box and Muller, 1958; Salmon et al., 2011, on random numbers from counters.
    """
    factors = np.array(_signed([0x9E3779B9, 0xC2B2AE35]), "int32")
    counters = np.outer(factors, np.arange(math.prod(shape[1:]), dtype="int32"))
    keys = _hashed(ops.add(keys, _signed(0x85EBCA6B) * ops.cast(number, "int32")))
    bits = _hashed(ops.add(ops.expand_dims(keys, -1), counters))
    u = (ops.cast(_shifted(bits, 8), "float32") + 0.5) * 2.0**-24
    x = ops.sqrt(-2 * ops.log(u[:, 0])) * ops.cos(2 * math.pi * u[:, 1])
    return ops.reshape(x, (-1, *shape[1:]))


def _signed(bits):
    """Integers of 32 bits as Python's, with a sign. Products of int32 keep the lowest 32 bits."""
    return np.asarray(bits, "uint32").astype("int32").tolist()


def _shifted(bits, places):
    """Shifts 32 bits to the right. Those of an int32 would be filled up with its sign."""
    return ops.bitwise_and(ops.bitwise_right_shift(bits, places), 2 ** (32 - places) - 1)


def _hashed(bits):
    """A bijection of 32 bits that changes half of them, on average, if one of them changes."""
    bits = ops.bitwise_xor(bits, _shifted(bits, 16)) * _signed(0x7FEB352D)
    bits = ops.bitwise_xor(bits, _shifted(bits, 15)) * _signed(0x846CA68B)
    return ops.bitwise_xor(bits, _shifted(bits, 16))


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What a loop runs.

    Args:
        steps: list of rows, as `Sampler.steps` returns.
        start: function from indices of examples to the x at the start of the steps.
        num: number of examples.
        seed: seed of the noise of the steps.
        first: number of the first example in the sequence of noise that belongs to the seed.
        clip: whether to clip the predicted x_0.
        known: pair of data x_0, `(num, ...)`, and a mask that broadcasts to them; or `None`. After each row, x is
            replaced by noisy data if the mask is 1, and after the last row by the data themselves.
        num_states: number of states to return, at the ends of evenly spaced steps; `None` for the last x only.
    """

    steps: list[np.ndarray]
    start: Callable
    num: int
    seed: int = 0
    first: int = 0
    clip: bool = True
    known: tuple | None = None
    num_states: int | None = None


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
        job: Job,
        *,
        inputs: tuple = (),
        columns: tuple = (),
        dynamic_threshold: float | None = None,
        batch_size: int | None = None,
        verbose: int | str = 0,
    ) -> Any:
        """Runs a job.

        Args:
            predict: function from x `(batch, ...)`, t `(batch,)`, then `inputs` and the values of `columns`, to the
                network's output. A program is compiled for each function object, so pass the same object each time. It
                may have an attribute `variables`: those that it reads besides the loop's.
            job: what to run.
            inputs: arrays `(num, ...)`. `predict` gets the examples of the batch.
            columns: arrays `(rows,)`. `predict` gets the entry of the current row.
            dynamic_threshold: as in `GaussianDiffusion.predict_x0`.
            batch_size: examples in a batch; `None` for equal batches of at most 256. Several devices divide a batch,
                so it is rounded up to a multiple of their number.
            verbose: 1 for a progress bar.

        Returns:
            float32 array `(num, ...)`. With `num_states`, two arrays `(num_states, num, ...)`: x and the predicted x_0.

        Raises:
            ValueError: if `batch_size` is not a positive integer.
        """
        num, num_states, known = job.num, job.num_states, job.known
        _checks.counts(optional=True, batch_size=batch_size)
        batch_size = batch_size or -(-num // -(-num // MAX_BATCH_SIZE))
        batch_size += -batch_size % replicas.program_parts()
        num_batches = -(-num // batch_size)
        table = np.concatenate(job.steps)
        arrival, schedule = np.append(table["t"][1:], 0).astype("int64"), self.diffusion.schedule
        arguments = {
            "rows": {name: _padded(table[name]) for name in rows.COLUMNS},
            "columns": tuple(map(_padded, columns)),  # in order, which JAX does not keep in a dict
            "arrival": [_padded(schedule.alpha[arrival]), _padded(schedule.sigma[arrival])],
            "calls": np.int32(num_batches * len(table)),
            "dynamic_threshold": () if dynamic_threshold is None else (np.float32(dynamic_threshold),),
        }
        draws_noise = bool(np.any(table["std"]))
        noisy = draws_noise or known is not None
        program = self.programs(predict, clips=job.clip, draws_noise=draws_noise)
        arrays = {"inputs": inputs, "known": tuple(np.asarray(array, "float32") for array in known or ())}

        ends = np.cumsum([0, *map(len, job.steps)], dtype="int32")
        cuts = ends[np.linspace(0, len(job.steps), (num_states or 1) + 1).round().astype("int32")]
        bars = ends[np.linspace(0, len(job.steps), min(20, len(job.steps)) + 1).round().astype("int32")]
        stops = np.unique([*cuts, *bars] if verbose else cuts).astype("int32")
        said = verbose if replicas.is_chief() else 0
        progress = keras.utils.Progbar(num_batches * len(table), verbose=said, unit_name="step")
        states = np.empty((2 if num_states else 1, num_states or 1, num, *self.shape), "float32")
        for batch in range(num_batches):
            # The last batch is filled up with its last example.
            indices = np.minimum(np.arange(batch * batch_size, (batch + 1) * batch_size), num - 1)
            arguments |= {name: tuple(array[indices] for array in several) for name, several in arrays.items()}
            keys = [np.random.SeedSequence([job.seed, job.first + i]).generate_state(2) for i in indices if noisy]
            arguments["keys"] = np.resize(np.array(_signed(keys), "int32"), (batch_size, 2))  # zeros without noise
            x = x_0 = job.start(indices)
            previous = (np.zeros_like(x),) * rows.NUM_PREVIOUS
            for begin, end in itertools.pairwise(stops):
                state = {"x": x, "x_0": x_0, "previous": previous, "between": (begin, end)}
                x, x_0, previous = program.predict_on_batch(arguments | state)
                progress.update(batch * len(table) + end)
                if end in cuts:
                    part, place = np.searchsorted(cuts, end) - 1, slice(indices[0], indices[-1] + 1)
                    for kept, state in zip(states, (x, x_0)):
                        kept[part, place] = state[: indices[-1] + 1 - indices[0]]
        return tuple(states) if num_states else states[0, 0]


def _padded(column, multiple=1024):
    """Pads the column with zeros to a multiple of 1024 rows, so that most tables share one program."""
    missing = -len(column) % multiple
    return np.pad(column.astype("float32"), [(0, missing)] + [(0, 0)] * (column.ndim - 1))


class _Program(keras.Model):
    """Runs a range of the rows of a table as one compiled loop."""

    def __init__(self, diffusion, variables, predict, *, draws_noise, clips):
        super().__init__(name="sampling", dtype="float32")
        self.diffusion = diffusion
        # So that Keras tracks them, which JAX needs.
        self.predicted_from = [*variables, *getattr(predict, "variables", [])]
        self.predict_y = predict
        self.draws_noise = draws_noise
        self.clips = clips
        self.recordings = {}
        self.jit_compile = devices.jit_compile()
        self.built = True

    def call(self, job):
        """Returns x, the predicted x_0 and the earlier calls after the rows of the range `between`."""
        in_batch = {name: job[name] for name in ("x", "x_0", "previous", "keys", "inputs", "known")}
        job = job | keras.tree.map_structure(replicas.part, in_batch)
        predict = recorded(self.predict_y, self.recordings, job["calls"])
        threshold = job["dynamic_threshold"][0] if job["dynamic_threshold"] else None

        def step(index, state):
            x, _, previous = state
            take = functools.partial(ops.take, indices=index, axis=0)
            columns = [take(column) for column in job["columns"]]

            # The noise of the row, and that of the known data.
            wanted = (2 * index, self.draws_noise), (2 * index + 1, bool(job["known"]))
            noise, noise_of_known = (counted_noise(x.shape, job["keys"], number) if w else None for number, w in wanted)
            row = {name: take(column) for name, column in job["rows"].items()}
            t = ops.broadcast_to(ops.cast(row["t"], "int32"), ops.shape(x)[:1])
            y = predict(x, t, *job["inputs"], *columns)
            x_0 = self.diffusion.predict_x0(x, t, y, threshold, self.clips)
            x, previous = rows.step(row, lambda *_: x_0, x, noise, previous)
            if job["known"]:
                (known, mask), (alpha, sigma) = job["known"], map(take, job["arrival"])
                x = ops.where(mask > 0, alpha * known + sigma * noise_of_known, x)
            return x, x_0, previous

        state = ops.fori_loop(*job["between"], step, (job["x"], job["x_0"], job["previous"]))
        return keras.tree.map_structure(replicas.whole, state)


@devices.fast_on_torch
def recorded(function: Callable, recordings: dict, calls: Any) -> Callable:
    """Returns a version of the function for many calls with the same weights and without gradients.

    Args:
        function: function from tensors to a tensor.
        recordings: dict that belongs to the function. A backend may keep its recordings in it between jobs.
        calls: number of calls in the whole job, an integer or a tensor.
    """
    return function
