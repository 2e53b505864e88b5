"""The samplers, and their base class."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm.diffusion import posterior_coefficients
from keras_ddpm.samplers.rows import NUM_PREVIOUS, Array, Columns, add_noise_back, row
from keras_ddpm.schedules import Schedule

__all__ = ["DDIM", "DDPM", "IPNDM", "DPMSolver", "Heun", "Langevin", "Sampler", "UniPC"]

SPACINGS: dict[str, Callable] = {
    # Functions of sigma / alpha. The visited times are evenly spaced in the function's value.
    "logsnr": np.log,
    "karras": lambda ratio: ratio ** (1 / 7),  # Karras et al., 2022, Eq. 5 with ρ = 7
}


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
            rows[0] = row(t[0], from_x=sigma_s[0] / sigma_t[0], from_x_0=alpha_s[0])
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
    """DPM-Solver++: DDIM with the x_0 of the step extrapolated from the last `order` network calls.

    With order 3, the weights integrate a parabola in λ = log(alpha/sigma) exactly, as those of UniP-3 do. Published
    implementations of DPM-Solver++(3M) use half of the second difference, and are therefore only second order.

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
        _checks.counts(low=2, high=3, order=self.order)

    def coefficients(self, alpha_t: Array, sigma_t: Array, alpha_s: Array, sigma_s: Array) -> Columns:
        columns = super().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        shares = np.zeros((1 + NUM_PREVIOUS, len(alpha_t)))
        for i, (nodes, decay) in enumerate(_multistep(self.order, columns["from_x"], alpha_t, sigma_t, alpha_s)):
            shares[: len(nodes), i] = _shares(nodes, decay)
        from_x_0, *from_previous = columns["from_x_0"] * shares
        return columns | {"from_x_0": from_x_0, "from_previous": from_previous}


@dataclasses.dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC: the steps of `DPMSolver`. The network call at the end of each step also corrects it, for free.

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
        _checks.counts(high=3, order=self.order)

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
        length = alpha_s * sigma_t / alpha_t - sigma_s
        for i in range(len(alpha_t)):
            num = min(1 + NUM_PREVIOUS, i + 1 - (alpha_t[0] == 0)) if 0 < sigma_s[i] and length[i] < FARTHEST else 1
            shares[:num, i] = _shares([-float(k) for k in range(num)], decay=0.0)
        shares[0] -= 1  # the noise of this call alone makes the step of DDIM
        from_noise, *from_previous = -length * shares
        noise = {"x": 1 / sigma_t, "x_0": -alpha_t / sigma_t}
        changed = {f"from_{name}": columns[f"from_{name}"] + from_noise * share for name, share in noise.items()}
        remembered = {f"remember_{name}": share for name, share in noise.items()}
        return columns | changed | remembered | {"from_previous": from_previous}


FARTHEST = 4.0  # the largest sum of the sizes of shares with which predictions are extrapolated
QUADRATURE = np.polynomial.legendre.leggauss(32)  # places and weights, for polynomials times an exponential


def _multistep(
    order: int, from_x: Array, alpha_t: Array, sigma_t: Array, alpha_s: Array
) -> Iterator[tuple[list, float]]:
    """Yields, for each step, the positions of the predictions it uses and the decay rate of their weights.

    The places are in λ = log(alpha/sigma), with 0 at the start of the step and 1 at its end. A step that is infinitely
    long in λ, from a time without signal or to clean data, uses one prediction. Its decay is given as 0.
    """
    signal, decay = np.log(alpha_t / sigma_t), -np.log(from_x * alpha_t / alpha_s)
    for i in range(len(signal)):
        num = min(order, i + 1 - np.isinf(signal[0]), len(signal) - i)
        earlier = [(signal[i - k] - signal[i]) / (signal[i + 1] - signal[i]) for k in range(1, num)]
        nodes = [0.0, *earlier]
        while len(nodes) > 2 and np.abs(_shares(nodes, decay[i])).sum() > FARTHEST:
            nodes.pop()
        yield nodes, decay[i] if np.isfinite(decay[i]) else 0.0


def _shares(nodes: list, decay: float) -> Array:
    """The shares of predictions of x_0 at `nodes`, which add up to 1, in a step from 0 to 1.

    Two or more integrate polynomials through the nodes with the weight exp(−decay (1 − u)). With two nodes,
    the polynomial's value at 1/2 is taken, as DPM-Solver++(2M) and UniPC do.
    """
    powers = np.vander(nodes, increasing=True).T
    u, weights = QUADRATURE
    u, weights = (1 + u) / 2, weights * np.exp(-decay * (1 - u) / 2)
    moments = [np.sum(weights * u**k) / np.sum(weights) for k in range(len(nodes))]
    return np.linalg.solve(powers, [1.0, 0.5] if len(nodes) == 2 else moments)


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order method in the log-SNR: a step of DDIM, corrected with the x_0 predicted at its end.

    Each step calls the network twice. The last step calls it once. So does the first step if the schedule has no signal
    at T. The correction integrates a straight line in λ = log(alpha/sigma) exactly. So it is stable in steps of any
    length, in which the mean of two slopes in sigma/alpha, as Karras et al. take it, grows without bounds.

    Args:
        num_steps: number of steps; `None` for all T.
        churn: noise added before each step but the first (EDM's S_churn); 0 for a deterministic sampler. sigma/alpha
            grows by the factor 1 + min(churn / num_steps, √2 − 1), rounded to the schedule's times. Rounding may leave
            the last few steps without noise.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: if `num_steps`, `churn` or `spacing` is invalid.

    Reference: Karras et al., 2022, algorithm 1, in the form of Cox and Matthews, 2002 ("Exponential time differencing
        for stiff systems"), Eq. 22; with churn, algorithm 2.
    """

    num_steps: int | None = 20
    churn: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(_checks.is_between(self.churn, 0, np.inf), "`churn` must be 0 or more", churn=self.churn)

    def steps(self, schedule: Schedule) -> list[Array]:
        alpha, sigma = schedule.alpha, schedule.sigma
        times = self.timesteps(schedule)
        growth = 1 + min(self.churn / (len(times) - 1), np.sqrt(2) - 1)
        noisy = np.flatnonzero(alpha)
        ratio = sigma[noisy] / alpha[noisy]
        # The times at which the steps start, after noise was added before every step but the first.
        churned = np.interp(growth * ratio[times[1:-1]], ratio, noisy).round().astype("int64")
        starts = [times[0], *churned, 0]
        steps = []
        for t, s, start in zip(starts, times[1:], starts[1:]):
            rows = [row(t, **DDIM().coefficients(alpha[t], sigma[t], alpha[s], sigma[s]))]
            if s > 0 and alpha[t] > 0:
                # Gives the x_0 at s its share in place of that of the x_0 at t.
                decay = np.log(alpha[s] * sigma[t] / (sigma[s] * alpha[t]))
                gain = rows[0]["from_x_0"] * (1 / -np.expm1(-decay) - 1 / decay)
                rows.append(row(s, from_x=1.0, from_x_0=gain, from_previous=[-gain]))
            if start > s:
                rows[-1] = add_noise_back(rows[-1], schedule, s, start)
            steps.append(np.stack(rows))
        return steps


@dataclasses.dataclass(frozen=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics, alone or as a corrector after each step of another sampler.

    An update at time t, with the network's score s = −ε/sigma_t and a step of step_size sigma_t², is

        x ← x + step_size sigma_t² s + √(2 step_size) sigma_t noise

    Its samples are exact in the limit of small steps and many updates. With a step_size of 0.1 the variance at a noise
    level is at most 5.3 % too large. Without a predictor, it keeps x/alpha from one level to the next and returns the
    x_0 predicted at the last level. Where alpha grows more than tenfold, a step of DDIM takes the place of the updates.

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
        descent = DDIM(self.num_steps, spacing=self.spacing).steps(schedule)
        for i, (t, s) in enumerate(itertools.pairwise(times[:-1])):
            if schedule.alpha[s] > 10 * schedule.alpha[t]:  # a few updates would not shrink x/alpha as much
                steps[i] = descent[i]
            else:
                for name in ("from_x", "from_x_0", "std"):
                    steps[i][name][-1] *= schedule.alpha[s] / schedule.alpha[t]
        steps[-1] = np.concatenate([steps[-1], row(times[-2:-1], from_x_0=1.0)])
        return steps

    def _updates(self, schedule: Schedule, t: int, keep: float = 0.0) -> Array:
        from_x_0, std = self.step_size * schedule.alpha[t], np.sqrt(2 * self.step_size) * schedule.sigma[t]
        return row([t] * self.num_updates, from_x=1 - self.step_size, from_x_0=from_x_0, std=std, keep=keep)
