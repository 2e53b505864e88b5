"""Against closed forms.

For data N(mean, std²) the best prediction of x_0 is known, so each sampler's output has a mean and a variance that
follow from a recursion in float64, and that tend to those of the data. No training is needed.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import DiffusionModel
from keras_ddpm import GaussianDiffusion
from keras_ddpm import samplers
from keras_ddpm import schedules

MEAN, STD = 0.3, 0.2
LINEAR = schedules.linear(1000)


@keras.saving.register_keras_serializable(package="tests")
class BestEpsilon(keras.layers.Layer):
    """E[ε | x_t] for data N(MEAN, STD²): what a perfectly trained network would say."""

    def call(self, x_t, t):
        alpha, sigma = (
            ops.take(ops.convert_to_tensor(table, "float32"), t)[:, None] for table in (LINEAR.alpha, LINEAR.sigma)
        )
        return sigma * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_model():
    x_t, t = keras.Input((1,)), keras.Input((), dtype="int32")
    network = keras.Model([x_t, t], BestEpsilon()(x_t, t))
    return DiffusionModel(network, GaussianDiffusion(LINEAR, clip_range=None))


def exact_moments(sampler):
    """Mean and variance of the samples: every step is linear in x_t, the mean of x_0 given x_t, and noise."""
    mean, variance = 0.0, 1.0
    for t, from_x_0, from_x_t, std in sampler.table(LINEAR):
        alpha, sigma = LINEAR.alpha[int(t)], LINEAR.sigma[int(t)]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # x_0 = MEAN + gain (x_t - alpha MEAN)
        factor = from_x_t + from_x_0 * gain
        mean = factor * mean + from_x_0 * (1 - gain * alpha) * MEAN
        variance = factor**2 * variance + std**2
    return mean, variance


ALL = [
    (samplers.DDPM(), 0.02),
    (samplers.DDPM(variance="large"), 0.02),
    (samplers.DDPM(variance=0.5), 0.02),
    (samplers.DDPM(100), 0.14),
    (samplers.DDIM(1000), 0.01),
    (samplers.DDIM(50), 0.14),
    (samplers.DDIM(100, eta=1.0), 0.14),
]


@pytest.mark.parametrize(("sampler", "bias"), ALL, ids=str)
def test_samples_have_the_moments_of_the_data(sampler, bias):
    mean, variance = exact_moments(sampler)
    assert abs(mean - MEAN) < 0.01 and abs(np.sqrt(variance) / STD - 1) < bias
    num = 20_000
    x = gaussian_model().sample(num, sampler, seed=0, batch_size=num)
    # Five standard errors.
    assert abs(x.mean() - mean) < 5 * np.sqrt(variance / num)
    assert abs(x.var() / variance - 1) < 5 * np.sqrt(2 / num)
    skewness = np.mean(((x - x.mean()) / x.std()) ** 3)
    assert abs(skewness) < 5 * np.sqrt(6 / num)


def test_ddpm_coefficients_are_the_papers():
    """[Ho et al., 2020, Eq. 7], from betas alone."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    table = samplers.DDPM().table(LINEAR)[::-1]
    assert np.array_equal(table[:, 0], np.arange(1, 1001))
    np.testing.assert_allclose(table[:, 1], np.sqrt(previous) * betas / (1 - alphas_cumprod), rtol=1e-10)
    np.testing.assert_allclose(
        table[:, 2], np.sqrt(1 - betas) * (1 - previous) / (1 - alphas_cumprod), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(table[:, 3] ** 2, (1 - previous) / (1 - alphas_cumprod) * betas, rtol=1e-10, atol=1e-12)
    large = samplers.DDPM(variance="large").table(LINEAR)[::-1]
    np.testing.assert_allclose(large[1:, 3] ** 2, betas[1:], rtol=1e-10)
    assert large[0, 3] == 0  # no noise at the end
    half = samplers.DDPM(variance=0.5).table(LINEAR)[::-1]
    np.testing.assert_allclose(half[1:, 3] ** 2, np.sqrt(betas[1:] * table[1:, 3] ** 2), rtol=1e-10)


def test_ddim_with_all_the_noise_is_ddpm():
    for num_steps in (None, 40):
        ddim, ddpm = samplers.DDIM(num_steps, eta=1.0).table(LINEAR), samplers.DDPM(num_steps).table(LINEAR)
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-12)


def test_ddim_keeps_the_noise_of_a_clipped_prediction():
    """x_s = alpha_s x_0 + sigma_s ε, with the ε that leads from that x_0 to x_t [Song et al., 2021, Eq. 12]."""
    sampler = samplers.DDIM(10)
    x_t = np.array([[2.0], [-0.7]], "float32")
    times = sampler.timesteps(LINEAR)
    for row, t, s in zip(sampler.table(LINEAR), times, times[1:]):
        row = [ops.convert_to_tensor(number, "float32") for number in row]
        x_s, x_0 = sampler.step(row, lambda x, t: ops.clip(x, -1, 1), ops.convert_to_tensor(x_t), None, None)
        x_0 = ops.convert_to_numpy(x_0)
        noise = (x_t - LINEAR.alpha[t] * x_0) / LINEAR.sigma[t]
        expected = LINEAR.alpha[s] * x_0 + LINEAR.sigma[s] * noise
        np.testing.assert_allclose(ops.convert_to_numpy(x_s), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 3, 50, 999, 1000, None])
def test_visits_start_at_noise_and_end_at_data(num_steps):
    times = samplers.DDPM(num_steps).timesteps(LINEAR)
    assert times[0] == 1000 and times[-1] == 0 and len(times) == (num_steps or 1000) + 1
    assert np.all(np.diff(times) < 0)


def test_samplers_are_values():
    assert samplers.DDIM(20) == samplers.DDIM(20) != samplers.DDPM(20)
    assert len({samplers.DDIM(20), samplers.DDIM(20), samplers.DDIM(20, eta=0.5)}) == 2
    assert samplers.DDPM().stochastic and not samplers.DDIM().stochastic and samplers.DDIM(eta=0.1).stochastic


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DDIM(0), "num_steps=0"),
        (lambda: samplers.DDPM(2.5), "num_steps=2.5"),
        (lambda: samplers.DDPM(variance="medium"), "variance='medium'"),
        (lambda: samplers.DDPM(variance=1.5), "variance=1.5"),
        (lambda: samplers.DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: samplers.DDIM(1001).table(LINEAR), "1000 steps.*num_steps=1001"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
