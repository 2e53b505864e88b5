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


def check_data(x, shape, clip_range=None, name="data"):
    """Raises ValueError unless `x` is a finite array `(batch, *shape)` in the range, but for rounding."""
    if x.shape[1:] != tuple(shape) or not len(x):
        raise ValueError(f"Expected `{name}` of shape {('batch', *shape)}, as the network's. Received: {x.shape}")
    low, high = x.min(), x.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"`{name}` hold NaN or infinite values. Received: values in [{low}, {high}]")
    if clip_range is not None and (low < clip_range[0] - 1e-3 or high > clip_range[1] + 1e-3):
        raise ValueError(
            f"Expected `{name}` in {list(clip_range)}, the `clip_range` of the diffusion; scale images with "
            f"x / 127.5 - 1. Received: values in [{low}, {high}]"
        )
