"""Checks of arguments."""

import numbers

import numpy as np


def is_count(value, low=1):
    """Whether it is an integer of Python or NumPy, at least `low`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= low


def is_between(value, low, high):
    """Whether it is a finite number in [low, high], of Python or NumPy."""
    return (
        isinstance(value, numbers.Real) and not isinstance(value, bool) and np.isfinite(value) and low <= value <= high
    )


def is_positive(value):
    """Whether it is a finite number above 0."""
    return is_between(value, 0, np.inf) and value > 0


def array(x, name):
    """`x` as a float32 array; ValueError for what is none, such as a list of images of several sizes."""
    try:
        return np.asarray(x, "float32")
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers. {error}") from error


def data(x, shape, clip_range=None, name="data"):
    """`x` as a float32 array; ValueError unless it is finite, `(batch, *shape)` and, up to rounding, in the range."""
    x = array(x, name)
    if x.shape[1:] != tuple(shape) or not len(x):
        raise ValueError(f"Expected `{name}` of shape {('batch', *shape)}, as the network's input. Received: {x.shape}")
    low, high = x.min(), x.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"`{name}` hold NaN or infinite values. Received: values in [{low}, {high}]")
    if clip_range is not None and (low < clip_range[0] - 1e-3 or high > clip_range[1] + 1e-3):
        hint = "; scale images with x / 127.5 - 1" if tuple(clip_range) == (-1, 1) else ""
        raise ValueError(
            f"Expected `{name}` in {list(clip_range)}, the `clip_range` of the diffusion{hint}. "
            f"Received: values in [{low}, {high}]"
        )
    return x
