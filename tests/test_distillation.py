"""Consistency models: the earlier times, the target, and samples in one call."""

import keras
import numpy as np
import pytest
from closed_form import TWO
from conftest import randomize
from conftest import weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm import distillation

SCHEDULES = {
    "linear": kd.schedules.linear(50),
    "cosine": kd.schedules.cosine(50),
    "without signal at T": kd.schedules.zero_terminal_snr(kd.schedules.linear(50)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_earlier_times(schedule):
    """Earlier than t, later in each further stage, and in the end the time before."""
    stages = [distillation.earlier_times(schedule, stage) for stage in range(16)]
    t = np.arange(51)
    for times, later in zip(stages, stages[1:]):
        assert times.shape == (51,) and times[0] == 0 and np.all(times[1:] < t[1:])
        assert np.all(later >= times)
    assert np.array_equal(stages[-1][1:], t[:-1])
    r = schedule.sigma[:50] / schedule.alpha[:50]
    assert r[stages[0][25]] <= r[25] * (1 - (1 + 8 / (1 + np.exp(r[25]))) / 4) or stages[0][25] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_the_target_is_the_models_own_earlier_prediction(prediction):
    """Turned into an x_0, it is the x_0 that the model predicts at s; and the data if s is 0."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(SCHEDULES["cosine"], prediction))
    randomize(model.network)
    fast = distillation.ConsistencyModel.from_model(model, num_stages=3)
    for got, expected in zip(weights(fast.network.weights), weights(model.ema_weights), strict=True):
        assert np.array_equal(got, expected)
    randomize(fast.network)
    fast.compile(loss="mse", optimizer="adam")
    random = np.random.default_rng(0)
    x_0 = random.uniform(-0.9, 0.9, (50, 2)).astype("float32")
    noise = random.standard_normal((50, 2)).astype("float32")
    t = np.arange(1, 51, dtype="int32")
    x_t = fast.diffusion.q_sample(x_0, t, noise)
    y = fast.target(x_0, noise, x_t, t)
    got = ops.convert_to_numpy(fast.diffusion.predict_x0(x_t, t, y, clip=False))
    s = distillation.earlier_times(SCHEDULES["cosine"], 0)[t]
    x_s = fast.diffusion.q_sample(x_0, s, noise)
    expected = ops.convert_to_numpy(fast.diffusion.predict_x0(x_s, s, fast.network([x_s, ops.convert_to_tensor(s)])))
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert 5 < np.sum(s == 0) < 45
    np.testing.assert_allclose(got[s == 0], x_0[s == 0], atol=1e-3)


def test_stages_follow_the_updates(points):
    fast = distillation.ConsistencyModel(kd.networks.mlp(2, 16, 1), updates_per_stage=2, num_stages=3)
    fast.compile(loss="mse", optimizer="adam")
    stages, losses = [], []
    for _ in range(4):
        stages.append(int(fast._stage()))
        losses += fast.fit(points[:64], batch_size=32, verbose=0).history["loss"]  # two updates
    assert stages == [0, 1, 2, 2] and np.isfinite(losses).all()


def test_evaluation_is_in_the_last_stage(points):
    """Whatever the stage of the training, so that losses can be compared. Its target is by the averaged weights."""
    fast = distillation.ConsistencyModel(kd.networks.mlp(2, 16, 1), updates_per_stage=1000, num_stages=3, seed=0)
    randomize(fast.network)
    fast.compile(loss="mse", optimizer="sgd")
    losses = [fast.evaluate(points, verbose=0)]
    fast.optimizer.iterations.assign(5000)
    losses.append(fast.evaluate(points, verbose=0))
    first = distillation.ConsistencyModel.from_model(fast, num_stages=1)
    first.network.set_weights(fast.network.get_weights())
    first.compile(loss="mse", optimizer="sgd")
    other = first.evaluate(points, verbose=0)
    assert losses[0] == losses[1] and abs(other - losses[0]) > 1e-3 * losses[0]
    for v in fast.network.weights:
        v.assign(np.full(v.shape, np.nan))
    averaged = fast.evaluate(points, verbose=0, callbacks=[kd.callbacks.EMAWeights()])
    assert np.isfinite(averaged) and np.isnan(fast.evaluate(points, verbose=0))


def test_what_a_consistency_model_takes_over(model):
    """The average and the process, and neither the weights of the loss nor the sampler."""
    model = kd.DiffusionModel(
        model.network, model.diffusion, loss_weight=model.diffusion.min_snr_weight(), sampler=kd.samplers.DDIM(3)
    )
    fast = distillation.ConsistencyModel.from_model(model, ema_decay=0.5)
    assert (fast.loss_weight, fast.sampler, fast.ema_decay) == (None, None, 0.5)
    assert [*kd.export.default_tables(fast)] == ["Consistency, 1 steps", "Consistency, 2 steps"]


def test_one_call_gives_the_distribution(tmp_path):
    """Two groups of numbers, which one call of the model that is tuned puts between the groups."""
    x = TWO.quantile((np.arange(4096) + 0.5) / 4096).clip(-1, 1)[:, None].astype("float32")
    model = kd.DiffusionModel(kd.networks.mlp(1, 64, 2), kd.GaussianDiffusion(kd.schedules.cosine(200), "v"), seed=0)

    def fit(model, epochs):
        rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * 32)
        model.compile(loss="mse", optimizer=kd.optimizers.Adam(rate))
        model.fit(x, batch_size=128, epochs=epochs, verbose=0)

    def distance(model):
        samples = model.sample(2000, kd.samplers.Consistency(1), seed=0)[:, 0]
        return np.mean(np.abs(np.sort(samples) - TWO.quantile((np.arange(2000) + 0.5) / 2000)))

    fit(model, 20)
    fast = distillation.ConsistencyModel.from_model(model, updates_per_stage=120, num_stages=6)
    before = distance(model)
    fit(fast, 30)
    assert distance(fast) < 0.3 * before
    fast.save(tmp_path / "fast.keras")
    loaded = kd.saving.load_model(tmp_path / "fast.keras")
    assert isinstance(loaded, distillation.ConsistencyModel) and loaded.default_sampler == kd.samplers.Consistency(1)
    assert (loaded.updates_per_stage, loaded.num_stages) == (120, 6)
    np.testing.assert_allclose(loaded.sample(4, seed=1), fast.sample(4, seed=1), atol=1e-6)


@pytest.mark.parametrize("arguments", [{"updates_per_stage": 0}, {"num_stages": 1.5}])
def test_bad_arguments(model, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        distillation.ConsistencyModel.from_model(model, **arguments)
