"""Properties of sampling over shapes, schedules, predictions, samplers and dtypes."""

import keras
import numpy as np
from hypothesis import HealthCheck, given, settings, strategies as st

import keras_ddpm as kd

SCHEDULES = st.sampled_from([kd.schedules.cosine(30), kd.schedules.linear(40), kd.schedules.sigmoid(25)])
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


def make_model(shape, diffusion):
    """A model whose network is cheap and not zero."""
    x, t = keras.Input(shape), keras.Input((), dtype="int32")
    return kd.DiffusionModel(keras.Model([x, t], keras.layers.Dense(shape[-1], dtype="float32")(x)), diffusion, seed=0)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=SHAPES,
    schedule=SCHEDULES,
    prediction=st.sampled_from(["epsilon", "x0", "v", "flow"]),
    sampler=samplers(),
    policy=st.sampled_from(["float32", "mixed_bfloat16", "mixed_float16"]),
    num=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_are_data(shape, schedule, prediction, sampler, policy, num, seed):
    """Finite, in the range, repeatable, and the first ones of a larger set, without noise also for any batch size."""
    keras.config.set_dtype_policy(policy)
    model = make_model(shape, kd.GaussianDiffusion(schedule, prediction))
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
