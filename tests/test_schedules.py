"""Schedules compared with products of betas in exact rational arithmetic, and with published numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from keras_ddpm import schedules

pytestmark = pytest.mark.host


def exact_alphas_cumprod(betas):
    """∏ (1 − β) for t = 0..T, rounded to 40 digits."""
    product, result = Fraction(1), [1.0]
    for beta in betas:
        product = Fraction(round(product * (1 - Fraction(float(beta))) * 10**40), 10**40)
        result.append(product)
    return result


def check(schedule, betas):
    exact = exact_alphas_cumprod(betas)
    assert schedule.timesteps == len(betas)
    np.testing.assert_allclose(schedule.alpha**2, [float(a) for a in exact], rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma**2, [float(1 - a) for a in exact], rtol=1e-12)


def test_linear():
    check(schedules.linear(1000), [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)])


def test_cosine():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    check(schedules.cosine(1000), [min(1 - f(t + 1) / f(t), 0.999) for t in range(1000)])


def test_sigmoid():
    def f(t):
        def logistic(x):
            return 1 / (1 + math.exp(-x))

        low, high = logistic(-3 / 0.7), logistic(3 / 0.7)
        return (high - logistic((-3 + 6 * t / 100) / 0.7)) / (high - low)

    check(schedules.sigmoid(100, tau=0.7), [min(1 - f(t + 1) / f(t), 0.999) for t in range(100)])


def test_straight():
    schedule = schedules.straight(4)
    assert schedule.alpha.tolist() == [1, 0.75, 0.5, 0.25, 0] and schedule.sigma.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert schedule.log_snr[0] == np.inf and schedule.log_snr[-1] == -np.inf
    np.testing.assert_allclose(schedule.log_snr[1:-1], [math.log(9), 0, -math.log(9)], atol=1e-15)


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.cosine(), schedules.straight()])
@pytest.mark.parametrize("image_size", [32, 64, 256])
def test_shifted_moves_the_log_snr_alone(schedule, image_size):
    """By 2 log(64 / d) [Hoogeboom et al., 2023]. The sum of signal and noise, or of their squares, remains 1."""
    shifted = schedules.shifted(schedule, image_size)
    inner = slice(1, -1)
    np.testing.assert_allclose(
        shifted.log_snr[inner], schedule.log_snr[inner] + 2 * math.log(64 / image_size), rtol=1e-12, atol=1e-9
    )
    power = 1 if schedule.alpha[-1] == 0 else 2
    np.testing.assert_allclose(shifted.alpha**power + shifted.sigma**power, 1, rtol=1e-12)
    assert (shifted.alpha[-1] == 0) == (schedule.alpha[-1] == 0)


def test_the_shifted_straight_line_is_the_published_one():
    """t' = m t / (1 + (m - 1) t) with m = d / 64 [Esser et al., 2024, Eq. 23]."""
    time = np.linspace(0, 1, 101)
    shifted = schedules.shifted(schedules.straight(100), 192)
    np.testing.assert_allclose(shifted.sigma, 3 * time / (1 + 2 * time), rtol=1e-12)


def test_input_scaling_scales_the_data():
    """x_t of scaled data, divided by its standard deviation for data of variance 1."""
    schedule = schedules.cosine(50)
    scaled = schedules.input_scaled(schedule, 0.5)
    x_0, noise = 0.8, -1.1
    expected = schedule.alpha * 0.5 * x_0 + schedule.sigma * noise
    expected /= np.sqrt(0.25 * schedule.alpha**2 + schedule.sigma**2)
    np.testing.assert_allclose(scaled.alpha * x_0 + scaled.sigma * noise, expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.cosine(), schedules.straight(10)])
def test_zero_terminal_snr(schedule):
    if schedule.alpha[-1] == 0:
        schedule = schedules.Schedule(schedule.alpha, np.sqrt(1 - schedule.alpha**2))
    rescaled = schedules.zero_terminal_snr(schedule)
    assert rescaled.alpha[-1] == 0 and rescaled.sigma[-1] == 1 and rescaled.alpha[1] == schedule.alpha[1]
    np.testing.assert_allclose(rescaled.alpha**2 + rescaled.sigma**2, 1, rtol=1e-14)
    # alpha becomes an affine function of the old alpha [Lin et al., 2024, algorithm 1].
    slope, offset = np.polyfit(schedule.alpha[1:], rescaled.alpha[1:], 1)
    np.testing.assert_allclose(rescaled.alpha[1:], slope * schedule.alpha[1:] + offset, atol=1e-12)


def test_from_betas():
    betas = np.random.default_rng(0).uniform(0.001, 0.5, 20)
    check(schedules.from_betas(betas), betas)


def test_t_is_one_more_than_in_code_that_counts_from_zero():
    published = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(schedules.linear().alpha[1:] ** 2, published, rtol=1e-12)
    assert schedules.linear().alpha[0] == 1


@pytest.mark.parametrize("timesteps", [25, 100, 200, 1000, 4000])
def test_linear_ends_in_noise_for_any_number_of_steps(timesteps):
    assert 0 < schedules.linear(timesteps).alpha[-1] ** 2 < 1e-4


def test_config_keeps_every_digit():
    schedule = schedules.cosine(30)
    copy = schedules.Schedule.from_config(schedule.get_config())
    assert np.array_equal(copy.alpha, schedule.alpha) and np.array_equal(copy.sigma, schedule.sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(10), "cosine.*timesteps=10"),
        (lambda: schedules.linear(0), "timesteps=0"),
        (lambda: schedules.cosine(1.5), "timesteps=1.5"),
        (lambda: schedules.from_betas([0.1, 1.2]), "1.2"),
        (lambda: schedules.from_betas([]), "alpha and sigma"),
        (lambda: schedules.Schedule([1, 0.5], [0.0, 0.5, 1.0]), r"\(2,\), \(3,\)"),
        (lambda: schedules.Schedule([0.9, 0.5], [0.0, 0.5]), r"start=\(0.9, 0.0\)"),
        (lambda: schedules.Schedule([1.0, 0.5, 0.5], [0.0, 0.5, 0.5]), "falls at every step"),
        (lambda: schedules.Schedule([1.0, 0.0, 0.0], [0.0, 0.5, 1.0]), "falls at every step"),
        (lambda: schedules.Schedule([1.0, 0.5], [0.0, np.inf]), "finite"),
        (lambda: schedules.Schedule([1.0, -0.5], [0.0, 0.5]), "negative"),
        (lambda: schedules.straight(0), "timesteps=0"),
        (lambda: schedules.sigmoid(10, start=3), "start=3"),
        (lambda: schedules.sigmoid(10, tau=0), "tau=0"),
        (lambda: schedules.sigmoid(10, tau=0.05), "less steep"),
        (lambda: schedules.sigmoid(10, start="a"), "start='a'"),
        (lambda: schedules.sigmoid(10, end="a"), "end='a'"),
        (lambda: schedules.cosine(10, offset=-1), "offset=-1"),
        (lambda: schedules.cosine(True), "timesteps=True"),
        (lambda: schedules.shifted(schedules.linear(), -64), "image_size=-64"),
        (lambda: schedules.shifted(schedules.linear(), "64"), "image_size='64'"),
        (lambda: schedules.input_scaled(schedules.linear(), np.inf), "inf"),
        (lambda: schedules.input_scaled(schedules.cosine, 0.5), "variance-preserving `Schedule`"),
        (lambda: schedules.zero_terminal_snr([0.1]), "variance-preserving"),
        (lambda: schedules.shifted(schedules.Schedule([1.0, 1.0], [0.0, 5.0]), 32), "variance-preserving"),
        (lambda: schedules.zero_terminal_snr(schedules.straight()), "variance-preserving"),
        (lambda: schedules.zero_terminal_snr(schedules.cosine(1)), "one step"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_close_up_to_rounding():
    schedule = schedules.cosine(50)
    rounded = schedules.Schedule(schedule.alpha * (1 - 1e-12 * (np.arange(51) > 0)), schedule.sigma)
    assert schedule.is_close(rounded) and not schedule.is_close(schedules.linear(50))
    assert not schedule.is_close(schedule.until(49))
