"""A whole run beside its derivation in float64: loss, weights, average, evaluation and samples.

The network is one dense layer of (x_t, t / T). Times and noise are given, so nothing is random.
"""

import keras
import numpy as np
import pytest
from conftest import weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm.samplers import loop
from keras_ddpm.training import corruption

T, BATCH, STEPS, MAX_DECAY, RATE = 5, 8, 3, 0.5, 0.1
BETAS = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
ALPHA = np.sqrt(np.append(1.0, np.cumprod(1 - BETAS)))
SIGMA = np.sqrt(1 - ALPHA**2)
WEIGHT = np.array([1.0, 0.5, 1.0, 1.5, 2.0, 2.5])  # of the loss, at t = 0..T
TIMES = 1 + np.arange(BATCH) * T // BATCH


def sgd(gradients, state, step):
    return [RATE * gradient for gradient in gradients], state


def adam(gradients, state, step, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Kingma and Ba, 2015, with the order of the correction at the end of section 2, as Keras has it."""
    state = state or [(0.0, 0.0)] * len(gradients)
    state = [(beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2) for g, (m, v) in zip(gradients, state)]
    rate = RATE * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
    return [rate * m / (np.sqrt(v) + epsilon) for m, v in state], state


def network_of(kernel, bias, x_t, t):
    features = np.concatenate([x_t, np.broadcast_to(t, len(x_t))[:, None] / T], axis=1)
    return features, features @ kernel + bias


def loss_of(parameters, x_0, noise):
    """The weighted mean squared error of v = alpha ε − sigma x_0, and its gradients."""
    alpha, sigma, weight = (of[TIMES][:, None] for of in (ALPHA, SIGMA, WEIGHT))
    features, y = network_of(*parameters, alpha * x_0 + sigma * noise, TIMES)
    error = y - (alpha * noise - sigma * x_0)
    slope = 2 * weight * error / error.size
    return np.mean(weight * error**2), [features.T @ slope, slope.sum(axis=0)]


def ddim(parameters, x):
    """Song et al., 2021, Eq. 12 with σ = 0, from T to 0, with x_0 clipped to [-1, 1]."""
    for t in range(T, 0, -1):
        x_0 = np.clip(ALPHA[t] * x - SIGMA[t] * network_of(*parameters, x, t)[1], -1, 1)
        x = ALPHA[t - 1] * x_0 + SIGMA[t - 1] * (x - ALPHA[t] * x_0) / SIGMA[t]
    return x


@pytest.mark.parametrize("name, optimizer", [("sgd", sgd), ("adam", adam)])
def test_a_whole_run_is_its_derivation(monkeypatch, name, optimizer):
    random = np.random.default_rng(0)
    x_0, noise = random.uniform(-1, 1, (BATCH, 2)), random.standard_normal((BATCH, 2))
    parameters = average = [random.standard_normal((3, 2)), random.standard_normal(2)]

    monkeypatch.setitem(corruption.TIMESTEP_SAMPLINGS, "given", lambda u, index, n: (index + 0.001) / n)
    x_t, t = keras.Input((2,)), keras.Input((), dtype="int32")
    features = ops.concatenate([x_t, ops.expand_dims(ops.cast(t, "float32"), 1) / T], axis=1)
    network = keras.Model([x_t, t], keras.layers.Dense(2)(features))
    network.set_weights(parameters)
    diffusion = kd.GaussianDiffusion(kd.schedules.from_betas(BETAS), "v")
    model = kd.DiffusionModel(network, diffusion, MAX_DECAY, WEIGHT, "given", seed=0)
    model.compile({"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[name](RATE), "mse")
    data = {"x_0": x_0, "noise": noise}
    history = model.fit(data, batch_size=BATCH, epochs=STEPS, shuffle=False, verbose=0).history

    losses, state = [], None
    for step in range(STEPS):
        loss, gradients = loss_of(parameters, x_0, noise)
        changes, state = optimizer(gradients, state, step + 1)
        parameters = [parameter - change for parameter, change in zip(parameters, changes)]
        decay = min(MAX_DECAY, 1 - (1 + step) ** -0.75)
        average = [decay * a + (1 - decay) * p for a, p in zip(average, parameters)]
        losses.append(loss)

    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(history["loss"], losses, **close)
    for got, expected in zip(weights(network.weights) + weights(model.ema_weights), parameters + average):
        np.testing.assert_allclose(got, expected, **close)
    np.testing.assert_allclose(model.evaluate(data, verbose=0), loss_of(average, x_0, noise)[0], **close)
    x_T = loop.prior(diffusion, (2,), 7, np.arange(4)).astype("float64")
    for use_ema, of in ((True, average), (False, parameters)):
        samples = model.sample(4, kd.samplers.DDIM(T), seed=7, use_ema=use_ema)
        np.testing.assert_allclose(samples, ddim(of, x_T), **close)
