"""Samplers: from noise to data in steps.

A sampler sees the network only as x_0 = denoise(x, t). After each network call it makes one linear update,

    x ← from_x x + from_x_0 x_0 + Σ_k from_previous[k] previous[k] + std noise

Multistep methods use earlier x_0: previous[0] comes from the call before this one, previous[1] from the call before
that, and so on. An entry is 0 if there was no such call. Earlier x are not kept, so a method that uses earlier slopes
must write them in terms of x_0.

A sampler is thus a table with one row for each network call and the named columns of `ROW`. NumPy computes it in
float64 from a `schedules.Schedule`. `step` applies one row. One compiled loop runs every sampler (`sampling.py`).

For example, DDIM from t to s keeps the noise ε = (x − alpha_t x_0) / sigma_t. Its row is

    row(t, from_x=sigma_s / sigma_t, from_x_0=alpha_s - alpha_t * sigma_s / sigma_t)

To add a sampler, subclass `Sampler` as a frozen dataclass. If each step calls the network once, override
`coefficients`. It gets the scales at both ends of all steps and returns the columns by name. Otherwise override
`steps`, which returns the rows of each step, and `evaluations`. Columns that are not given are 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ddpm import _checks
from keras_ddpm.diffusion import posterior_coefficients
from keras_ddpm.schedules import Schedule

Array = np.ndarray
Columns = dict[str, Any]  # from names of `ROW` to numbers or arrays

# How many earlier predictions of x_0 a row can use. A multistep solver of fourth order needs three.
NUM_PREVIOUS = 3

# The network is called at the integer time t. With keep = 1 `previous` stays as it is, with keep = 0 it gains this x_0.
ROW = np.dtype(
    {
        "names": ["t", "from_x", "from_x_0", "from_previous", "std", "keep"],
        "formats": ["f8", "f8", "f8", f"{NUM_PREVIOUS}f8", "f8", "f8"],
    }
)

SPACINGS: dict[str, Callable] = {
    # Functions of sigma / alpha. The visited times are evenly spaced in the function's value.
    "logsnr": np.log,
    "karras": lambda ratio: ratio ** (1 / 7),  # Karras et al., 2022, Eq. 5 with ρ = 7
}


def row(t: Any, **columns: Any) -> Array:
    """Makes rows of a table. Columns that are not given are 0.

    Args:
        t: the time of one row, or an array `(n,)` of times.
        **columns: columns of `ROW`, each a number or an array `(n,)`. `from_previous` is a sequence of at most
            `NUM_PREVIOUS` numbers or arrays, starting with the factor of the last prediction.

    Returns:
        Array of dtype `ROW` and shape `()` or `(n,)`.
    """
    rows = np.zeros(np.shape(t), ROW)
    rows["t"] = t
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
        previous: the last `NUM_PREVIOUS` predictions of x_0, most recent first, each like x.

    Returns:
        The new x and the new `previous`.
    """
    x_0 = denoise(x, row["t"])
    x = row["from_x"] * x + row["from_x_0"] * x_0
    for k, x_0_then in enumerate(previous):
        x = x + row["from_previous"][k] * x_0_then
    if noise is not None:
        x = x + row["std"] * noise
    return x, tuple(new + row["keep"] * (old - new) for new, old in zip((x_0, *previous), previous))


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
            Times are rounded to integers. If two of them coincide, one moves to the next free time.

    Raises:
        ValueError: if `num_steps` or `spacing` is invalid.
    """

    num_steps: int | None = None
    spacing: str = dataclasses.field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        _checks.counts(optional=True, num_steps=self.num_steps)
        known = ["uniform", *SPACINGS]
        _checks.require(self.spacing in known, f"`spacing` must be one of {known}", spacing=self.spacing)

    @property
    def evaluations(self) -> int | None:
        """Number of network calls in a run; `None` if it depends on T.

        `Heun` and `Langevin` make fewer calls if the schedule has no signal at T.
        """
        return self.num_steps

    def shortened(self, share: float, timesteps: int) -> "Sampler":
        """The same sampler with this share of its steps, at least one. `None` steps count as `timesteps`."""
        return dataclasses.replace(self, num_steps=max(1, round(share * (self.num_steps or timesteps))))

    def timesteps(self, schedule: Schedule) -> Array:
        """The visited times, `(num_steps + 1,)` integers from T down to 0.

        Raises:
            ValueError: if the schedule has fewer steps than the sampler.
        """
        end = schedule.timesteps
        num_steps = self.num_steps or end
        _checks.require(num_steps <= end, f"The schedule has only {end} steps", num_steps=num_steps)
        if self.spacing == "uniform" or num_steps == 1:
            return np.linspace(end, 0, num_steps + 1).round().astype("int64")
        # If there is no signal at T, its log-SNR is not finite. Then the times below T are spaced.
        highest = end if schedule.alpha[-1] > 0 else end - 1
        times = np.arange(1, highest + 1)
        num = num_steps - (end - highest)
        position = SPACINGS[self.spacing](schedule.sigma[times] / schedule.alpha[times])
        nodes = np.interp(np.linspace(position[-1], position[0], num)[::-1], position, times).round()
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
        with np.errstate(divide="ignore"):
            rows = row(t, **self.coefficients(alpha_t, sigma_t, alpha_s, sigma_s))
        rows["std"][-1] = 0.0  # the last step ends at clean data
        if alpha_t[0] == 0:
            # If x_T has no signal, its log-SNR is not finite. So every sampler starts with a step of DDIM.
            rows[:1] = row(t[:1], from_x=sigma_s[:1] / sigma_t[:1], from_x_0=alpha_s[:1])
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


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling, from the posterior q(x_s | x_t, x_0) with the predicted x_0.

    Args:
        num_steps: number of steps; `None` for all T.
        variance: "small" (the posterior's variance), "large" (β_t, exact for data x_0 ~ N(0, I)), or a number in [0, 1]
            that interpolates between their logarithms. 0 is "small" and 1 is "large".
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `variance` or `spacing` is invalid.

    Reference: Ho et al., 2020, algorithm 2 and section 3.2; Nichol and Dhariwal, 2021, Eq. 15.
    """

    variance: str | float = "small"

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.variance in ["small", "large"] or _checks.is_between(self.variance, 0, 1)
        _checks.require(valid, "`variance` must be 'small', 'large' or a number in [0, 1]", variance=self.variance)

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        from_x_0, from_x, small = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        large = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        fraction = float({"small": 0.0, "large": 1.0}.get(str(self.variance), self.variance))
        return {"from_x": from_x, "from_x_0": from_x_0, "std": np.sqrt(small ** (1 - fraction) * large**fraction)}


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models: deterministic with `eta=0`, DDPM with `eta=1`.

    The noise ε is computed from x and the clipped prediction of x_0.

    Args:
        num_steps: number of steps; `None` for all T.
        eta: factor of the standard deviation of DDPM's noise with "small" variance, in [0, 1].
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `eta` or `spacing` is invalid.

    Reference: Song et al., 2021, Eq. 12 and 16.
    """

    num_steps: int | None = 50
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(_checks.is_between(self.eta, 0, 1), "`eta` must be in [0, 1]", eta=self.eta)

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        *_, variance = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        variance = self.eta**2 * variance
        from_x = np.sqrt(sigma_s**2 - variance) / sigma_t
        return {"from_x": from_x, "from_x_0": alpha_s - alpha_t * from_x, "std": np.sqrt(variance)}


@dataclasses.dataclass(frozen=True)
class DPMSolver(DDIM):
    """DPM-Solver++ (2M), of second order: DDIM with x_0 extrapolated from the last two network calls.

    Args:
        num_steps: number of steps; `None` for all T.
        eta: 0 solves the probability-flow equation, 1 the stochastic one, as in `DDIM`.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `eta` or `spacing` is invalid.

    Reference: Lu et al., 2022 ("DPM-Solver++"), algorithm 2; with eta = 1, SDE-DPM-Solver++(2M).
    """

    num_steps: int | None = 20

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        columns = super().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        h = np.log(alpha_s * sigma_t) - np.log(sigma_s * alpha_t)  # the step in λ
        extrapolation = np.zeros_like(h)
        # The first step has no earlier call. The last step is infinitely long in λ.
        extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])
        from_x_0 = columns["from_x_0"]
        return columns | {"from_x_0": (1 + extrapolation) * from_x_0, "from_previous": [-extrapolation * from_x_0]}


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order method in sigma/alpha: a step of DDIM, corrected with the x_0 predicted at its end.

    Each step calls the network twice. The last step calls it once. So does the first step if the schedule has no signal
    at T. Use "logsnr" for few steps on a schedule like `cosine`. Its sigma/alpha at T is in the thousands, so with
    "uniform" the first steps are too long.

    Args:
        num_steps: number of steps; `None` for all T.
        churn: noise added before each step but the first (EDM's S_churn); 0 for a deterministic sampler. sigma/alpha
            grows by the factor 1 + min(churn / num_steps, √2 − 1), rounded to the schedule's times. Rounding may leave
            the last few steps without noise.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `churn` or `spacing` is invalid.

    Reference: Karras et al., 2022, algorithm 1; with churn, algorithm 2.
    """

    num_steps: int | None = 20
    churn: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(_checks.is_between(self.churn, 0, np.inf), "`churn` must be 0 or more", churn=self.churn)

    @property
    def evaluations(self) -> int | None:
        return self.num_steps and 2 * self.num_steps - 1

    def steps(self, schedule: Schedule) -> list[Array]:
        alpha, sigma = schedule.alpha, schedule.sigma
        times = self.timesteps(schedule)
        starts = [*self._churned(times, schedule), 0]
        steps = []
        for t, s, start in zip(starts, times[1:], starts[1:]):
            from_x = sigma[s] / sigma[t]
            rows = [row(t, from_x=from_x, from_x_0=alpha[s] - alpha[t] * from_x)]
            if s > 0 and alpha[t] > 0:
                # Replaces the slope at t by the mean of the slopes at t and s, which is linear in the two x_0.
                gain = alpha[s] / 2 * (alpha[s] * sigma[t] / (sigma[s] * alpha[t]) - 1)
                rows.append(row(s, from_x=1.0, from_x_0=gain, from_previous=[-gain]))
            if start > s:
                rows[-1] = add_noise_back(rows[-1], schedule, s, start)
            steps.append(np.stack(rows))
        return steps

    def _churned(self, times: Array, schedule: Schedule) -> list:
        """The times at which the steps start, after noise was added before every step but the first."""
        growth = 1 + min(self.churn / (len(times) - 1), np.sqrt(2) - 1)
        t = np.flatnonzero(schedule.alpha)
        ratio = schedule.sigma[t] / schedule.alpha[t]
        churned = np.interp(growth * ratio[times[1:-1]], ratio, t).round().astype("int64")
        return [times[0], *churned]


@dataclasses.dataclass(frozen=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics, alone or as a corrector after each step of another sampler.

    An update at time t, with the network's score s = −ε/sigma_t and a step of step_size sigma_t², is

        x ← x + step_size sigma_t² s + √(2 step_size) sigma_t noise

    Its samples are exact in the limit of small steps and many updates. With a step_size of 0.1 the variance at a noise
    level is at most 5.3 % too large. Without a predictor, it keeps x/alpha from one level to the next and returns the
    x_0 predicted at the last level.

    Args:
        num_steps: number of noise levels; `None` for all T. With a predictor, it must be `None`.
        step_size: step in units of sigma_t², in (0, 1].
        num_updates: number of updates at each level.
        predictor: the sampler whose steps are corrected, at every time that it visits between T and 0. It must not be a
            `Langevin`.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`. With a predictor, the predictor's spacing is used.

    Raises:
        ValueError: if an argument is invalid, or if `num_steps` or `spacing` is given together with a predictor.

    Reference: Song and Ermon, 2019, algorithm 1; as a corrector, Song et al., 2021 ("Score-based generative
        modeling through SDEs"), algorithm 1.
    """

    step_size: float = 0.1
    num_updates: int = 1
    predictor: Sampler | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = _checks.is_between(self.step_size, 0, 1) and self.step_size > 0
        _checks.require(valid, "`step_size` must be in (0, 1]", step_size=self.step_size)
        _checks.counts(num_updates=self.num_updates)
        if self.predictor is not None:
            valid = isinstance(self.predictor, Sampler) and not isinstance(self.predictor, Langevin)
            valid = valid and (self.num_steps, self.spacing) == (None, "uniform")
            _checks.require(
                valid, "`predictor` must be another sampler, with its own `num_steps` and `spacing`", sampler=self
            )

    @property
    def evaluations(self) -> int | None:
        if self.predictor is None:
            return self.num_steps and self.num_steps * self.num_updates + 1
        calls, steps = self.predictor.evaluations, self.predictor.num_steps
        return calls and steps and calls + (steps - 1) * self.num_updates

    def shortened(self, share: float, timesteps: int) -> Sampler:
        if self.predictor is None:
            return super().shortened(share, timesteps)
        return dataclasses.replace(self, predictor=self.predictor.shortened(share, timesteps))

    def timesteps(self, schedule: Schedule) -> Array:
        return super().timesteps(schedule) if self.predictor is None else self.predictor.timesteps(schedule)

    def steps(self, schedule: Schedule) -> list[Array]:
        if self.predictor is not None:
            steps = self.predictor.steps(schedule)
            for index, after in enumerate(steps[1:]):
                # With keep = 1, `previous` holds the x_0 of the predictor only.
                updates = self._updates(schedule, int(after["t"][0]), keep=1.0)
                steps[index] = np.concatenate([steps[index], updates])
            return steps
        times = self.timesteps(schedule)
        steps = [self._updates(schedule, t) for t in times[:-1]]
        for rows, t, s in zip(steps, times, times[1:-1]):
            if schedule.alpha[t] > 0:
                for name in ("from_x", "from_x_0", "std"):
                    rows[name][-1] *= schedule.alpha[s] / schedule.alpha[t]
        steps[-1] = np.concatenate([steps[-1], row(times[-2:-1], from_x_0=1.0)])
        if schedule.alpha[-1] == 0:
            steps[0] = DDIM(self.num_steps, spacing=self.spacing).steps(schedule)[0]
        return steps

    def _updates(self, schedule: Schedule, t: int, keep: float = 0.0) -> Array:
        from_x_0, std = self.step_size * schedule.alpha[t], np.sqrt(2 * self.step_size) * schedule.sigma[t]
        return row([t] * self.num_updates, from_x=1 - self.step_size, from_x_0=from_x_0, std=std, keep=keep)
