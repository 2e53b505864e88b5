"""Against betas multiplied out in exact rational arithmetic, and the published numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from keras_ddpm import schedules


def exact_alphas_cumprod(betas):
    """∏ (1 − β), for t = 0..T, without rounding before the end."""
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
        (lambda: schedules.Schedule([1, 0.5], [0.0, 0.5, 1.0]), r"\(2,\) and \(3,\)"),
        (lambda: schedules.Schedule([0.9, 0.5], [0.0, 0.5]), r"alpha\[0\]=0.9"),
        (lambda: schedules.Schedule([1.0, 0.5, 0.4], [0.0, 0.5, 0.5]), "grows at every step"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
