"""The variational bound on the likelihood of images, in bits per dimension.

A model of T steps is a distribution of images x_0 of 256 levels, and

    −log p(x_0) <= KL(q(x_T | x_0), p(x_T)) + Σ_{t=2..T} KL(q(x_{t−1} | x_t, x_0), p(x_{t−1} | x_t)) − log p(x_0 | x_1)

where the last term is a decoder: the probability of a level is that of a Gaussian's falling next to it.
"""

import dataclasses
import math

import numpy as np

from keras_ddpm import _checks
from keras_ddpm import images
from keras_ddpm import sampling
from keras_ddpm.diffusion import posterior_coefficients


@dataclasses.dataclass(frozen=True)
class BitsPerDimension:
    """What `bits_per_dimension` finds; everything but `errors` in bits per dimension, averaged over the images.

    Attributes:
        total: the bound, the sum of `prior` and `terms`.
        standard_error: of the total, from its deviation between images; NaN for one image.
        prior: KL(q(x_T | x_0), p(x_T)), the term L_T.
        terms: `(T,)`: that of the decoder, L_0, first, and then L_{t−1} for t = 2..T.
        errors: `(T,)`: mean squared error of the predicted x_0 at t = 1..T.
    """

    total: float
    standard_error: float
    prior: float
    terms: np.ndarray
    errors: np.ndarray


def bits_per_dimension(model, x, seed=0, **options):
    """The variational bound of a model for images, each at all T times with one noise.

    It is that of `samplers.DDPM(variance=...)` with all T steps: "small" is the variance of q(x_{t−1} | x_t, x_0) and
    "large" that of q(x_t | x_{t−1}), beta_t. The decoder at t = 1 has beta_1 for "large", and for "small", whose own is
    0 there, that at t = 2 (which the paper's code takes for both).

    Args:
        model: a `DiffusionModel` of images in [-1, 1].
        x: images `(num, height, width, channels)` at the 256 levels of `images.from_uint8`.
        seed: of the noise, a non-negative integer; `None` draws one.
        **options: of `DiffusionModel.denoise`: `labels`, `guidance_scale`, `use_ema`, `batch_size`, ...

    Returns:
        A dict from "small" and "large" to a `BitsPerDimension`.

    Raises:
        ValueError: for images of another shape or range or between the levels, fewer than two steps, or a model whose
            data are not in [-1, 1].

    Reference: Ho et al., 2020, Eq. 5 and 13; Sohl-Dickstein et al., 2015.
    """
    diffusion, schedule = model.diffusion, model.diffusion.schedule
    if diffusion.clip_range not in (None, (-1.0, 1.0)) or schedule.timesteps < 2:
        raise ValueError(
            "Expected a model of data in [-1, 1] and at least two steps. "
            f"Received: clip_range={diffusion.clip_range}, timesteps={schedule.timesteps}"
        )
    seed = sampling.checked_seed(seed)
    x = _checks.data(x, model.data_shape, (-1, 1), "x")
    level = images.to_uint8(x).astype("int32")
    if np.max(np.abs(x - images.from_uint8(level))) > 1e-4:
        raise ValueError("`x` must hold 8-bit levels: images.from_uint8(images.to_uint8(x)) rounds.")
    x = level / 127.5 - 1  # in float64

    def mean(values):
        """Over the dimensions of each image, in bits."""
        return values.reshape(len(x), -1).mean(axis=1) / np.log(2)

    alpha, sigma = schedule.alpha, schedule.sigma
    prior = mean(_divergence((alpha[-1] * x) ** 2, sigma[-1] ** 2, alpha[-1] ** 2 + sigma[-1] ** 2))
    random = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])  # no one else's stream of that seed
    terms, errors = {"small": [], "large": []}, []
    for t in range(1, schedule.timesteps + 1):
        x_t = alpha[t] * x + sigma[t] * random.standard_normal(x.shape)
        x_0 = model.denoise(x_t, t, **options)
        errors.append(np.mean((x_0 - x) ** 2))
        large = sigma[t] ** 2 - (alpha[t] / alpha[t - 1]) ** 2 * sigma[t - 1] ** 2
        s = max(t, 2) - 1
        from_x_0, _, small = posterior_coefficients(alpha[s + 1], sigma[s + 1], alpha[s], sigma[s])
        for name, of_p in {"small": small, "large": large}.items():
            if t == 1:
                terms[name].append(mean(-_log_probability(level, x_0, np.sqrt(of_p))))
            else:
                terms[name].append(mean(_divergence((from_x_0 * (x_0 - x)) ** 2, small, of_p)))
    found = {}
    for variance, of_images in terms.items():
        totals = prior + np.sum(of_images, axis=0)
        error = float(np.std(totals, ddof=1) / len(x) ** 0.5) if len(x) > 1 else math.nan
        found[variance] = BitsPerDimension(
            float(totals.mean()), error, float(prior.mean()), np.mean(of_images, axis=1), np.array(errors)
        )
    return found


def _divergence(squared_distance, variance_q, variance_p):
    """KL(q, p) of Gaussians whose means are apart by the root of `squared_distance`."""
    ratio = variance_q / variance_p
    return 0.5 * (squared_distance / variance_p + ratio - 1 - np.log(ratio))


def _log_probability(level, mean, std):
    """Of the integers 0..255: of what is nearer to one than to others under N(mean, std²). [Ho et al., 2020, Eq. 13]"""
    low = np.where(level == 0, -np.inf, ((2 * level - 1) / 255 - 1 - mean) / std)
    high = np.where(level == 255, np.inf, ((2 * level + 1) / 255 - 1 - mean) / std)
    # Both in the lower half, where no digits are lost.
    low, high = np.where(low + high > 0, -high, low), np.where(low + high > 0, -low, high)
    from_low, to_high = _log_cdf(low), _log_cdf(high)
    return to_high + np.log1p(-np.exp(from_low - to_high))


def _log_cdf(z):
    """Of the standard Gaussian; far down by its asymptotic series. [Abramowitz and Stegun, 7.1.23]"""
    far = np.minimum(z, -30.0)
    series = -(far**2) / 2 - np.log(-far * math.sqrt(2 * math.pi)) + np.log1p(-1 / far**2 + 3 / far**4)
    near = np.log(0.5 * _erfc(-np.maximum(z, -30.0) / math.sqrt(2)))
    return np.where(z < -30, series, near)


_erfc = np.vectorize(math.erfc, otypes=[float])
