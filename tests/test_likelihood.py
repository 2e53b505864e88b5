"""The bound on the likelihood, compared with its closed form for Gaussian data."""

import functools
import math

import closed_form
import numpy as np
import pytest

import keras_ddpm as kd
from keras_ddpm import likelihood

VARIANCE = 0.2
DATA = closed_form.Mixture((1.0,), (0.0,), VARIANCE**0.5)


def eight_bits(num):
    """Evenly spaced quantiles of N(0, 0.2), `(num, 1)`, clipped and rounded to 8 bits."""
    x = DATA.quantile((np.arange(num) + 0.5) / num)[:, None]
    return kd.images.from_uint8(kd.images.to_uint8(x))


def entropy():
    """The entropy of these data, in bits."""
    edges = np.concatenate([[-np.inf], (2 * np.arange(255) + 1) / 255 - 1, [np.inf]])
    p = np.diff((1 + closed_form.erf(edges / np.sqrt(2 * VARIANCE))) / 2)
    return -np.sum(p * np.log2(p))


def expected_terms(schedule, x, variance):
    """Mean and deviation over the noise of L_{t−1} for t = 2..T with the exact denoiser, `(T − 1, num)`, in bits.

    The prediction is g x_t, so its error is (g alpha − 1) x_0 + g sigma ε. The formulas use betas, as the paper does.
    """
    alpha_bar = schedule.alpha**2
    beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
    t = np.arange(2, schedule.timesteps + 1)
    beta_tilde = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t - 1]
    of_p = beta_tilde if variance == "small" else beta[t - 1]
    gain = schedule.alpha[t] * VARIANCE / (alpha_bar[t] * VARIANCE + 1 - alpha_bar[t])
    a, b = (gain * schedule.alpha[t] - 1)[:, None] * x[:, 0], (gain * schedule.sigma[t])[:, None]
    factor = (np.sqrt(alpha_bar[t - 1]) * beta[t - 1] / (1 - alpha_bar[t])) ** 2 / (2 * of_p)
    constant = 0.5 * (np.log(of_p / beta_tilde) + beta_tilde / of_p - 1)
    mean = constant[:, None] + factor[:, None] * (a**2 + b**2)
    std = factor[:, None] * np.sqrt(4 * a**2 * b**2 + 2 * b**4)
    return mean / np.log(2), std / np.log(2)


def expected_decoder(schedule, x, variance):
    """Mean and deviation of L_0 with the exact denoiser, by Gauss-Hermite quadrature, `(num,)`, in bits."""
    alpha, sigma = schedule.alpha, schedule.sigma
    std = sigma[1]  # beta_1 = sigma_1²
    if variance == "small":  # the deviation of the posterior at t = 2
        std = sigma[1] / sigma[2] * np.sqrt(1 - (alpha[2] / alpha[1]) ** 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    gain = alpha[1] * VARIANCE / (alpha[1] ** 2 * VARIANCE + sigma[1] ** 2)
    mean = gain * (alpha[1] * x + sigma[1] * nodes)
    below_high, below_low = (
        (1 + closed_form.erf((x + side / 255 - mean) / (np.sqrt(2) * std))) / 2 for side in (1, -1)
    )
    probability = np.where(x > 0.999, 1, below_high) - np.where(x < -0.999, 0, below_low)
    bits = -np.log2(np.maximum(probability, 1e-300))
    expected = bits @ weights / weights.sum()
    return expected, np.sqrt((bits - expected[:, None]) ** 2 @ weights / weights.sum())


@functools.cache
def bounds():
    """The data and their bounds under a linear schedule."""
    x = eight_bits(2000)
    return x, likelihood.bits_per_dimension(DATA.model(kd.schedules.linear(1000)), x, batch_size=len(x))


@pytest.mark.parametrize(("variance", "total"), [("small", 8.62), ("large", 7.85)])
def test_the_bound_is_its_closed_form(variance, total):
    """Each term agrees within the deviation of the noise. The bound lies above the entropy."""
    schedule = kd.schedules.linear(1000)
    x, found = bounds()
    found = found[variance]
    terms = [expected_decoder(schedule, x, variance), expected_terms(schedule, x, variance)]
    mean, std = (np.vstack(parts) for parts in zip(*terms))
    error = np.sqrt(np.mean(std**2, axis=1) / len(x))
    z = (found.terms - mean.mean(axis=1)) / error
    assert np.abs(z).max() < 5 and 0.9 < z.std() < 1.1 and abs(z.mean()) < 0.15
    alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
    prior = 0.5 * (alpha**2 * np.mean(x**2) + sigma**2 - 1 - 2 * np.log(sigma)) / np.log(2)
    assert found.prior == pytest.approx(prior, rel=1e-6)
    assert found.total == pytest.approx(found.prior + found.terms.sum(), rel=1e-9)
    bound = prior + mean.mean(axis=1).sum()
    assert abs(found.total - bound) < 4 * np.sqrt(np.sum(error**2))
    print(f"{variance}: found {found.total:.3f}, bound {bound:.3f} bits, {bound - entropy():.3f} above the entropy")
    assert bound == pytest.approx(total, abs=0.04) and entropy() == pytest.approx(7.73, abs=0.005)
    # The error of the exact prediction is the variance of x_0 given x_t, except for the clipping of the data.
    expected = VARIANCE * schedule.sigma**2 / (schedule.alpha**2 * VARIANCE + schedule.sigma**2)
    np.testing.assert_allclose(found.errors, expected[1:], rtol=0.15)


def log_cdf(z):
    """Log of the standard normal distribution function, below −30 by a series. [Abramowitz and Stegun, 7.1.23]"""
    if z < -30:
        return -(z**2) / 2 - math.log(-z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4)
    return math.log(0.5 * math.erfc(-z / math.sqrt(2)))


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.3, 0.0, 0.001, 0.999, 5.0])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3])
def test_the_decoder_is_a_distribution(mean, std):
    """The probabilities sum to 1, and equal the formula without SciPy, also far from the mean."""
    level = np.arange(256)
    got = likelihood._log_probability(level, mean, std)
    assert np.all(np.isfinite(got))
    assert np.exp(got).sum() == pytest.approx(1, abs=1e-12)
    low, high = (((2 * level + side) / 255 - 1 - mean) / std for side in (-1, 1))
    upper = low + high > 0
    low, high = np.where(upper, -high, low), np.where(upper, -low, high)
    low, high = (np.array([log_cdf(z) for z in ends]) for ends in (low, high))
    expected = high + np.log1p(-np.exp(low - high))
    np.testing.assert_allclose(got[1:-1], expected[1:-1], rtol=1e-6, atol=1e-12)


def test_of_images_by_label():
    """Shapes, seeds and options are correct."""
    network = kd.networks.unet((8, 8, 3), 8, (1,), 1, (), 4, num_classes=2)
    random = np.random.default_rng(0)
    network.set_weights([0.1 * random.standard_normal(weight.shape) for weight in network.get_weights()])
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(5), "v"))
    x = kd.datasets.procedural_flowers(3, 8)[0]

    def total(x, **options):
        return likelihood.bits_per_dimension(model, x, **options)["small"].total

    found = likelihood.bits_per_dimension(model, x)["large"]
    assert found.terms.shape == found.errors.shape == (5,) and found.standard_error > 0
    assert len({total(x), total(x, seed=2), total(x, labels=0), total(x, labels=[1, 0, 1])}) == 4
    assert total(x) == total(x)
    assert np.isnan(likelihood.bits_per_dimension(model, x[:1])["small"].standard_error)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.full((2, 1), 0.001), {}, "must hold 8-bit levels"),
        (np.full((2, 1), np.nan), {}, "NaN"),
        (np.full((2, 1), 255.0), {}, r"in \[-1, 1\]"),
        (np.ones((2, 2)), {}, "shape"),
        (np.ones((2, 1)), {"seed": -1}, "seed=-1"),
        (np.ones((2, 1)), {"labels": 3}, "has no condition"),
    ],
)
def test_bad_input(x, options, message):
    with pytest.raises(ValueError, match=message):
        likelihood.bits_per_dimension(DATA.model(kd.schedules.cosine(4)), x, **options)


def test_bad_models():
    network = kd.networks.mlp(1, 8, 1)
    for diffusion in (kd.GaussianDiffusion(clip_range=(0, 1)), kd.GaussianDiffusion(kd.schedules.cosine(1), "v")):
        with pytest.raises(ValueError, match=r"Received: (clip_range=\(0, 1\)|timesteps=1)"):
            likelihood.bits_per_dimension(kd.DiffusionModel(network, diffusion), np.ones((2, 1)))
