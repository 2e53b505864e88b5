"""Samplers compared with closed forms. No training is needed.

The best prediction of x_0 is known for Gaussian data and for mixtures of Gaussians. For Gaussian data, a recursion in
float64 gives the mean and the variance of each sampler's output. They tend to the mean and the variance of the data.
Without noise, each sampler follows the probability-flow equation. In one dimension this equation preserves quantiles.
"""

import dataclasses
import functools
import itertools
import json
import statistics

import keras
import numpy as np
import pytest
from closed_form import GAUSSIAN, TWO, Mixture

import keras_ddpm as kd
from keras_ddpm import samplers, schedules
from keras_ddpm.samplers import loop as sampling

LINEAR = schedules.linear(1000)
DPM = samplers.DPMSolver
UniPC = samplers.UniPC


def exact_moments(sampler, schedule):
    """Mean and variance of the samples of GAUSSIAN: every row is linear in x, earlier x_0, x_0 and noise."""
    (mean,), std = GAUSSIAN.means, GAUSSIAN.std
    size = 1 + samplers.NUM_PREVIOUS
    expected, covariance = np.zeros(size), np.zeros((size, size))  # of x and the earlier predictions
    covariance[0, 0] = 1.0
    for row in sampler.table(schedule):
        alpha, sigma = schedule.alpha[int(row["t"])], schedule.sigma[int(row["t"])]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # x_0 = mean + gain (x - alpha mean)
        x_0 = np.array([gain] + [0.0] * samplers.NUM_PREVIOUS)
        from_all = np.array([row["from_x"], *row["from_previous"]]) + row["from_x_0"] * x_0
        of_call = row["remember_x_0"] * x_0 + row["remember_x"] * np.eye(size)[0]
        remembered = np.vstack([of_call, np.eye(size)[1:-1]]), np.eye(size)[1:]
        matrix = np.vstack([from_all, (1 - row["keep"]) * remembered[0] + row["keep"] * remembered[1]])
        of_mean = [row["from_x_0"], (1 - row["keep"]) * row["remember_x_0"]] + [0.0] * (size - 2)
        constant = np.array(of_mean) * (1 - gain * alpha) * mean
        expected = matrix @ expected + constant
        covariance = matrix @ covariance @ matrix.T
        covariance[0, 0] += row["std"] ** 2
    return expected[0], covariance[0, 0]


# How far the deviation of the samples may be off, by discretisation.
ALL = [
    (samplers.DDPM(), 0.02),
    (samplers.DDPM(variance="large"), 0.02),
    (samplers.DDPM(variance=0.5), 0.02),
    (samplers.DDPM(100), 0.14),
    (samplers.DDIM(1000), 0.01),
    (samplers.DDIM(50), 0.14),
    (samplers.DDIM(50, spacing="logsnr"), 0.08),
    (samplers.DDIM(100, eta=1.0), 0.14),
    (DPM(50, spacing="logsnr"), 0.01),
    (DPM(50, spacing="karras"), 0.06),
    (DPM(100, eta=1.0, spacing="logsnr"), 0.02),
    (DPM(50, order=3, spacing="logsnr"), 0.01),
    (DPM(100, eta=1.0, order=3, spacing="logsnr"), 0.02),
    (UniPC(50, order=1, spacing="logsnr"), 0.02),
    (UniPC(50, spacing="logsnr"), 0.01),
    (UniPC(50, order=3, spacing="karras"), 0.06),
    (samplers.IPNDM(50), 0.06),
    (samplers.IPNDM(50, spacing="uniform"), 0.08),
    (samplers.Heun(50, spacing="logsnr"), 0.02),
    (samplers.Heun(50, churn=10, spacing="karras"), 0.1),
    (samplers.Langevin(200, num_updates=5, spacing="logsnr"), 0.07),
    (samplers.Langevin(predictor=samplers.DDIM(50, spacing="logsnr")), 0.06),
    (samplers.Langevin(predictor=DPM(50, spacing="logsnr"), step_size=0.02), 0.02),
    (samplers.Langevin(predictor=samplers.Heun(50, churn=10, spacing="logsnr"), num_updates=2), 0.05),
]
SCHEDULES = {
    "linear": LINEAR,
    "cosine": schedules.cosine(1000),
    "straight": schedules.straight(1000),
    "zero terminal": schedules.zero_terminal_snr(LINEAR),
}


@functools.cache
def model_of(data, schedule, size=1):
    return data.model(SCHEDULES[schedule], size=size)


def draws(data, schedule, sampler):
    """20,000 samples, in examples of 50, since the noise of each example has a seed of its own."""
    return model_of(data, schedule, 50).sample(400, sampler, seed=0, batch_size=400).ravel().astype("float64")


@pytest.mark.host
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "bias"), ALL, ids=str)
def test_moments_tend_to_those_of_the_data(sampler, bias, schedule):
    mean, variance = exact_moments(sampler, SCHEDULES[schedule])
    assert abs(mean - 0.3) < 0.001 and abs(np.sqrt(variance) / 0.2 - 1) < bias


@pytest.mark.host
@pytest.mark.parametrize(
    "make",
    [
        samplers.DDPM,
        samplers.DDIM,
        functools.partial(DPM, eta=1.0, spacing="logsnr"),
        DPM,
        samplers.Heun,
        lambda num: samplers.Langevin(predictor=DPM(num, spacing="logsnr"), step_size=4 / num),
        lambda num: samplers.Langevin(50, step_size=0.4, num_updates=num // 5, spacing="logsnr"),
    ],
)
def test_moments_converge(make):
    """With four times as many steps the error is less than half, or below the 0.2 % that T = 1000 leaves."""
    errors = [abs(np.sqrt(exact_moments(make(num), LINEAR)[1]) / 0.2 - 1) for num in (25, 100, 400)]
    assert errors[1] < errors[0] / 2 and errors[2] < max(errors[1] / 2, 0.002) and errors[2] < 0.05, errors


@pytest.mark.parametrize(("sampler", "bias"), ALL, ids=str)
def test_samples_have_the_moments_of_the_recursion(sampler, bias):
    mean, variance = exact_moments(sampler, LINEAR)
    x = draws(GAUSSIAN, "linear", sampler)
    num = len(x)
    # Five standard errors.
    assert abs(x.mean() - mean) < 5 * np.sqrt(variance / num)
    assert abs(x.var() / variance - 1) < 5 * np.sqrt(2 / num)
    skewness = np.mean(((x - x.mean()) / x.std()) ** 3)
    assert abs(skewness) < 5 * np.sqrt(6 / num)


@pytest.mark.parametrize("schedule", ["linear", "straight"])
@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDPM(400, spacing="logsnr"),
        samplers.DDIM(400, spacing="logsnr"),
        DPM(100, spacing="logsnr"),
        DPM(100, eta=1.0, spacing="logsnr"),
        DPM(100, order=3, spacing="logsnr"),
        UniPC(100, spacing="logsnr"),
        samplers.IPNDM(100, spacing="logsnr"),
        samplers.Heun(60, spacing="logsnr"),
        samplers.Heun(60, churn=20, spacing="logsnr"),
        samplers.Langevin(50, step_size=0.4, num_updates=20, spacing="logsnr"),
        samplers.Langevin(predictor=DPM(60, spacing="logsnr"), step_size=0.02),
    ],
    ids=str,
)
def test_samples_of_a_mixture_are_distributed_as_it(sampler, schedule):
    """By the largest distance of the distribution functions, of which 0.013 are due to 20,000 samples (p = 0.002)."""
    x = np.sort(draws(TWO, schedule, sampler))
    assert np.max(np.abs(TWO.cdf(x) - (np.arange(len(x)) + 0.5) / len(x))) < 0.02


@pytest.mark.parametrize(
    ("data", "make", "low", "high"),
    [(data, *row) for row in [(samplers.DDIM, 0.9, 1.1), (DPM, 1.8, 3)] for data in (GAUSSIAN, TWO)]
    # On the Gaussian, these errors reach those of the rounded times.
    + [
        (TWO, samplers.Heun, 1.8, 3),
        (TWO, functools.partial(DPM, order=3), 1.8, 4),
        (TWO, UniPC, 1.8, 4),
        (TWO, functools.partial(UniPC, order=3), 1.8, 5),
    ],
)
def test_order_of_convergence_to_the_probability_flow(data, make, low, high):
    """Whose map keeps quantiles: a sample is the quantile of the data that its noise was of x_T."""
    model, num = model_of(data, "linear"), 500
    noise = sampling.noise((1,), 0, range(num))[:, 0].astype("float64")
    expected = data.quantile(data.cdf(noise, LINEAR.alpha[-1], LINEAR.sigma[-1]))
    steps = [20, 40, 80]
    errors = []
    for num_steps in steps:
        sampler = make(num_steps, spacing="logsnr")
        assert len(sampler.timesteps(LINEAR)) == num_steps + 1
        x = model.sample(num, sampler, seed=0, batch_size=num)[:, 0]
        errors.append(np.sqrt(np.mean((x - expected) ** 2)))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert low < order < high, errors


@pytest.mark.host
@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (samplers.DDIM(), 1),
        (DPM(), 2),
        (DPM(order=3), 3),
        (UniPC(order=1), 2),
        (UniPC(order=2), 3),
        (UniPC(order=3), 4),
    ],
    ids=str,
)
def test_order_of_convergence(sampler, order):
    """On correlated Gaussian data, from nearly no signal to as much as noise, at times that are not rounded."""
    steps, errors = np.array([10, 20, 40, 80]), []
    variances, axes = np.linalg.eigh([[0.05, 0.02], [0.02, 0.03]])
    along = lambda values: (axes * values) @ axes.T
    for num in steps:
        signal = -6 + 6.3 / num * np.arange(num + 4)  # the last steps, of lower orders, are not made
        alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * signal)), 1 / np.sqrt(1 + np.exp(2 * signal))
        rows = samplers.row(signal[:-1], **sampler.coefficients(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]))
        of_x_t = alpha[:, None] ** 2 * variances + sigma[:, None] ** 2
        x = start = np.array([1.0, -0.5])
        previous = (np.zeros(2),) * samplers.NUM_PREVIOUS
        for index, row in enumerate(rows[:num]):
            gain = along(alpha[index] * variances / of_x_t[index])
            x, previous = samplers.step(row, lambda x, t, gain=gain: gain @ x, x, None, previous)
        errors.append(np.linalg.norm(x - along(np.sqrt(of_x_t[num] / of_x_t[0])) @ start))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.3, errors


@pytest.mark.host
@pytest.mark.parametrize(("even_in", "order"), [("sigma / alpha", 4), ("logarithm", 2)])
def test_order_of_convergence_of_ipndm(even_in, order):
    """On Gaussian data, for steps that are even in sigma/alpha. The first three, of lower orders, are not made."""
    steps, errors, variance = np.array([50, 100, 200, 400]), [], 0.2**2
    for num in steps:
        ratio = np.linspace(3, 0.3, num + 1) if even_in == "sigma / alpha" else np.geomspace(20, 0.3, num + 1)
        alpha, sigma = 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio)
        columns = samplers.IPNDM().coefficients(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
        exact = np.sqrt(alpha**2 * variance + sigma**2)
        gain, noise = alpha * variance / exact**2, sigma / exact
        x, previous = exact[3], tuple(noise[2::-1])
        for index, row in enumerate(samplers.row(ratio[:-1], **columns)[3:], start=3):
            x, previous = samplers.step(row, lambda x, t, index=index: gain[index] * x, x, None, previous)
        errors.append(abs(x - exact[-1]))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.3, errors


@functools.cache
def clipping_model(schedule, clips_itself=False, clip_range=(-1, 1)):
    """A model of three numbers whose network predicts that x_0 is x, or x clipped to [-1, 1]."""
    inputs = keras.Input((3,)), keras.Input((), dtype="int32")
    network = keras.Model(inputs, keras.ops.clip(inputs[0], -1, 1) if clips_itself else inputs[0])
    return kd.DiffusionModel(network, kd.GaussianDiffusion(schedule, "x0", clip_range))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ipndm_is_the_papers(schedule, num_steps):
    """[Zhang and Chen, 2023, section 3], with the noise written out."""
    sampler, schedule = samplers.IPNDM(num_steps), SCHEDULES[schedule]
    x = start = np.array([1.2, -0.4, 0.03])
    weights = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    noises, times = [], sampler.timesteps(schedule)
    for t, s in itertools.pairwise(times):
        x_0 = clipped(x, t)
        noise = (x - schedule.alpha[t] * x_0) / schedule.sigma[t]
        if schedule.alpha[t] == 0 or s == 0:
            x = schedule.alpha[s] * x_0 + schedule.sigma[s] * noise
            continue
        noises = [noise, *noises][:4]
        length = schedule.alpha[s] * schedule.sigma[t] / schedule.alpha[t] - schedule.sigma[s]
        # In longer steps, the noise is not extrapolated.
        mean = noise if length >= 4 else sum(w * noise for w, noise in zip(weights[len(noises)], noises))
        x = schedule.alpha[s] / schedule.alpha[t] * (x - schedule.sigma[t] * mean) + schedule.sigma[s] * mean
    np.testing.assert_allclose(run(sampler, start, clipped, schedule), x, rtol=1e-9)
    got = clipping_model(schedule).run(
        sampling.Job(sampler.steps(schedule), lambda indices: start[None].astype("float32"), 1)
    )
    # In float32. Where there is little signal, the noise that is remembered has large factors.
    np.testing.assert_allclose(got[0], x, atol=5e-4)


@pytest.mark.host
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("make", "spacing", "few"),
    [(DPM, "uniform", 8), (functools.partial(DPM, order=3), "uniform", 8), (UniPC, "uniform", 8)]
    + [(functools.partial(UniPC, order=3), "uniform", 8), (samplers.IPNDM, "karras", 8)]
    + [
        (DPM, "logsnr", 8),
        (functools.partial(DPM, order=3), "logsnr", 16),
        (UniPC, "logsnr", 8),
        (samplers.IPNDM, "logsnr", 8),
    ],
)
def test_every_number_of_steps_beats_ddim(make, spacing, few, schedule):
    """On correlated Gaussian data, whose components are independent in some directions. From `few` calls on.

    With the default spacing of each sampler from 8 calls on. Third order with "logsnr" needs more.
    """
    alpha, sigma = SCHEDULES[schedule].alpha, SCHEDULES[schedule].sigma
    std = np.array([0.3, 0.6, 1.2])
    prior = np.hypot(alpha[-1], sigma[-1])
    expected = std * prior / np.hypot(alpha[-1] * std, sigma[-1])

    def error(sampler):
        gain = lambda t: alpha[t] * std**2 / (alpha[t] ** 2 * std**2 + sigma[t] ** 2)
        x, previous = np.full(3, prior), (np.zeros(3),) * samplers.NUM_PREVIOUS
        for row in sampler.table(SCHEDULES[schedule]):
            x, previous = samplers.step(row, lambda x, t: gain(int(t)) * x, x, None, previous)
        return np.sqrt(np.mean((x - expected) ** 2))

    for num in range(1, 51):
        found = error(make(num, spacing=spacing))
        assert np.isfinite(found) and (num < few or found <= error(samplers.DDIM(num, spacing=spacing))), num


SHORT = schedules.linear(60)


@pytest.mark.host
@pytest.mark.parametrize(
    "schedule", [SHORT, schedules.cosine(60), schedules.straight(60), schedules.zero_terminal_snr(SHORT)]
)
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize(
    "make",
    [samplers.DDPM, samplers.DDIM, samplers.IPNDM, DPM, functools.partial(DPM, order=3)]
    + [functools.partial(DPM, eta=1.0, order=3), *(functools.partial(UniPC, order=order) for order in (1, 2, 3))],
)
def test_any_number_of_steps_makes_as_many_calls(make, spacing, schedule):
    """Among them N = T, and N = 3k − 1. Data that are constant are found whatever the noise, so no noise is left.

    Mistakes of others: an index beyond the last time at N = T, a third-order solver that fails or stops early at
    N = 3k − 1, a last step to the smallest noise level instead of to data, and doubled times with Karras' spacing of
    the cosine schedule.
    """
    for num in (1, 2, 3, 5, 8, 53, 59, 60, None):
        sampler = make(num, spacing=spacing)
        table = sampler.table(schedule)
        assert len(table) == (num or 60)
        assert np.all(np.diff(table["t"]) < 0) and sampler.timesteps(schedule)[-1] == 0
        x, previous, noise = np.array([2.0, -3.0]), (np.zeros(2),) * samplers.NUM_PREVIOUS, np.array([-1.0, 2.0])
        for row in table:
            x, previous = samplers.step(row, lambda x, t: np.array([0.25, 0.25]), x, noise, previous)
        np.testing.assert_allclose(x, 0.25, rtol=1e-9)


@pytest.mark.host
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
def test_every_step_lands_on_the_next_visited_time(spacing, schedule):
    """Mistakes of others: t − T // N as the next time, which is another one if N does not divide T, as 53 of 1000.

    For constant data x_0, a method without noise keeps ε. So x_t is known at each time.
    """
    schedule, x_0, noise = SCHEDULES[schedule], 0.25, np.array([1.5, -0.7])
    for make in (samplers.DDIM, DPM, functools.partial(DPM, order=3), UniPC, samplers.IPNDM):
        for num in (7, 53, 999):
            table = make(num, spacing=spacing).table(schedule)
            x, previous = schedule.alpha[-1] * x_0 + schedule.sigma[-1] * noise, (np.zeros(2),) * samplers.NUM_PREVIOUS
            for row, s in zip(table, [*table["t"][1:].astype(int), 0]):
                x, previous = samplers.step(row, lambda x, t: np.full(2, x_0), x, None, previous)
                np.testing.assert_allclose(x, schedule.alpha[s] * x_0 + schedule.sigma[s] * noise, atol=1e-7)


@pytest.mark.host
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_large_variance_of_long_steps(schedule):
    """Mistake of others: the β of one step of the whole chain, also if N < T. A step from s to t adds 1 − α_t²/α_s²."""
    alpha, sampler = SCHEDULES[schedule].alpha, samplers.DDPM(53, variance="large")
    times = sampler.timesteps(SCHEDULES[schedule])
    std = sampler.table(SCHEDULES[schedule])["std"]
    np.testing.assert_allclose(std[:-1] ** 2, 1 - (alpha[times[:-2]] / alpha[times[1:-1]]) ** 2, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [SHORT, schedules.cosine(60), schedules.straight(60)])
@pytest.mark.parametrize("make", [samplers.DDIM, functools.partial(DPM, order=3), UniPC, samplers.IPNDM, samplers.Heun])
def test_constant_data_by_any_prediction(make, schedule, prediction):
    """The network's output is exact. x_0 at the least signal is known to float32 divided by alpha_T."""
    if prediction == "epsilon" and schedule.alpha[-1] == 0:
        pytest.skip("without signal, the noise says nothing about x_0")
    diffusion, x_0 = kd.GaussianDiffusion(schedule, prediction), np.full((1, 2), 0.25, "float32")
    calls = []

    def denoise(x, t):
        calls.append(int(t))
        t = np.array([t], "int32")
        y = diffusion.target(x_0, t, diffusion.predict_noise(x.astype("float32"), t, x_0))
        return keras.ops.convert_to_numpy(diffusion.predict_x0(x.astype("float32"), t, y)).astype("float64")

    for num in (1, 2, 3, 5, 20):
        sampler = make(num)
        x, previous = np.array([[1.5, -0.7]]), (np.zeros((1, 2)),) * samplers.NUM_PREVIOUS
        for row in sampler.table(schedule):
            x, previous = samplers.step(row, denoise, x, None, previous)
        np.testing.assert_allclose(x, 0.25, atol=1e-3)
        assert len(calls) == len(sampler.table(schedule))
        calls.clear()


def test_ddim_with_all_the_noise_samples_what_ddpm_does():
    model = model_of(TWO, "linear")
    x = model.sample(500, samplers.DDIM(100, eta=1.0), seed=0)
    np.testing.assert_allclose(x, model.sample(500, samplers.DDPM(100), seed=0), atol=2e-5)
    assert list(samplers.DDIM(None, eta=1.0).table(LINEAR)["t"]) == list(range(1000, 0, -1))


@pytest.mark.host
def test_ddpm_coefficients_are_the_papers():
    """[Ho et al., 2020, Eq. 7], from betas alone."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    rows = samplers.DDPM().table(LINEAR)[::-1]
    t, from_x, from_x_0, std = (rows[name] for name in ("t", "from_x", "from_x_0", "std"))
    assert np.array_equal(t, np.arange(1, 1001))
    np.testing.assert_allclose(from_x_0, np.sqrt(previous) * betas / (1 - alphas_cumprod), rtol=1e-10)
    np.testing.assert_allclose(
        from_x, np.sqrt(1 - betas) * (1 - previous) / (1 - alphas_cumprod), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(std**2, (1 - previous) / (1 - alphas_cumprod) * betas, rtol=1e-10, atol=1e-12)
    large = samplers.DDPM(variance="large").table(LINEAR)[::-1]["std"]
    np.testing.assert_allclose(large[1:] ** 2, betas[1:], rtol=1e-10)
    assert large[0] == 0  # no noise at the end
    half = samplers.DDPM(variance=0.5).table(LINEAR)[::-1]["std"]
    np.testing.assert_allclose(half[1:] ** 2, np.sqrt(betas[1:] * std[1:] ** 2), rtol=1e-10)


@pytest.mark.host
def test_ddim_with_all_the_noise_is_ddpm():
    for num_steps in (None, 40):
        for schedule in SCHEDULES.values():
            ddim, ddpm = samplers.DDIM(num_steps, eta=1.0).table(schedule), samplers.DDPM(num_steps).table(schedule)
            for name in samplers.ROW.names:
                np.testing.assert_allclose(ddim[name], ddpm[name], rtol=1e-9, atol=1e-12)


def clipped(x, t):
    return np.clip(x, -1, 1)


def test_ddim_keeps_the_noise_of_a_clipped_prediction():
    """x_s = alpha_s x_0 + sigma_s ε, with the ε that leads from that x_0 to x_t [Song et al., 2021, Eq. 12]."""
    sampler = samplers.DDIM(10)
    x_t = np.array([2.0, -0.7])
    times = sampler.timesteps(LINEAR)
    for row, t, s in zip(sampler.table(LINEAR), times, times[1:]):
        x_s, (x_0,) = samplers.step(row, clipped, x_t, None, (0 * x_t,))
        noise = (x_t - LINEAR.alpha[t] * x_0) / LINEAR.sigma[t]
        np.testing.assert_allclose(x_s, LINEAR.alpha[s] * x_0 + LINEAR.sigma[s] * noise, rtol=1e-10, atol=1e-12)


def run(sampler, x, denoise, schedule=LINEAR):
    previous = (0 * x,) * samplers.NUM_PREVIOUS
    for row in sampler.table(schedule):
        x, previous = samplers.step(row, denoise, x, 0, previous)
    return x


def test_predictions_are_clipped_before_they_are_used_and_remembered():
    """As if the network had clipped them. They lie far outside for noise of three standard deviations."""
    start, schedule = np.array([[3.0, -0.4, 1.5]], "float32"), schedules.cosine(50)
    for sampler in (DPM(8), DPM(8, order=3), UniPC(8), UniPC(8, order=3), samplers.IPNDM(8), samplers.Heun(8)):
        found = []
        for options in [(False, (-1, 1)), (True, None), (False, None)]:
            model = clipping_model(schedule, *options)
            found.append(model.run(sampling.Job(sampler.steps(schedule), lambda indices: start, 1)))
        np.testing.assert_allclose(found[0], found[1], atol=1e-5)
        assert np.abs(found[0] - found[2]).max() > 0.1, sampler


def test_heun_integrates_a_line_in_the_log_snr():
    """x_s = sigma_s/sigma_t x_t + sigma_s ∫ e^λ x_0(λ) dλ, with x_0 on the line through those at t and s."""
    sampler = samplers.Heun(7, spacing="karras")
    times = sampler.timesteps(LINEAR)
    x = start = np.array([1.2, -0.4])
    for t, s in zip(times, times[1:]):
        x_0 = clipped(x, t)
        predicted = LINEAR.sigma[s] / LINEAR.sigma[t] * (x - LINEAR.alpha[t] * x_0) + LINEAR.alpha[s] * x_0
        if s > 0:
            end, u = clipped(predicted, s), np.linspace(0, 1, 20_001)
            decay = LINEAR.log_snr[s] / 2 - LINEAR.log_snr[t] / 2
            weight = np.array([1, *[4, 2] * 9_999, 4, 1]) / 60_000 * decay * np.exp(-decay * (1 - u))
            integral = np.sum(weight * (1 - u)) * x_0 + np.sum(weight * u) * end
            predicted = LINEAR.sigma[s] / LINEAR.sigma[t] * x + LINEAR.alpha[s] * integral
        x = predicted
    np.testing.assert_allclose(run(sampler, start, clipped), x, rtol=1e-9)


def slopes(sampler, x, schedule):
    """Heun's method of [Karras et al., 2022, algorithm 1], in the variable x/alpha, with the mean of two slopes."""
    times, ratio = sampler.timesteps(schedule), schedule.sigma / schedule.alpha
    x = x / schedule.alpha[-1]
    for t, s in zip(times, times[1:]):
        slope = (x - clipped(schedule.alpha[t] * x, t)) / ratio[t]
        predicted = x + (ratio[s] - ratio[t]) * slope
        if s > 0:
            end = (predicted - clipped(schedule.alpha[s] * predicted, s)) / ratio[s]
            predicted = x + (ratio[s] - ratio[t]) * (slope + end) / 2
        x = predicted
    return x


def test_heun_tends_to_the_papers():
    start = np.array([1.2, -0.4])
    differences = []
    for num_steps in (50, 200):
        sampler = samplers.Heun(num_steps, spacing="logsnr")
        differences.append(np.abs(run(sampler, start, clipped) - slopes(sampler, start, LINEAR)).max())
    assert differences[1] < differences[0] / 4 and differences[1] < 1e-3, differences


EVERY = [
    samplers.DDPM,
    samplers.DDIM,
    functools.partial(samplers.DDIM, eta=1.0),
    DPM,
    functools.partial(DPM, eta=1.0),
    functools.partial(DPM, order=3),
    functools.partial(DPM, order=3, eta=1.0),
    *(functools.partial(UniPC, order=order) for order in (1, 2, 3)),
    samplers.IPNDM,
    samplers.Heun,
    functools.partial(samplers.Heun, churn=40.0),
    samplers.Langevin,
    lambda num, spacing: samplers.Langevin(predictor=samplers.DDIM(num, spacing=spacing)),
]
STRICT = {"cosine": kd.schedules.cosine(1000), "linear": LINEAR, "sigmoid": kd.schedules.sigmoid(1000)}
STRICT |= {"shifted": kd.schedules.shifted(STRICT["cosine"], 64, 32), "zero": kd.schedules.zero_terminal_snr(LINEAR)}


@pytest.mark.host
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize("make", EVERY)
def test_factors_are_bounded(make, spacing):
    """The exact solution multiplies x and x_0 by at most 1, so errors of the network do not grow more than tenfold."""
    for schedule in STRICT.values():
        for num_steps in (1, 2, 3, 5, 8, 10, 20, 50, 200, 1000):
            table = make(num_steps, spacing=spacing).table(schedule)
            for name in ("from_x", "from_x_0", "from_previous", "std"):
                assert np.abs(table[name]).max() < 10, (schedule, num_steps, name)


def distance(sampler, data, schedule, num=1000):
    """The mean distance of the quantiles of samples and data [Wasserstein], by steps in float64 without clipping."""
    u = (np.arange(num) + 0.5) / num
    x = np.vectorize(statistics.NormalDist().inv_cdf)(u) * np.hypot(schedule.alpha[-1], schedule.sigma[-1])
    predict = lambda x, t: data.denoise(x, schedule.alpha[int(t)], schedule.sigma[int(t)])
    previous = (np.zeros_like(x),) * samplers.NUM_PREVIOUS
    for row in sampler.table(schedule):
        x, previous = samplers.step(row, predict, x, None, previous)
    return np.abs(np.sort(x) - data.quantile(u)).mean()


@pytest.mark.host
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize("data", [GAUSSIAN, TWO, Mixture((1.0,), (0.1,), 0.6)], ids=["narrow", "two", "wide"])
def test_solvers_are_not_farther_than_ddim(data, spacing):
    """With as many steps, from 5 on; iPNDM, which is the paper's, within 1.3 times the distance."""
    for schedule in STRICT.values():
        for num in (5, 8, 11, 21):
            limit = max(distance(samplers.DDIM(num, spacing=spacing), data, schedule), 0.004)
            for make in (DPM, functools.partial(DPM, order=3), UniPC, functools.partial(UniPC, order=3), samplers.Heun):
                assert distance(make(num, spacing=spacing), data, schedule) < 1.1 * limit, (make, schedule, num)
            assert distance(samplers.IPNDM(num, spacing=spacing), data, schedule) < 1.3 * limit, (schedule, num)


def test_churn_adds_the_noise_of_the_time_that_it_goes_back_to():
    """Each step but the first starts where sigma/alpha has grown by 1 + γ [Karras et al., 2022, algorithm 2]."""
    sampler = samplers.Heun(30, churn=6.0)
    ratio = LINEAR.sigma / np.maximum(LINEAR.alpha, 1e-300)
    times = sampler.timesteps(LINEAR)
    table = sampler.table(LINEAR)
    starts = table["t"][::2].astype(int)
    assert starts[0] == 1000 and np.all(starts[1:] >= times[1:-1])
    wanted = 1.2 * ratio[times[1:-1]]
    inside = wanted < ratio[1000]
    assert np.all(np.abs(ratio[starts[1:]] - wanted)[inside] <= np.diff(ratio)[starts[1:] - 1][inside])
    # With the x_0 that x_s stands for kept, signal and noise are those of the later time.
    for row, t in zip(table[1::2], starts[1:]):
        s, ratio = int(row["t"]), row["from_x"]
        np.testing.assert_allclose(ratio * LINEAR.alpha[s], LINEAR.alpha[t], rtol=1e-12)
        np.testing.assert_allclose((ratio * LINEAR.sigma[s]) ** 2 + row["std"] ** 2, LINEAR.sigma[t] ** 2, rtol=1e-12)


def test_langevin_is_the_papers():
    """x + step/2 s + sqrt(step) z [Song and Ermon, 2019, Eq. 4] in x/alpha, with steps 2 step_size (sigma/alpha)²."""
    rows = samplers.Langevin(10, step_size=0.05, num_updates=2).table(LINEAR)
    times = samplers.DDIM(10).timesteps(LINEAR)
    assert np.array_equal(rows["t"], [*np.repeat(times[:-1], 2), times[-2]])
    x, noise, x_0 = 0.7, -1.3, 0.2
    for t, s, row in zip(times, times[1:-1], rows[1::2]):
        ratio = LINEAR.sigma[t] / LINEAR.alpha[t]
        size = 2 * 0.05 * ratio**2
        scaled = x / LINEAR.alpha[t]
        scaled = scaled + size / 2 * (x_0 - scaled) / ratio**2 + np.sqrt(size) * noise
        got, _ = samplers.step(row, lambda x, t: x_0, x, noise, ())
        assert got == pytest.approx(LINEAR.alpha[s] * scaled, rel=1e-12)


def test_rows_remember_in_order():
    """The last call first; a row that keeps forgets its own. By default columns are 0, but x_0 is remembered."""
    rows = samplers.row([3, 2, 1], from_previous=[[1, 2, 3], 4.0], keep=[0, 0, 1])
    both = samplers.row(3, remember_x_0=-2.0, remember_x=5.0)
    assert samplers.step(both, lambda x, t: 7.0, 0.5, None, (1.0, 2.0)) == (0.0, (-2 * 7 + 5 * 0.5, 1.0))
    assert rows["from_previous"].tolist() == [[1, 4, 0], [2, 4, 0], [3, 4, 0]]
    assert rows["t"].tolist() == [3, 2, 1] and not np.any(rows["std"]) and samplers.row(5).shape == ()
    x, previous = 0.0, (10.0, 20.0, 30.0)
    sums, memories = [], []
    for row in rows:
        x, previous = samplers.step(row, lambda x, t: t, x, None, previous)
        sums.append(x)
        memories.append(previous)
    assert memories == [(3, 10, 20), (2, 3, 10), (2, 3, 10)]
    assert sums == [1 * 10 + 4 * 20, 2 * 3 + 4 * 10, 3 * 2 + 4 * 3]
    with pytest.raises(ValueError, match="no field of name from_memory"):
        samplers.row(3, from_memory=1.0)


def test_a_corrector_leaves_the_predictor_its_memory():
    """Without a step it changes nothing, whatever the predictor remembers."""
    for predictor in (DPM(8), samplers.Heun(8), samplers.DDIM(8), samplers.IPNDM(8)):
        x = np.array([0.3, 1.4])
        corrected = samplers.Langevin(predictor=predictor, step_size=1e-12, num_updates=2)
        np.testing.assert_allclose(run(corrected, x, clipped), run(predictor, x, clipped), rtol=1e-9)


@pytest.mark.host
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50, 99, 100, None])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
@pytest.mark.parametrize("schedule", [schedules.linear(100), schedules.cosine(100), schedules.straight(100)])
def test_visits_start_at_noise_and_end_at_data(schedule, spacing, num_steps):
    times = samplers.DDPM(num_steps, spacing=spacing).timesteps(schedule)
    assert times[0] == 100 and times[-1] == 0 and len(times) == (num_steps or 100) + 1
    assert np.all(np.diff(times) < 0)
    assert spacing == "uniform" or num_steps == 1 or times[-2] == 1


@pytest.mark.parametrize(("spacing", "position"), [("logsnr", np.log), ("karras", lambda ratio: ratio ** (1 / 7))])
def test_spacing_is_even_up_to_rounding(spacing, position):
    times = samplers.DDIM(12, spacing=spacing).timesteps(LINEAR)[:-1]
    nodes = position(LINEAR.sigma[times] / LINEAR.alpha[times])
    even = np.linspace(nodes[0], nodes[-1], 12)
    far = times > 50  # where a step of 1 is a small part of the distance
    assert far.sum() >= 7 and times[-1] == 1
    np.testing.assert_allclose(nodes[far], even[far], atol=0.02 * (nodes[0] - nodes[1]))


@pytest.mark.host
@pytest.mark.parametrize("sampler", [sampler for sampler, _ in ALL], ids=str)
def test_a_row_is_a_network_call(sampler):
    calls = []
    run(sampler, 0.0, lambda x, t: calls.append(t) or x)
    assert len(calls) == len(sampler.table(LINEAR))


def test_numbers_of_network_calls():
    assert len(samplers.Heun(20).table(LINEAR)) == 39 and len(DPM(20).table(LINEAR)) == 20
    assert len(samplers.Langevin(10, num_updates=3).table(LINEAR)) == 31
    assert len(samplers.Langevin(predictor=samplers.Heun(20)).table(LINEAR)) == 39 + 19
    # Without signal at T Heun and Langevin take a single step of one call there.
    straight = schedules.straight(100)
    assert len(samplers.Heun(20).table(straight)) == 38
    assert len(samplers.Langevin(10, num_updates=3).table(straight)) == 31 - 2


def test_a_corrector_visits_the_times_of_its_predictor():
    predictor = samplers.DDIM(10, spacing="karras")
    visited = samplers.Langevin(predictor=predictor).timesteps(LINEAR)
    assert np.array_equal(visited, predictor.timesteps(LINEAR))


@pytest.mark.parametrize("schedule", [schedules.straight(100), schedules.zero_terminal_snr(schedules.linear(100))])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras"])
def test_without_signal_at_the_start_every_first_step_is_ddims(schedule, spacing):
    expected = samplers.DDIM(10, spacing=spacing).table(schedule)[0]
    update = [name for name in samplers.ROW.names if not name.startswith("remember")]
    for sampler in (
        samplers.DDPM(10, spacing=spacing),
        samplers.DDPM(10, "large", spacing=spacing),
        samplers.DDIM(10, eta=0.5, spacing=spacing),
        DPM(10, spacing=spacing),
        DPM(10, eta=1.0, spacing=spacing),
        DPM(10, order=3, spacing=spacing),
        UniPC(10, order=3, spacing=spacing),
        samplers.IPNDM(10, spacing=spacing),
        samplers.Heun(10, spacing=spacing),
        samplers.Langevin(10, spacing=spacing),
        samplers.Langevin(10, num_updates=3, spacing=spacing),
        samplers.Langevin(predictor=samplers.Heun(10, spacing=spacing)),
    ):
        table = sampler.table(schedule)
        assert all(np.array_equal(table[name][0], expected[name]) for name in update)
        assert all(np.all(np.isfinite(table[name])) for name in samplers.ROW.names)
        if spacing != "uniform":
            assert sampler.steps(schedule)[1]["t"][0] == 99 and sampler.steps(schedule)[-1]["t"][0] == 1


def test_a_custom_sampler_ends_without_noise():
    class Noisy(samplers.Sampler):
        def coefficients(self, alpha_t, sigma_t, alpha_s, sigma_s):
            return {"from_x_0": alpha_s, "std": 1.0}

    assert Noisy(5).table(LINEAR)["std"].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(NotImplementedError, match="coefficients"):
        samplers.Sampler(5).table(LINEAR)


def test_the_shortest_path_is_that_of_all_paths():
    lengths = np.random.default_rng(0).random((7, 7))
    lengths[np.tril_indices(7)] = np.inf
    for num in range(1, 7):
        paths = [(0, *middle) for middle in itertools.combinations(range(1, 6), num - 1)]
        length = lambda path: sum(lengths[a, b] for a, b in itertools.pairwise([*path, 6]))
        assert tuple(samplers.searching.shortest_path(lengths, num)) == min(paths, key=length)


@pytest.mark.parametrize("schedule", ["linear", "straight"])
def test_optimized_times_are_closer_to_the_probability_flow(schedule):
    """With few steps, than any spacing. As the last one they stay a value, also in JSON."""
    model, num = model_of(TWO, schedule), 400
    ends = SCHEDULES[schedule].alpha[-1], SCHEDULES[schedule].sigma[-1]
    noise = sampling.prior(model.diffusion, (1,), 0, range(num))[:, 0].astype("float64")
    expected = TWO.quantile(TWO.cdf(noise, *ends))
    error = lambda sampler: np.sqrt(np.mean((model.sample(num, sampler, seed=0)[:, 0] - expected) ** 2))
    paths = model.trajectories(seed=1)
    found = samplers.optimized(paths, samplers.DDIM(7))
    assert error(found) < 0.9 * min(error(samplers.DDIM(7, spacing=s)) for s in ("uniform", "logsnr", "karras"))
    again = json.loads(json.dumps(dataclasses.asdict(found)))
    assert samplers.DDIM(**again) == found and hash(samplers.DDIM(**again)) == hash(found)
    with pytest.raises(ValueError, match="whose steps call the network once. Received: sampler='ddim'"):
        samplers.optimized(paths, "ddim")
    with pytest.raises(ValueError, match="whose steps call the network once"):
        samplers.optimized(paths, samplers.Heun(7))
    assert found.shortened(0.5, 1000).timesteps(SCHEDULES[schedule].until(500))[0] == 500
    with pytest.raises(ValueError, match="`num_steps` must be an integer in 1..60. Received: num_steps=61"):
        samplers.optimized(paths, samplers.DDIM(61))


def test_times_given_as_numbers():
    sampler = DPM(3, spacing=(1000, 400, 2))
    assert sampler.timesteps(LINEAR).tolist() == [1000, 400, 2, 0] and sampler.table(LINEAR)["t"][1] == 400
    assert sampler.shortened(0.3, 1000).spacing == (300, 2)
    with pytest.raises(ValueError, match="The first time of `spacing` must be 60"):
        sampler.timesteps(SHORT)
    for spacing in ((1000, 400), (1000, 400, 400), (1000, 400, 0), (1000.0, 400, 2), [1000, 400]):
        with pytest.raises(ValueError, match="or `num_steps` falling times. Received: spacing="):
            DPM(3, spacing=spacing)


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDPM(variance="large"),
        samplers.DDIM(20, eta=0.5),
        DPM(3, spacing=(1000, 400, 2), order=3),
        UniPC(order=3),
    ]
    + [samplers.Heun(4, churn=2.0), samplers.Langevin(predictor=samplers.DDIM(5))],
    ids=str,
)
def test_samplers_are_saved_with_a_model(sampler, tmp_path):
    config = keras.saving.serialize_keras_object(sampler)
    assert keras.saving.deserialize_keras_object(json.loads(json.dumps(config))) == sampler
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), sampler=samplers.DDPM(3))
    assert model.default_sampler == samplers.DDPM(3)
    model.sampler = sampler
    model.save(tmp_path / "model.keras")
    assert kd.saving.load_model(tmp_path / "model.keras").default_sampler == sampler
    with pytest.raises(ValueError, match="`sampler` must be a sampler, .* Received: sampler='ddim'"):
        kd.DiffusionModel(model.network, sampler="ddim")


def test_samplers_are_values():
    assert samplers.DDIM(20) == samplers.DDIM(20) != samplers.DDPM(20)
    assert len({samplers.DDIM(20), samplers.DDIM(20), samplers.DDIM(20, eta=0.5)}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DDIM(0), "num_steps=0"),
        (lambda: samplers.DDPM(2.5), "num_steps=2.5"),
        (lambda: samplers.DDPM(variance="medium"), "variance='medium'"),
        (lambda: samplers.DDPM(variance=1.5), "variance=1.5"),
        (lambda: samplers.DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: DPM(eta=2), "eta=2"),
        (lambda: DPM(eta="0.5"), "eta='0.5'"),
        (lambda: DPM(eta=True), "eta=True"),
        (lambda: DPM(order=1), "`order` must be an integer in 2..3. Received: order=1"),
        (lambda: UniPC(order=4), "`order` must be an integer in 1..3. Received: order=4"),
        (lambda: DPM(spacing=["uniform"]), "spacing="),
        (lambda: samplers.DDPM(variance=["small"]), "variance="),
        (lambda: samplers.Langevin(predictor=samplers.Langevin(10)), "another sampler"),
        (lambda: DPM(spacing="log-snr"), "uniform.*logsnr.*karras.*spacing='log-snr'"),
        (lambda: samplers.Heun(churn=-1), "churn=-1"),
        (lambda: samplers.Langevin(step_size=0), "step_size=0"),
        (lambda: samplers.Langevin(num_updates=0), "num_updates=0"),
        (lambda: samplers.Langevin(predictor="ddim"), "another sampler.*predictor='ddim'"),
        (lambda: samplers.Langevin(10, predictor=DPM(10)), "num_steps=10"),
        (lambda: samplers.DDIM(1001).table(LINEAR), "1000 steps.*num_steps=1001"),
        (lambda: samplers.Langevin(predictor=samplers.Heun(1001)).table(LINEAR), "1000 steps.*num_steps=1001"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
