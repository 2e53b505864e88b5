"""Rows: what samplers are made of, and how one row is applied.

A sampler sees the network only as x_0 = denoise(x, t). After each network call it makes one linear update,

    x ← from_x x + from_x_0 x_0 + Σ_k from_previous[k] previous[k] + std noise

Multistep methods use earlier predictions: previous[0] comes from the call before this one, previous[1] from the call
before that, and so on. An entry is 0 if there was no such call. Each call is remembered as

    remember_x_0 x_0 + remember_x x

with the x before the update. By default this is x_0. A method that uses earlier noise remembers (x − alpha_t x_0) /
sigma_t.

A sampler is thus a table with one row for each network call and the named columns of `ROW`. NumPy computes it in
float64 from a `schedules.Schedule`. `step` applies one row. One compiled loop runs every sampler (`sampling.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm.schedules import Schedule

Array = np.ndarray
Columns = dict[str, Any]  # from names of `ROW` to numbers or arrays

# How many earlier predictions of x_0 a row can use. A multistep solver of fourth order needs three.
NUM_PREVIOUS = 3

# The network is called at the integer time t. With keep = 1 `previous` stays as it is, and gains this call with 0.
ROW = np.dtype(
    {
        "names": ["t", "from_x", "from_x_0", "from_previous", "std", "remember_x_0", "remember_x", "keep"],
        "formats": ["f8", "f8", "f8", f"{NUM_PREVIOUS}f8", "f8", "f8", "f8", "f8"],
    }
)

SPACINGS: dict[str, Callable] = {
    # Functions of sigma / alpha. The visited times are evenly spaced in the function's value.
    "logsnr": np.log,
    "karras": lambda ratio: ratio ** (1 / 7),  # Karras et al., 2022, Eq. 5 with ρ = 7
}


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


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Base class of samplers, which are immutable and compare by value.

    Args:
        num_steps: number of steps, at most T; `None` for all T.
        spacing: how the visited times are spaced from T down to 0: "uniform" in t, "logsnr" (uniform in the log-SNR)
            or "karras" (uniform in (sigma/alpha)^(1/7)). With "logsnr" and "karras" the last step starts at t = 1.
            Times are rounded to integers. If two of them coincide, one moves to the next free time. A tuple holds the
            times at which the steps start, from T down, such as `samplers.optimized` finds.

    `keras.saving.serialize_keras_object` turns a sampler into JSON, as models do that carry one.

    Raises:
        ValueError: if `num_steps` or `spacing` is invalid.
    """

    num_steps: int | None = None
    spacing: str | tuple[int, ...] = dataclasses.field(default="uniform", kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        keras.saving.register_keras_serializable(cls.__module__.partition(".")[0])(cls)

    def __post_init__(self) -> None:
        _checks.counts(optional=True, num_steps=self.num_steps)
        known, times = ["uniform", *SPACINGS], self.spacing
        if isinstance(times, (list, tuple)):  # JSON has lists
            valid = all(map(_checks.is_count, times)) and len(times) == self.num_steps
            valid = valid and all(t > s for t, s in itertools.pairwise(times))
            object.__setattr__(self, "spacing", tuple(map(int, times)) if valid else times)
        else:
            valid = times in known
        _checks.require(valid, f"`spacing` must be one of {known}, or `num_steps` falling times", spacing=times)

    def get_config(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: dict) -> "Sampler":
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})

    @property
    def evaluations(self) -> int | None:
        """Number of network calls in a run; `None` if it depends on T.

        `Heun` and `Langevin` make fewer calls if the schedule has no signal at T.
        """
        return self.num_steps

    def shortened(self, share: float, timesteps: int) -> "Sampler":
        """The same sampler with this share of its steps, at least one. `None` steps count as `timesteps`."""
        if isinstance(self.spacing, tuple):
            end = max(1, round(share * timesteps))
            times = (end, *(t for t in self.spacing if t < end))
            return dataclasses.replace(self, num_steps=len(times), spacing=times)
        return dataclasses.replace(self, num_steps=max(1, round(share * (self.num_steps or timesteps))))

    def timesteps(self, schedule: Schedule) -> Array:
        """The visited times, `(num_steps + 1,)` integers from T down to 0.

        Raises:
            ValueError: if the schedule has fewer steps than the sampler.
        """
        end = schedule.timesteps
        num_steps = self.num_steps or end
        _checks.require(num_steps <= end, f"The schedule has only {end} steps", num_steps=num_steps)
        if isinstance(self.spacing, tuple):
            _checks.require(self.spacing[0] == end, f"The first time of `spacing` must be {end}", spacing=self.spacing)
            return np.array([*self.spacing, 0])
        if self.spacing == "uniform" or num_steps == 1:
            return np.linspace(end, 0, num_steps + 1).round().astype("int64")
        # If there is no signal at T, its log-SNR is not finite. Then the times below T are spaced.
        highest = end if schedule.alpha[-1] > 0 else end - 1
        times = np.arange(1, highest + 1)
        num = num_steps - (end - highest)
        position = SPACINGS[self.spacing](schedule.sigma[times] / schedule.alpha[times])
        nodes = np.interp(np.linspace(position[0], position[-1], num), position, times).round()
        order = np.arange(num)
        nodes = np.maximum.accumulate(nodes - order) + order  # moves equal times upwards
        nodes = np.minimum(nodes, highest - order[::-1])
        return np.concatenate([[end][: end - highest], nodes[::-1], [0]]).astype("int64")

    def table(self, schedule: Schedule) -> Array:
        """All rows, an array `(network calls,)` of dtype `ROW`."""
        return np.concatenate(self.steps(schedule))

    def steps(self, schedule: Schedule) -> list[Array]:
        """The rows of each step, one array for each pair of successive `timesteps`."""
        times = self.timesteps(schedule)
        t, s = times[:-1], times[1:]
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = row(t, **self.coefficients(alpha_t, sigma_t, alpha_s, sigma_s))
        rows["std"][-1] = 0.0  # the last step ends at clean data
        if alpha_t[0] == 0:
            # If x_T has no signal, its log-SNR is not finite. So every sampler starts with a step of DDIM.
            ddim = {"from_x": sigma_s[0] / sigma_t[0], "from_x_0": alpha_s[0], "from_previous": 0.0, "std": 0.0}
            for name, value in ddim.items():
                rows[name][0] = value
        return np.split(rows, len(rows))

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        """The columns of `ROW`, by name, for steps from t to s.

        `steps` sets the noise of the last step to 0. If alpha_T = 0, it also replaces the first step by a step of DDIM.

        Args:
            alpha_t: scale of the signal at the start of each step, float64 `(steps,)`.
            sigma_t: scale of the noise at the start of each step.
            alpha_s: scale of the signal at the end of each step; 1 at the end of the last step.
            sigma_s: scale of the noise at the end of each step; 0 at the end of the last step.
        """
        raise NotImplementedError("A sampler needs `coefficients` or `steps`.")
