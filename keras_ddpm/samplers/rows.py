"""Rows: what samplers are made of, and how one row is applied.

A sampler sees the network only as x_0 = denoise(x, t). After each network call it makes one linear update,

    x ← from_x x + from_x_0 x_0 + Σ_k from_previous[k] previous[k] + std noise

Multistep methods use earlier predictions: previous[0] comes from the call before this one, previous[1] from the call
before that, and so on. An entry is 0 if there was no such call. Each call is remembered as

    remember_x_0 x_0 + remember_x x

with the x before the update. By default this is x_0. A method that uses earlier noise remembers (x − alpha_t x_0) /
sigma_t.

A sampler is thus a table with one row for each network call and the named columns of `ROW`. NumPy computes it in
float64 from a `schedules.Schedule`. `step` applies one row. One compiled loop runs every sampler (`loop.py`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ddpm.schedules import Schedule

__all__ = ["NUM_PREVIOUS", "ROW", "add_noise_back", "row", "step"]

Array = np.ndarray

Columns = dict[str, Any]  # from names of `ROW` to numbers or arrays

# How many earlier predictions of x_0 a row can use. A multistep solver of fourth order needs three.
NUM_PREVIOUS = 3

# The network is called at the integer time t. keep = 0 stores this call in `previous`, keep = 1 leaves it unchanged.
COLUMNS = ("t", "from_x", "from_x_0", "from_previous", "std", "remember_x_0", "remember_x", "keep")
ROW = np.dtype([(name, "f8", NUM_PREVIOUS if name == "from_previous" else ()) for name in COLUMNS])


def row(t: Any, **columns: Any) -> Array:
    """Makes rows of a table. Columns that are not given are 0, but `remember_x_0` is 1.

    Args:
        t: the time of one row, or an array `(n,)` of times.
        **columns: columns of `ROW`, each a number or an array `(n,)`. `from_previous` is a sequence of at most
            `NUM_PREVIOUS` numbers or arrays, starting with the factor of the last prediction.

    Returns:
        Array of dtype `ROW` and shape `()` or `(n,)`.
    """
    rows = np.zeros(np.shape(t), ROW)
    rows["t"], rows["remember_x_0"] = t, 1.0
    for name, values in columns.items():
        if name == "from_previous":
            for k, value in enumerate(values):
                rows[name][..., k] = value
        else:
            rows[name] = values
    return rows


def step(row: Any, denoise: Callable, x: Any, noise: Any, previous: tuple) -> tuple:
    """Applies one row of a table to tensors or NumPy arrays.

    Args:
        row: a row, or a dict of tensors by the names of its columns.
        denoise: function from x and t to the predicted x_0.
        x: `(batch, ...)`.
        noise: standard Gaussian noise like x, or `None` if every std is 0.
        previous: what is remembered of the last `NUM_PREVIOUS` calls, most recent first, each like x.

    Returns:
        The new x and the new `previous`.
    """
    x_0 = denoise(x, row["t"])
    remembered = row["remember_x_0"] * x_0 + row["remember_x"] * x
    x = row["from_x"] * x + row["from_x_0"] * x_0
    for k, then in enumerate(previous):
        x = x + row["from_previous"][k] * then
    if noise is not None:
        x = x + row["std"] * noise
    return x, tuple(new + row["keep"] * (old - new) for new, old in zip((remembered, *previous), previous))


def add_noise_back(row: Array, schedule: Schedule, s: int, t: int) -> Array:
    """Extends a row of a schedule that arrives at s: the new row also adds the noise that leads back to t > s."""
    ratio = schedule.alpha[t] / schedule.alpha[s]
    back = row.copy()
    for name in ("from_x", "from_x_0", "from_previous"):
        back[name] *= ratio
    back["std"] = np.sqrt(schedule.sigma[t] ** 2 - ratio**2 * (schedule.sigma[s] ** 2 - row["std"] ** 2))
    return back
