"""The process compared with an independent derivation in float64, which conditions Gaussians by adding precisions."""

import importlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import GaussianDiffusion, schedules

SCHEDULES = {"linear": schedules.linear(1000), "cosine": schedules.cosine(1000)}
PREDICTIONS = ["epsilon", "x0", "v", "flow"]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def draw(num, shape=(4, 3), seed=0):
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, (num, *shape)).astype("float32"), random.normal(size=(num, *shape)).astype("float32")


def compiled(function):
    """The function as TensorFlow or JAX compiles it; PyTorch runs it eagerly."""
    if keras.backend.backend() == "tensorflow":
        return importlib.import_module("tensorflow").function(function)
    return importlib.import_module("jax").jit(function) if keras.backend.backend() == "jax" else function


def test_scales_and_q_sample(schedule):
    diffusion = GaussianDiffusion(schedule)
    t = np.arange(1001)
    x_0, noise = draw(1001)
    alpha, sigma = diffusion.scales(t, x_0)
    assert alpha.shape == (1001, 1, 1)
    np.testing.assert_allclose(np.ravel(ops.convert_to_numpy(alpha)), schedule.alpha, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(ops.convert_to_numpy(sigma)), schedule.sigma, rtol=1e-6)
    expected = schedule.alpha[:, None, None] * x_0 + schedule.sigma[:, None, None] * noise
    np.testing.assert_allclose(ops.convert_to_numpy(diffusion.q_sample(x_0, t, noise)), expected, atol=1e-6)
    assert diffusion.timesteps == 1000
    assert diffusion.alphas_cumprod.dtype == "float64" and diffusion.alphas_cumprod[0] == 1
    np.testing.assert_allclose(diffusion.alphas_cumprod, schedule.alpha**2)


@pytest.mark.parametrize("step", [1, 7, 300])
def test_q_posterior(schedule, step):
    """x_s | x_0 is a Gaussian prior and x_t | x_s a Gaussian likelihood, so their precisions add up."""
    t = np.arange(step + 1, 1001)
    s = t - step
    betas = 1 - (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2  # beta_t at [t - 1]
    keep = np.array([np.prod(1 - betas[j:i]) for i, j in zip(t, s)])  # (alpha_t / alpha_s)^2
    prior_precision = 1 / schedule.sigma[s] ** 2
    likelihood_precision = keep / (1 - keep)
    variance = 1 / (prior_precision + likelihood_precision)
    x_0, x_t = draw(len(t))
    mean = variance[:, None, None] * (
        (prior_precision * schedule.alpha[s])[:, None, None] * x_0 + (np.sqrt(keep) / (1 - keep))[:, None, None] * x_t
    )
    got_mean, got_variance = GaussianDiffusion(schedule).q_posterior(x_0, x_t, t, s)
    np.testing.assert_allclose(np.ravel(ops.convert_to_numpy(got_variance)), variance, rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(got_mean), mean, rtol=1e-4, atol=1e-5)


def test_q_posterior_at_clean_data():
    """q(x_0 | x_t, x_0) is a point."""
    x_0, x_t = draw(1000)
    mean, variance = GaussianDiffusion().q_posterior(x_0, x_t, np.arange(1, 1001), np.zeros(1000, int))
    np.testing.assert_allclose(ops.convert_to_numpy(mean), x_0, atol=1e-6)
    assert np.all(ops.convert_to_numpy(variance) == 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions_lead_back_to_the_data(prediction):
    schedule = schedules.linear(1000)
    diffusion = GaussianDiffusion(schedule, prediction, clip_range=None)
    x_0, noise = draw(1001)
    t = np.arange(1001)
    x_t = diffusion.q_sample(x_0, t, noise)
    got = ops.convert_to_numpy(diffusion.predict_x0(x_t, t, diffusion.target(x_0, t, noise)))
    # Subtracting the noise amplifies the rounding errors of x_t and y by 1 / alpha_t.
    amplified = 1 / schedule.alpha if prediction == "epsilon" else np.ones(1001)
    assert np.max(np.abs(got - x_0).max(axis=(1, 2)) / amplified) < 2e-6
    got = ops.convert_to_numpy(diffusion.predict_noise(x_t[1:], t[1:], x_0[1:]))
    assert np.max(np.abs(got - noise[1:]).max(axis=(1, 2)) * schedule.sigma[1:]) < 2e-6


def test_the_error_of_x_0_weighs_the_network_against_x_t():
    """Two independent estimates with the errors r and s: their best average has the error r s / hypot(r, s)."""
    schedule, r = schedules.cosine(1000), 0.06
    diffusion = GaussianDiffusion(schedule, "x0", clip_range=None, x0_error=r)
    t = np.array([0, 1, 10, 30, 100, 900])
    x_0, noise = draw(len(t), (200, 200))
    y = x_0 + r * np.random.default_rng(1).normal(size=x_0.shape)
    got = ops.convert_to_numpy(diffusion.predict_x0(diffusion.q_sample(x_0, t, noise), t, y))
    s = schedule.sigma[t] / schedule.alpha[t]
    error = np.sqrt(np.mean((got - x_0) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(error[1:], (r * s / np.hypot(r, s))[1:], rtol=0.02)
    assert error[0] < 1e-6
    no_signal = GaussianDiffusion(schedules.zero_terminal_snr(schedule), "x0", x0_error=r)
    assert no_signal.x0_coefficients()[-1].tolist() == [0, 1]


def test_targets():
    diffusion = {prediction: GaussianDiffusion(prediction=prediction) for prediction in PREDICTIONS}
    x_0, noise = draw(1001)
    t = np.arange(1001)
    alpha, sigma = (table[:, None, None] for table in (diffusion["v"].schedule.alpha, diffusion["v"].schedule.sigma))
    expected = {"epsilon": noise, "x0": x_0, "v": alpha * noise - sigma * x_0, "flow": noise - x_0}
    for prediction in PREDICTIONS:
        got = ops.convert_to_numpy(diffusion[prediction].target(x_0, t, noise))
        np.testing.assert_allclose(got, expected[prediction], atol=1e-6)


def test_flow_is_the_velocity_of_the_straight_line():
    diffusion = GaussianDiffusion(schedules.straight(100), "flow")
    x_0, noise = draw(100)
    t = np.arange(100)
    velocity = 100 * (diffusion.q_sample(x_0, t + 1, noise) - diffusion.q_sample(x_0, t, noise))
    got = ops.convert_to_numpy(diffusion.target(x_0, t, noise))
    np.testing.assert_allclose(got, ops.convert_to_numpy(velocity), atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_weights_by_definition(prediction, schedule):
    """An error of 1 in y causes errors of x_0 [Hang et al., 2023] and ε [Choi et al., 2022]."""
    diffusion = GaussianDiffusion(schedule, prediction, clip_range=None)
    t = np.arange(1, 1001)
    zeros = np.zeros((1000, 1))
    error_of_x_0 = diffusion.predict_x0(zeros, t, zeros + 1)
    error_of_noise = np.ravel(ops.convert_to_numpy(diffusion.predict_noise(zeros, t, error_of_x_0))).astype("float64")
    error_of_x_0 = np.ravel(ops.convert_to_numpy(error_of_x_0)).astype("float64")
    snr = schedule.alpha[1:] ** 2 / schedule.sigma[1:] ** 2
    for gamma in (1.0, 5.0):
        weight = diffusion.min_snr_weight(gamma)
        assert weight[0] == 0
        np.testing.assert_allclose(weight[1:], np.minimum(snr, gamma) * error_of_x_0**2, rtol=1e-5)
    for k, gamma in ((1.0, 1.0), (0.5, 0.7), (1.0, 0.0)):
        weight = diffusion.p2_weight(k, gamma)
        assert weight[0] == 0
        np.testing.assert_allclose(weight[1:], (k + snr) ** -gamma * error_of_noise**2, rtol=1e-5)


def test_published_loss_weights():
    """min(SNR, γ) / SNR for the noise, and min(SNR, γ) / (SNR + 1) for v. P2 with γ = 0 is the simple loss."""
    snr = np.exp(schedules.linear().log_snr[1:])
    np.testing.assert_allclose(GaussianDiffusion().min_snr_weight()[1:], np.minimum(snr, 5) / snr)
    np.testing.assert_allclose(GaussianDiffusion(prediction="v").min_snr_weight()[1:], np.minimum(snr, 5) / (snr + 1))
    np.testing.assert_allclose(GaussianDiffusion().p2_weight(gamma=0)[1:], 1)


def test_predict_x0_clips():
    x_t = np.full((2, 3), 5.0)
    t, y = np.array([1, 1000]), np.zeros((2, 3))
    assert np.all(ops.convert_to_numpy(GaussianDiffusion().predict_x0(x_t, t, y)) == 1)
    assert np.all(ops.convert_to_numpy(GaussianDiffusion(clip_range=(0, 0.5)).predict_x0(x_t, t, y)) == 0.5)
    assert np.all(ops.convert_to_numpy(GaussianDiffusion(clip_range=None).predict_x0(x_t, t, y)) > 4)


@pytest.mark.parametrize("clip_range", [(-1, 1), (0, 0.5)])
def test_dynamic_threshold(clip_range):
    """Against NumPy, with a number and with a tensor, of which a new value is not traced again."""
    diffusion = GaussianDiffusion(prediction="x0", clip_range=clip_range)
    middle, half = np.mean(clip_range), np.ptp(clip_range) / 2
    t, y = np.array([1, 500, 1000]), 1.5 * draw(3)[1]
    traced = []

    @compiled
    def predict(y, p):
        traced.append(p)
        return diffusion.predict_x0(y, t, y, p)

    for p in (0.3, 0.9, 0.99):
        scaled = (y - middle) / half
        threshold = np.maximum(np.quantile(np.abs(scaled), p, axis=(1, 2), keepdims=True), 1)
        expected = middle + half * np.clip(scaled, -threshold, threshold) / threshold
        for got in (diffusion.predict_x0(y, t, y, p), predict(y, ops.convert_to_tensor(p, "float32"))):
            np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=1e-6)
    assert len(traced) == (3 if keras.backend.backend() == "torch" else 1)


def test_config():
    diffusion = GaussianDiffusion(np.linspace(0.01, 0.2, 30), prediction="v", clip_range=None, x0_error=0.1)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(diffusion))
    assert copy.get_config() == diffusion.get_config()
    assert np.array_equal(copy.alphas_cumprod, diffusion.alphas_cumprod)


def test_zero_terminal_signal_needs_a_target_that_contains_the_data():
    schedule = schedules.Schedule([1.0, 0.6, 0.0], [0.0, 0.8, 1.0])
    with pytest.raises(ValueError, match="'epsilon' at t = 2"):
        GaussianDiffusion(schedule)
    for prediction in ("x0", "v", "flow"):
        diffusion = GaussianDiffusion(schedule, prediction)
        x_0, noise = draw(3)
        t = np.arange(3)
        got = diffusion.predict_x0(diffusion.q_sample(x_0, t, noise), t, diffusion.target(x_0, t, noise))
        np.testing.assert_allclose(ops.convert_to_numpy(got), x_0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "eps"}, "epsilon.*Received: prediction='eps'"),
        ({"prediction": ["v"]}, "epsilon.*Received: prediction="),
        ({"clip_range": (1, -1)}, r"clip_range=\(1, -1\)"),
        ({"schedule": [0.1, -0.1]}, "-0.1"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"x0_error": -0.1}, "`x0_error` must be 0 or more. Received: x0_error=-0.1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**arguments)


def test_bad_loss_weights():
    diffusion = GaussianDiffusion()
    for weight in (diffusion.min_snr_weight, diffusion.p2_weight):
        with pytest.raises(ValueError, match="gamma=-1"):
            weight(gamma=-1)
    with pytest.raises(ValueError, match="k=0"):
        diffusion.p2_weight(k=0)
    with pytest.raises(ValueError, match="gamma='5'"):
        diffusion.min_snr_weight("5")
    with pytest.raises(ValueError, match="gamma=inf"):
        diffusion.p2_weight(gamma=np.inf)


def test_dynamic_threshold_shrinks_and_does_not_cut():
    """The share p of each example ends inside the range, and nothing outside."""
    diffusion = GaussianDiffusion(prediction="x0", clip_range=(0.0, 1.0))
    random = np.random.default_rng(0)
    y = np.stack([random.normal(0.5, 3.0, 1000), random.normal(0.5, 0.05, 1000)]).astype("float32")
    got = ops.convert_to_numpy(diffusion.predict_x0(y, np.array([5, 5]), y, dynamic_threshold=0.9))
    assert abs(np.mean((got[0] > 1e-5) & (got[0] < 1 - 1e-5)) - 0.9) < 0.002 and got.min() >= 0 and got.max() <= 1
    inside = (got[0] > 1e-5) & (got[0] < 1 - 1e-5)
    ratio = (got[0] - 0.5)[inside] / (y[0] - 0.5)[inside]
    assert np.ptp(ratio) < 1e-3  # shrunk, not cut
    np.testing.assert_allclose(got[1], y[1], atol=1e-6)  # nothing to do
