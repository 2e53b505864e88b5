import gc
import os
import subprocess
import sys
import warnings
import weakref

import keras
import numpy as np
import pytest
from closed_form import Mixture
from keras import ops

import keras_ddpm as kd
from keras_ddpm import sampling


def weights(variables):
    return [ops.convert_to_numpy(v) for v in variables]


def small_unet(**kwargs):
    network = kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4)
    model = kd.DiffusionModel(network, seed=0, **kwargs)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3))
    return model


# Training.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mse", 1.0), ("mae", np.sqrt(2 / np.pi)), (keras.losses.LogCosh(), 0.37439), ("huber", 0.42445)],
)
def test_a_fresh_model_predicts_zero(model, points, loss, expected):
    """Its loss is then E|ε|^2, E|ε| and so on, here of 1024 draws of two numbers."""
    model.compile(loss=loss, optimizer="adam")
    got = model.evaluate(np.tile(points, (4, 1)), verbose=0)
    assert abs(got / expected - 1) < 5 * np.sqrt(2 / 2048)


def test_a_fresh_unet_has_loss_one():
    images = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 1)).astype("float32")
    assert abs(small_unet().evaluate(images, verbose=0) - 1) < 5 * np.sqrt(2 / images.size)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("timestep_sampling", ["uniform", "batch", "stratified"])
def test_fit_reports_the_true_loss(timestep_sampling, weighted):
    """Of weights that do not move: the loss of the batches by hand, with the t and noise that the step drew.

    Batch, height and width are of one size, so that a weight of the wrong shape would go unnoticed.
    """
    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (16, 8, 8, 1)).astype("float32")
    loss_weight = random.uniform(0.1, 2, 1001) if weighted else np.ones(1001)
    network = kd.networks.unet((8, 8, 1), 8, (1,), 1, (), 4)
    model = kd.DiffusionModel(
        network,
        loss_weight=loss_weight if weighted else None,
        timestep_sampling=timestep_sampling,
        seed=3,
    )
    model.network.set_weights([random.normal(0, 0.3, w.shape) for w in weights(model.network.weights)])
    model.compile(loss="mse", metrics=["mae"], optimizer=keras.optimizers.SGD(0.0))
    history = model.fit(images, batch_size=8, shuffle=False, epochs=1, verbose=0).history
    generator = keras.random.SeedGenerator(3)
    losses, errors = [], []
    for x_0 in (images[:8], images[8:]):
        t = ops.convert_to_numpy(model._draw_timesteps(8, generator))
        noise = ops.convert_to_numpy(keras.random.normal(x_0.shape, seed=generator)).astype("float64")
        schedule = model.diffusion.schedule
        alpha, sigma = (table[t][:, None, None, None] for table in (schedule.alpha, schedule.sigma))
        y = ops.convert_to_numpy(model.network([(alpha * x_0 + sigma * noise).astype("float32"), t]))
        losses.append(np.mean(loss_weight[t] * np.mean((y - noise) ** 2, axis=(1, 2, 3))))
        errors.append(np.mean(np.abs(y - noise)))
    assert history["loss"][0] == pytest.approx(np.mean(losses), rel=1e-4)
    assert history["mae"][0] == pytest.approx(np.mean(errors), rel=1e-4)


def draw_timesteps(kind, batches, batch_size, timesteps=10):
    diffusion = kd.GaussianDiffusion(kd.schedules.cosine(timesteps))
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), diffusion, timestep_sampling=kind)
    generator = keras.random.SeedGenerator(0)
    return np.array([ops.convert_to_numpy(model._draw_timesteps(batch_size, generator)) for _ in range(batches)])


@pytest.mark.parametrize("kind", ["uniform", "batch", "stratified"])
def test_timesteps_are_uniform(kind):
    """At each place in the batch, as data may come in a fixed order."""
    t = draw_timesteps(kind, 2000, 3)
    for place in range(3):
        counts = np.bincount(t[:, place], minlength=11)
        assert t.dtype == "int32" and counts[0] == 0 and len(counts) == 11
        assert np.sum((counts[1:] - 200) ** 2 / 200) < 27.9  # chi² of 9 degrees of freedom, p = 0.001


def test_timesteps_of_a_batch():
    assert np.all(np.ptp(draw_timesteps("batch", 20, 8), axis=1) == 0)
    for t, repeats in ((draw_timesteps("stratified", 20, 10), 1), (draw_timesteps("stratified", 20, 50), 5)):
        assert np.array_equal(np.sort(t, axis=1), np.tile(np.repeat(np.arange(1, 11), repeats), (20, 1)))
    assert np.any(np.diff(np.sort(draw_timesteps("uniform", 20, 10), axis=1), axis=1) == 0)


def test_stratified_timesteps_lower_the_variance_of_a_mean_over_t():
    """Without bias: of the mean of (t/T)² over a batch, more than tenfold here."""
    means = {
        kind: np.mean((draw_timesteps(kind, 300, 32, 1000) / 1000) ** 2, axis=1) for kind in ("uniform", "stratified")
    }
    assert np.var(means["stratified"]) < 0.1 * np.var(means["uniform"])
    exact = np.mean((np.arange(1, 1001) / 1000) ** 2)
    for values in means.values():
        assert abs(np.mean(values) - exact) < 4 * np.std(values) / 300**0.5


def test_learns(model, points):
    points = 0.5 + 0.05 * points
    losses = model.fit(points, epochs=40, batch_size=64, verbose=0).history["loss"]
    assert losses[-1] < 0.25 < losses[0]
    samples = model.sample(200, seed=0)
    assert np.abs(samples.mean(0) - 0.5).max() < 0.15 and samples.std() < 0.3


def test_labels_are_ignored_without_conditioning(points):
    histories = []
    for data in [(points,), (points, np.arange(256))]:
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mse", optimizer="adam")
        histories.append(model.fit(*data, epochs=1, shuffle=False, verbose=0).history["loss"])
    assert histories[0] == histories[1]


def test_evaluate_draws_the_same_each_time(model, points):
    first = model.evaluate(points, verbose=0)
    history = model.fit(points, validation_data=points, epochs=1, verbose=0).history
    assert first == pytest.approx(1.0, abs=0.3) and history["val_loss"][0] != first
    assert model.evaluate(points, verbose=0) == model.evaluate(points, verbose=0) == history["val_loss"][0]


def expected_average(before, after, n, decay):
    decay = min(decay, 1 - (1 + n) ** -0.75)
    return [decay * average + (1 - decay) * raw for average, raw in zip(before, after)]


@pytest.mark.parametrize("accumulation", [None, 2])
def test_ema_follows_its_recurrence(points, accumulation):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), ema_decay=0.5, seed=0)
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation)
    model.compile(loss="mse", optimizer=optimizer)
    average, updates = weights(model.ema_weights), 0
    for step in range(1, 9):
        model.train_on_batch(points[:32])
        if step % (accumulation or 1) == 0:
            average = expected_average(average, weights(model.network.trainable_variables), updates, 0.5)
            updates += 1
        for got, expected in zip(weights(model.ema_weights), average):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        if updates == 1:  # the first update copies
            assert all(map(np.array_equal, weights(model.ema_weights), weights(model.network.trainable_variables)))
    assert updates == 8 // (accumulation or 1)


def test_evaluation_needs_no_optimizer(model):
    model.compile(loss="mse", optimizer=None)
    assert np.isfinite(model.evaluate(np.zeros((4, *model.data_shape), "float32"), verbose=0))


def test_compilation_is_chosen_anew_where_a_file_is_loaded(model, monkeypatch):
    assert model.get_compile_config()["jit_compile"] == "auto"
    for choice in (True, False):
        monkeypatch.setattr(kd.hardware, "jit_compile", lambda: choice)
        copy = kd.DiffusionModel.from_config(model.get_config())
        copy.compile_from_config(model.get_compile_config())
        assert copy.jit_compile is choice
    model.compile(loss="mse", optimizer="adam", jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False
    monkeypatch.setattr(kd.hardware, "jit_compile", lambda: True)
    model.compile(loss="mse", optimizer="adam", run_eagerly=True)
    assert model.jit_compile is False


def test_a_frozen_layer_keeps_its_place_in_the_average(tmp_path, points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
    model.network.get_layer("block_0_dense_1").trainable = False
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
    model.fit(points, epochs=2, batch_size=32, verbose=0)
    samples = model.sample(4, kd.samplers.DDIM(3), seed=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.network.get_layer("block_0_dense_1").trainable
    assert np.array_equal(loaded.sample(4, kd.samplers.DDIM(3), seed=0), samples)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small_unet()
    images = np.zeros((16, 8, 8, 1), "float32")
    loss = model.fit(images, epochs=1, verbose=0).history["loss"][0]
    assert loss == pytest.approx(1.0, abs=0.15)
    assert {v.dtype for v in model.ema_weights} == {"float32"}
    assert model.sample(2, kd.samplers.DDIM(2), seed=0).dtype == "float32"


# Sampling.


def test_samples_depend_on_seed_and_index_alone(model):
    sampler = kd.samplers.DDIM(10)
    ten = model.sample(10, sampler, seed=1)
    assert ten.shape == (10, 2) and ten.dtype == "float32" and np.abs(ten).max() <= 1
    assert np.array_equal(ten, model.sample(10, sampler, seed=1))
    assert not np.array_equal(ten, model.sample(10, sampler, seed=2))
    np.testing.assert_allclose(model.sample(4, sampler, seed=1), ten[:4], atol=1e-5)
    np.testing.assert_allclose(model.sample(10, sampler, seed=1, batch_size=3), ten, atol=1e-5)
    assert not np.array_equal(model.sample(2), model.sample(2))


def test_stochastic_samples_depend_on_the_batch_size_too(model):
    sampler = kd.samplers.DDPM(10)
    ten, x_t, _ = model.sample(10, sampler, seed=1, batch_size=4, return_trajectory=2)
    np.testing.assert_allclose(model.sample(6, sampler, seed=1, batch_size=4), ten[:6], atol=1e-5)
    assert len(np.unique(x_t[0].round(4), axis=0)) == 10  # before x_0 is clipped, into a corner now and then


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
    for index, row in enumerate(sampler.table(model.diffusion.schedule)[1:], start=1):
        expected, _ = kd.samplers.step(row, lambda x, t: x_0[index], x_t[index - 1], None, x_0[index - 1])
        np.testing.assert_allclose(expected, x_t[index], atol=1e-5)
    # Where steps call the network more than once, states are those at their ends.
    heun = kd.samplers.Heun(10)
    _, x_t, _ = model.sample(5, heun, seed=1, return_trajectory=5)
    _, all_x_t, _ = model.sample(5, heun, seed=1, return_trajectory=10)
    assert np.array_equal(x_t, all_x_t[1::2])
    for part, t in enumerate(heun.timesteps(model.diffusion.schedule)[1:-1]):
        rows = np.concatenate(heun.steps(model.diffusion.schedule)[part + 1 :])
        assert rows[0, 0] == t


def test_sample_reads_the_chosen_weights(model, points):
    model.fit(points, epochs=1, verbose=0)
    average, raw = (model.sample(8, seed=0, use_ema=use_ema) for use_ema in (True, False))
    assert not np.allclose(average, raw, atol=1e-4)
    for average_variable, v in zip(model.ema_weights, model.network.trainable_variables):
        average_variable.assign(ops.copy(v))
    np.testing.assert_allclose(model.sample(8, seed=0), raw, atol=1e-6)


def test_programs_are_reused_and_freed(model):
    """One serves all samplers without noise, one all with."""
    calls = []
    predict_x0 = model.diffusion.predict_x0
    model.diffusion.predict_x0 = lambda *args: calls.append(args) or predict_x0(*args)
    for num_steps in range(3, 50, 4):
        for sampler in (kd.samplers.DDIM, kd.samplers.DPMSolver, kd.samplers.Heun, kd.samplers.DDPM):
            model.sample(2, sampler(num_steps))
    if keras.backend.backend() != "torch":  # whose loop is not compiled
        assert len(calls) == 2
    assert model.programs.cache_info().currsize == 2


def test_programs_go_with_their_model(monkeypatch):
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1))
    references = [weakref.ref(model)]
    make = sampling.Program.__init__

    def spy(program, *args, **kwargs):
        references.append(weakref.ref(program))
        make(program, *args, **kwargs)

    monkeypatch.setattr(sampling.Program, "__init__", spy)
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


# Saving.


def test_saves_and_loads_in_a_new_process(tmp_path):
    """Bit for bit the same samples, the optimizer and the random state with them."""
    model = small_unet()
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype("float32")
    model.fit(images, epochs=2, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    samplers = {"ddim": kd.samplers.DDIM(5), "ddpm": kd.samplers.DDPM(5)}
    expected = {name: model.sample(3, sampler, seed=4) for name, sampler in samplers.items()}
    expected["raw"] = model.sample(3, samplers["ddim"], seed=4, use_ema=False)
    code = """
import keras, numpy as np, keras_ddpm as kd
model = keras.saving.load_model("model.keras")
assert int(model.optimizer.iterations) == 4 and model.loss == "mse"
ddim = kd.samplers.DDIM(5)
np.savez("samples.npz", ddim=model.sample(3, ddim, seed=4), ddpm=model.sample(3, kd.samplers.DDPM(5), seed=4),
         raw=model.sample(3, ddim, seed=4, use_ema=False))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    samples = np.load(tmp_path / "samples.npz")
    for name, x in expected.items():
        assert np.array_equal(samples[name], x), name
    assert not np.array_equal(expected["raw"], expected["ddim"])


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path, points):
    def make():
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
        return model

    def fit(model):
        return model.fit(
            points, epochs=1, shuffle=False, validation_data=points, callbacks=[kd.callbacks.EMAWeights()], verbose=0
        )

    whole, first = make(), make()
    fit(whole)
    fit(first)
    first.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert fit(whole).history == fit(resumed).history
    assert all(map(np.array_equal, weights(whole.weights), weights(resumed.weights)))


def test_config():
    diffusion = kd.GaussianDiffusion(kd.schedules.cosine(20), "v", None)
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), diffusion, 0.9, diffusion.min_snr_weight(), "batch", seed=5)
    copy = kd.DiffusionModel.from_config(model.get_config())
    assert copy.get_config() == model.get_config()
    assert np.array_equal(copy.loss_weight, model.loss_weight) and copy.timestep_sampling == "batch"
    copy.set_weights(model.get_weights())
    assert np.array_equal(copy.sample(2, kd.samplers.DDIM(3), seed=0), model.sample(2, kd.samplers.DDIM(3), seed=0))


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="needs a backend other than TensorFlow")
def test_does_not_import_tensorflow():
    code = """
import sys, numpy as np, keras_ddpm as kd
model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1))
model.compile(loss="mse", optimizer="adam")
model.fit(np.zeros((8, 2), "float32"), epochs=1, verbose=0)
model.fit(kd.datasets.from_arrays(np.zeros((8, 2), "float32"), batch_size=4), epochs=1, verbose=0)
model.sample(2, kd.samplers.DDIM(2))
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Stream(keras.utils.PyDataset):
    """One batch."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 1

    def __getitem__(self, step):
        return self.x


def test_takes_tf_data_and_data_loaders(model, points):
    if keras.backend.backend() == "torch":
        torch = pytest.importorskip("torch")
        tensors = torch.utils.data.TensorDataset(torch.from_numpy(points), torch.arange(256))
        streams = [torch.utils.data.DataLoader(tensors, batch_size=64)]
    else:
        tf = pytest.importorskip("tensorflow")
        streams = [
            tf.data.Dataset.from_tensor_slices(points).batch(64),
            tf.data.Dataset.from_tensor_slices((points, np.arange(256))).batch(64),
        ]
    for stream in streams:
        history = model.fit(stream, validation_data=stream, epochs=2, shuffle=False, verbose=0).history
        assert history["loss"][-1] < 1.2 and len(history["val_loss"]) == 2


# Bad input, before any work.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.full((8, 2), 255.0), r"\[-1.0, 1.0\].*Received: values in \[255.0, 255.0\]"),
        (np.zeros((8, 3)), r"\('batch', 2\).*Received: \(8, 3\)"),
        (np.zeros((8, 2, 1)), r"Received: \(8, 2, 1\)"),
        (np.zeros((0, 2)), r"Received: \(0, 2\)"),
        (np.where(np.arange(16).reshape(8, 2) == 15, np.nan, 0.0), "NaN"),
        (np.where(np.arange(16).reshape(8, 2) == 15, np.inf, 0.0), "infinite"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x for x in [x]), lambda x: Stream(x)])
def test_bad_data(model, points, data, message, wrap):
    with pytest.raises(ValueError, match=message):
        model.fit(wrap(data), verbose=0)
    with pytest.raises(ValueError, match=message):
        model.fit(points, validation_data=wrap(data), verbose=0)
    with pytest.raises(ValueError, match=message):
        model.evaluate(wrap(data), verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_a_look_does_not_consume_a_stream(model, points):
    seen = []

    def batches():
        for start in range(0, 256, 64):
            seen.append(start)
            yield points[start : start + 64]

    model.fit(batches(), steps_per_epoch=4, epochs=1, shuffle=False, verbose=0)
    assert seen == [0, 64, 128, 192] and int(model.optimizer.iterations) == 4
    with pytest.raises(ValueError, match="no batch"):
        model.fit((x for x in []), verbose=0)
    with pytest.raises(ValueError, match="no batch. Received: None"):
        model.fit()


def test_a_validation_stream_is_not_consumed_either(model, points):
    def batches():
        while True:
            yield (points[:64],)

    history = model.fit(points, validation_data=batches(), validation_steps=2, epochs=3, verbose=0).history
    assert len(history["val_loss"]) == 3


def test_data_without_bounds(points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(clip_range=None))
    model.compile(loss="mse", optimizer="adam")
    model.fit(100 * points, epochs=1, verbose=0)


def test_a_late_nan_stops_the_run(model, points):
    def batches():
        while True:
            yield (points[:64],)
            yield (np.full((64, 2), np.nan, "float32"),)

    saved = []
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: saved.append(epoch))
    with pytest.raises(ValueError, match="loss of epoch 1 is nan"):
        model.fit(batches(), steps_per_epoch=4, epochs=3, callbacks=save, shuffle=False, verbose=0)
    assert not saved


def test_a_model_that_learns_nothing_says_so(points):
    data = kd.datasets.from_arrays(points, batch_size=32, steps_per_epoch=320)
    for learning_rate, warns in [(0.0, True), (1e-2, False)]:
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mae", optimizer=keras.optimizers.Adam(learning_rate))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(data, epochs=1, verbose=0)
        texts = [str(w.message) for w in caught if "learned next to nothing" in str(w.message)]
        assert len(texts) == warns
        assert not warns or "always predicting zero gives 0.7" in texts[0] or "gives 0.8" in texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2.0}, "num_samples=2.0"),
        ({"num_samples": 2, "batch_size": 0}, "batch_size=0"),
        ({"num_samples": 2, "seed": 1.5}, "seed=1.5"),
        ({"num_samples": 2, "seed": -1}, "seed=-1"),
        ({"num_samples": 2, "seed": "3"}, "seed='3'"),
        ({"num_samples": True}, "num_samples=True"),
        ({"num_samples": 2, "sampler": "ddim"}, "sampler='ddim'"),
        ({"num_samples": 2, "sampler": kd.samplers.DDIM(51)}, "num_steps=51"),
        ({"num_samples": 2, "return_trajectory": 51}, "20 steps.*return_trajectory=51"),
    ],
)
def test_bad_sampling(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**arguments)


def test_bad_construction():
    network = kd.networks.mlp(2, 16, 1)
    with pytest.raises(ValueError, match="ema_decay=1.0"):
        kd.DiffusionModel(network, ema_decay=1.0)
    with pytest.raises(ValueError, match="uniform.*batch.*stratified.*'per image'"):
        kd.DiffusionModel(network, timestep_sampling="per image")
    with pytest.raises(ValueError, match="timestep_sampling.*uniform"):
        kd.DiffusionModel(network, timestep_sampling=["uniform"])
    for loss_weight in (np.ones(1000), "min_snr", kd.GaussianDiffusion().min_snr_weight):
        with pytest.raises(ValueError, match="an array of 1001 numbers, for t = 0..1000"):
            kd.DiffusionModel(network, loss_weight=loss_weight)
    with pytest.raises(ValueError, match="must be a `GaussianDiffusion`"):
        kd.DiffusionModel(network, kd.schedules.linear())
    diffusion = kd.GaussianDiffusion(kd.schedules.straight(), "flow")
    for weight in (diffusion.min_snr_weight(), diffusion.p2_weight()):
        with pytest.raises(ValueError, match="0.0 at t = 1000.*never be trained"):
            kd.DiffusionModel(network, diffusion, loss_weight=weight)
    with pytest.raises(ValueError, match="nan at t = 3"):
        kd.DiffusionModel(network, loss_weight=np.where(np.arange(1001) == 3, np.nan, 1.0))
    x, t, free = keras.Input((2,)), keras.Input(()), keras.Input((None, 2))
    wider = keras.Model([x, t], ops.concatenate([x, t[:, None]], axis=1))
    for network in (keras.Model([x], 2 * x), wider, keras.Model([free, t], free * t[:, None, None]), keras.Model()):
        with pytest.raises(ValueError, match="must be a functional model"):
            kd.DiffusionModel(network)


def test_short_schedules_have_short_defaults(points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(kd.schedules.cosine(7)))
    assert model.sample(2, return_trajectory=7)[1].shape == (7, 2, 2)
