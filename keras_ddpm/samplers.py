"""Samplers: from noise to data in steps.

A sampler is a table of numbers with one row for each network call, as `rows.py` explains. For example, DDIM from t to s
keeps the noise ε = (x − alpha_t x_0) / sigma_t. Its row is

    row(t, from_x=sigma_s / sigma_t, from_x_0=alpha_s - alpha_t * sigma_s / sigma_t)

To add a sampler, subclass `Sampler` as a frozen dataclass. If each step calls the network once, override
`coefficients`. It gets the scales at both ends of all steps and returns the columns by name. Otherwise override
`steps`, which returns the rows of each step, and `evaluations`. Columns that are not given are 0.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_ddpm import _checks
from keras_ddpm.diffusion import posterior_coefficients
from keras_ddpm.rows import NUM_PREVIOUS as NUM_PREVIOUS
from keras_ddpm.rows import ROW as ROW
from keras_ddpm.rows import Array
from keras_ddpm.rows import Columns
from keras_ddpm.rows import Sampler as Sampler
from keras_ddpm.rows import add_noise_back as add_noise_back
from keras_ddpm.rows import row as row
from keras_ddpm.rows import step as step
from keras_ddpm.schedules import Schedule

QUADRATURE = np.polynomial.legendre.leggauss(32)  # places and weights, for polynomials times an exponential


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
    """DPM-Solver++: DDIM with the x_0 of the step extrapolated from the last `order` network calls.

    With order 3, the weights integrate a parabola in λ = log(alpha/sigma) exactly, as those of UniP-3 do. Published
    code of DPM-Solver++(3M) has half of its second difference, and so converges with the second order only.

    Args:
        num_steps: number of steps; `None` for all T.
        eta: 0 solves the probability-flow equation, 1 the stochastic one, as in `DDIM`.
        order: 2 or 3. The first and the last steps have lower orders.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `eta`, `order` or `spacing` is invalid.

    Reference: Lu et al., 2022 ("DPM-Solver++"), algorithm 2; with eta = 1, SDE-DPM-Solver++(2M).
    """

    num_steps: int | None = 20
    order: int = dataclasses.field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(
            _checks.is_count(self.order) and self.order in (2, 3), "`order` must be 2 or 3", order=self.order
        )

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        columns = super().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        shares = np.zeros((1 + NUM_PREVIOUS, len(alpha_t)))
        for i, (nodes, decay) in enumerate(_multistep(self.order, columns["from_x"], alpha_t, sigma_t, alpha_s)):
            shares[: len(nodes), i] = _shares(nodes, decay)
        from_x_0, *from_previous = columns["from_x_0"] * shares
        return columns | {"from_x_0": from_x_0, "from_previous": from_previous}


@dataclasses.dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC: the steps of `DPMSolver`, of which each is corrected by the network call at its end, for free.

    Args:
        num_steps: number of steps; `None` for all T.
        order: order of the predictor, 1, 2 or 3. The corrector's is higher by one. The first and the last steps have
            lower orders.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `order` or `spacing` is invalid.

    Reference: Zhao et al., 2023 ("UniPC"), algorithm 1 with B(h) = e^h − 1.
    """

    num_steps: int | None = 20
    order: int = dataclasses.field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(_checks.is_count(self.order) and self.order <= 3, "`order` must be 1, 2 or 3", order=self.order)

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        columns = DDIM().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        from_x, from_x_0 = columns["from_x"], columns["from_x_0"]
        from_all = np.zeros((1 + NUM_PREVIOUS, len(alpha_t)))  # of this and the earlier predictions
        earlier = None
        for i, (nodes, decay) in enumerate(_multistep(self.order, from_x, alpha_t, sigma_t, alpha_s)):
            if earlier is not None:
                # The corrector replaces the shares of the step before, as this call has found x_0 at its end.
                from_all[: 1 + len(earlier[0]), i] = from_x[i] * from_x_0[i - 1] * (earlier[1] - [0, *earlier[0]])
            predicted = _shares(nodes, decay)
            from_all[: len(nodes), i] += from_x_0[i] * predicted
            earlier = (predicted, _shares([1.0, *nodes], decay)) if decay else None
        return {"from_x": from_x, "from_x_0": from_all[0], "from_previous": from_all[1:]}


@dataclasses.dataclass(frozen=True)
class IPNDM(Sampler):
    """iPNDM: DDIM with the noise ε of the step extrapolated from the last four network calls.

    The weights are those of Adams and Bashforth for equal steps in sigma/alpha. For other steps, they are of second
    order. The first three steps and the last one have lower orders.

    Args:
        num_steps: number of steps; `None` for all T.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps` or `spacing` is invalid.

    Reference: Zhang and Chen, 2023 ("Fast sampling of diffusion models with exponential integrator"), section 3.
    """

    num_steps: int | None = 20
    spacing: str | tuple[int, ...] = dataclasses.field(default="karras", kw_only=True)

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        columns = DDIM().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        shares = np.zeros((1 + NUM_PREVIOUS, len(alpha_t)))
        for i in range(len(alpha_t)):
            num = min(1 + NUM_PREVIOUS, i + 1 - (alpha_t[0] == 0)) if sigma_s[i] > 0 else 1
            shares[:num, i] = _shares([-float(k) for k in range(num)], decay=0.0)
        shares[0] -= 1  # the noise of this call alone makes the step of DDIM
        from_noise, *from_previous = (sigma_s - alpha_s * sigma_t / alpha_t) * shares
        noise = {"x": 1 / sigma_t, "x_0": -alpha_t / sigma_t}
        changed = {f"from_{name}": columns[f"from_{name}"] + from_noise * share for name, share in noise.items()}
        remembered = {f"remember_{name}": share for name, share in noise.items()}
        return columns | changed | remembered | {"from_previous": from_previous}


def _multistep(
    order: int, from_x: Array, alpha_t: Array, sigma_t: Array, alpha_s: Array
) -> Iterator[tuple[list, float]]:
    """Yields for each step where the predictions are that it uses, and how fast the weight of earlier ones decays.

    The places are in λ = log(alpha/sigma), with 0 at the start of the step and 1 at its end. A step that is infinitely
    long in λ, from a time without signal or to clean data, uses one prediction. Its decay is given as 0.
    """
    signal, decay = np.log(alpha_t / sigma_t), -np.log(from_x * alpha_t / alpha_s)
    for i in range(len(signal)):
        num = min(order, i + 1 - np.isinf(signal[0]), len(signal) - i)
        earlier = [(signal[i - k] - signal[i]) / (signal[i + 1] - signal[i]) for k in range(1, num)]
        yield [0.0, *earlier], decay[i] if np.isfinite(decay[i]) else 0.0


def _shares(nodes: list, decay: float) -> Array:
    """The shares of predictions of x_0 at `nodes`, which add up to 1, in a step from 0 to 1.

    Two or more integrate polynomials through the nodes with the weight exp(−decay (1 − u)). Of two nodes, the
    polynomial's value at 1/2 is taken, as DPM-Solver++(2M) and UniPC do.
    """
    powers = np.vander(nodes, increasing=True).T
    u, weights = QUADRATURE
    u, weights = (1 + u) / 2, weights * np.exp(-decay * (1 - u) / 2)
    moments = [np.sum(weights * u**k) / np.sum(weights) for k in range(len(nodes))]
    return np.linalg.solve(powers, [1.0, 0.5] if len(nodes) == 2 else moments)


class Trajectories(NamedTuple):
    """Samples on their way from noise to data.

    Attributes:
        schedule: the schedule.
        times: array `(N + 1,)` of times t, from T down to 0.
        x: array `(N + 1, num_samples, ...)` of x_t at these times.
        x_0: array `(N, num_samples, ...)` of the x_0 predicted at these times.
    """

    schedule: Schedule
    times: Array
    x: Array
    x_0: Array


def trajectories(model: Any, num_samples: int = 64, seed: int = 0, **options: Any) -> Trajectories:
    """`num_samples` samples of a `DiffusionModel`, in up to 60 steps of DDIM. `seed`, `options`: as in its `sample`."""
    schedule = model.diffusion.schedule
    num = min(60, schedule.timesteps)
    sampler = DDIM(num, spacing="logsnr")
    _, x, x_0 = model.sample(num_samples, sampler, seed, return_trajectory=num, **options)
    first = sampler.table(schedule)[0]
    x = np.concatenate([(x[:1] - first["from_x_0"] * x_0[:1]) / first["from_x"], x])
    return Trajectories(schedule, sampler.timesteps(schedule), x, x_0)


def optimized(paths: Trajectories, sampler: Sampler) -> Sampler:
    """Returns the sampler with the times at which its steps start searched for a model.

    The trajectories of a model's samples have nearly the same shape. Among their times, those are chosen whose straight
    steps deviate least from the trajectories, in sum.

    >>> model.sampler = optimized(trajectories(model), UniPC(6))  # the default of `sample`, and saved with the model

    Args:
        paths: `trajectories` of the model. They serve any number of searches.
        sampler: a sampler whose steps call the network once, with at most as many steps as the trajectories.

    Returns:
        The sampler with another `spacing`, a tuple of times.

    Raises:
        ValueError: if the sampler has too many steps, or steps of several network calls.

    Reference: Chen et al., 2024 ("On the trajectory regularity of ODE-based diffusion sampling"), section 4.
    """
    once = isinstance(sampler, Sampler) and sampler.evaluations == sampler.num_steps
    _checks.require(once, "`sampler` must be a sampler whose steps call the network once", sampler=sampler)
    num, wanted = len(paths.x_0), sampler.num_steps or 0
    _checks.require(0 < wanted <= num, f"`num_steps` must be in 1..{num}", num_steps=sampler.num_steps)
    alpha, sigma = paths.schedule.alpha[paths.times], paths.schedule.sigma[paths.times]
    deviation = np.full((num + 1, num + 1), np.inf)  # of a step from one time to a later one
    for i, (x, x_0) in enumerate(zip(paths.x, paths.x_0)):
        columns = DDIM().coefficients(alpha[i], sigma[i], alpha[i + 1 :], sigma[i + 1 :])
        for j, from_x, from_x_0 in zip(range(i + 1, num + 1), columns["from_x"], columns["from_x_0"]):
            deviation[i, j] = np.sqrt(np.mean((from_x * x + from_x_0 * x_0 - paths.x[j]) ** 2))
    return dataclasses.replace(sampler, spacing=tuple(map(int, paths.times[shortest_path(deviation, wanted)])))


def shortest_path(lengths: Array, num_steps: int) -> list[int]:
    """The nodes from 0 on, without the last node, of the shortest path to the last node in so many steps.

    Args:
        lengths: array `(nodes, nodes)`: the length of each step, infinite where there is none.
        num_steps: number of steps, of which there must be a path.
    """
    total, origins = np.full(len(lengths), np.inf), []
    total[0] = 0.0
    for _ in range(num_steps):
        sums = total[:, None] + lengths
        origins.append(np.argmin(sums, axis=0))
        total = np.min(sums, axis=0)
    path = [len(lengths) - 1]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[:0:-1]


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order method in sigma/alpha: a step of DDIM, corrected with the x_0 predicted at its end.

    Each step calls the network twice. The last step calls it once. So does the first step if the schedule has no signal
    at T. Use "logsnr" and some 20 steps on a schedule like `cosine`. Its sigma/alpha at T is in the thousands, so with
    "uniform" or fewer steps, the first ones are too long.

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
            message = "`predictor` must be another sampler, with its own `num_steps` and `spacing`"
            _checks.require(valid, message, sampler=self)

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
