"""The diffusion process: what it does to data, and what a network may predict about it.

With x_t = alpha_t x_0 + sigma_t ε, every common target of a network is linear in the data and the noise,

    y = a x_0 + b ε

and eliminating ε gives the data back from any of them:

    x_0 = (b x_t − sigma_t y) / (b alpha_t − a sigma_t)

To add a prediction type, add its pair (a, b) to `PREDICTIONS`.
"""

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import schedules

PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans and Ho, 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al., 2023, Eq. 21: the velocity of the straight line
}


def posterior_coefficients(alpha_t, sigma_t, alpha_s, sigma_s):
    """q(x_s | x_t, x_0) for s < t: the factors of x_0 and of x_t in its mean, and its variance.

    Args may be numbers, arrays or tensors.

    Reference: Kingma et al., 2021, appendix A; with s = t − 1, Ho et al., 2020, Eq. 7.
    """
    ratio = alpha_t / alpha_s
    variance_s, variance_t = sigma_s**2, sigma_t**2
    variance_t_given_s = variance_t - ratio**2 * variance_s
    return (
        alpha_s * variance_t_given_s / variance_t,
        ratio * variance_s / variance_t,
        variance_t_given_s * variance_s / variance_t,
    )


@keras.saving.register_keras_serializable(package="keras_ddpm")
class GaussianDiffusion:
    """The forward process q, its posterior, and the meaning of the network's output.

    Shapes: `x_0`, `x_t`, `noise` and `y` are `(batch, ...)` of one shape; `t` and `s` are `(batch,)` integers in
    0..T. NumPy arrays and tensors are accepted; results are float32 tensors.

    Example:

    >>> diffusion = GaussianDiffusion(schedules.linear(1000), prediction="v")
    >>> x_t = diffusion.q_sample(x_0, t, noise)
    >>> x_0 = diffusion.predict_x0(x_t, t, diffusion.target(x_0, t, noise))

    Args:
        schedule: a `schedules.Schedule`, or an array of betas; by default `schedules.linear(1000)`.
        prediction: what the network predicts: "epsilon" (the noise), "x0" (the data), "v" (alpha ε − sigma x_0) or
            "flow" (ε − x_0).
        clip_range: `(low, high)` of the data, to which `predict_x0` clips, or `None` for data without bounds.

    Raises:
        ValueError: for an unknown prediction type, a range that is none, or a prediction type from which x_0
            cannot be recovered at some step of the schedule.
    """

    def __init__(self, schedule=None, prediction="epsilon", clip_range=(-1.0, 1.0)):
        if schedule is None:
            schedule = schedules.linear()
        elif isinstance(schedule, str):
            raise ValueError(f"`schedule` must be a `Schedule` or an array of betas. Received: schedule={schedule!r}")
        elif not isinstance(schedule, schedules.Schedule):
            schedule = schedules.from_betas(schedule)
        if prediction not in list(PREDICTIONS):
            raise ValueError(f"`prediction` must be one of {sorted(PREDICTIONS)}. Received: prediction={prediction!r}")
        if clip_range is not None and not (len(clip_range) == 2 and clip_range[0] < clip_range[1]):
            raise ValueError(f"`clip_range` must be (low, high) or None. Received: clip_range={clip_range}")
        self.schedule = schedule
        self.prediction = prediction
        self.clip_range = None if clip_range is None else tuple(clip_range)

        alpha, sigma = schedule.alpha, schedule.sigma
        a, b = (np.broadcast_to(factor, alpha.shape) for factor in PREDICTIONS[prediction](alpha, sigma))
        determinant = b * alpha - a * sigma
        lost = np.flatnonzero(determinant[1:] == 0)
        if lost.size:
            raise ValueError(
                f"x_0 cannot be recovered from {prediction!r} at t = {lost[0] + 1}, where the schedule's signal is 0; "
                "use a prediction that holds x_0: 'v', 'x0' or 'flow'."
            )
        from_x_t, from_y = np.ones_like(alpha), np.zeros_like(alpha)  # as it is at t = 0, for any type
        from_x_t[1:], from_y[1:] = b[1:] / determinant[1:], -sigma[1:] / determinant[1:]
        self._scales = np.stack([alpha, sigma], axis=1)
        self._target = np.stack([a, b], axis=1)
        self._x0 = np.stack([from_x_t, from_y], axis=1)

    @property
    def timesteps(self):
        """T, the number of steps."""
        return self.schedule.timesteps

    @property
    def alphas_cumprod(self):
        """ᾱ_t for t = 0..T, a float64 array `(T + 1,)` with ᾱ_0 = 1."""
        return self.schedule.alpha**2

    def scales(self, t, x):
        """alpha_t and sigma_t, shaped `(batch, 1, ..., 1)` to broadcast against `x`."""
        return self._gather(self._scales, t, x)

    def q_sample(self, x_0, t, noise):
        """x_t ~ q(x_t | x_0), given the noise. [Ho et al., 2020, Eq. 4]"""
        return self._combine(self._scales, t, x_0, noise)

    def target(self, x_0, t, noise):
        """What the network is to predict at x_t = `q_sample(x_0, t, noise)`."""
        return self._combine(self._target, t, x_0, noise)

    def predict_x0(self, x_t, t, y, dynamic_threshold=None, clip=True):
        """The data that the network's output `y` at x_t stands for, clipped to `clip_range` unless `clip` is false.

        With a `dynamic_threshold` p in (0, 1), the range is widened in each example until the share p of its values
        lies inside, and the result is shrunk to `clip_range`. [Saharia et al., 2022, section 2.3]
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

    def predict_noise(self, x_t, t, x_0):
        """ε = (x_t − alpha_t x_0) / sigma_t, for t >= 1 (at t = 0 there is none)."""
        x_t, x_0 = _float32(x_t), _float32(x_0)
        alpha_t, sigma_t = self.scales(t, x_t)
        return (x_t - alpha_t * x_0) / sigma_t

    def q_posterior(self, x_0, x_t, t, s):
        """Mean and variance of q(x_s | x_t, x_0) for any s < t. [Ho et al., 2020, Eq. 6-7 at s = t − 1]

        Returns:
            The mean, shaped like `x_t`, and the variance, `(batch, 1, ..., 1)`.
        """
        x_0, x_t = _float32(x_0), _float32(x_t)
        from_x_0, from_x_t, variance = posterior_coefficients(*self.scales(t, x_t), *self.scales(s, x_t))
        return from_x_0 * x_0 + from_x_t * x_t, variance

    def min_snr_weight(self, gamma=5.0):
        """Weights of the loss of x_0, min(SNR, γ), expressed for this prediction. [Hang et al., 2023, section 3.4]

        Args:
            gamma: the largest weight of the squared error of x_0.

        Returns:
            float64 array `(T + 1,)`, 0 at t = 0, for `DiffusionModel(loss_weight=...)`.

        Raises:
            ValueError: if `gamma` is not positive.
        """
        if not _checks.is_positive(gamma):
            raise ValueError(f"`gamma` must be positive. Received: gamma={gamma!r}")
        return np.minimum(self._snr(), gamma) * self._x0[:, 1] ** 2

    def p2_weight(self, k=1.0, gamma=1.0):
        """Weights of the loss of the noise, (k + SNR)^−γ, expressed for this prediction. [Choi et al., 2022, Eq. 8]

        Args:
            k: keeps the weights finite where there is no signal.
            gamma: how strongly late steps of sampling, which clean up, are weighted down; 0 is the simple loss.

        Returns:
            float64 array `(T + 1,)`, 0 at t = 0, for `DiffusionModel(loss_weight=...)`.

        Raises:
            ValueError: if `k` is not positive or `gamma` negative.
        """
        if not (_checks.is_positive(k) and _checks.is_between(gamma, 0, np.inf)):
            raise ValueError(f"Expected k > 0 and gamma >= 0. Received: k={k!r}, gamma={gamma!r}")
        snr = self._snr()
        return snr * (k + snr) ** -gamma * self._x0[:, 1] ** 2

    def _snr(self):
        """The signal-to-noise ratio, at t = 0 that of t = 1 in place of ∞."""
        snr = np.exp(self.schedule.log_snr)
        snr[0] = snr[1]
        return snr

    def _combine(self, table, t, x, y):
        x, y = _float32(x), _float32(y)
        from_x, from_y = self._gather(table, t, x)
        return from_x * x + from_y * y

    def _gather(self, table, t, x):
        """The rows t of a float64 table, cast to float32, one tensor a column."""
        rows = ops.take(ops.convert_to_tensor(table, "float32"), ops.convert_to_tensor(t, "int32"), axis=0)
        shape = (-1,) + (1,) * (len(x.shape) - 1)
        return [ops.reshape(rows[..., column], shape) for column in range(table.shape[1])]

    def get_config(self):
        return {
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "prediction": self.prediction,
            "clip_range": self.clip_range,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


def _float32(x):
    return ops.convert_to_tensor(x, "float32")
