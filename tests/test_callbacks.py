"""The callbacks: averaged weights in validation, samples during training, and the watch on the loss."""

import io
import warnings

import keras
import numpy as np
import pytest
from conftest import EAGER, image_network
from keras import ops
from PIL import Image

import keras_ddpm as kd

pytestmark = pytest.mark.usefixtures("uncompiled")


def read(path):
    with Image.open(path) as file:
        return np.asarray(file)


def weights(variables):
    return [ops.convert_to_numpy(v) for v in variables]


def small_model(num_classes=None, prediction="epsilon", run_eagerly=EAGER):
    network = image_network((8, 8, 1), num_classes=num_classes)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction=prediction), seed=0)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2), run_eagerly=run_eagerly)
    return model


IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype("float32")


def test_evaluation_sees_the_average_and_files_hold_both(tmp_path, model, points):
    """The loss is that of a model whose raw weights are the average, in validation and in `evaluate`."""
    file = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    options = {"epochs": 3, "batch_size": 32, "validation_data": points, "callbacks": [file], "verbose": 0}
    history = model.fit(points, **options).history
    raw, average = weights(model.network.trainable_variables), weights(model.ema_weights)
    assert not np.allclose(raw[0], average[0])
    loss = model.evaluate(points, verbose=0)
    assert history["val_loss"][-1] == loss
    assert all(map(np.array_equal, raw, weights(model.network.trainable_variables)))

    saved = keras.saving.load_model(tmp_path / "3.keras")
    assert all(map(np.array_equal, raw, weights(saved.network.trainable_variables)))
    assert all(map(np.array_equal, average, weights(saved.ema_weights)))
    assert abs(saved.evaluate(points, verbose=0) - loss) < 1e-6
    for v, value in zip(saved.ema_weights, weights(saved.network.weights)):
        v.assign(value)
    assert abs(saved.evaluate(points, verbose=0) - loss) > 1e-4


def test_the_average_stays_in_the_network(model, points):
    """At the end of training, and the model can be trained on and saved, on JAX too."""
    options = {"batch_size": 32, "callbacks": [kd.callbacks.EMAWeights()], "verbose": 0}
    for _ in range(2):
        model.fit(points, epochs=2, **options)
        assert all(map(np.array_equal, weights(model.network.weights), weights(model.ema_weights)))
    assert np.array_equal(model.sample(4, seed=0, use_ema=False), model.sample(4, seed=0))


def test_training_on_is_not_disturbed(model, points):
    """With and without validation, the same weights come out."""
    copy = kd.DiffusionModel.from_config(model.get_config())
    copy.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2))
    copy.set_weights(model.get_weights())
    options = {"epochs": 3, "batch_size": 32, "shuffle": False, "verbose": 0}
    model.fit(points, validation_data=points, **options)
    copy.fit(points, **options)
    for got, expected in zip(weights(model.network.weights), weights(copy.network.weights)):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_interrupted_validation_leaves_the_weights_alone(model, points):
    def interrupt(batch, logs):
        average.append(model.sample(2, seed=0))
        raise KeyboardInterrupt

    model.fit(points, epochs=1, verbose=0)
    raw, average = weights(model.network.weights), [model.sample(2, seed=0)]
    loss = model.evaluate(points, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        model.evaluate(points, callbacks=[keras.callbacks.LambdaCallback(on_test_batch_end=interrupt)], verbose=0)
    assert np.array_equal(*average)  # `sample` uses the average within an evaluation, too
    assert all(map(np.array_equal, raw, weights(model.network.weights)))
    assert model.evaluate(points, verbose=0) == loss


def test_callbacks_come_in_every_form_that_keras_takes(model, points):
    """And evaluation is compiled once."""
    seen, functions = [], set()
    callback = keras.callbacks.LambdaCallback(on_test_end=lambda logs: seen.append(logs["loss"]))
    for callbacks in ([callback], callback, (callback,), keras.callbacks.CallbackList([callback]), None):
        model.evaluate(points, callbacks=callbacks, verbose=0)
        functions.add(model.test_function)
    assert len(seen) == 4 and len({*seen}) == 1 and len(functions) == 1


@pytest.fixture(scope="module")
def untrained():
    return small_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "{epoch}-{step}.png"}, "path={epoch}-{step}.png"),
        ({"path": "x.png", "sampler": kd.samplers.DDIM(1001)}, "num_steps=1001"),
        ({"path": "x.png", "every": 0}, "every=0"),
        ({"path": "x.png", "num_samples": 0}, "num_samples=0"),
        ({"path": "x.png", "num_samples": -1}, "num_samples=-1"),
        ({"path": "x.png", "seed": -1}, "seed=-1"),
        ({"path": "x.png", "scale": 0}, "scale=0"),
        ({"path": "x.rose"}, "path='x.rose'"),
        ({"path": "x"}, "path='x'"),
        ({"path": "x{.png"}, "path=x{.png"),
        ({"path": "x.png", "batch_size": 0}, "batch_size=0"),
        ({"path": "x.png", "guidance_scale": -2}, "guidance_scale=-2"),
        ({"path": "x.png", "use_ema": 1}, "use_ema=1"),
        ({"path": "x.png", "sampler": "ddim"}, "sampler='ddim'"),
        ({"path": "x.png", "labels": 1}, "has no condition"),
        ({"path": "x.png", "guidance_scale": 2.0}, "Guidance needs labels"),
        ({"path": "x.png", "guidance_scale": -1}, "guidance_scale=-1"),
    ],
)
def test_sample_grid_fails_before_training(tmp_path, monkeypatch, untrained, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = untrained
    with pytest.raises(ValueError, match=message):
        model.fit(IMAGES, callbacks=[kd.callbacks.SampleGrid(**arguments)], verbose=0)
    assert int(model.optimizer.iterations) == 0


def test_sample_grid_draws_images_alone(model, points):
    with pytest.raises(ValueError, match=r"\(2,\)"):
        model.fit(points, callbacks=[kd.callbacks.SampleGrid("x.png")], verbose=0)


def test_sample_grid(tmp_path):
    """Every other epoch, from the same noise: a model that does not learn draws the same picture."""
    model = small_model(run_eagerly=False)
    model.optimizer.learning_rate = 0.0
    model.fit(
        IMAGES,
        epochs=4,
        callbacks=kd.callbacks.SampleGrid(tmp_path / "grids/{epoch:02d}.png", every=2, num_samples=3, scale=2),
        verbose=0,
    )
    files = sorted((tmp_path / "grids").iterdir())
    assert [file.name for file in files] == ["02.png", "04.png"]
    first, second = (read(file) for file in files)
    assert first.shape == (44, 44) and np.array_equal(first, second) and first[4:20, 4:20].std() > 10
    samples = model.sample(3, seed=0)
    assert np.array_equal(first[::2, ::2], kd.images.to_uint8(kd.images.grid(samples))[..., 0])


def test_sample_grid_of_labels(tmp_path):
    model = small_model(num_classes=2, prediction="x0")
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0, 0.1, w.shape) for w in model.get_weights()])
    options = {"sampler": kd.samplers.DDIM(2), "labels": [0, 1, 1], "guidance_scale": 3.0}
    callback = kd.callbacks.SampleGrid(tmp_path / "grid.png", num_samples=3, **options)
    model.fit(IMAGES, np.arange(16) % 2, epochs=2, batch_size=4, callbacks=[callback], verbose=0)

    def grid(**changes):
        return kd.images.to_uint8(kd.images.grid(model.sample(3, seed=0, **options | changes)))[..., 0]

    assert np.array_equal(read(tmp_path / "grid.png"), grid())
    assert not np.array_equal(grid(), grid(labels=0)) and not np.array_equal(grid(), grid(guidance_scale=1.0))


def test_sample_grid_beside_the_raw_weights(tmp_path):
    model = small_model()
    callback = kd.callbacks.SampleGrid(
        tmp_path / "grid.png", num_samples=4, sampler=kd.samplers.DDIM(2), compare_raw=True
    )
    model.fit(IMAGES, epochs=2, batch_size=4, callbacks=[callback], verbose=0)
    picture = read(tmp_path / "grid.png")
    assert picture.shape == (22, 44)
    average, raw = (
        kd.images.to_uint8(kd.images.grid(model.sample(4, kd.samplers.DDIM(2), seed=0, use_ema=use_ema)))[..., 0]
        for use_ema in (True, False)
    )
    assert np.array_equal(picture, np.concatenate([average, raw], axis=1)) and not np.array_equal(average, raw)
    model.optimizer.learning_rate = 0.0
    callback = kd.callbacks.SampleGrid(tmp_path / "raw.png", num_samples=4, sampler=kd.samplers.DDIM(2), use_ema=False)
    model.fit(IMAGES, batch_size=16, callbacks=[callback], verbose=0)
    assert np.array_equal(read(tmp_path / "raw.png"), raw)


def pixels(shape=(8, 8, 1)):
    x = keras.Input(shape)
    return keras.Model(x, keras.layers.Flatten()(x))


def test_metrics_of_samples_are_ordinary_logs(tmp_path):
    """Later callbacks see them, and what they see is what the metric says of `sample`."""
    kid = kd.metrics.KernelInceptionDistance(pixels(), subset_size=4)
    kid.update_state(real_images=IMAGES)
    model = small_model()
    best = tmp_path / "best.keras"
    metric = kd.callbacks.SampleMetrics(kid, num_samples=8, every=2, sampler=kd.samplers.DDIM(2))
    history = model.fit(
        IMAGES,
        epochs=5,
        batch_size=8,
        callbacks=[
            metric,
            keras.callbacks.ModelCheckpoint(best, monitor="val_kid", mode="min", save_best_only=True),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        ],
        verbose=0,
    ).history
    values = history["val_kid"]
    assert len(values) == 5 and values[1] == values[2] and values[3] == values[4] and len(set(values)) == 3
    model.fit(IMAGES, epochs=7, initial_epoch=6, callbacks=[metric], verbose=0)  # another fit, another first epoch
    assert kid.result() not in values
    assert kid.result() == kid.compare(model.sample(8, kd.samplers.DDIM(2), seed=0))
    assert history["val_kid_standard_error"][-1] > 0
    saved = keras.saving.load_model(best)
    assert kid.compare(saved.sample(8, kd.samplers.DDIM(2), seed=0)) == pytest.approx(min(values), rel=1e-6)
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "epoch,loss,val_kid,val_kid_standard_error"


def test_metrics_of_samples_that_cannot_be_had(untrained):
    kid = kd.metrics.KernelInceptionDistance(pixels(), subset_size=4)
    with pytest.raises(ValueError, match="has no real images"):
        untrained.fit(IMAGES, callbacks=[kd.callbacks.SampleMetrics(kid)], verbose=0)
    kid.update_state(real_images=IMAGES)
    with pytest.raises(ValueError, match="has no condition"):
        untrained.fit(IMAGES, callbacks=[kd.callbacks.SampleMetrics(kid, labels=1)], verbose=0)
    with pytest.raises(ValueError, match="at least 4. Received: num_generated=3"):
        untrained.fit(IMAGES, callbacks=[kd.callbacks.SampleMetrics(kid, num_samples=3)], verbose=0)
    with pytest.raises(ValueError, match="every=0"):
        kd.callbacks.SampleMetrics(kid, every=0)


def test_early_stopping_by_a_metric_of_samples(monkeypatch):
    """Patience counts epochs in which the metric does not fall: here it rises after the second."""
    kid = kd.metrics.KernelInceptionDistance(pixels(), subset_size=4)
    kid.update_state(real_images=IMAGES)
    metric = kd.callbacks.SampleMetrics(kid, num_samples=8)
    model = small_model()
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(metric, "sample", lambda: IMAGES[:8])
    monkeypatch.setattr(kid, "values", lambda: {"kid": 0.0})
    metric.set_model(model)
    metric.on_train_begin()
    monkeypatch.setattr(metric, "on_train_begin", lambda logs: None)
    monkeypatch.setattr(kid, "values", lambda: {"kid": next(values)})
    stop = keras.callbacks.EarlyStopping(monitor="val_kid", mode="min", patience=2)
    history = model.fit(IMAGES, epochs=5, batch_size=8, callbacks=[metric, stop], verbose=0).history
    assert history["val_kid"] == [3.0, 1.0, 2.0, 2.0]


@pytest.fixture(scope="module")
def of_labels():
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1, num_classes=3), seed=0)
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(1e-2))
    return model, model.get_weights()


@pytest.mark.parametrize("kind", ["nan", "range", "label"])
def test_a_late_batch_that_is_wrong_stops_the_run(points, of_labels, kind):
    """Within five steps, before the average is spoilt. A compiled step cannot say what is wrong."""
    x, labels = {
        "nan": (np.nan * points[:32], np.zeros(32)),
        "range": (3 * points[:32], np.zeros(32)),
        "label": (points[:32], np.full(32, 3)),  # as in classes that are counted from 1
    }[kind]

    def batches():
        for step in range(100):
            seen.append(step)
            yield (points[:32], np.zeros(32, "int32")) if step != 7 else (x.astype("float32"), labels.astype("int32"))

    seen, saved = [], []
    model, values = of_labels
    model.set_weights(values)
    save = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: saved.append(epoch))
    with pytest.raises(ValueError, match="loss is nan at step 8 of epoch 1"):
        model.fit(batches(), steps_per_epoch=100, callbacks=save, shuffle=False, verbose=0)
    assert not saved and len(seen) < 20
    average = weights(model.ema_weights)
    assert all(np.all(np.isfinite(w)) for w in average) and np.all(np.isfinite(model.sample(4, seed=0)))
    assert not all(map(np.array_equal, average, weights(kd.DiffusionModel(model.network).network.weights)))


def test_a_model_that_learns_nothing_says_so(points):
    data = kd.datasets.from_arrays(points, batch_size=32, steps_per_epoch=320)
    streams = {"batches": data, "weights": ((x, None, np.full(32, 3.0)) for x in data)}
    for learning_rate, stream, warns in [(0.0, "batches", True), (1e-2, "batches", False), (0.0, "weights", False)]:
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mae", optimizer=keras.optimizers.Adam(learning_rate))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(streams[stream], epochs=1, steps_per_epoch=320, verbose=0)
        texts = [str(w.message) for w in caught if "learned next to nothing" in str(w.message)]
        assert len(texts) == warns
        assert not warns or "always predicting zero gives 0.7" in texts[0] or "gives 0.8" in texts[0]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_loss_by_timestep(prediction):
    """A network that always predicts zero: the loss is the mean square of the target."""
    diffusion = kd.GaussianDiffusion(kd.schedules.cosine(100), prediction, clip_range=None)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2), diffusion)
    for v in [*model.network.weights, *model.ema_weights]:
        v.assign(np.zeros(v.shape, "float32"))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0), run_eagerly=EAGER)
    x_0 = np.random.default_rng(1).standard_normal((2000, 2)).astype("float32")
    labels = np.arange(2000) % 2
    by_time = kd.callbacks.LossByTimestep(x_0, labels, times=4)
    history = model.fit(x_0[:64], labels[:64], verbose=0, callbacks=[by_time]).history
    for t in (12, 38, 62, 88):
        a, b = kd.diffusion.PREDICTIONS[prediction](diffusion.schedule.alpha[t], diffusion.schedule.sigma[t])
        assert history[f"loss_at_{t}"][0] == pytest.approx(a**2 + b**2, rel=0.1)
    for arguments, message in [
        ({"x_0": x_0[:, :1], "labels": labels}, "Expected `x_0` of shape"),
        ({"x_0": x_0, "labels": labels + 1}, "integers in 0..1"),
        ({"x_0": x_0, "labels": labels, "times": [50, 101]}, "must hold integers in 0..100"),
        ({"x_0": x_0, "labels": labels, "times": 0}, "`times` must be .* Received: times=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.fit(x_0, labels, verbose=0, callbacks=[kd.callbacks.LossByTimestep(**arguments)])


def test_grids_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = small_model()
    grids = kd.callbacks.SampleGrid(
        tmp_path / "{epoch}.png", num_samples=4, sampler=kd.samplers.DDIM(2), tensorboard=tmp_path / "logs"
    )
    model.fit(np.zeros((4, 8, 8, 1), "float32"), epochs=2, verbose=0, callbacks=[grids])
    found = EventAccumulator(str(tmp_path / "logs")).Reload().Images("samples")
    assert [event.step for event in found] == [1, 2]
    with Image.open(io.BytesIO(found[1].encoded_image_string)) as logged, Image.open(tmp_path / "2.png") as written:
        assert np.array_equal(np.asarray(logged), np.asarray(written))
