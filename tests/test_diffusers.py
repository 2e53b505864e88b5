"""Samples compared with the schedulers of Hugging Face's diffusers, for the same network, schedule, times and noise.

The tests run if diffusers is installed. Its t is 1 less than the t of this package.
"""

import functools

import numpy as np
import pytest
from conftest import TORCH
from keras import ops

from keras_ddpm import GaussianDiffusion, samplers, schedules

if not TORCH:  # importing diffusers takes seconds
    pytest.skip("compares tables, which are the same on every backend", allow_module_level=True)

diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")
torch = pytest.importorskip("torch")

LINEAR = schedules.linear(1000)
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
LENGTHS = [(1000, "epsilon"), *((50, prediction) for prediction in PREDICTIONS)]
NOISE = np.random.default_rng(0).standard_normal((1001, 4, 3)).astype("float32")


def network(x, t, prediction):
    """The best predictions for values around -0.9 and 0.8, of which some are clipped."""
    alpha, sigma = LINEAR.alpha[t], LINEAR.sigma[t]
    means = np.array([-0.9, 0.8])
    variance = alpha**2 * 0.3**2 + sigma**2
    residual = x[..., None] - alpha * means
    responsibilities = np.exp(-(residual**2) / (2 * variance))
    responsibilities /= responsibilities.sum(-1, keepdims=True)
    x_0 = np.sum(responsibilities * (means + alpha * 0.3**2 / variance * residual), axis=-1)
    noise = (x - alpha * x_0) / sigma
    return {"epsilon": noise, "x0": x_0, "v": alpha * noise - sigma * x_0}[prediction].astype("float32")


def ours(sampler, prediction, clip_range):
    diffusion = GaussianDiffusion(LINEAR, prediction, clip_range)

    def denoise(x, t):
        times = np.full(len(x), t, "int32")
        return ops.convert_to_numpy(diffusion.predict_x0(x, times, network(x, int(t), prediction)))

    x, previous = NOISE[1000], (np.zeros_like(NOISE[1000]),) * samplers.NUM_PREVIOUS
    for row in sampler.table(LINEAR):
        x, previous = samplers.step(row, denoise, x, NOISE[int(row["t"]) - 1], previous)
    return x


def theirs(scheduler, times, prediction, step):
    """Samples by `step(scheduler, y, t, x, noise)`, asserting that the scheduler visits `times`."""
    assert scheduler.timesteps.tolist() == (times[:-1] - 1).tolist()
    x = torch.tensor(NOISE[1000])
    for t in scheduler.timesteps:
        y = torch.tensor(network(x.numpy(), int(t) + 1, prediction))
        x = step(scheduler, y, t, x, torch.tensor(NOISE[int(t)]))
    return x.numpy()


@pytest.mark.parametrize(("num_steps", "prediction"), LENGTHS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(monkeypatch, num_steps, variance, prediction):
    scheduler = diffusers.DDPMScheduler(
        variance_type=f"fixed_{variance}",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(num_steps)

    def step(scheduler, y, t, x, noise):
        if t == scheduler.timesteps[-1]:
            noise = 0 * noise  # it would leave the noise of "large" in the samples, unless that step is t = 0
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: noise)
        return scheduler.step(y, t, x).prev_sample

    sampler = samplers.DDPM(num_steps, variance)
    expected = theirs(scheduler, sampler.timesteps(LINEAR), prediction, step)
    np.testing.assert_allclose(ours(sampler, prediction, (-1, 1)), expected, atol=1e-4)


@pytest.mark.parametrize(("num_steps", "prediction"), LENGTHS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(num_steps, eta, prediction):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        beta_start=1e-4,
        beta_end=0.02,
    )
    scheduler.set_timesteps(num_steps)

    def step(scheduler, y, t, x, noise):
        options = {"eta": eta, "variance_noise": noise} if eta else {}
        return scheduler.step(y, t, x, use_clipped_model_output=True, **options).prev_sample

    sampler = samplers.DDIM(num_steps, eta)
    expected = theirs(scheduler, sampler.timesteps(LINEAR), prediction, step)
    np.testing.assert_allclose(ours(sampler, prediction, (-1, 1)), expected, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("num_steps", [10, 20])
def test_dpm_solver(num_steps, eta, algorithm, spacing, prediction):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=PREDICTIONS[prediction],
        algorithm_type=algorithm,
        final_sigmas_type="zero",
        beta_start=1e-4,
        beta_end=0.02,
        lower_order_final=False,
    )
    sampler = samplers.DPMSolver(num_steps, eta, spacing=spacing)
    times = sampler.timesteps(LINEAR)
    scheduler.set_timesteps(timesteps=(times[:-1] - 1).tolist())

    def step(scheduler, y, t, x, noise):
        return scheduler.step(y, t, x, variance_noise=noise).prev_sample

    expected = theirs(scheduler, times, prediction, step)
    np.testing.assert_allclose(ours(sampler, prediction, None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_steps", "prediction"), [(3, "epsilon"), (8, "v"), (20, "x0")])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(samplers.UniPC, order=order) for order in (1, 2, 3)),
        functools.partial(samplers.DPMSolver, order=3),
    ],
)
def test_unipc(make, num_steps, spacing, prediction, monkeypatch):
    """Without its corrector it is DPMSolver: their DPM-Solver++(3M) has half of the second difference.

    Theirs extrapolates however far it is.
    """
    monkeypatch.setattr(samplers.solvers, "FARTHEST", np.inf)
    sampler = make(num_steps, spacing=spacing)
    predicts_only = isinstance(sampler, samplers.DPMSolver)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type=PREDICTIONS[prediction],
        solver_order=sampler.order,
        disable_corrector=list(range(num_steps)) if predicts_only else [],
        final_sigmas_type="zero",
        beta_start=1e-4,
        beta_end=0.02,
    )
    times = sampler.timesteps(LINEAR)
    scheduler.set_timesteps(num_steps)
    scheduler.timesteps = torch.tensor(times[:-1] - 1)
    scheduler.sigmas = torch.tensor(LINEAR.sigma[times] / LINEAR.alpha[times], dtype=torch.float32)
    expected = theirs(scheduler, times, prediction, lambda scheduler, y, t, x, _: scheduler.step(y, t, x).prev_sample)
    np.testing.assert_allclose(ours(sampler, prediction, None), expected, rtol=1e-4, atol=1e-4)


def test_zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, beta_start=1e-4, beta_end=0.02)
    schedule = schedules.zero_terminal_snr(LINEAR)
    np.testing.assert_allclose(schedule.alpha[1:] ** 2, scheduler.alphas_cumprod.numpy(), atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weight(prediction):
    """The published ones of each prediction [Hang et al., 2023], which diffusers' training scripts compute."""
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    snr = training_utils.compute_snr(scheduler, torch.arange(1000)).numpy()
    divisor = {"epsilon": snr, "x0": 1.0, "v": snr + 1}[prediction]
    weight = GaussianDiffusion(LINEAR, prediction).min_snr_weight(5.0)
    np.testing.assert_allclose(weight[1:], np.minimum(snr, 5.0) / divisor, rtol=2e-3)
    assert weight[0] == 0
