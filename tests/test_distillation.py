"""Distillation: samples with the noise they were made from, and a model that learns to make them in one call."""

import keras
import numpy as np
import pytest
from closed_form import GAUSSIAN, TWO
from conftest import EAGER, TORCH, image_network, randomize, weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm import distillation

COSINE = kd.schedules.cosine(200)
SCHEDULES = {
    "linear": kd.schedules.linear(50),
    "cosine": COSINE,
    "without signal at T": kd.schedules.zero_terminal_snr(kd.schedules.linear(50)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_pair_is_a_sample_and_its_start(schedule):
    """Whatever the order: x_0 is the sample of an index, and x_T made of x_0 and the noise is where it started."""
    teacher = GAUSSIAN.model(schedule)
    data = distillation.pairs(teacher, 50, kd.samplers.DDIM(10), seed=3, batch_size=25)
    x = teacher.sample(50, kd.samplers.DDIM(10), seed=3)
    start = kd.samplers.loop.prior(teacher.diffusion, (1,), 3, np.arange(50))
    seen = []
    for batch in data:
        index = [int(np.flatnonzero(x == value)[0]) for value in batch["x_0"]]
        x_T = teacher.diffusion.q_sample(batch["x_0"], np.full(25, schedule.timesteps), batch["noise"])
        np.testing.assert_allclose(ops.convert_to_numpy(x_T), start[index], atol=1e-5)
        seen += index
    assert sorted(seen) == [*range(50)] != seen


def test_pairs_of_a_gaussian():
    """The flow is linear, and turns x_T of quantile u into x_0 of quantile u."""
    teacher = GAUSSIAN.model(COSINE)
    data = distillation.pairs(teacher, 200, kd.samplers.DPMSolver(100), shuffle=False, batch_size=200)
    x_T = COSINE.alpha[-1] * data[0]["x_0"] + COSINE.sigma[-1] * data[0]["noise"]
    mean, std = COSINE.alpha[-1] * 0.3, np.hypot(COSINE.alpha[-1] * 0.2, COSINE.sigma[-1])
    np.testing.assert_allclose(data[0]["x_0"], 0.3 + 0.2 * (x_T - mean) / std, atol=2e-3)


def test_training_takes_the_noise_of_the_data(points):
    """A fresh network predicts 0, so the loss is the mean square of the noise. New noise would not be 0.5."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(COSINE))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0), run_eagerly=EAGER)
    data = {"x_0": points, "noise": np.full_like(points, 0.5)}
    assert model.fit(data, batch_size=64, verbose=0).history["loss"][0] == pytest.approx(0.25, rel=1e-5)
    for labels in (None, np.zeros(256)):
        assert model.evaluate(data, labels, batch_size=64, verbose=0) == pytest.approx(0.25, rel=1e-5)
    weighted = model.fit(data, sample_weight=np.full(256, 3.0), batch_size=64, verbose=0).history["loss"][0]
    assert weighted == pytest.approx(0.75, rel=1e-5)
    pairs = distillation.Pairs(points, batch_size=64, diffusion=model.diffusion, noise_seed=5)
    loss = model.fit(pairs, validation_data=pairs, verbose=0).history["val_loss"][0]
    assert loss == pytest.approx(np.mean(np.square([batch["noise"] for batch in pairs])), rel=1e-5)


def test_noise_in_streams(points):
    """Of generators, TensorFlow's data sets and PyTorch's loaders."""
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    data = {"x_0": points, "noise": np.full_like(points, 0.5)}
    examples = [{"x_0": x, "noise": noise} for x, noise in zip(points, data["noise"])]
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(COSINE))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0), run_eagerly=EAGER)
    for stream in (
        (data for _ in range(2)),
        tf.data.Dataset.from_tensor_slices(data).batch(64),
        torch.utils.data.DataLoader(examples, batch_size=64),
    ):
        loss = model.fit(stream, steps_per_epoch=2, shuffle=False, verbose=0).history["loss"][0]
        assert loss == pytest.approx(0.25, rel=1e-5)


@pytest.mark.skipif(not TORCH, reason="the same steps of training, which other tests take on each backend")
def test_one_call_gives_the_samples_of_many(tmp_path):
    """Of two groups of numbers, between which one call of the teacher ends."""
    teacher = TWO.model(COSINE)
    data = distillation.pairs(teacher, 4096, kd.samplers.DPMSolver(50), batch_size=128)
    fast = kd.DiffusionModel(
        kd.networks.mlp(1, 64, 2),
        kd.GaussianDiffusion(COSINE, "v", clip_range=None),
        timestep_sampling="half_at_T",
        seed=0,
        sampler=kd.samplers.DDIM(1),
    )
    fast.compile(loss="mae", optimizer=kd.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, 960)))
    fast.fit(data, epochs=30, verbose=0)
    expected = teacher.sample(1000, kd.samplers.DPMSolver(50), seed=9)
    before = np.mean(np.abs(teacher.sample(1000, kd.samplers.DDIM(1), seed=9) - expected))
    fast.save(tmp_path / "fast.keras")
    fast = kd.saving.load_model(tmp_path / "fast.keras")
    for num_calls in (1, 2):
        error = np.mean(np.abs(fast.sample(1000, kd.samplers.DDIM(num_calls), seed=9) - expected))
        assert error < 0.1 * before, num_calls
    assert np.array_equal(fast.sample(4, seed=1), fast.sample(4, kd.samplers.DDIM(1), seed=1))


def test_pairs_of_a_guided_model():
    """They have its labels, so that the guidance need not be computed again."""
    teacher = TWO.model(COSINE, conditional=True)
    labels = np.arange(20) % 2
    asked = {"labels": labels, "guidance_scale": 3.0}
    data = distillation.pairs(teacher, 20, kd.samplers.DDIM(10), batch_size=20, shuffle=False, **asked)
    x, got = data[0]
    assert np.array_equal(got, labels)
    assert np.array_equal(x["x_0"], teacher.sample(20, kd.samplers.DDIM(10), seed=0, **asked))


def test_a_distilled_model_starts_as_its_teacher(model):
    """But for what it is told."""
    told = {"sampler": kd.samplers.DDIM(1), "diffusion": kd.GaussianDiffusion(COSINE), "timestep_sampling": "half_at_T"}
    fast = kd.DiffusionModel.from_model(model, **told)
    assert (fast.sampler, fast.diffusion.timesteps, fast.corruption.timestep_sampling) == (
        kd.samplers.DDIM(1),
        200,
        "half_at_T",
    )
    for got, expected in zip(weights(fast.network.weights), weights(model.ema_weights), strict=True):
        assert np.array_equal(got, expected)


def test_pairs_of_stored_images():
    """Samples can be kept as 8-bit images, and be read again with their noise."""
    model = kd.DiffusionModel(image_network((8, 8, 1)), kd.GaussianDiffusion(COSINE))
    randomize(model.network)
    data = distillation.pairs(model, 6, kd.samplers.DDIM(2), seed=4, batch_size=6)
    stored = distillation.Pairs(kd.images.to_uint8(data.x), None, 6, seed=4, diffusion=model.diffusion, noise_seed=4)
    np.testing.assert_allclose(stored[0]["x_0"], data[0]["x_0"], atol=1 / 255 + 1e-6)
    np.testing.assert_allclose(stored[0]["noise"], data[0]["noise"], atol=1e-2)


def test_bad_pairs(model, points, monkeypatch):
    with pytest.raises(ValueError, match="with noise do not depend on x_T alone.*DDPM"):
        distillation.pairs(model, 4, kd.samplers.DDPM(4), batch_size=2)
    with pytest.raises(ValueError, match="from index 0 on. Received: first=5"):
        distillation.pairs(model, 4, first=5)
    with pytest.raises(ValueError, match="has classes: choose `labels`"):
        distillation.pairs(TWO.model(COSINE, conditional=True), 4, batch_size=2)
    of = {"diffusion": kd.GaussianDiffusion(COSINE), "noise_seed": 0}
    with pytest.raises(ValueError, match="cannot be flipped.*True"):
        distillation.Pairs(np.zeros((4, 8, 8, 1), "uint8"), batch_size=2, flip=True, **of)
    with pytest.raises(ValueError, match="another schedule than that of the model"):
        model.fit(distillation.Pairs(points, **of), verbose=0)
    for wrong in ({"batch_size": 5}, {"seed": None}, {"seed": -1}):  # before it samples
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=next(iter(wrong))):
            patch.setattr(model, "run", None)
            distillation.pairs(model, 4, **{"batch_size": 2, **wrong})
    with pytest.raises(ValueError, match="'x_0' and 'noise'.*'x'"):
        model.fit({"x_0": points, "x": points}, verbose=0)
    with pytest.raises(ValueError, match=r"`noise` of shape \('batch', 2\)"):
        model.fit({"x_0": points, "noise": points[:, :1]}, verbose=0)
    with pytest.raises(ValueError, match="NaN"):
        model.fit({"x_0": points, "noise": np.full_like(points, np.nan)}, verbose=0)
