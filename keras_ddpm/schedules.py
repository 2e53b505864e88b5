"""Noise schedules: how much signal and how much noise x_t contains.

A schedule consists of two arrays of length T + 1, for t = 0..T, in

    x_t = alpha_t x_0 + sigma_t ε,   ε ~ N(0, I)

t = 0 is clean data (alpha_0 = 1, sigma_0 = 0), and t = 1..T are the steps of the papers. Most published code counts
from 0: its t is our t minus 1.

`alpha` and `sigma` are the scales of signal and noise, as in VDM, DPM-Solver and EDM. Ho et al. (2020) use α_t for
1 − β_t instead; their ᾱ_t is our alpha_t².

To add a schedule, write a function that returns a `Schedule`. `from_betas` makes variance-preserving schedules.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_ddpm import _checks

__all__ = [
    "Schedule",
    "cosine",
    "from_betas",
    "input_scaled",
    "linear",
    "shifted",
    "sigmoid",
    "straight",
    "zero_terminal_snr",
]


@keras.saving.register_keras_serializable(package="keras_ddpm")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The scales of signal and noise at t = 0..T.

    The ratio alpha / sigma falls at every step and may end at 0.

    Attributes:
        alpha: float64 array `(T + 1,)`, scale of the signal; `alpha[0] == 1`.
        sigma: float64 array `(T + 1,)`, scale of the noise; `sigma[0] == 0`.

    Raises:
        ValueError: if the arrays do not have these properties.
    """

    alpha: np.ndarray
    sigma: np.ndarray

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), "float64"))
        alpha, sigma = self.alpha, self.sigma
        fit = alpha.ndim == 1 and alpha.shape == sigma.shape and len(alpha) > 1
        _checks.require(fit, "Expected alpha and sigma of length T + 1, at least 2", shapes=(alpha.shape, sigma.shape))
        start = float(alpha[0]), float(sigma[0])
        _checks.require(start == (1, 0), "A schedule starts at clean data, alpha = 1 and sigma = 0", start=start)
        finite = np.all(np.isfinite([alpha, sigma])) and np.all(alpha >= 0)
        falls = finite and np.all(alpha[1:] * sigma[:-1] < alpha[:-1] * sigma[1:])
        _checks.require(falls, "A schedule's alpha / sigma falls at every step, and both are finite and never negative")

    def __repr__(self) -> str:
        return f"<Schedule of {self.timesteps} steps, log SNR {self.log_snr[1]:.3g} to {self.log_snr[-1]:.3g}>"

    @property
    def timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> np.ndarray:
        """The log signal-to-noise ratio, log(alpha_t² / sigma_t²): ∞ at t = 0, and −∞ if there is no signal."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def is_close(self, other: "Schedule") -> bool:
        """Whether another schedule is the same, but for the last bits, which differ from machine to machine."""
        same = self.timesteps == other.timesteps
        return same and np.allclose(self.alpha, other.alpha) and np.allclose(self.sigma, other.sigma)

    def until(self, t: int) -> "Schedule":
        """Returns the schedule of the steps 1..t.

        Raises:
            ValueError: if `t` is not an integer in 1..T.
        """
        _checks.counts(high=self.timesteps, t=t)
        return Schedule(self.alpha[: t + 1], self.sigma[: t + 1])

    def get_config(self) -> dict[str, Any]:
        return {"alpha": self.alpha.tolist(), "sigma": self.sigma.tolist()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        return cls(**config)


def from_betas(betas: npt.ArrayLike) -> Schedule:
    """The variance-preserving schedule of given betas: alpha_t² = ∏ (1 − β_s), sigma_t² = 1 − alpha_t².

    Args:
        betas: array `(T,)` of numbers in (0, 1); `betas[0]` is β_1.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if a beta is outside (0, 1).

    Reference: Ho et al., 2020, Eq. 4.
    """
    betas = np.asarray(betas, "float64")
    _checks.require(betas.ndim == 1 and np.all((betas > 0) & (betas < 1)), "Expected betas (T,) in (0, 1)", betas=betas)
    log_alphas_cumprod = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    # Not 1 − ᾱ, which loses half of its digits if ᾱ is close to 1.
    return Schedule(np.exp(log_alphas_cumprod / 2), np.sqrt(-np.expm1(log_alphas_cumprod)))


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas that grow linearly.

    The end points are given for T = 1000 and scaled by 1000 / T, so that x_T is noise for any T.

    Args:
        timesteps: T, at least 25. With fewer steps the last betas would be too large.
        beta_start: β_1 at T = 1000.
        beta_end: β_T at T = 1000.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not an integer of at least 25, or a beta is outside (0, 1).

    Reference: Ho et al., 2020, section 4.
    """
    _checks.require(_checks.is_count(timesteps, 25), "Use `cosine` for fewer than 25 steps", timesteps=timesteps)
    scale = 1000 / timesteps
    return from_betas(np.linspace(beta_start * scale, beta_end * scale, timesteps))


def cosine(timesteps: int = 1000, offset: float = 0.008) -> Schedule:
    """ᾱ_t falls like a squared cosine; betas are capped at 0.999.

    Args:
        timesteps: T.
        offset: keeps the first betas from vanishing (s in the paper).

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer or `offset` is negative.

    Reference: Nichol and Dhariwal, 2021, Eq. 17.
    """
    _checks.counts(timesteps=timesteps)
    _checks.require(_checks.is_between(offset, 0, np.inf), "`offset` must be 0 or more", offset=offset)
    time = np.linspace(0, 1, timesteps + 1)
    return _from_alphas_cumprod(np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2)


def sigmoid(timesteps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """ᾱ_t falls like a sigmoid, steeper in the middle than `cosine`; betas are capped at 0.999.

    Args:
        timesteps: T.
        start: argument of the sigmoid at t = 0.
        end: argument of the sigmoid at t = T.
        tau: temperature; a smaller value makes the schedule steeper.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer, `end` is not above `start`, `tau` is not positive, or the
            schedule is so steep that the signal does not fall at every step.

    Reference: Jabri et al., 2022; Chen, 2023, algorithm 1.
    """
    _checks.counts(timesteps=timesteps)
    valid = all(_checks.is_between(value, -np.inf, np.inf) for value in (start, end, tau)) and start < end and tau > 0
    _checks.require(valid, "Expected start < end and tau > 0", start=start, end=end, tau=tau)
    values = 1 / (1 + np.exp(np.linspace(start, end, timesteps + 1) / tau))
    return _from_alphas_cumprod((values - values[-1]) / (values[0] - values[-1]))


def straight(timesteps: int = 1000) -> Schedule:
    """The straight line from data to noise of rectified flows: alpha_t = 1 − t/T and sigma_t = t/T.

    The signal is 0 at T. The matching target is the velocity ε − x_0, `prediction="flow"`.

    Args:
        timesteps: T.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer.

    Reference: Liu et al., 2022, Eq. 1; Lipman et al., 2023, Eq. 20.
    """
    _checks.counts(timesteps=timesteps)
    time = np.linspace(0, 1, timesteps + 1)
    return Schedule(1 - time, time)


def input_scaled(schedule: Schedule, scale: float) -> Schedule:
    """The schedule for data multiplied by `scale`: the log-SNR is shifted by 2 log(scale) at every t.

    The data stay in [-1, 1]; the scale is part of the schedule. x_t keeps its size: alpha_t² + sigma_t², or
    alpha_t + sigma_t for a straight schedule, remains 1.

    Args:
        schedule: a variance-preserving or straight `Schedule`.
        scale: a value below 1 gives more noise, above 1 less.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `scale` is not positive, or `schedule` is neither variance-preserving nor straight.

    Reference: Chen, 2023, strategy 2, which divides x_t by its standard deviation. The two are equal for data of
        variance 1.
    """
    _checks.require(_checks.is_positive(scale), "`scale` must be positive", scale=scale)
    is_straight = isinstance(schedule, Schedule) and np.allclose(schedule.alpha + schedule.sigma, 1)
    if not is_straight:
        _check_variance_preserving(schedule)
    alpha, sigma = scale * schedule.alpha, schedule.sigma
    norm = alpha + sigma if is_straight else np.hypot(alpha, sigma)
    return Schedule(alpha / norm, sigma / norm)


def shifted(schedule: Schedule, image_size: float, reference_size: float = 64) -> Schedule:
    """The schedule for images of another size: `input_scaled` by `reference_size / image_size`.

    The same noise hides less of a larger image. The log-SNR is shifted by 2 log(reference_size / image_size).

    Args:
        schedule: a variance-preserving or straight `Schedule` made for images of `reference_size`.
        image_size: side of the images in pixels.
        reference_size: side of the images that the schedule was made for.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if a size is not positive, or `schedule` is neither variance-preserving nor straight.

    Reference: Hoogeboom et al., 2023 ("simple diffusion"), section 3.1; for the straight line Esser et al., 2024,
        Eq. 23.
    """
    sizes = {"image_size": image_size, "reference_size": reference_size}
    _checks.require(all(map(_checks.is_positive, sizes.values())), "Sizes must be positive", **sizes)
    return input_scaled(schedule, reference_size / image_size)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha shifted and scaled so that x_T is pure noise and alpha_1 does not change.

    Requires a target that contains x_0: `prediction="v"`, "x0" or "flow".

    Args:
        schedule: a variance-preserving `Schedule` of at least two steps.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `schedule` is not variance-preserving or has one step.

    Reference: Lin et al., 2024, algorithm 1.
    """
    _check_variance_preserving(schedule)
    _checks.require(schedule.timesteps > 1, "A schedule of one step cannot be rescaled to end in noise")
    alpha = schedule.alpha.copy()
    alpha[1:] = alpha[1] * (alpha[1:] - alpha[-1]) / (alpha[1] - alpha[-1])
    alpha[1] = schedule.alpha[1]
    return Schedule(alpha, np.sqrt((1 - alpha) * (1 + alpha)))


def _from_alphas_cumprod(alphas_cumprod: np.ndarray) -> Schedule:
    _checks.require(np.all(np.diff(alphas_cumprod) < 0), "The signal must fall at every step: make it less steep")
    return from_betas(np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999))


def _check_variance_preserving(schedule: Schedule) -> None:
    valid = isinstance(schedule, Schedule) and np.allclose(schedule.alpha**2 + schedule.sigma**2, 1)
    _checks.require(valid, "Expected a variance-preserving `Schedule`, alpha² + sigma² = 1", schedule=schedule)
