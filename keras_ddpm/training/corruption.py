"""Corruption: algorithm 1 of Ho et al. as a value. It turns clean data into a regression problem.

New ways to train change this value and not the training step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.conditions import Condition, seen
from keras_ddpm.diffusion import GaussianDiffusion

__all__ = ["TIMESTEP_SAMPLINGS", "Corruption"]

# Functions to times in [0, 1]. They get a number u in [0, 1) and an index 0..n − 1 for each of n examples.
TIMESTEP_SAMPLINGS: dict[str, Callable] = {
    "uniform": lambda u, index, n: u,
    "batch": lambda u, index, n: ops.broadcast_to(u[:1], ops.shape(u)),
    "stratified": lambda u, index, n: (index / n + u[:1]) % 1.0,  # Kingma et al., 2021, appendix I.1
    "half_at_T": lambda u, index, n: ops.minimum(2 * ((index / n + u[:1]) % 1.0), 1.0),
}


def standard_normal(x_0: Any, generator: keras.random.SeedGenerator) -> Any:
    """Draws independent noise like `x_0`."""
    return keras.random.normal(ops.shape(x_0), seed=generator)


@dataclasses.dataclass(frozen=True, eq=False)
class Corruption:
    """Draws t and noise for a batch of clean data, and says what the network should predict.

    Args:
        diffusion: the process.
        condition: the network's `conditions.Condition`, or `None`.
        loss_weight: array `(T + 1,)` of weights of the loss at t = 0..T; `None` for 1.
        timestep_sampling: how t is drawn from 1..T: a name in `TIMESTEP_SAMPLINGS`.
        label_dropout: the share of examples that lose their label or vector, in [0, 1).
        image_dropout: the share of examples that lose their condition image, in [0, 1).
        image_noise: the largest level of noise in condition images, in [0, 1), as in `conditions.seen`.
        max_guidance_scale: the largest guidance scale w that a network with the input `scale` learns; 1 for none. The
            input is 1 / w, uniform in w, and 1 without the condition. [Chen et al., 2025]
        draw_noise: function from x_0 and a seed generator to noise like x_0.

    Call arguments:
        x_0: clean data `(batch, ...)`, or a dict `{"x_0": x_0, "noise": noise}`. Then this noise is used.
        condition: labels, vectors or images of the batch, or a dict by name. Ignored if `condition` is `None`.
        weight: weights of the examples `(batch,)`, or `None`.
        generator: a `keras.random.SeedGenerator`.

    Returns:
        The network's inputs, a tuple of x_t, t and the parts of the condition; the target, shaped like x_t; and
        the weights of the loss `(batch,)`, or `None` for 1.

    Raises:
        ValueError: if `timestep_sampling` is unknown, a dropout or `image_noise` is outside [0, 1), or `loss_weight`
            has another shape or is not positive at some t in 1..T.

    Reference: Ho et al., 2020, algorithm 1.
    """

    diffusion: GaussianDiffusion
    condition: Condition | None = None
    loss_weight: Any = None
    timestep_sampling: str = "stratified"
    label_dropout: float = 0.0
    image_dropout: float = 0.0
    image_noise: float = 0.0
    max_guidance_scale: float = 1.0
    draw_noise: Callable = standard_normal

    def __post_init__(self) -> None:
        kinds = list(TIMESTEP_SAMPLINGS)
        valid, needed = self.timestep_sampling in kinds, f"`timestep_sampling` must be one of {kinds}"
        _checks.require(valid, needed, timestep_sampling=self.timestep_sampling)
        for name in ("label_dropout", "image_dropout", "image_noise"):
            _checks.share(**{name: getattr(self, name)})
        known = self.condition or ()
        told = not self.image_noise or "image_noise" in known
        _checks.require(told, "The network is not told the noise of images", image_noise=self.image_noise)
        largest = self.max_guidance_scale
        valid = _checks.is_between(largest, 1, 1000) and (largest == 1 or "scale" in known)
        needed = "`max_guidance_scale` must be 1, or up to 1000 for a network with the input 'scale'"
        _checks.require(valid, needed, max_guidance_scale=largest)
        if largest > 1 and self.condition:
            trained = self.dropout(self.condition.given[0]) > 0
            needed = "Guidance in one call needs a `label_dropout`, or without labels an `image_dropout`, above 0"
            _checks.require(trained, needed, label_dropout=self.label_dropout, image_dropout=self.image_dropout)
        object.__setattr__(self, "loss_weight", _checked_weight(self.loss_weight, self.diffusion.timesteps))

    def __call__(self, x_0: Any, condition: Any, weight: Any, generator: keras.random.SeedGenerator) -> tuple:
        x_0, noise = _x_0_and_noise(x_0)
        if isinstance(weight, dict):  # Keras repeats it for each part of the condition
            weight = next(iter(weight.values()))
        x_0 = self._poisoned(ops.cast(x_0, "float32"), condition)
        batch_size = ops.shape(x_0)[0]
        t = self.draw_timesteps(batch_size, generator)
        noise = self.draw_noise(x_0, generator) if noise is None else ops.cast(noise, "float32")
        inputs: tuple = (self.diffusion.q_sample(x_0, t, noise), t)
        target = self.diffusion.target(x_0, t, noise)
        if self.condition:
            inputs = (*inputs, *self._conditions(self.condition, condition, batch_size, generator))
        weights = [ops.cast(factor, "float32") for factor in (self.weight(t), weight) if factor is not None]
        return inputs, target, math.prod(weights) if weights else None

    def _conditions(self, known, values, batch_size, generator):
        """The network's inputs after x_t and t. Some examples lose parts of their condition, and images get noise."""
        values = known.by_name(values)
        kept = {name: keras.random.uniform((batch_size,), seed=generator) >= self.dropout(name) for name in values}
        if "image" in values:
            images = ops.cast(values["image"], "float32")
            levels = self.image_noise * keras.random.uniform((batch_size,), seed=generator)
            noise = standard_normal(images, generator) if self.image_noise else None
            values["image"] = seen(images, levels, noise, known["image"].shape)
            values["image_noise"], kept["image_noise"] = levels, kept["image"]
        if "scale" in known:
            values["scale"], kept["scale"] = ops.ones((batch_size,)), kept[known.given[0]]
            if self.max_guidance_scale > 1:
                u = keras.random.uniform((batch_size,), seed=generator)
                values["scale"] = 1 / (1 + (self.max_guidance_scale - 1) * u)
        return [part.drop(values[part.name], kept[part.name]) for part in known.parts]

    def dropout(self, name: str) -> float:
        """The share of examples that lose this part of the condition."""
        return self.image_dropout if name == "image" else self.label_dropout

    def weight(self, t: Any) -> Any:
        """The weights of the loss at times t, `(batch,)`; `None` if all are 1."""
        return None if self.loss_weight is None else ops.take(ops.convert_to_tensor(self.loss_weight, "float32"), t)

    def check(self, x_0: Any, condition: Any, shape: tuple) -> np.ndarray:
        """Checks data on the host, before they are trained on.

        Args:
            x_0: clean data or a dict, as in a call.
            condition: labels or vectors of the data, or `None`.
            shape: shape of one example.

        Returns:
            x_0 as a float32 array.

        Raises:
            ValueError: if the data have another shape, lie outside the `clip_range`, contain NaN or lack the condition.
        """
        x_0, noise = _x_0_and_noise(x_0)
        x_0 = _checks.data(ops.convert_to_numpy(x_0), shape, self.diffusion.clip_range)
        if noise is not None:
            noise = _checks.data(ops.convert_to_numpy(noise), shape, name="noise")
            _checks.require(len(noise) == len(x_0), f"Expected noise of {len(x_0)} examples", shape=noise.shape)
        if self.condition:
            hint = "The network has a condition: call `fit(x_0, labels)`, or give `(x_0, label)` batches"
            _checks.require(condition is not None, hint)
            for name, values in self.condition.by_name(condition).items():
                values = ops.convert_to_numpy(values) if hasattr(values, "shape") else np.asarray(None)
                valid = values.dtype.kind in "biuf" and values.ndim > len(self.condition[name].shape)
                needed = f"Expected an array with one {name} for each example. Labels are integers: see `np.unique`"
                _checks.require(valid, needed, shape=values.shape)
                self.condition.encoded(values, len(values), name)
        return x_0

    def draw_timesteps(self, batch_size: Any, generator: keras.random.SeedGenerator) -> Any:
        """Draws t in 1..T, `(batch,)`."""
        u = keras.random.uniform((batch_size,), seed=generator)
        index, number = ops.cast(ops.arange(batch_size), "float32"), ops.cast(batch_size, "float32")
        steps = self.diffusion.timesteps
        time = TIMESTEP_SAMPLINGS[self.timestep_sampling](u, index, number)
        return ops.minimum(1 + ops.cast(time * steps, "int32"), steps)  # in float32, time may be rounded to 1

    def _poisoned(self, x_0, condition):
        """Replaces data that `check` would refuse by NaN, as a compiled step cannot raise an error.

        Only the first batch of a stream is checked. `LossWatch` raises an error if the loss is NaN.
        """
        valid = True
        if self.diffusion.clip_range is not None:
            low, high = self.diffusion.clip_range
            valid = ops.logical_and(x_0 >= low - _checks.ROUNDING, x_0 <= high + _checks.ROUNDING)
        if self.condition:
            for name, values in self.condition.by_name(condition).items():
                known = ops.reshape(self.condition[name].in_range(values), (-1,) + (1,) * (len(x_0.shape) - 1))
                valid = ops.logical_and(valid, known)
        return x_0 if valid is True else ops.where(valid, x_0, np.nan)


def _x_0_and_noise(x: Any) -> tuple:
    """The x_0 and the noise of a batch `{"x_0": x_0, "noise": noise}`, or x_0 and `None`."""
    if not isinstance(x, dict):
        return x, None
    valid = set(x) == {"x_0", "noise"}
    _checks.require(valid, "A batch must be x_0, `(x_0, condition)`, or a dict of 'x_0' and 'noise'", entries=sorted(x))
    return x["x_0"], x["noise"]


def _checked_weight(loss_weight: Any, timesteps: int) -> np.ndarray | None:
    """The weights as a float64 array `(T + 1,)`; `None` stays `None`."""
    if loss_weight is None:
        return None
    needed = f"`loss_weight` must be an array of {timesteps + 1} numbers, for t = 0..{timesteps}"
    _checks.require(np.shape(loss_weight) == (timesteps + 1,), needed, loss_weight=loss_weight)
    weight = np.asarray(loss_weight, "float64")
    wrong = np.flatnonzero(~((weight[1:] > 0) & np.isfinite(weight[1:]))) + 1
    message = f"`loss_weight` must be positive at t = 1..{timesteps}, or the network is never trained there"
    _checks.require(not wrong.size, message, **{f"loss_weight[{t}]": float(weight[t]) for t in wrong[-1:]})
    return weight
