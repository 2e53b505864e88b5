"""The variational bound on the likelihood of images, in bits per dimension.

A model of T steps defines a distribution over images x_0 of 256 levels, and

    −log p(x_0) <= KL(q(x_T | x_0), p(x_T)) + Σ_{t=2..T} KL(q(x_{t−1} | x_t, x_0), p(x_{t−1} | x_t)) − log p(x_0 | x_1)

The last term is a decoder: the probability that a Gaussian variable rounds to the level of the image.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr

from keras_ddpm import _checks, images
from keras_ddpm.diffusion import posterior_coefficients
from keras_ddpm.model import DiffusionModel

__all__ = ["BitsPerDimension", "bits_per_dimension"]


@dataclasses.dataclass(frozen=True)
class BitsPerDimension:
    """The result of `bits_per_dimension`: averages over the images, all but `errors` in bits per dimension.

    Attributes:
        total: the bound, which is the sum of `prior` and `terms`.
        standard_error: standard error of `total`, from its deviation between images. NaN for a single image.
        prior: KL(q(x_T | x_0), p(x_T)), the term L_T.
        terms: `(T,)`. The decoder term L_0 first, then L_{t−1} for t = 2..T.
        errors: `(T,)`. The mean squared error of the predicted x_0 at t = 1..T.
    """

    total: float
    standard_error: float
    prior: float
    terms: np.ndarray
    errors: np.ndarray


def bits_per_dimension(
    model: DiffusionModel, x: ArrayLike, seed: int | None = 0, **options
) -> dict[str, BitsPerDimension]:
    """Computes the variational bound of a model on images. Each image is evaluated at all T times, with one noise each.

    The bound belongs to `samplers.DDPM(variance=...)` with all T steps. "small" is the variance of
    q(x_{t−1} | x_t, x_0), and "large" is beta_t, the variance of q(x_t | x_{t−1}). The decoder at t = 1 uses beta_1
    for "large". The small variance is 0 at t = 1, so the decoder uses its value at t = 2 for "small". (The code of
    the paper uses this value for both.)

    Args:
        model: a `DiffusionModel` of images in [-1, 1].
        x: images `(num, height, width, channels)` at the 256 levels of `images.from_uint8`.
        seed: seed of the noise, a non-negative integer. `None` draws one.
        **options: options of `DiffusionModel.denoise`, such as `labels`, `guidance_scale`, `use_ema`, `batch_size`.

    Returns:
        A dict with the keys "small" and "large" and a `BitsPerDimension` for each.

    Raises:
        ValueError: if the images have another shape or range or lie between the levels, the schedule has fewer than two
            steps, or the data of the model are not in [-1, 1].

    Reference: Ho et al., 2020, Eq. 5 and 13; Sohl-Dickstein et al., 2015.
    """
    diffusion, schedule = model.diffusion, model.diffusion.schedule
    _checks.require(diffusion.clip_range in (None, (-1, 1)), "Expected [-1, 1] data", clip_range=diffusion.clip_range)
    _checks.counts(low=2, timesteps=schedule.timesteps)
    seed = _checks.seed(seed)
    x = _checks.data(x, model.data_shape, (-1, 1), "x")
    level = images.to_uint8(x).astype("int32")
    _checks.require(np.allclose(x, images.from_uint8(level), 0, 1e-4), "`x` must hold 8-bit levels: see `to_uint8`")
    x = level / 127.5 - 1  # in float64

    def mean(values):
        """Averages over the dimensions of each image, in bits."""
        return values.reshape(len(x), -1).mean(axis=1) / np.log(2)

    alpha, sigma = schedule.alpha, schedule.sigma
    prior = mean(_divergence((alpha[-1] * x) ** 2, sigma[-1] ** 2, alpha[-1] ** 2 + sigma[-1] ** 2))
    random = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])  # independent of the noise of `sample`
    terms: dict[str, list[np.ndarray]] = {"small": [], "large": []}
    errors = np.empty(schedule.timesteps)
    for t in range(1, schedule.timesteps + 1):
        x_t = alpha[t] * x + sigma[t] * random.standard_normal(x.shape)
        x_0 = model.denoise(x_t, t, **options)
        errors[t - 1] = np.mean((x_0 - x) ** 2)
        large = sigma[t] ** 2 - (alpha[t] / alpha[t - 1]) ** 2 * sigma[t - 1] ** 2
        s = max(t, 2) - 1
        from_x_0, _, small = posterior_coefficients(alpha[s + 1], sigma[s + 1], alpha[s], sigma[s])
        distance = (from_x_0 * (x_0 - x)) ** 2
        for name, variance in {"small": small, "large": large}.items():
            nats = _divergence(distance, small, variance) if t > 1 else -_log_probability(level, x_0, variance**0.5)
            terms[name].append(mean(nats))
    found = {}
    for name, bits in terms.items():
        totals = prior + np.sum(bits, axis=0)
        error = float(np.std(totals, ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
        found[name] = BitsPerDimension(float(totals.mean()), error, float(prior.mean()), np.mean(bits, axis=1), errors)
    return found


def _divergence(squared_distance, variance_q, variance_p):
    """KL(q, p) of two Gaussians. `squared_distance` is the squared distance of their means."""
    ratio = variance_q / variance_p
    return 0.5 * (squared_distance / variance_p + ratio - 1 - np.log(ratio))


def _log_probability(level, mean, std):
    """Log probability that a variable of N(mean, std²) rounds to `level` in 0..255. [Ho et al., 2020, Eq. 13]"""
    low = np.where(level == 0, -np.inf, ((2 * level - 1) / 255 - 1 - mean) / std)
    high = np.where(level == 255, np.inf, ((2 * level + 1) / 255 - 1 - mean) / std)
    # Mirrored into the lower half, where the difference of the two probabilities keeps its digits.
    low, high = np.where(low + high > 0, (-high, -low), (low, high))
    from_low, to_high = log_ndtr(low), log_ndtr(high)
    return to_high + np.log1p(-np.exp(from_low - to_high))
