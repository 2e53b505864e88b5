"""Guidance: extrapolates from a worse prediction to a better one, and beyond.

In classifier-free guidance, a network trained with and without its condition c has two outputs. The scale w makes it
follow its condition more strongly:

    y = (1 − w) y(x_t, t, no condition) + w y(x_t, t, c)

w = 0 and w = 1 give one of the two outputs and need one network call. This w is 1 + w of Ho and Salimans, 2022.

In autoguidance, the worse prediction is that of another model, smaller or less trained, with the same condition.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.conditions import GIVEN, Condition

__all__ = ["Condition", "Guidance", "Plan", "guided", "in_one_call", "unguided", "without_condition"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the calls of a network are guided.

    Attributes:
        inputs: the network's inputs after x and t, arrays `(num, ...)`.
        kind: "none"; "all" or "some" for two predictions in all or in some calls; "one call" if the network is told the
            scale.
        columns: arrays `(calls,)`: the scale and the rescaling for `guided`, or 1 / scale for `in_one_call`.
        nulls: for `without_condition`, the null value of each input, or `None` to keep it.
    """

    inputs: tuple
    kind: str = "none"
    columns: tuple = ()
    nulls: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """The rare options of guidance, for `DiffusionModel.sample(..., guidance_scale=2.0, guidance=Guidance(...))`.

    Args:
        rescale: φ in [0, 1], how far the standard deviation of the guided output is moved to the standard deviation of
            the conditional output. [Lin et al., 2024, Eq. 15-16]
        interval: `(low, high)`, or `None` for guidance at every t. Outside low <= t <= high, the scale is 1.
            [Kynkäänniemi et al., 2024]
        dynamic_threshold: p of dynamic thresholding, in (0, 1), as in `GaussianDiffusion.predict_x0`; `None` for
            static clipping.
        guide: a `DiffusionModel` of the same data and process, such as an early checkpoint. Its averaged network
            replaces the unconditional prediction. The guide may be unconditional. [Karras et al., 2024]
        drop: names of the parts of the condition that the worse prediction lacks, such as `("label", "image")`; `None`
            for the first one that is given. Guidance by images needs a model with an `image_dropout`.

    Raises:
        ValueError: if a value is out of range.

    Reference: Ho and Salimans, 2022, Eq. 6; Karras et al., 2024 ("Guiding a diffusion model with a bad version of
        itself"), Eq. 4.
    """

    rescale: float = 0.0
    interval: tuple | None = None
    dynamic_threshold: float | None = None
    guide: Any = None
    drop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        valid = _checks.is_between(self.rescale, 0, 1)
        _checks.require(valid, "`rescale` must be in [0, 1]", rescale=self.rescale)
        ends, p = self.interval, self.dynamic_threshold
        valid = ends is None or (isinstance(ends, (tuple, list)) and len(ends) == 2)
        valid = valid and (ends is None or _checks.is_between(ends[0], -np.inf, ends[1]))
        _checks.require(valid, "`interval` must be (low, high)", interval=ends)
        valid = p is None or _checks.is_positive(p) and p < 1
        _checks.require(valid, "`dynamic_threshold` must be in (0, 1)", dynamic_threshold=p)
        valid = self.drop is None or (isinstance(self.drop, (tuple, list)) and {*self.drop} <= {*GIVEN})
        _checks.require(valid, f"`drop` must be a tuple of names among {[*GIVEN]}", drop=self.drop)

    def scales(self, guidance_scale: float, t: np.ndarray) -> np.ndarray:
        """The guidance scale at times t: `guidance_scale` within the interval, and 1 outside.

        Raises:
            ValueError: if the scale is not in [0, 1000].
        """
        valid = _checks.is_between(guidance_scale, 0, 1000)  # far more than is useful; float32 ends at 3e38
        _checks.require(valid, "`guidance_scale` must be in [0, 1000]", guidance_scale=guidance_scale)
        low, high = self.interval or (-np.inf, np.inf)
        return np.where((low <= t) & (t <= high), guidance_scale, 1.0)

    def plan(
        self,
        condition: Condition | None,
        given: Collection[str],
        inputs: tuple,
        guidance_scale: float,
        t: np.ndarray,
        largest: float = 1.0,
    ) -> Plan:
        """Plans the calls of a network.

        Args:
            condition: the `Condition` of the network, or `None`.
            given: names of the parts that samples are given.
            inputs: the network's inputs after x and t.
            guidance_scale: as in `DiffusionModel.sample`.
            t: the time of each network call, `(calls,)`.
            largest: the largest scale that a network with the input `scale` was trained with.

        Raises:
            ValueError: if guidance is asked for without a condition and without a guide, or the scale is invalid.
        """
        scale = self.scales(guidance_scale, t)
        dropped = tuple(given)[:1] if self.drop is None else tuple(self.drop)
        valid = guidance_scale == 1 or self.guide is not None or (dropped and {*dropped} <= {*given})
        _checks.require(valid, "Guidance needs labels or a `guide`", guidance_scale=guidance_scale, given=[*given])
        if np.all(scale == 1):
            return Plan(inputs)
        kind, columns = "some" if np.any(scale == 1) else "all", (scale, np.full(len(t), self.rescale))
        if self.guide is not None:
            return Plan(inputs, kind, columns)
        nulls = condition.nulls(dropped) if condition else ()
        if not self.rescale and np.all(scale == 0):
            return Plan(tuple(c if null is None else np.full_like(c, null) for c, null in zip(inputs, nulls)))
        learned = condition and "scale" in condition and dropped == condition.given[:1]
        if learned and not self.rescale and np.all((1 <= scale) & (scale <= largest)):
            return Plan(inputs, "one call", (1 / scale,))
        return Plan(inputs, kind, columns, nulls)


def without_condition(predict: Callable, nulls: Sequence) -> Callable:
    """Returns a function from x, t and the conditions to two outputs: without some conditions, and with all.

    It makes one call of `predict`.

    Args:
        predict: function from x, t and the conditions to the network's output.
        nulls: the null value of each condition, or `None` to keep the condition.
    """

    def predict_both(x: Any, t: Any, *conditions: Any) -> tuple:
        without = [c if null is None else ops.full_like(c, null) for c, null in zip(conditions, nulls)]
        pairs = [(x, x), (t, t), *zip(without, conditions)]
        return tuple(ops.split(predict(*map(ops.concatenate, pairs)), 2))

    return predict_both


def in_one_call(predict: Callable, place: int) -> Callable:
    """Returns a function that predicts with guidance in one call of a network that is told 1 / scale.

    Args:
        predict: function from x, t and the conditions to the network's output.
        place: which of the conditions is the scale.
    """

    def predict_in_one_call(x: Any, t: Any, *conditions: Any) -> Any:
        *values, scale = conditions
        values[place] = ops.broadcast_to(scale, ops.shape(t))
        return predict(x, t, *values)

    return predict_in_one_call


def unguided(y: Any, predict: Callable, inputs: Sequence, nulls: Sequence, place: int) -> Any:
    """The output with the condition as it was learned, from a guided one: β y + (1 − β) y(x_t, t, no condition).

    This is the guidance formula, solved for the output with the condition, with β = 1 / w. A network whose y is guided
    learns by it with any loss. No gradient flows through the second call.

    Args:
        y: the network's outputs, `(batch, ...)`.
        predict: function from the network's inputs to its output.
        inputs: x, t and the conditions, of which one is β, `(batch,)`.
        nulls: the null value of each condition, or `None` to keep it. That of β is 1.
        place: which of the conditions is β.

    Reference: Chen et al., 2025 ("Visual generation without guidance").
    """
    x, t, *conditions = inputs
    without = [c if null is None else ops.full_like(c, null) for c, null in zip(conditions, nulls)]
    beta = ops.reshape(conditions[place], (-1,) + (1,) * (len(y.shape) - 1))
    return beta * y + (1 - beta) * ops.stop_gradient(predict(x, t, *without))


def guided(predict: Callable, predict_both: Callable, sometimes: bool) -> Callable:
    """Returns a function that predicts with guidance.

    Args:
        predict: function from x, t and the conditions to the network's output.
        predict_both: function from the same arguments to a worse output and the output of `predict`.
        sometimes: whether the scale may be 1. In such calls only `predict` is called.

    Returns:
        Function from x `(batch, ...)`, t `(batch,)`, the conditions, the scale and the rescaling (scalar tensors) to
        the guided output.
    """

    def predict_guided(*arguments: Any) -> Any:
        *inputs, scale, rescale = arguments
        worse, better = predict_both(*inputs)
        y = (1 - scale) * worse + scale * better
        axes = tuple(range(1, len(y.shape)))
        std, std_better = (ops.std(v, axis=axes, keepdims=True) for v in (y, better))
        ratio = ops.where(std > 0, std_better / ops.where(std > 0, std, 1.0), 1.0)
        return y * (1 - rescale + rescale * ratio)

    def predict_some(*arguments: Any) -> Any:
        *inputs, scale, _ = arguments
        return ops.cond(scale != 1, lambda: predict_guided(*arguments), lambda: predict(*inputs))

    return predict_some if sometimes else predict_guided
