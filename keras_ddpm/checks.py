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


def is_within(low, high, clip_range):
    """Whether data from `low` to `high` lie in a `clip_range`, up to rounding; always in `None`."""
    return clip_range is None or (low >= clip_range[0] - 1e-3 and high <= clip_range[1] + 1e-3)
