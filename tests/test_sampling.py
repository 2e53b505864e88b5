"""The compiled loop: what samples depend on, what is compiled, and what is returned."""

import gc
import weakref

import keras
import numpy as np
import pytest
from closed_form import Mixture

import keras_ddpm as kd
from keras_ddpm.samplers import loop as sampling


def test_samples_depend_on_seed_and_index_alone(model):
    """Also with noise in each step. All samplers share two programs.

    Mistake of others: noise that is kept for one batch size and used for another.
    """
    for sampler in (
        kd.samplers.DDIM(10),
        kd.samplers.UniPC(10),
        kd.samplers.UniPC(10, order=3),
        kd.samplers.IPNDM(10),
        kd.samplers.DPMSolver(10, order=3),
        kd.samplers.DPMSolver(4, spacing=(50, 30, 11, 2)),
        kd.samplers.DDIM(10, eta=0.5),
        kd.samplers.DDPM(10),
        kd.samplers.DDPM(10, variance="large"),
        kd.samplers.DPMSolver(10, eta=1.0),
        kd.samplers.Heun(10),
        kd.samplers.Heun(10, churn=5),
        kd.samplers.Langevin(predictor=kd.samplers.DPMSolver(5)),
    ):
        ten = model.sample(10, sampler, seed=1)
        assert ten.shape == (10, 2) and ten.dtype == "float32" and np.abs(ten).max() <= 1
        assert np.array_equal(ten, model.sample(10, sampler, seed=1))
        assert not np.array_equal(ten, model.sample(10, sampler, seed=2))
        np.testing.assert_allclose(model.sample(4, sampler, seed=1), ten[:4], atol=1e-5)
        many = model.sample(40, sampler, seed=3, batch_size=7)
        np.testing.assert_allclose(model.sample(4, sampler, seed=3)[2], many[2], atol=1e-5)
        np.testing.assert_allclose(model.sample(4, sampler, seed=3, first=30), many[30:34], atol=1e-5)
        _, x_t, _ = model.sample(10, sampler, seed=1, return_trajectory=2)
        assert len(np.unique(x_t[0].round(4), axis=0)) == 10  # before x_0 is clipped, into a corner now and then
    assert not np.array_equal(model.sample(2), model.sample(2))


def test_noise_of_counters_is_gaussian_and_the_same_everywhere():
    """Its first values by integers of Python; moments, tails and correlations within five standard errors."""

    def hashed(bits):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> shift)) * factor % 2**32
        return bits ^ (bits >> 16)

    def normal(keys, number, counter):
        keys = [hashed((key + 0x85EBCA6B * number) % 2**32) for key in keys]
        words = [hashed((key + c * counter) % 2**32) for key, c in zip(keys, (0x9E3779B9, 0xC2B2AE35))]
        u, v = (((word >> 8) + 0.5) / 2**24 for word in words)
        return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)

    keys = np.random.default_rng(0).integers(-(2**31), 2**31, (40, 2), dtype="int32")
    draws = [keras.ops.convert_to_numpy(sampling.counted_noise((40, 50, 60), keys, number)) for number in (0, 1, 2001)]
    for number, x in zip((0, 1, 2001), draws):
        for i, counter in [(0, 0), (3, 1), (39, 2999)]:
            expected = normal([int(key) % 2**32 for key in keys[i]], number, counter)
            assert x[i].ravel()[counter] == pytest.approx(expected, abs=1e-5)
    x = np.stack(draws).astype("float64")
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(x**power) - moment) < 5 * np.sqrt(variance / x.size), power
    beyond = 2.7e-3  # |x| > 3
    assert abs(np.mean(np.abs(x) > 3) - beyond) < 5 * np.sqrt(beyond / x.size)
    for a, b in [(x[0], x[1]), (x[:, 0], x[:, 1]), (x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :])]:
        for f in (np.asarray, np.square):
            assert abs(np.corrcoef(f(a).ravel(), f(b).ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_trajectory(model):
    sampler = kd.samplers.DDPM(10)
    samples, x_t, x_0 = model.sample(5, sampler, seed=1, return_trajectory=10, batch_size=3)
    assert x_t.shape == x_0.shape == (10, 5, 2)
    assert np.array_equal(x_t[-1], samples)
    np.testing.assert_allclose(x_0[-1], samples, atol=1e-6)  # the last step is the prediction
    np.testing.assert_allclose(model.sample(5, sampler, seed=1, batch_size=3), samples, atol=1e-6)
    # Steps by hand, from one state to the next where there is no noise.
    sampler = kd.samplers.DPMSolver(10)
    _, x_t, x_0 = model.sample(5, sampler, seed=1, return_trajectory=10)
    zeros = np.zeros_like(x_t[0])
    for index, row in enumerate(sampler.table(model.diffusion.schedule)[1:], start=1):
        previous = (x_0[index - 1], zeros, zeros)
        expected, _ = kd.samplers.step(row, lambda x, t: x_0[index], x_t[index - 1], None, previous)
        np.testing.assert_allclose(expected, x_t[index], atol=1e-5)
    # Where steps call the network more than once, states are those at their ends.
    heun = kd.samplers.Heun(10)
    _, x_t, _ = model.sample(5, heun, seed=1, return_trajectory=5)
    _, all_x_t, _ = model.sample(5, heun, seed=1, return_trajectory=10)
    assert np.array_equal(x_t, all_x_t[1::2])
    for part, t in enumerate(heun.timesteps(model.diffusion.schedule)[1:-1]):
        rows = np.concatenate(heun.steps(model.diffusion.schedule)[part + 1 :])
        assert rows["t"][0] == t


def test_programs_are_reused_and_freed(fresh_model):
    """One serves all samplers without noise, one all with."""
    model = fresh_model
    calls = []
    predict_x0 = model.diffusion.predict_x0
    model.diffusion.predict_x0 = lambda *args: calls.append(args) or predict_x0(*args)
    for num_steps in range(3, 50, 9):
        for sampler in (kd.samplers.DDIM, kd.samplers.DPMSolver, kd.samplers.Heun, kd.samplers.DDPM):
            model.sample(2, sampler(num_steps))
    if keras.backend.backend() != "torch":  # whose loop is not compiled
        assert len(calls) == 2
    assert model._loop.programs.cache_info().currsize == 2


def test_programs_go_with_their_model(monkeypatch):
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1))
    references = [weakref.ref(model)]
    make = sampling._Program.__init__

    def spy(program, *args, **kwargs):
        references.append(weakref.ref(program))
        make(program, *args, **kwargs)

    monkeypatch.setattr(sampling._Program, "__init__", spy)
    model.sample(2, kd.samplers.DDPM(2))
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_the_noise_has_the_size_of_x_T():
    """Data of any schedule: here alpha_T = 1 and sigma_T = 7, of data N(0, 0.01)."""
    schedule = kd.schedules.Schedule(np.ones(51), np.append(0, np.geomspace(0.01, 7, 50)))
    data = Mixture((1.0,), (0.0,), 0.1)
    x = data.model(schedule).sample(5000, kd.samplers.Heun(50), seed=0)
    assert abs(x.std() / 0.1 - 1) < 0.05


def test_progress_bar(model, capsys):
    model.sample(3, kd.samplers.DDIM(10), batch_size=2, verbose=1)
    assert "20/20" in capsys.readouterr().out
    model.sample(3, kd.samplers.DDIM(10))
    assert capsys.readouterr().out == ""


def test_short_schedules_have_short_defaults(points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.cosine(7)))
    assert model.sample(2, return_trajectory=7)[1].shape == (7, 2, 2)
