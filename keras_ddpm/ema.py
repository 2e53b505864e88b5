"""The exponential moving average (EMA) of a network's weights."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

__all__ = ["Average"]

HALF = {"bfloat16": "float32", "float16": "float32"}  # what replaces dtypes of half precision


class Average:
    """A moving average of the network's weights.

    The n-th update of the optimizer (n = 0, 1, ...) has the decay min(max_decay, 1 − (1 + n)^(−3/4)). The first update
    thus copies the weights, so the average does not contain the random initial weights. Averages
    of weights in half precision are float32, as their changes are too small for half precision.

    Args:
        network: a built `keras.Model`.
        max_decay: the largest decay, in [0, 1).
        add_weight: the method `add_weight` of a Keras layer. The layer owns the variables of the average.

    Attributes:
        weights: list of variables, in the order of `network.weights`.

    Reference: diffusers' `EMAModel` has the same warm-up, with power 3/4.
    """

    def __init__(self, network: keras.Model, max_decay: float, add_weight: Callable):
        self.network = network
        self.max_decay = max_decay
        self.weights = []
        for index, v in enumerate(network.weights):
            dtype = HALF.get(v.dtype, v.dtype)
            self.weights.append(add_weight(shape=v.shape, dtype=dtype, trainable=False, name=f"ema_{index}"))
            self.weights[-1].assign(ops.copy(v))

    def update(self, before: Any, after: Any, loss: Any = 0.0) -> None:
        """average ← average + (1 − decay) (weight − average), if the optimizer made an update and the loss is finite.

        Integers are copied.

        Args:
            before: the optimizer's number of updates before the training step, a scalar tensor.
            after: its number of updates after the training step. With gradient accumulation, most steps make none.
            loss: the loss of the training step, a scalar tensor.
        """
        decay = ops.minimum(self.max_decay, 1.0 - (1.0 + ops.cast(before, "float32")) ** -0.75)
        # With the decay 1 nothing moves, even if a variable is NaN.
        decay = ops.where(ops.logical_and(after > before, ops.isfinite(loss)), decay, 1.0)
        for average, v in zip(self.weights, self.network.weights):
            if keras.backend.is_float_dtype(v.dtype):
                v, share = ops.cast(v, average.dtype), ops.cast(decay, average.dtype)
                average.assign(ops.where(decay < 1, v + share * (average - v), average.value))
            else:
                average.assign(v)

    def predict(self, *inputs: Any, add_loss: Callable | None = None) -> Any:
        """The network's output with the averaged weights. `add_loss` gets the losses that layers add."""
        # An inner scope hides the values of an outer one. So this scope gets the values of all variables.
        values = [(v, v.value) for v in self.network.variables]
        values += [(v, ops.cast(average, v.dtype)) for v, average in zip(self.network.weights, self.weights)]
        with keras.StatelessScope(values, collect_losses=add_loss is not None) as scope:
            y = self.network(list(inputs), training=False)
        if add_loss is not None:
            add_loss([1.0 * loss for loss in scope.losses])  # new tensors, or Keras would count them twice
        return y
