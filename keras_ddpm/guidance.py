"""Guidance: extrapolates from a worse prediction to a better one, and beyond.

In classifier-free guidance, a network trained with and without its condition c has two outputs. The scale w makes it
follow its condition more strongly:

    y = (1 − w) y(x_t, t, no condition) + w y(x_t, t, c)

w = 0 and w = 1 give one of the two outputs and need one network call. This w is 1 + w of Ho and Salimans, 2022.

In autoguidance, the worse prediction is that of another model, smaller or less trained, with the same condition.
"""

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks

__all__ = ["Condition", "Guidance", "guided", "without_condition"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a network is conditioned on: labels 0..K − 1, or vectors.

    Attributes:
        shape: shape of the condition of one example, `()` for a label.
        num_classes: the number K of labels; `None` for vectors.
        class_names: the name of each label, if they have names.
    """

    shape: tuple
    num_classes: int | None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", _checks.names(self.class_names, self.num_classes))

    @classmethod
    def of(cls, network: keras.Model, class_names: Sequence[str] | None = None) -> "Condition | None":
        """The condition of a functional model of `[x_t, t, condition]`, or `None` for a model of `[x_t, t]`.

        Raises:
            ValueError: if the condition is an integer and no layer has the name "label_embedding", or `class_names` are
                not K different names.
        """
        conditions = network.inputs[2:]
        labels = [condition for condition in conditions if "int" in condition.dtype]
        _checks.require(labels or class_names is None, "The network has no labels to name", class_names=class_names)
        if not labels:
            return cls(tuple(conditions[0].shape[1:]), None) if conditions else None
        embeddings = [layer for layer in network.layers if layer.name == "label_embedding"]
        _checks.require(embeddings, "A network of labels needs a layer 'label_embedding' with K + 1 entries")
        num = embeddings[0].input_dim - 1
        return cls((), num, None if class_names is None else tuple(class_names))

    def named(self, class_names: Sequence[str] | None) -> "Condition":
        """This condition, which takes the names that data have if it has none. Warns if it has others."""
        if not class_names or not self.num_classes or self.class_names == tuple(map(_checks.text, class_names)):
            return self
        if not self.class_names and len(class_names) == self.num_classes:
            return dataclasses.replace(self, class_names=tuple(class_names))
        known = f"The data name {len(class_names)} classes, and the model's {self.num_classes} labels stay as they are"
        warnings.warn(f"{known}: check that they mean the same", stacklevel=3)
        return self

    @property
    def null_label(self) -> int:
        """The value that stands for no condition: the label K, or 0 for every entry of a vector."""
        return self.num_classes or 0

    @property
    def dtype(self) -> str:
        return "int32" if self.num_classes else "float32"

    def array(self, labels: Any, num: int) -> np.ndarray:
        """The conditions of `num` examples.

        Args:
            labels: one label, name or vector for all examples, or one for each; `None` for no condition.
            num: number of examples.

        Returns:
            int32 array `(num,)` of labels, or float32 array `(num, context_dim)`.

        Raises:
            ValueError: if the labels have a wrong shape, are out of range or are unknown names.
        """
        shape = (num, *self.shape)
        if labels is None:
            return np.full(shape, self.null_label, self.dtype)
        labels = np.asarray(labels)
        if labels.dtype.kind in "OT":  # objects, and NumPy's text of any length
            labels = np.array(labels.tolist())
        if self.class_names and labels.dtype.kind in "US":
            numbers = {name: number for number, name in enumerate(self.class_names)}
            names = [_checks.text(name) for name in labels.ravel().tolist()]
            for name in {*names} - {*numbers}:
                similar = difflib.get_close_matches(name, numbers, cutoff=0.4) or self.class_names[:3]
                raise ValueError(f"There is no class {name!r}. Similar names: {', '.join(similar)}.")
            labels = np.reshape([numbers[name] for name in names], labels.shape)
        if self.num_classes:
            valid = np.issubdtype(labels.dtype, np.integer) and np.all((labels >= 0) & (labels < self.num_classes))
            shown = None if valid else np.array2string(labels, threshold=8)
            _checks.require(valid, f"Labels must be integers in 0..{self.num_classes - 1}. Received: labels={shown}")
        valid = labels.shape in (shape, self.shape) and np.all(np.isfinite(labels))
        expected = f"Expected finite conditions of shape {shape}, or one of shape {self.shape} for all"
        _checks.require(valid, expected, shape=labels.shape)
        return np.broadcast_to(labels, shape).astype(self.dtype)

    def drop(self, condition: Any, kept: Any) -> Any:
        """Replaces conditions `(batch, ...)` by the null label if their entry of `kept`, `(batch,)`, is false."""
        condition = ops.cast(condition, self.dtype)
        kept = ops.reshape(kept, (-1,) + (1,) * len(self.shape))
        return ops.where(kept, condition, ops.full_like(condition, self.null_label))


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

    Raises:
        ValueError: if a value is out of range.

    Reference: Ho and Salimans, 2022, Eq. 6; Karras et al., 2024 ("Guiding a diffusion model with a bad version of
        itself"), Eq. 4.
    """

    rescale: float = 0.0
    interval: tuple | None = None
    dynamic_threshold: float | None = None
    guide: Any = None

    def __post_init__(self) -> None:
        valid = _checks.is_between(self.rescale, 0, 1)
        _checks.require(valid, "`rescale` must be in [0, 1]", rescale=self.rescale)
        ends, p = self.interval, self.dynamic_threshold
        valid = ends is None or (isinstance(ends, (tuple, list)) and len(ends) == 2)
        valid = valid and (ends is None or _checks.is_between(ends[0], -np.inf, ends[1]))
        _checks.require(valid, "`interval` must be (low, high)", interval=ends)
        valid = p is None or _checks.is_positive(p) and p < 1
        _checks.require(valid, "`dynamic_threshold` must be in (0, 1)", dynamic_threshold=p)

    def scales(self, guidance_scale: float, t: np.ndarray) -> np.ndarray:
        """The guidance scale at times t: `guidance_scale` within the interval, and 1 outside.

        Raises:
            ValueError: if the scale is not in [0, 1000].
        """
        valid = _checks.is_between(guidance_scale, 0, 1000)  # far more than is useful; float32 ends at 3e38
        _checks.require(valid, "`guidance_scale` must be in [0, 1000]", guidance_scale=guidance_scale)
        low, high = self.interval or (-np.inf, np.inf)
        return np.where((low <= t) & (t <= high), guidance_scale, 1.0)

    def resolve(
        self, condition: Condition | None, labels: Any, guidance_scale: float, num: int, t: np.ndarray
    ) -> tuple[tuple, tuple, str]:
        """The inputs of the network for `num` examples.

        Args:
            condition: the `Condition` of the network, or `None`.
            labels: as in `DiffusionModel.sample`.
            guidance_scale: as in `DiffusionModel.sample`.
            num: number of examples.
            t: the time of each network call, `(calls,)`.

        Returns:
            The network's inputs after x and t, arrays `(num, ...)`; the scale and the rescaling for `guided`, arrays
            `(calls,)`; and which calls are guided: "none", "some" or "all".

        Raises:
            ValueError: if the network takes no labels but gets some, if guidance is asked for without labels and
                without a guide, or if the labels or the scale are invalid.
        """
        scale = self.scales(guidance_scale, t)
        valid = labels is not None or guidance_scale == 1 or self.guide is not None
        _checks.require(valid, "Guidance needs labels or a `guide`", guidance_scale=guidance_scale, labels=labels)
        valid = labels is None or condition is not None
        _checks.require(valid, "The network takes no labels", labels=labels)
        inputs: tuple = (condition.array(labels, num),) if condition else ()
        if condition and np.all(scale == 0) and not self.rescale and self.guide is None:
            return (np.full_like(inputs[0], condition.null_label),), (), "none"
        if np.all(scale == 1):
            return inputs, (), "none"
        return inputs, (scale, np.full(len(t), self.rescale)), "some" if np.any(scale == 1) else "all"


def without_condition(predict: Callable, null_label: int) -> Callable:
    """Returns a function from x, t and the condition to two outputs: without the condition, and with it.

    It makes one call of `predict`. The value `null_label` stands for no condition.
    """

    def predict_both(x: Any, t: Any, condition: Any) -> tuple:
        both = ops.concatenate([ops.full_like(condition, null_label), condition])
        return tuple(ops.split(predict(ops.concatenate([x, x]), ops.concatenate([t, t]), both), 2))

    return predict_both


def guided(predict: Callable, predict_both: Callable, sometimes: bool) -> Callable:
    """Returns a function that predicts with guidance.

    Args:
        predict: function from x, t and the condition, if there is one, to the network's output.
        predict_both: function from the same arguments to a worse output and the output of `predict`.
        sometimes: whether the scale may be 1. In such calls only `predict` is called.

    Returns:
        Function from x `(batch, ...)`, t `(batch,)`, the condition, the scale and the rescaling (scalar tensors) to the
        guided output.
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
