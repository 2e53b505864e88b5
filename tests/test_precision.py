"""A model in each precision: it trains, its average moves, it samples, and its files hold all of it."""

import keras
import numpy as np
import pytest
from conftest import weights

import keras_ddpm as kd

# The dtype of the weights, and how far rounding moves samples from those of the same weights in float32.
POLICIES = {
    "float32": ("float32", 1e-5),
    "float64": ("float64", 1e-5),
    "bfloat16": ("bfloat16", 0.1),
    "float16": ("float16", 0.02),
    "mixed_bfloat16": ("float32", 0.1),
    "mixed_float16": ("float32", 0.02),
}
STEPS, DECAY = 12, 0.9


def make(policy):
    keras.config.set_dtype_policy(policy)
    return kd.DiffusionModel(
        kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.cosine(50), "x0"), DECAY, seed=0
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_precision(policy, points, tmp_path):
    """The table of `pytest -s`: dtypes, first and last loss, and the largest error of the average and of samples."""
    if policy == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 by default")
    dtype, tolerance = POLICIES[policy]
    model = make(policy)
    model.compile(keras.optimizers.SGD(0.2), "mse", run_eagerly=True)
    average, losses = [w.astype("float64") for w in weights(model.network.weights)], []
    for step in range(STEPS):
        losses.append(float(model.train_on_batch(points)))
        decay = min(DECAY, 1 - (1 + step) ** -0.75)
        new = [w.astype("float64") for w in weights(model.network.weights)]
        average = [decay * a + (1 - decay) * w for a, w in zip(average, new)]
    of_average = {v.dtype for v in model.ema_weights}
    error = max(np.abs(a - got).max() for a, got in zip(average, weights(model.ema_weights)))

    samples = model.sample(8, kd.samplers.DDIM(5), seed=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    in_float32 = make("float32")
    in_float32.set_weights(model.get_weights())
    distance = np.abs(in_float32.sample(8, kd.samplers.DDIM(5), seed=0) - samples).max()
    print(f"{policy:14}  {dtype} {of_average}  loss {losses[0]:.3f} to {losses[-1]:.3f}  {error:.1e} {distance:.1e}")

    assert {v.dtype for v in model.network.trainable_weights} - {"float32"} <= {dtype}
    assert of_average == ({"float64"} if policy == "float64" else {"float32"}) | of_average & {"float32"}
    assert losses[-1] < 0.9 * losses[0] and error < 1e-6
    assert distance < tolerance
    assert all(map(np.array_equal, weights(loaded.weights), weights(model.weights)))
    assert np.array_equal(loaded.sample(8, kd.samplers.DDIM(5), seed=0), samples)
