"""Noise schedules: how much signal and how much noise x_t holds.

A schedule is two arrays of length T + 1, for t = 0..T, in

    x_t = alpha_t x_0 + sigma_t ε,   ε ~ N(0, I)

t = 0 is clean data (alpha_0 = 1, sigma_0 = 0); t = 1..T are the steps of the papers. Most published code
counts from 0: its t is ours minus 1.

`alpha` and `sigma` are the scales of signal and noise, as in VDM, DPM-Solver and EDM. The α_t of Ho et al. (2020)
is something else, 1 − β_t; their ᾱ_t is our alpha_t².

To add a schedule, write a function that returns a `Schedule`: `from_betas` makes the variance-preserving ones.
"""

import dataclasses

import keras
import numpy as np

from keras_ddpm import _checks


@keras.saving.register_keras_serializable(package="keras_ddpm")
@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The scales of signal and noise at t = 0..T.

    Attributes:
        alpha: float64 array `(T + 1,)`, scale of the signal; `alpha[0] == 1`.
        sigma: float64 array `(T + 1,)`, scale of the noise; `sigma[0] == 0`.

    alpha / sigma falls at every step; it may end at 0.

    Raises:
        ValueError: if the arrays are no schedule.
    """

    alpha: np.ndarray
    sigma: np.ndarray

    def __post_init__(self):
        for name in ("alpha", "sigma"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), "float64"))
        shape = self.alpha.shape
        if len(shape) != 1 or shape[0] < 2 or shape != self.sigma.shape:
            raise ValueError(
                "A schedule needs alpha and sigma of one length, T + 1 with T at least 1. "
                f"Received: shapes {shape} and {self.sigma.shape}"
            )
        if self.alpha[0] != 1.0 or self.sigma[0] != 0.0:
            raise ValueError(
                "A schedule starts at clean data, with alpha[0] = 1 and sigma[0] = 0. "
                f"Received: alpha[0]={self.alpha[0]}, sigma[0]={self.sigma[0]}"
            )
        finite = np.all(np.isfinite([self.alpha, self.sigma])) and np.all(self.alpha >= 0)
        if not finite or np.any(self.alpha[1:] * self.sigma[:-1] >= self.alpha[:-1] * self.sigma[1:]):
            raise ValueError("In a schedule alpha / sigma falls at every step, and both are finite and never negative.")

    @property
    def timesteps(self):
        """T, the number of steps."""
        return len(self.alpha) - 1

    @property
    def log_snr(self):
        """log(alpha_t² / sigma_t²), the log signal-to-noise ratio: ∞ at t = 0, −∞ where there is no signal."""
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))

    def until(self, t):
        """The schedule of the steps 1..t alone."""
        return Schedule(self.alpha[: t + 1], self.sigma[: t + 1])

    def get_config(self):
        return {"alpha": self.alpha.tolist(), "sigma": self.sigma.tolist()}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def from_betas(betas):
    """The variance-preserving schedule of some betas: alpha_t² = ∏ (1 − β_s), sigma_t² = 1 − alpha_t².

    Args:
        betas: array `(T,)`, each in (0, 1); `betas[0]` is β_1.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if a beta is outside (0, 1).

    Reference: Ho et al., 2020, Eq. 4.
    """
    betas = np.asarray(betas, "float64")
    if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"`betas` must be one row of numbers in (0, 1). Received: {betas}")
    log_alphas_cumprod = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])
    # expm1, because 1 − ᾱ loses half of its digits where ᾱ is close to 1.
    return Schedule(np.exp(log_alphas_cumprod / 2), np.sqrt(-np.expm1(log_alphas_cumprod)))


def linear(timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """Betas that grow linearly.

    The end points belong to T = 1000 and are scaled by 1000 / T, so that x_T is noise for any T.

    Args:
        timesteps: T, at least 25: with fewer the last betas would be too large.
        beta_start: β_1 at T = 1000.
        beta_end: β_T at T = 1000.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is below 25 or no integer.

    Reference: Ho et al., 2020, section 4.
    """
    _check_timesteps(timesteps)
    if timesteps < 25:
        raise ValueError(f"A linear schedule needs 25 steps or more; use `cosine`. Received: timesteps={timesteps}")
    scale = 1000 / timesteps
    return from_betas(np.linspace(beta_start * scale, beta_end * scale, timesteps))


def cosine(timesteps=1000, offset=0.008):
    """ᾱ_t falls as a squared cosine; betas are capped at 0.999.

    Args:
        timesteps: T.
        offset: keeps the first betas from vanishing (s in the paper).

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer or `offset` negative.

    Reference: Nichol and Dhariwal, 2021, Eq. 17.
    """
    _check_timesteps(timesteps)
    if not _checks.is_between(offset, 0, np.inf):
        raise ValueError(f"`offset` must be 0 or more. Received: offset={offset!r}")
    time = np.linspace(0, 1, timesteps + 1)
    return _from_alphas_cumprod(np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2)


def sigmoid(timesteps=1000, start=-3.0, end=3.0, tau=1.0):
    """ᾱ_t falls as a sigmoid, steeper in the middle than `cosine`; betas are capped at 0.999.

    Args:
        timesteps: T.
        start: where on the sigmoid t = 0 lies.
        end: where t = T lies.
        tau: temperature; the smaller, the steeper.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer, `end` not above `start` or `tau` not above 0.

    Reference: Jabri et al., 2022; Chen, 2023, algorithm 1.
    """
    _check_timesteps(timesteps)
    if not (_checks.is_between(start, -np.inf, end) and start < end and _checks.is_positive(tau)):
        raise ValueError(f"Expected start < end and tau > 0. Received: start={start!r}, end={end!r}, tau={tau!r}")
    values = 1 / (1 + np.exp(np.linspace(start, end, timesteps + 1) / tau))
    return _from_alphas_cumprod((values - values[-1]) / (values[0] - values[-1]))


def straight(timesteps=1000):
    """The straight line from data to noise, alpha_t = 1 − t/T and sigma_t = t/T, of rectified flows.

    Its signal is 0 at T. The target that belongs to it is `prediction="flow"`, the velocity ε − x_0.

    Args:
        timesteps: T.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if `timesteps` is not a positive integer.

    Reference: Liu et al., 2022, Eq. 1; Lipman et al., 2023, Eq. 20.
    """
    _check_timesteps(timesteps)
    time = np.linspace(0, 1, timesteps + 1)
    return Schedule(1 - time, time)


def input_scaled(schedule, scale):
    """The schedule of data multiplied by `scale`: the log-SNR is shifted by 2 log(scale) at every t.

    x_t keeps its size (alpha_t² + sigma_t², or alpha_t + sigma_t, stays 1), so that data stay in [-1, 1].

    Args:
        schedule: a variance-preserving or a straight `Schedule`.
        scale: below 1 for more noise, above 1 for less.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if the scale is not positive or the schedule of another kind.

    Reference: Chen, 2023, strategy 2; equal to it for data of variance 1, where x_t is divided by its deviation.
    """
    if not isinstance(schedule, Schedule) or not _checks.is_positive(scale):
        raise ValueError(f"Expected a `Schedule` and a positive number. Received: {schedule!r} and {scale!r}")
    alpha, sigma = scale * schedule.alpha, schedule.sigma
    if np.allclose(schedule.alpha + schedule.sigma, 1):
        norm = alpha + sigma
    else:
        _check_variance_preserving(schedule)
        norm = np.hypot(alpha, sigma)
    return Schedule(alpha / norm, sigma / norm)


def shifted(schedule, image_size, reference_size=64):
    """The schedule for images of another size, at which the same noise would hide less: `input_scaled`, by sizes.

    The log-SNR is shifted by 2 log(reference_size / image_size).

    Args:
        schedule: a `Schedule` made for images of `reference_size`.
        image_size: side of the images in pixels.
        reference_size: side of the images for which the schedule was made.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: as `input_scaled`.

    Reference: Hoogeboom et al., 2023 ("simple diffusion"), section 3.1; for the straight line Esser et al., 2024,
        Eq. 23.
    """
    if not (_checks.is_positive(image_size) and _checks.is_positive(reference_size)):
        raise ValueError(
            f"Sizes must be positive. Received: image_size={image_size!r}, reference_size={reference_size!r}"
        )
    return input_scaled(schedule, reference_size / image_size)


def zero_terminal_snr(schedule):
    """The schedule shifted and scaled in alpha so that x_T is nothing but noise; alpha_1 stays.

    Needs a target that holds x_0: `prediction="v"` or "x0".

    Args:
        schedule: a variance-preserving `Schedule` of two steps or more.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: if the schedule is of another kind.

    Reference: Lin et al., 2024, algorithm 1.
    """
    _check_variance_preserving(schedule)
    if schedule.timesteps < 2:
        raise ValueError("A schedule of one step cannot be rescaled to end in noise.")
    alpha = schedule.alpha.copy()
    alpha[1:] = alpha[1] * (alpha[1:] - alpha[-1]) / (alpha[1] - alpha[-1])
    alpha[1] = schedule.alpha[1]
    return Schedule(alpha, np.sqrt((1 - alpha) * (1 + alpha)))


def _from_alphas_cumprod(alphas_cumprod):
    if not np.all(np.diff(alphas_cumprod) < 0):
        raise ValueError("With these arguments the signal does not fall at every step: make the schedule less steep.")
    return from_betas(np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999))


def _check_variance_preserving(schedule):
    if not isinstance(schedule, Schedule) or not np.allclose(schedule.alpha**2 + schedule.sigma**2, 1):
        raise ValueError(f"Expected a variance-preserving `Schedule`, alpha² + sigma² = 1. Received: {schedule!r}")


def _check_timesteps(timesteps):
    if not _checks.is_count(timesteps):
        raise ValueError(f"`timesteps` must be a positive integer. Received: timesteps={timesteps!r}")
