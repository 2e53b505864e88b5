"""Conditions: what a network is told besides x_t and t, which is a label or a vector, an image, or both."""

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks

__all__ = ["Condition", "Part", "seen"]

GIVEN, DRAWN = ("label", "context", "image"), ("image_noise", "scale")  # what data hold, and what is drawn


@dataclasses.dataclass(frozen=True)
class Part:
    """One input of a network besides x_t and t.

    Attributes:
        name: "label", "context" (a vector or an array), "image", "image_noise" or "scale" (of guidance, as 1 / w).
        shape: shape of the input of one example, `()` for a label.
        null: the value for no condition: the label K, 0 for the entries of vectors and images, 1 for the noise of an
            image, as no image is left then, and 1 for the scale.
    """

    name: str
    shape: tuple
    null: int = 0

    @property
    def dtype(self) -> str:
        return "int32" if self.name == "label" else "float32"

    def drop(self, value: Any, kept: Any) -> Any:
        """Replaces values `(batch, ...)` by the null value if their entry of `kept`, `(batch,)`, is false."""
        value = ops.cast(value, self.dtype)
        kept = ops.reshape(kept, (-1,) + (1,) * len(self.shape))
        return ops.where(kept, value, ops.full_like(value, self.null))

    def in_range(self, value: Any) -> Any:
        """Which examples `(batch,)` are in range: labels in 0..K − 1, pixels in [-1, 1], and finite vectors."""
        if self.name == "label":
            value = ops.cast(value, "int32")  # some integers are too short for the number of classes
            return ops.logical_and(value >= 0, value < self.null)
        value = ops.cast(value, "float32")
        largest = 1 + _checks.ROUNDING if self.name == "image" else np.finfo("float32").max
        return ops.all(ops.abs(value) <= largest, axis=tuple(range(1, len(value.shape))))


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a network is conditioned on: a label or a vector, an image, or both.

    Data and samples give it as a dict by the names of the parts. An array is the first part.

    Attributes:
        parts: the `Part`s, in the order of the network's inputs.
        class_names: a tuple of the name of each label, if they have names.
    """

    parts: tuple[Part, ...]
    class_names: Any = None

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", _checks.names(self.class_names, self.num_classes))

    @classmethod
    def of(cls, network: keras.Model, class_names: Sequence[str] | None = None) -> "Condition | None":
        """The condition of a functional model of `[x_t, t, *conditions]`, or `None` for a model of `[x_t, t]`.

        The inputs have the names of parts. A single condition may have any name: integers are labels.

        Raises:
            ValueError: if an input has another name, there are labels and no layer has the name "label_embedding", or
                `class_names` are not K different names.
        """
        parts: list[Part] = []
        inputs = network.inputs[2:]
        for tensor in inputs:
            name, shape = tensor.name, tuple(tensor.shape[1:])
            if len(inputs) == 1 and name != "image":
                name = "label" if "int" in tensor.dtype else "context"
            valid = name in {*GIVEN, *DRAWN} - {part.name for part in parts}
            needed = f"Inputs of the network besides x_t and t are named {', '.join([*GIVEN, *DRAWN])}"
            _checks.require(valid, needed, names=[tensor.name for tensor in inputs])
            null = int(name in DRAWN)
            if name == "label":
                embeddings = [layer for layer in network.layers if layer.name == "label_embedding"]
                _checks.require(embeddings, "A network of labels needs a layer 'label_embedding' with K + 1 entries")
                null = embeddings[0].input_dim - 1
            parts.append(Part(name, shape, null))
        labeled = class_names is None or any(part.name == "label" for part in parts)
        _checks.require(labeled, "The network has no labels to name", class_names=class_names)
        return cls(tuple(parts), class_names) if parts else None

    def named(self, class_names: Sequence[str] | None) -> "Condition":
        """This condition, which takes the names that data have if it has none. Warns if it has others."""
        if not class_names or not self.num_classes or self.class_names == tuple(map(_checks.text, class_names)):
            return self
        if not self.class_names and len(class_names) == self.num_classes:
            return dataclasses.replace(self, class_names=class_names)
        known = f"The data name {len(class_names)} classes, and the model's {self.num_classes} labels stay as they are"
        hint = "check that they mean the same, or make a model of these classes with `DiffusionModel.from_model`"
        warnings.warn(f"{known}: {hint}", stacklevel=3)
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, in the order of the network's inputs."""
        return tuple(part.name for part in self.parts)

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the parts that data hold. The others are drawn in training."""
        return tuple(name for name in self.names if name in GIVEN)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Part:
        """The part of this name."""
        return self.parts[self.names.index(name)]

    def nulls(self, dropped: Collection[str]) -> tuple:
        """The null values of the parts with these names, and `None` for others. An image goes with its noise."""
        names = {*dropped, *(["image_noise"] if "image" in dropped else [])}
        return tuple(part.null if part.name in names else None for part in self.parts)

    @property
    def num_classes(self) -> int | None:
        """The number K of labels, which is also the null label; `None` without labels."""
        return self["label"].null if "label" in self else None

    def by_name(self, values: Any, images: Any = None, complete: bool = True) -> dict:
        """Conditions as a dict by name.

        Args:
            values: a dict by name, or an array, which is the first part; `None` for nothing.
            images: the part "image", if it is not in `values`.
            complete: whether all parts must be there, as in data.

        Raises:
            ValueError: if there is a part that the network does not take, or one is missing.
        """
        found = values if isinstance(values, dict) else {self.given[0]: values}
        found = {name: value for name, value in found.items() if value is not None}
        _checks.require(images is None or "image" not in found, "Condition images are given twice")
        found = found if images is None else found | {"image": images}
        fits = {*found} == {*self.given} if complete else {*found} <= {*self.given}
        _checks.require(fits, f"The network has the conditions {[*self.given]}", received=[*found])
        return {name: found[name] for name in self.given if name in found}

    def encoded(self, values: Any, num: int, name: str | None = None) -> np.ndarray:
        """One part of the condition of `num` examples.

        Args:
            values: one label, class name, vector or image for all examples, or one for each; `None` for no condition.
            num: number of examples.
            name: name of the part; `None` for the first.

        Returns:
            An array `(num, ...)`: int32 labels, or float32 vectors or images. Small images stay small.

        Raises:
            ValueError: if values have a wrong shape, are out of range or are unknown names.
        """
        part = self[name or self.given[0]]
        shape = (num, *part.shape)
        if values is None:
            return np.full(shape, part.null, part.dtype)
        values = _checks.array(values, part.name, None)
        if values.dtype.kind in "OT":  # objects, and NumPy's text of any length
            values = np.array(values.tolist())
        if part.name == "label" and self.class_names and values.dtype.kind in "US":
            numbers = {name: number for number, name in enumerate(self.class_names)}
            names = [_checks.text(name) for name in values.ravel().tolist()]
            for name in {*names} - {*numbers}:
                similar = difflib.get_close_matches(name, numbers, cutoff=0.4) or self.class_names[:3]
                raise ValueError(f"There is no class {name!r}. Similar names: {', '.join(similar)}.")
            values = np.reshape([numbers[name] for name in names], values.shape)
        if part.name == "image":
            return self._images(values, shape)
        if part.name == "label":
            needed = f"Labels must be integers in 0..{part.null - 1}"
            valid: Any = np.issubdtype(values.dtype, np.integer) and np.all((values >= 0) & (values < part.null))
        else:
            needed, valid = "Expected finite conditions", np.all(np.isfinite(values))
        valid, received = valid and values.shape in (shape, part.shape), values.tolist()
        _checks.require(valid, f"{needed}, of shape {shape} or {part.shape}", shape=values.shape, values=received)
        return np.broadcast_to(values, shape).astype(part.dtype)

    @staticmethod
    def _images(values, shape):
        fits = values.ndim in (3, 4) and values.shape[:-3] in ((), shape[:1]) and values.shape[-1] == shape[-1]
        fits = fits and all(0 < side <= most for side, most in zip(values.shape[-3:-1], shape[1:]))
        _checks.require(fits, f"Expected condition images of shape {shape}, or smaller", shape=values.shape)
        largest = float(np.max(np.abs(values))) if values.dtype.kind == "f" else np.inf
        needed = "Condition images must be floats in [-1, 1]: see `images.from_uint8`"
        _checks.require(largest <= 1 + _checks.ROUNDING, needed, dtype=str(values.dtype), largest=largest)
        return np.broadcast_to(values, (*shape[:1], *values.shape[-3:])).astype("float32")

    def network_inputs(self, values: Any, num: int, image_noise: float = 0.0, noise: Callable | None = None) -> tuple:
        """The inputs of the network besides x_t and t, for `num` examples.

        Args:
            values: a dict by name, or an array, which is the first part. A missing part gets its null value.
            num: number of examples.
            image_noise: the noise that images get, in [0, 1), as in `seen`.
            noise: function from the shape of one image to standard Gaussian noise for all.

        Returns:
            A tuple of arrays `(num, ...)`.

        Raises:
            ValueError: as `encoded`, or if there is noise for a network that is not told of it.
        """
        found = self.by_name(values, complete=False)
        _checks.share(image_noise=image_noise)
        told = not image_noise or ("image_noise" in self and "image" in found)
        _checks.require(told, "`image_noise` is for images of a network that is told of it", image_noise=image_noise)
        arrays = {part.name: self.encoded(found.get(part.name), num, part.name) for part in self.parts}
        if "image" in found:
            image = arrays["image"]
            levels = arrays["image_noise"] = np.full(num, image_noise, "float32")
            drawn = noise(image.shape[1:]) if noise and image_noise else None
            arrays["image"] = ops.convert_to_numpy(seen(image, levels, drawn, self["image"].shape))
        return tuple(arrays[part.name] for part in self.parts)


def seen(images: Any, levels: Any, noise: Any, size: Sequence[int]) -> Any:
    """Condition images as the network sees them: cos(π/2 level) image + sin(π/2 level) noise, enlarged.

    A network that is told the level does not rely on details that noise hides. It then forgives faults of images that
    another model has made.

    Args:
        images: `(batch, height, width, channels)`.
        levels: how much noise, `(batch,)`, from 0 for none to 1 for noise alone.
        noise: standard Gaussian noise like `images`; `None` for none.
        size: `(height, width, ...)` to enlarge to, by bicubic interpolation.

    Reference: Ho et al., 2022 ("Cascaded diffusion models"), section 4.2.
    """
    if noise is not None:
        images, levels, noise = map(ops.convert_to_tensor, (images, levels, noise))
        angles = ops.reshape(levels, (-1, 1, 1, 1)) * (np.pi / 2)
        images = ops.cos(angles) * images + ops.sin(angles) * noise
    size = tuple(size[:2])
    if tuple(images.shape[1:3]) == size:
        return images
    factors = [new / old for new, old in zip(size, images.shape[1:3])]
    shape = (ops.shape(images)[0], *size, images.shape[-1])
    # On every backend, these are the same plain operations.
    return ops.image.scale_and_translate(images, shape, factors, [0.0, 0.0], (1, 2), "cubic")
