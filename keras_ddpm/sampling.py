"""The compiled loop that runs the table of any sampler on a model, and what is added to it: guidance, known pixels."""

import dataclasses
import itertools
import random

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import hardware
from keras_ddpm import recording
from keras_ddpm import samplers

# Where the backend records, jobs of as many network calls are run as a recording, which takes as long as fifty calls
# the first time for a size of the batch. What is recorded depends on the job alone, so that samples do not depend on
# what was sampled before.
RECORDED_FROM = 20


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The options of `DiffusionModel.sample` by the same names.

    Raises:
        ValueError: for a value outside its range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple | None = None
    dynamic_threshold: float | None = None

    def __post_init__(self):
        if not _checks.is_between(self.scale, 0, np.inf):
            raise ValueError(f"`guidance_scale` must be 0 or more. Received: guidance_scale={self.scale!r}")
        if not _checks.is_between(self.rescale, 0, 1):
            raise ValueError(f"`guidance_rescale` must be in [0, 1]. Received: guidance_rescale={self.rescale!r}")
        ends = self.interval
        if ends is not None and not (
            isinstance(ends, (tuple, list)) and len(ends) == 2 and _checks.is_between(ends[0], -np.inf, ends[1])
        ):
            raise ValueError(f"`guidance_interval` must be (low, high). Received: {ends!r}")
        p = self.dynamic_threshold
        if p is not None and not (_checks.is_positive(p) and p < 1):
            raise ValueError(f"`dynamic_threshold` must be in (0, 1). Received: dynamic_threshold={p!r}")

    def labels(self, model, labels, num):
        """`model.conditions(labels, num)`; raises ValueError for guidance without labels."""
        if labels is None and self.scale != 1:
            raise ValueError(f"Guidance needs labels. Received: guidance_scale={self.scale!r}, labels=None")
        return model.conditions(labels, num)

    def scales(self, t):
        """w at the times `t`."""
        low, high = self.interval or (-np.inf, np.inf)
        return np.where((low <= t) & (t <= high), self.scale, 1.0)


def checked_seed(seed):
    """The seed, or one drawn from Python's `random`."""
    if seed is None:
        return random.randrange(2**31)
    if not _checks.is_count(seed, low=0):
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
    return seed


def noise(model, seed, indices):
    """The noise of the samples `indices`."""
    return np.stack(
        [np.random.default_rng([seed, index]).standard_normal(model.data_shape, "float32") for index in indices]
    )


def prior(model, seed, indices):
    """x_T of the samples `indices`: their noise, of a size that is 1 for variance-preserving schedules."""
    schedule = model.diffusion.schedule
    return np.hypot(schedule.alpha[-1], schedule.sigma[-1]).astype("float32") * noise(model, seed, indices)


def run(
    model,
    steps,
    start,
    num,
    seed,
    *,
    labels=None,
    guidance_scale=1.0,
    guidance_rescale=0.0,
    guidance_interval=None,
    dynamic_threshold=None,
    use_ema=True,
    batch_size=None,
    verbose=0,
    clip=True,
    known=None,
    parts=None,
):
    """Runs the steps of a sampler on `num` examples, in batches.

    Args:
        model: a `DiffusionModel`.
        steps: list of rows, as `Sampler.steps` returns.
        start: function from indices of examples to the x that they start from.
        num: number of examples.
        seed: of the noise of the steps.
        labels: and the options after it: as in `DiffusionModel.sample`.
        clip: whether to clip the predicted x_0.
        known: pair of data x_0, `(num, ...)`, and a mask that broadcasts to it: where it is 1 every step ends with
            noisy data in place of x, the last with the data themselves; or `None`.
        parts: number of states to return, at the ends of steps evenly spaced; `None` for the last x alone.

    Returns:
        Array `(num, ...)`, or with `parts` two arrays `(parts, num, ...)`: x and the predicted x_0.

    Raises:
        ValueError: for an invalid option.
    """
    if dynamic_threshold is not None and (not clip or model.diffusion.clip_range is None):
        raise ValueError(f"Nothing is clipped here. Received: dynamic_threshold={dynamic_threshold!r}")
    guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval, dynamic_threshold)
    labels = guidance.labels(model, labels, num)
    if batch_size is not None and not _checks.is_count(batch_size):
        raise ValueError(f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}")
    num_batches = -(-num // (batch_size or 256))
    batch_size = batch_size or -(-num // num_batches)
    table = np.concatenate(steps)
    scale = guidance.scales(table[:, 0])
    if labels is not None and np.all(scale == 0):
        labels, scale = np.full_like(labels, model.null), np.ones_like(scale)
    guided = scale != 1 if labels is not None else np.zeros(len(table), bool)
    arrival = np.append(table[1:, 0], 0).astype("int64")
    scales = model.diffusion.schedule.alpha[arrival], model.diffusion.schedule.sigma[arrival]
    rows = np.column_stack([table, scale, *scales]).astype("float32")
    # Filled up, so that one program serves samplers of any number of steps.
    rows = np.pad(rows, ((0, -len(table) % 1024), (0, 0)))
    stochastic = bool(np.any(table[:, samplers.COLUMNS.index("std")]))

    ends = np.cumsum([0, *map(len, steps)], dtype="int32")
    cuts = ends[np.linspace(0, len(steps), (parts or 1) + 1).round().astype("int32")]
    stops = ends[np.linspace(0, len(steps), min(20, len(steps)) + 1).round().astype("int32")] if verbose else []
    stops = np.unique([*cuts, *stops, *(np.flatnonzero(np.diff(guided)) + 1)]).astype("int32")
    if known is not None:
        known = [np.asarray(array, "float32") for array in known]
    progress = keras.utils.Progbar(num_batches * len(table), verbose=verbose, unit_name="step")
    states = np.empty((2 if parts else 1, parts or 1, num, *model.data_shape), "float32")
    for batch in range(num_batches):
        # The last batch is filled up.
        indices = np.minimum(np.arange(batch * batch_size, (batch + 1) * batch_size), num - 1)
        x = start(indices)
        x_0 = np.zeros_like(x)
        extras = () if labels is None else (labels[indices],)
        if known is not None:
            extras += tuple(array[indices] for array in known)
        # Keras on PyTorch adds seed and step as int32: leave room.
        batch_seed = np.int32(np.random.SeedSequence([seed, batch * batch_size]).generate_state(1)[0] >> 2)
        for first, last in itertools.pairwise(stops):
            program = model.programs(
                use_ema=bool(use_ema),
                stochastic=stochastic,
                guided=bool(guided[first]),
                rescale=guidance.rescale if guided[first] else 0.0,
                dynamic_threshold=guidance.dynamic_threshold,
                clip=clip,
                masked=known is not None,
            )
            program.recorded = num_batches * len(table) >= RECORDED_FROM
            x, x_0 = program.predict_on_batch((x, x_0, *extras, rows, batch_seed, first, last))
            progress.update(batch * len(table) + last)
            if last in cuts:
                part, chosen = np.searchsorted(cuts, last) - 1, slice(indices[0], indices[-1] + 1)
                for kept, state in zip(states, (x, x_0)):
                    kept[part, chosen] = state[: indices[-1] + 1 - indices[0]]
    return tuple(states) if parts else states[0, 0]


class Program(keras.Model):
    """A stretch of the rows of any sampler's table, as one compiled loop."""

    def __init__(
        self, model, use_ema, stochastic, guided=False, rescale=0.0, dynamic_threshold=None, clip=True, masked=False
    ):
        super().__init__(name="sampling", dtype="float32")
        self.model = model
        self.use_ema = use_ema
        self.stochastic = stochastic
        self.guided = guided
        self.rescale = rescale
        self.dynamic_threshold = dynamic_threshold
        self.clip = clip
        self.masked = masked
        self.network = recording.InferenceRecording(self._predict, after=1)
        self.recorded = False
        self.random = keras.random.SeedGenerator(0)
        self.jit_compile = hardware.jit_compile()
        self.built = True

    def call(self, inputs):
        """x and memory after the rows from `first` to before `last`, from those before."""
        x, memory, *condition, table, seed, first, last = inputs
        if self.masked:
            *condition, known, mask = condition
        network, predict = self.model.network, self.network if self.recorded else self._predict
        # A scope hides the values of the scope around it, so that it needs those of all variables.
        values = [(v, v.value) for v in network.variables]
        if self.use_ema:
            values += [(v, average.value) for v, average in zip(network.weights, self.model.ema_weights)]
        scope = keras.StatelessScope(values)

        def step(index, state):
            x, memory = state
            *row, scale, alpha, sigma = ops.unstack(ops.take(table, index, axis=0))

            def denoise(x, t):
                t = ops.broadcast_to(ops.cast(t, "int32"), ops.shape(x)[:1])
                with scope:
                    y = predict(x, t, scale, *condition)
                return self.model.diffusion.predict_x0(x, t, y, self.dynamic_threshold, self.clip)

            noise, noise_of_known = self._normal(ops.shape(x), seed, index)
            x, memory = samplers.step(row, denoise, x, noise, memory)
            if self.masked:
                x = ops.where(mask > 0, alpha * known + sigma * noise_of_known, x)
            return x, memory

        with self.network.fixed_weights():
            return ops.fori_loop(first, last, step, (x, memory))

    def _predict(self, x, t, scale, *condition):
        """The network's output, with guidance."""
        network = self.model.network
        if not self.guided:
            return network([x, t, *condition], training=False)
        (condition,) = condition
        both = ops.concatenate([ops.full_like(condition, self.model.null), condition])
        y = network([ops.concatenate([x, x]), ops.concatenate([t, t]), both], training=False)
        y_null, y_condition = ops.split(y, 2)
        y = (1 - scale) * y_null + scale * y_condition
        if self.rescale:
            axes = tuple(range(1, len(y.shape)))
            std, std_condition = (ops.std(v, axis=axes, keepdims=True) for v in (y, y_condition))
            y = y * (1 - self.rescale + self.rescale * ops.where(std > 0, std_condition / std, 1.0))
        return y

    def _normal(self, shape, seed, index):
        """Noise of the step and of the known pixels, if there is any.

        It depends on the seed and the step alone, however the steps are cut into stretches.
        """
        state = ops.cast(ops.stack([seed, 2 * index]), self.random.state.dtype)  # a draw adds 1
        with keras.StatelessScope([(self.random.state, state)]):
            return [
                keras.random.normal(shape, seed=self.random) if drawn else None
                for drawn in (self.stochastic, self.masked)
            ]
