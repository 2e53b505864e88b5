"""Samplers: from noise to data in steps.

Every step of every sampler here is linear in what is at hand. With x_0 = denoise(x_t, t), the only way in which a
sampler sees the network, one network call leads to

    x ← from_x x + from_x_0 x_0 + from_memory memory + std noise
    memory ← x_0 + keep (memory − x_0)

where `memory` is what multi-step methods need, the x_0 of the call before. So a sampler is a table of these numbers,
one row a call, made on the host in float64 from a `schedules.Schedule`, and `step`, which applies a row, is the body
of the one compiled loop that runs any of them. For DDIM from t to s, which keeps the noise ε = (x − alpha_t x_0) /
sigma_t, the row is from_x = sigma_s / sigma_t, from_x_0 = alpha_s − alpha_t sigma_s / sigma_t, and zeros.

To add a sampler, subclass `Sampler` and write `coefficients` (a step of one call) or `steps` (of several).
"""

import dataclasses
import itertools

import numpy as np

from keras_ddpm import _checks
from keras_ddpm.diffusion import posterior_coefficients

COLUMNS = ("t", "from_x", "from_x_0", "from_memory", "std", "keep")

SPACINGS = {
    # Functions of sigma / alpha, in which the visited times are evenly spaced.
    "logsnr": np.log,
    "karras": lambda ratio: ratio ** (1 / 7),  # Karras et al., 2022, Eq. 5 with ρ = 7
}


def step(row, denoise, x, noise, memory):
    """One row of a table: the new x and the new memory. `noise` may be `None` where every std is 0."""
    t, from_x, from_x_0, from_memory, std, keep = row
    x_0 = denoise(x, t)
    x = from_x * x + from_x_0 * x_0 + from_memory * memory
    return (x if noise is None else x + std * noise), x_0 + keep * (memory - x_0)


def renoised(row, schedule, s, t):
    """The row that, having arrived at s, adds the noise that leads back to t > s."""
    _, from_x, from_x_0, from_memory, std, keep = row
    ratio = schedule.alpha[t] / schedule.alpha[s]
    std = np.sqrt(schedule.sigma[t] ** 2 - ratio**2 * (schedule.sigma[s] ** 2 - std**2))
    return [row[0], ratio * from_x, ratio * from_x_0, ratio * from_memory, std, keep]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler, as a value.

    Args:
        num_steps: how many steps, at most T; `None` for all T.
        spacing: how the steps are spaced from T down to 0: "uniform" in t, "logsnr" (uniform in log-SNR, the last
            step from t = 1) or "karras" (uniform in (sigma/alpha)^(1/7), likewise). Times are rounded, and moved to
            the next free one where two fall on one.
    """

    num_steps: int | None = None
    spacing: str = dataclasses.field(default="uniform", kw_only=True)

    def __post_init__(self):
        if self.num_steps is not None and not _checks.is_count(self.num_steps):
            raise ValueError(f"`num_steps` must be a positive integer or None. Received: num_steps={self.num_steps!r}")
        if self.spacing not in ["uniform", *SPACINGS]:
            raise ValueError(f"`spacing` must be one of {['uniform', *SPACINGS]}. Received: spacing={self.spacing!r}")

    @property
    def evaluations(self):
        """How often a run calls the network; `None` where that depends on T.

        `Heun` and `Langevin` call it less often where a schedule has no signal at T.
        """
        return self.num_steps

    def shortened(self, share, timesteps):
        """The sampler with the share of its steps that it makes of `timesteps`, at least one."""
        return dataclasses.replace(self, num_steps=max(1, round(share * (self.num_steps or timesteps))))

    def timesteps(self, schedule):
        """The visited times, `(num_steps + 1,)` integers from T down to 0."""
        end = schedule.timesteps
        num_steps = self.num_steps or end
        if num_steps > end:
            raise ValueError(f"A schedule of {end} steps cannot be sampled in more. Received: num_steps={num_steps}")
        if self.spacing == "uniform" or num_steps == 1:
            return np.linspace(end, 0, num_steps + 1).round().astype("int64")
        # Without signal at T there is no log-SNR: the others are spaced.
        highest = end if schedule.alpha[-1] > 0 else end - 1
        times = np.arange(1, highest + 1)
        num = num_steps - (end - highest)
        position = SPACINGS[self.spacing](schedule.sigma[times] / schedule.alpha[times])
        nodes = np.interp(np.linspace(position[-1], position[0], num)[::-1], position, times).round()
        order = np.arange(num)
        nodes = np.maximum.accumulate(nodes - order) + order  # distinct, upwards
        nodes = np.minimum(nodes, highest - order[::-1])
        return np.concatenate([[end][: end - highest], nodes[::-1], [0]]).astype("int64")

    def table(self, schedule):
        """float64 array `(network calls, 6)` of `COLUMNS`."""
        return np.concatenate(self.steps(schedule))

    def steps(self, schedule):
        """The rows of each step, from each of `timesteps` to the next."""
        times = self.timesteps(schedule)
        t, s = times[:-1], times[1:]
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha[t], schedule.sigma[t], schedule.alpha[s], schedule.sigma[s]
        with np.errstate(divide="ignore"):
            columns = self.coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        table = np.stack([np.broadcast_to(column, t.shape) for column in (t, *columns, 0.0)], axis=1)
        table[-1, 4] = 0.0  # data hold no noise
        if alpha_t[0] == 0:
            # Without signal in x_T every sampler keeps its noise, whose log-SNR is not finite.
            table[0, 1:] = sigma_s[0] / sigma_t[0], alpha_s[0], 0.0, 0.0, 0.0
        return list(table[:, None])

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        """The columns from_x, from_x_0, from_memory and std of steps from t to s, of float64 arrays `(steps,)`."""
        raise NotImplementedError("A sampler needs `coefficients` or `steps`.")


@dataclasses.dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling, from the posterior q(x_s | x_t, x_0) with the predicted x_0.

    Args:
        num_steps: how many steps; `None` for all T.
        variance: "small" (the posterior's), "large" (β_t; right for data that is noise), or a number in [0, 1]
            between their logarithms, 0 being "small".
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: for an invalid number of steps, variance or spacing.

    Reference: Ho et al., 2020, algorithm 2 and section 3.2; Nichol and Dhariwal, 2021, Eq. 15.
    """

    variance: str | float = "small"

    def __post_init__(self):
        super().__post_init__()
        if self.variance not in ["small", "large"] and not _checks.is_between(self.variance, 0, 1):
            raise ValueError(
                f"`variance` must be 'small', 'large' or a number in [0, 1]. Received: variance={self.variance!r}"
            )

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        from_x_0, from_x_t, small = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        large = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        fraction = {"small": 0.0, "large": 1.0}.get(self.variance, self.variance)
        return from_x_t, from_x_0, 0.0, np.sqrt(small ** (1 - fraction) * large**fraction)


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models: deterministic with `eta=0`, DDPM with `eta=1`.

    The noise is derived again from the (clipped) prediction of x_0.

    Args:
        num_steps: how many steps; `None` for all T.
        eta: the share of DDPM's noise ("small" variance) that is used, in [0, 1].
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: for an invalid number of steps or spacing, or an eta outside [0, 1].

    Reference: Song et al., 2021, Eq. 12 and 16.
    """

    num_steps: int | None = 50
    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not _checks.is_between(self.eta, 0, 1):
            raise ValueError(f"`eta` must be in [0, 1]. Received: eta={self.eta!r}")

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        *_, variance = posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        variance = self.eta**2 * variance
        from_x = np.sqrt(sigma_s**2 - variance) / sigma_t
        return from_x, alpha_s - alpha_t * from_x, 0.0, np.sqrt(variance)


@dataclasses.dataclass(frozen=True)
class DPMSolver(DDIM):
    """DPM-Solver++ (2M): DDIM with x_0 extrapolated from the last two network calls, of second order.

    Args:
        num_steps: how many steps; `None` for all T.
        eta: 0 for the solver of the probability-flow equation, 1 for that of the stochastic one, as for `DDIM`.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: for an invalid number of steps or spacing, or an eta outside [0, 1].

    Reference: Lu et al., 2022 ("DPM-Solver++"), algorithm 2 and, with eta = 1, SDE-DPM-Solver++(2M).
    """

    num_steps: int | None = 20

    def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
        from_x, from_x_0, _, std = super().coefficients(alpha_t, sigma_t, alpha_s, sigma_s)
        h = np.log(alpha_s * sigma_t) - np.log(sigma_s * alpha_t)  # the step in λ
        extrapolation = np.zeros_like(h)
        extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])  # none at first, nor in the last step, which is infinite in λ
        return from_x, (1 + extrapolation) * from_x_0, -extrapolation * from_x_0, std


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's second-order method in sigma/alpha: a step of DDIM, corrected with the x_0 predicted at its end.

    A step calls the network twice; only the last step, and on a schedule without signal at T the first, calls it
    once. Where sigma/alpha at T is in the thousands (`cosine`) few steps uniform in t are too long at first: take
    "logsnr".

    Args:
        num_steps: how many steps; `None` for all T.
        churn: noise added before each step but the first, in EDM's S_churn: sigma/alpha grows by the factor
            1 + min(churn / num_steps, √2 − 1), rounded to the schedule's times, which may leave the last few steps
            without; 0 for a deterministic sampler.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`.

    Raises:
        ValueError: for an invalid number of steps or spacing, or a negative churn.

    Reference: Karras et al., 2022, algorithm 1 and, with churn, 2.
    """

    num_steps: int | None = 20
    churn: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not _checks.is_between(self.churn, 0, np.inf):
            raise ValueError(f"`churn` must be 0 or more. Received: churn={self.churn!r}")

    @property
    def evaluations(self):
        return self.num_steps and 2 * self.num_steps - 1

    def steps(self, schedule):
        alpha, sigma = schedule.alpha, schedule.sigma
        times = self.timesteps(schedule)
        starts = [*self._churned(times, schedule), 0]
        steps = []
        for t, s, start in zip(starts, times[1:], starts[1:]):
            from_x = sigma[s] / sigma[t]
            rows = [[t, from_x, alpha[s] - alpha[t] * from_x, 0.0, 0.0, 0.0]]
            if s > 0 and alpha[t] > 0:
                # The mean of the slopes at both ends, which differ by what their x_0 do.
                gain = alpha[s] / 2 * (alpha[s] * sigma[t] / (sigma[s] * alpha[t]) - 1)
                rows.append([s, 1.0, gain, -gain, 0.0, 0.0])
            if start > s:
                rows[-1] = renoised(rows[-1], schedule, s, start)
            steps.append(np.array(rows))
        return steps

    def _churned(self, times, schedule):
        """The times at which steps start, noise having been added to all but the first."""
        growth = 1 + min(self.churn / (len(times) - 1), np.sqrt(2) - 1)
        t = np.flatnonzero(schedule.alpha)
        ratio = schedule.sigma[t] / schedule.alpha[t]
        churned = np.interp(growth * ratio[times[1:-1]], ratio, t).round().astype("int64")
        return [times[0], *churned]


@dataclasses.dataclass(frozen=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics, alone or as a corrector after each step of another sampler.

    An update at time t, with the score s = −ε/sigma_t of the network and a step of step_size sigma_t², is

        x ← x + step_size sigma_t² s + √(2 step_size) sigma_t noise

    and its samples are right as step_size tends to 0 and the number of updates to infinity: for a step of 0.1 the
    variance at one noise level is at most 5.3 % too large. Alone, x/alpha stays what it is from one level to the
    next, and the run ends with the x_0 predicted at the last.

    Args:
        num_steps: number of noise levels; `None` for all T, or for those of the predictor.
        step_size: in units of sigma_t², in (0, 1].
        num_updates: updates at each level.
        predictor: the sampler whose steps are corrected, at all times that it visits between T and 0, itself no
            `Langevin`.
        spacing: "uniform", "logsnr" or "karras", as in `Sampler`; that of the predictor, where there is one.

    Raises:
        ValueError: for an invalid number, step size, spacing or predictor, or steps beside the predictor's own.

    Reference: Song and Ermon, 2019, algorithm 1; as a corrector, Song et al., 2021 ("Score-based generative
        modeling through SDEs"), algorithm 1.
    """

    step_size: float = 0.1
    num_updates: int = 1
    predictor: Sampler | None = None

    def __post_init__(self):
        super().__post_init__()
        if not _checks.is_between(self.step_size, 0, 1) or self.step_size == 0:
            raise ValueError(f"`step_size` must be in (0, 1]. Received: step_size={self.step_size!r}")
        if not _checks.is_count(self.num_updates):
            raise ValueError(f"`num_updates` must be a positive integer. Received: num_updates={self.num_updates!r}")
        if self.predictor is not None and not (
            isinstance(self.predictor, Sampler)
            and not isinstance(self.predictor, Langevin)
            and self.num_steps is None
            and self.spacing == "uniform"
        ):
            raise ValueError(
                "`predictor` must be another sampler, which brings `num_steps` and `spacing`. Received: "
                f"predictor={self.predictor}, num_steps={self.num_steps}, spacing={self.spacing!r}"
            )

    @property
    def evaluations(self):
        if self.predictor is None:
            return self.num_steps and self.num_steps * self.num_updates + 1
        calls, steps = self.predictor.evaluations, self.predictor.num_steps
        return calls and calls + (steps - 1) * self.num_updates

    def shortened(self, share, timesteps):
        if self.predictor is None:
            return super().shortened(share, timesteps)
        return dataclasses.replace(self, predictor=self.predictor.shortened(share, timesteps))

    def timesteps(self, schedule):
        return super().timesteps(schedule) if self.predictor is None else self.predictor.timesteps(schedule)

    def steps(self, schedule):
        if self.predictor is not None:
            steps = self.predictor.steps(schedule)
            pairs = itertools.pairwise(steps)
            # The predictor finds its own x_0 in memory.
            return [np.concatenate([rows, self._updates(schedule, after[0, 0], 1.0)]) for rows, after in pairs] + steps[
                -1:
            ]
        times = self.timesteps(schedule)
        steps = [self._updates(schedule, t) for t in times[:-1]]
        for rows, t, s in zip(steps, times, times[1:-1]):
            if schedule.alpha[t] > 0:
                rows[-1, 1:5] *= schedule.alpha[s] / schedule.alpha[t]
        denoise = [[times[-2], 0.0, 1.0, 0.0, 0.0, 0.0]]
        steps[-1] = np.concatenate([steps[-1], denoise])
        if schedule.alpha[-1] == 0:
            steps[0] = DDIM(self.num_steps, spacing=self.spacing).steps(schedule)[0]
        return steps

    def _updates(self, schedule, t, keep=0.0):
        alpha, sigma = schedule.alpha[int(t)], schedule.sigma[int(t)]
        row = [t, 1 - self.step_size, self.step_size * alpha, 0.0, np.sqrt(2 * self.step_size) * sigma, keep]
        return np.array([row] * self.num_updates)
