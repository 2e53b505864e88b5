"""The diffusion process: how it adds noise to data, and what a network can predict from the result.

With x_t = alpha_t x_0 + sigma_t ε, every common target of a network is linear in the data and the noise:

    y = a x_0 + b ε

Eliminating ε recovers the data from any such target:

    x_0 = (b x_t − sigma_t y) / (b alpha_t − a sigma_t)

To add a prediction type, add its pair (a, b) to `PREDICTIONS`.
"""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_ddpm import _checks, schedules

__all__ = ["PREDICTIONS", "GaussianDiffusion", "posterior_coefficients"]

Tensor = Any  # a tensor of the backend, or an array or number that Keras converts to one

PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans and Ho, 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al., 2023, Eq. 21: the velocity of the straight line
}


def posterior_coefficients(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> tuple[Tensor, ...]:
    """q(x_s | x_t, x_0) for s < t: the factors of x_0 and x_t in its mean, and its variance.

    `alpha_t`, `sigma_t`, `alpha_s` and `sigma_s` are numbers, arrays or tensors.

    Reference: Kingma et al., 2021, appendix A; with s = t − 1, Ho et al., 2020, Eq. 7.
    """
    ratio = alpha_t / alpha_s
    variance_s, variance_t = sigma_s**2, sigma_t**2
    variance_t_given_s = variance_t - ratio**2 * variance_s
    from_x_0, from_x_t = alpha_s * variance_t_given_s / variance_t, ratio * variance_s / variance_t
    return from_x_0, from_x_t, variance_t_given_s * variance_s / variance_t


@keras.saving.register_keras_serializable(package="keras_ddpm")
class GaussianDiffusion:
    """The forward process q, its posterior, and the meaning of the network's output.

    Shapes: `x_0`, `x_t`, `noise` and `y` have the same shape `(batch, ...)`; `t` and `s` are `(batch,)` integers in
    0..T. The methods accept NumPy arrays and tensors and return float32 tensors.

    Example:

    >>> diffusion = GaussianDiffusion(schedules.linear(1000), prediction="v")
    >>> x_t = diffusion.q_sample(x_0, t, noise)
    >>> x_0 = diffusion.predict_x0(x_t, t, diffusion.target(x_0, t, noise))

    Args:
        schedule: a `schedules.Schedule` or an array of betas. The default is `schedules.linear(1000)`.
        prediction: what the network predicts: "epsilon" (the noise), "x0" (the data), "v" (alpha ε − sigma x_0) or
            "flow" (ε − x_0).
        clip_range: range `(low, high)` of the data, to which `predict_x0` clips, or `None` for data without bounds.
        x0_error: root mean squared error r of an x_0 that is predicted from little noise. A network that predicts x_0
            itself errs however little noise there is. Where x_t / alpha has less, with standard deviation
            s = sigma / alpha, it is the better estimate. So `predict_x0` weighs both by their precision: that of the
            network by s² / (r² + s²), and x_t / alpha by r² / (r² + s²). 0 leaves the network's.

    Raises:
        ValueError: if an argument is invalid, or x_0 cannot be recovered from the prediction at some step of the
            schedule.
    """

    def __init__(
        self,
        schedule: schedules.Schedule | npt.ArrayLike | None = None,
        prediction: str = "epsilon",
        clip_range: tuple[float, float] | None = (-1.0, 1.0),
        x0_error: float = 0.0,
    ) -> None:
        valid = schedule is None or isinstance(schedule, schedules.Schedule) or np.ndim(schedule) == 1
        needed = "Expected a `Schedule`, such as `schedules.cosine(1000)`, or an array of betas"
        _checks.require(valid, needed, schedule=schedule)
        if not isinstance(schedule, schedules.Schedule):
            schedule = schedules.linear() if schedule is None else schedules.from_betas(schedule)
        _checks.require(prediction in [*PREDICTIONS], f"Expected one of {[*PREDICTIONS]}", prediction=prediction)
        valid = clip_range is None or isinstance(clip_range, (tuple, list)) and len(clip_range) == 2
        valid = valid and (clip_range is None or all(_checks.is_between(end, -np.inf, np.inf) for end in clip_range))
        valid = valid and (clip_range is None or clip_range[0] < clip_range[1])
        _checks.require(valid, "`clip_range` must be (low, high) or None", clip_range=clip_range)
        _checks.require(_checks.is_between(x0_error, 0, np.inf), "`x0_error` must be 0 or more", x0_error=x0_error)
        self.schedule = schedule
        self.prediction = prediction
        self.x0_error = x0_error
        self.clip_range = None if clip_range is None else tuple(clip_range)

        alpha, sigma = schedule.alpha, schedule.sigma
        a, b = (np.broadcast_to(factor, alpha.shape) for factor in PREDICTIONS[prediction](alpha, sigma))
        determinant = b * alpha - a * sigma
        hint = f"No x_0 from {prediction!r} at t = {self.timesteps}, without signal; use 'v', 'x0' or 'flow'"
        _checks.require(np.all(determinant[1:]), hint)
        self._scales = np.stack([alpha, sigma], axis=1)
        self._target = np.stack([a, b], axis=1)
        self._x0 = np.stack([np.ones_like(alpha), np.zeros_like(alpha)], axis=1)  # t = 0: x_t is x_0
        self._x0[1:] = np.stack([b, -sigma], axis=1)[1:] / determinant[1:, None]
        if x0_error:
            both = (x0_error * alpha) ** 2 + sigma**2
            self._x0 *= (sigma**2 / both)[:, None]
            self._x0[:, 0] += x0_error**2 * alpha / both

    def __repr__(self) -> str:
        return f"GaussianDiffusion({self.schedule}, prediction={self.prediction!r}, clip_range={self.clip_range})"

    @property
    def timesteps(self) -> int:
        """T, the number of steps."""
        return self.schedule.timesteps

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t for t = 0..T, a float64 array `(T + 1,)` with ᾱ_0 = 1."""
        return self.schedule.alpha**2

    def scales(self, t: Tensor, x: Tensor) -> list[Tensor]:
        """Returns alpha_t and sigma_t, shaped `(batch, 1, ..., 1)` to broadcast against `x`."""
        return self._gather(self._scales, t, x)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t ~ q(x_t | x_0) for the given noise. [Ho et al., 2020, Eq. 4]"""
        return self._combine(self._scales, t, x_0, noise)

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns what the network should predict at x_t = `q_sample(x_0, t, noise)`."""
        return self._combine(self._target, t, x_0, noise)

    def predict_x0(
        self, x_t: Tensor, t: Tensor, y: Tensor, dynamic_threshold: Tensor | None = None, clip: bool = True
    ) -> Tensor:
        """Returns the x_0 that the network's output `y` at x_t stands for.

        Args:
            x_t: noisy data.
            t: time of `x_t`.
            y: output of the network.
            dynamic_threshold: p in (0, 1), a number or a scalar tensor. For each example, the clipping range is widened
                until the share p of its values lies inside, and the result is scaled back to `clip_range`.
                It has no effect without clipping. [Saharia et al., 2022, section 2.3]
            clip: whether to clip the result to `clip_range`.

        Returns:
            A tensor shaped like `x_t`.
        """
        x_0 = self._combine(self._x0, t, x_t, y)
        if self.clip_range is None or not clip:
            return x_0
        low, high = self.clip_range
        if dynamic_threshold is None:
            return ops.clip(x_0, low, high)
        middle, half = (low + high) / 2, (high - low) / 2
        x_0 = (x_0 - middle) / half
        axes = tuple(range(1, len(x_0.shape)))
        threshold = ops.maximum(ops.quantile(ops.abs(x_0), dynamic_threshold, axis=axes, keepdims=True), 1.0)
        return middle + half * ops.clip(x_0, -threshold, threshold) / threshold

    def predict_noise(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """Returns ε = (x_t − alpha_t x_0) / sigma_t for t >= 1. At t = 0 there is no noise."""
        self._check(t, low=1)
        x_t, x_0 = _float32(x_t), _float32(x_0)
        alpha_t, sigma_t = self.scales(t, x_t)
        return (x_t - alpha_t * x_0) / sigma_t

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s | x_t, x_0) for any s < t. [Ho et al., 2020, Eq. 6-7 at s = t − 1]

        Returns:
            The mean, shaped like `x_t`, and the variance, `(batch, 1, ..., 1)`.

        Raises:
            ValueError: if s or t is neither a tensor nor an integer in 0..T, or s >= t somewhere.
        """
        if self._check(t, low=1) and self._check(s):
            _checks.require(np.all(np.less(s, t)), "`s` must be smaller than `t`", s=s, t=t)
        x_0, x_t = _float32(x_0), _float32(x_t)
        from_x_0, from_x_t, variance = posterior_coefficients(*self.scales(t, x_t), *self.scales(s, x_t))
        return from_x_0 * x_0 + from_x_t * x_t, variance

    def min_snr_weight(self, gamma: float = 5.0) -> np.ndarray:
        """Loss weights that are min(SNR, γ) for the squared error of x_0. [Hang et al., 2023, section 3.4]

        They are converted to weights for the squared error of this prediction.

        Args:
            gamma: the largest weight of the squared error of x_0.

        Returns:
            float64 array `(T + 1,)`, 0 at t = 0, for `DiffusionModel(loss_weight=...)`.

        Raises:
            ValueError: if `gamma` is not positive.
        """
        _checks.require(_checks.is_positive(gamma), "`gamma` must be positive", gamma=gamma)
        return np.minimum(self._snr(), gamma) * self.x0_weight()

    def p2_weight(self, k: float = 1.0, gamma: float = 1.0) -> np.ndarray:
        """Loss weights that are (k + SNR)^−γ for the squared error of the noise. [Choi et al., 2022, Eq. 8]

        They are converted to weights for the squared error of this prediction.

        Args:
            k: keeps the weights finite if the SNR is 0.
            gamma: a larger value gives less weight to times of high SNR, whose noise is hardly visible. 0 gives the
                simple loss.

        Returns:
            float64 array `(T + 1,)`, 0 at t = 0, for `DiffusionModel(loss_weight=...)`.

        Raises:
            ValueError: if `k` is not positive or `gamma` is negative.
        """
        _checks.require(_checks.is_positive(k), "`k` must be positive", k=k)
        _checks.require(_checks.is_between(gamma, 0, np.inf), "`gamma` must be 0 or more", gamma=gamma)
        snr = self._snr()
        return snr * (k + snr) ** -gamma * self.x0_weight()

    def x0_coefficients(self) -> np.ndarray:
        """The factors of x_t and of the network's output y in x_0, before clipping, float64 `(T + 1, 2)`."""
        return self._x0.copy()

    def x0_weight(self) -> np.ndarray:
        """Loss weights that turn the squared error of the network's output into that of x_0, float64 `(T + 1,)`."""
        return self._x0[:, 1] ** 2

    def _snr(self) -> np.ndarray:
        """The signal-to-noise ratio, with the value of t = 1 instead of ∞ at t = 0."""
        snr = np.exp(self.schedule.log_snr)
        snr[0] = snr[1]
        return snr

    def _combine(self, table: np.ndarray, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x, y = _float32(x), _float32(y)
        from_x, from_y = self._gather(table, t, x)
        return from_x * x + from_y * y

    def _check(self, t: Tensor, low: int = 0) -> bool:
        """Raises ValueError if t is neither a tensor nor an integer in low..T. Returns whether it was checked.

        The values of a tensor may be unknown or on an accelerator.
        """
        if not isinstance(t, (int, float, list, tuple, np.ndarray, np.generic)):
            return False
        times = np.asarray(t)
        valid = times.dtype.kind in "iu" and np.all((times >= low) & (times <= self.timesteps))
        _checks.require(valid, f"`t` must hold integers in {low}..{self.timesteps}", t=t)
        return True

    def _gather(self, table: np.ndarray, t: Tensor, x: Tensor) -> list[Tensor]:
        """The rows t of a float64 table in float32: one tensor per column, which broadcasts against `x`."""
        self._check(t)
        rows = ops.take(ops.convert_to_tensor(table, "float32"), ops.convert_to_tensor(t, "int32"), axis=0)
        shape = (-1,) + (1,) * (len(x.shape) - 1)
        return [ops.reshape(rows[..., column], shape) for column in range(table.shape[1])]

    def get_config(self) -> dict[str, Any]:
        schedule = keras.saving.serialize_keras_object(self.schedule)
        rest = {name: getattr(self, name) for name in ("prediction", "clip_range", "x0_error")}
        return {"schedule": schedule, **rest}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GaussianDiffusion":
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


def _float32(x: Tensor) -> Tensor:
    return ops.convert_to_tensor(x, "float32")
