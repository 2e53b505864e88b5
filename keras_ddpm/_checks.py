"""Checks of arguments."""

import math
import numbers
import random
import textwrap
import unicodedata
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

ROUNDING = 1e-3  # by which data may lie outside the range


def require(condition: Any, message: str, **received: Any) -> None:
    """Raises ValueError unless the condition holds: the message, a sentence without a period, and what was received."""
    if not condition:
        values = ", ".join(f"{name}={_short(value)}" for name, value in received.items())
        raise ValueError(f"{message}. Received: {values}" if received else f"{message}.")


def _short(value: Any, most: int = 100) -> str:
    """The representation of a value in one line of at most `most` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def reason(error: Exception) -> str:
    """What an error of another package says, in one line. Keras puts configurations before it, and lists after it."""
    text = str(error).rpartition("Exception encountered: ")[2].partition("\n\nList of objects")[0]
    return textwrap.shorten(text, 250, placeholder="...") or type(error).__name__


def text(name: Any) -> str:
    """A name as one line of text in Unicode's normal form C, in which equal names are equal. Bytes are UTF-8."""
    return " ".join(unicodedata.normalize("NFC", name.decode() if isinstance(name, bytes) else str(name)).split())


def names(values: Any, num: int | None = None) -> tuple[str, ...]:
    """The names of classes, as `text` gives them.

    Raises:
        ValueError: if they are not `num` different texts, or one is empty or holds control characters for a terminal.
    """
    listed = [] if isinstance(values, str) else values  # a name is not a list of letters
    found = tuple(text(value) for value in listed if isinstance(value, (str, bytes)))
    valid = len({*found}) == len(values) == (len(values) if num is None else num) and all(found)
    valid = valid and not any(unicodedata.category(character) == "Cc" for character in "".join(found))
    number = "" if num is None else f"{num} "
    require(valid, f"`class_names` must be {number}different names without control characters", class_names=values)
    return found


def counts(low: int = 1, high: float = np.inf, optional: bool = False, **values: Any) -> None:
    """Raises ValueError unless every value is an integer in low..high, or `None` if they are optional."""
    wanted = f"of at least {low}" if high == np.inf else f"in {low}..{high}"
    for name, value in values.items():
        valid = is_count(value, low, high) or (optional and value is None)
        require(valid, f"`{name}` must be an integer {wanted}", **{name: value})


def is_count(value: Any, low: int = 1, high: float = np.inf) -> bool:
    """Whether `value` is an integer, of Python or NumPy, in low..high."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(low <= value <= high)


def are_counts(values: Any) -> bool:
    """Whether `values` are a list or another collection of integers of at least 1."""
    return isinstance(values, Collection) and all(map(is_count, values))


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a finite number, of Python or NumPy, and in [low, high]."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and bool(low <= value <= high)


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return is_between(value, 0, np.inf) and value > 0


def share(**values: Any) -> None:
    """Raises ValueError unless every value is a number in [0, 1)."""
    for name, value in values.items():
        require(is_between(value, 0, 1) and value < 1, f"`{name}` must be in [0, 1)", **{name: value})


def seed(value: int | None) -> int:
    """Returns `value`, or a seed drawn from Python's `random` if it is `None`.

    Raises:
        ValueError: if `value` is not an integer of 32 bits.
    """
    if value is None:
        return random.randrange(2**31)
    require(is_count(value, 0, 2**32 - 1), "`seed` must be an integer in 0..2³² − 1", seed=value)
    return int(value)


def array(x: Any, name: str) -> np.ndarray:
    """Returns `x` as a float32 array.

    Raises:
        ValueError: if `x` is not an array of numbers, such as a list of images of several sizes.
    """
    try:
        return np.asarray(x, "float32")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers. {error}") from error


def data(x: Any, shape: Sequence[int], clip_range: Sequence[float] | None = None, name: str = "data") -> np.ndarray:
    """Returns `x` as a float32 array `(batch, *shape)`.

    Raises:
        ValueError: if `x` has another shape, is empty or not finite, or is outside `clip_range` by more than rounding.
    """
    x = array(x, name)
    expected = f"{('batch', *shape)}" + (", channels last" if len(shape) == 3 else "")
    require(x.shape[1:] == tuple(shape) and len(x), f"Expected `{name}` of shape {expected}. Received: {x.shape}")
    values = [float(x.min()), float(x.max())]
    require(np.all(np.isfinite(values)), f"`{name}` contains NaN or infinite values. Received: values in {values}")
    if clip_range is not None:
        if tuple(clip_range) == (-1, 1) and len(shape) == 3:
            images(x)
        message = f"Expected `{name}` in {list(clip_range)}, the `clip_range`. Received: values in {values}"
        require(clip_range[0] - ROUNDING <= values[0] and values[1] <= clip_range[1] + ROUNDING, message)
    return x


def images(x: Any) -> np.ndarray:
    """Returns one or several images in [-1, 1] as a float32 array. Warns if several images lie in [0, 1].

    Raises:
        ValueError: if `x` holds integers, NaN or infinite values, or values in 0..255.
    """
    x = np.asarray(x)
    require(x.dtype.kind not in "biu", "Expected floats in [-1, 1]: see `images.from_uint8`", dtype=x.dtype)
    x = array(x, "images")
    require(np.all(np.isfinite(x)), "The images hold NaN or infinite values")
    in_8_bits = x.size and x.min() >= 0 and x.max() > 16
    require(not in_8_bits, "The images lie in 0..255. Expected [-1, 1]: see `images.from_uint8`, or x / 127.5 - 1")
    if x.ndim > 3 and len(x) > 1 and 0 <= x.min() < x.max() <= 1:  # a single image may be as bright
        warnings.warn("The images lie in [0, 1]. Expected [-1, 1]: scale them with 2 * x - 1", stacklevel=4)
    return x
