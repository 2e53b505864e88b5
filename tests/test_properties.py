"""Properties of sampling over shapes, schedules, predictions, samplers and dtypes."""

import functools

import keras
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

import keras_ddpm as kd

COSINE, LINEAR, SIGMOID = kd.schedules.cosine(30), kd.schedules.linear(40), kd.schedules.sigmoid(25)
SCHEDULES = st.sampled_from([COSINE, LINEAR, SIGMOID])
# Few, as each compiles programs of its own: shape, schedule, prediction and dtype policy.
MODELS = [
    ((1, 1, 1), COSINE, "epsilon", "float32"),
    ((9, 4, 3), LINEAR, "x0", "mixed_bfloat16"),
    ((5, 9, 2), SIGMOID, "v", "mixed_float16"),
    ((8, 8, 1), LINEAR, "flow", "float32"),
]
STRAIGHT = kd.schedules.straight(30)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
STEPS = st.integers(1, 25)
SPACINGS = st.sampled_from(["uniform", "logsnr", "karras"])


@st.composite
def samplers(draw):
    steps, spacing, eta = draw(STEPS), draw(SPACINGS), draw(st.floats(0, 1))
    return draw(
        st.sampled_from(
            [
                kd.samplers.DDPM(steps, spacing=spacing),
                kd.samplers.DDPM(steps, variance=eta),
                kd.samplers.DDIM(steps, eta=eta, spacing=spacing),
                kd.samplers.DPMSolver(steps, eta=eta),
                kd.samplers.DPMSolver(steps, eta=eta, order=3, spacing=spacing),
                kd.samplers.UniPC(steps, order=3, spacing=spacing),
                kd.samplers.IPNDM(steps, spacing=spacing),
                kd.samplers.Heun(steps, churn=eta),
                kd.samplers.Langevin(steps),
                kd.samplers.Langevin(predictor=kd.samplers.DDIM(steps)),
            ]
        )
    )


@functools.cache
def make_model(shape, schedule, prediction, policy):
    """A model whose network is cheap and not zero."""
    keras.config.set_dtype_policy(policy)
    x, t = keras.Input(shape), keras.Input((), dtype="int32")
    network = keras.Model([x, t], keras.layers.Dense(shape[-1], dtype="float32")(x))
    return kd.DiffusionModel(network, kd.GaussianDiffusion(schedule, prediction), seed=0)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=st.sampled_from(MODELS), sampler=samplers(), num=st.sampled_from([1, 3]), seed=st.integers(0, 2**32 - 1))
def test_samples_are_data(model, sampler, num, seed):
    """Finite, in the range, repeatable, and the first ones of a larger set, without noise also for any batch size."""
    (shape, schedule, *_), model = model, make_model(*model)
    x = model.sample(num, sampler, seed)
    assert x.shape == (num, *shape) and x.dtype == "float32" and np.all(np.abs(x) <= 1)
    assert np.array_equal(x, model.sample(num, sampler, seed))
    if not np.any(sampler.table(schedule)["std"]):
        np.testing.assert_allclose(model.sample(num, sampler, seed, batch_size=1), x, atol=1e-4)
    trajectory, x_t, x_0 = model.sample(num, sampler, seed, return_trajectory=1)
    assert np.array_equal(trajectory, x) and np.array_equal(x_t[-1], x) and x_0.shape == x_t.shape


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    schedule=st.one_of(SCHEDULES, st.just(STRAIGHT)),
    prediction=st.sampled_from(["x0", "v", "flow"]),
    t=st.integers(1, 25),
    s=st.integers(0, 24),
    shape=SHAPES,
    seed=st.integers(0, 100),
)
def test_the_process_is_consistent(schedule, prediction, t, s, shape, seed):
    """What is predicted from x_t and the exact target is x_0 and the noise, and q(x_s | x_t, x_0) has a variance."""
    random = np.random.default_rng(seed)
    x_0, noise = (random.uniform(-1, 1, (2, *shape)).astype("float32") for _ in range(2))
    diffusion = kd.GaussianDiffusion(schedule, prediction)
    x_t = diffusion.q_sample(x_0, t, noise)
    found = keras.ops.convert_to_numpy(diffusion.predict_x0(x_t, t, diffusion.target(x_0, t, noise)))
    np.testing.assert_allclose(found, x_0, atol=2e-4)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(diffusion.predict_noise(x_t, t, x_0)), noise, atol=1e-4 / schedule.sigma[t]
    )
    if s < t:
        mean, variance = diffusion.q_posterior(x_0, x_t, t, s)
        assert np.all(np.isfinite(keras.ops.convert_to_numpy(mean))) and float(variance[0, 0, 0, 0]) >= 0
