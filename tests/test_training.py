"""Training compared with its definition: the loss, the draws of t, and the data that are rejected."""

import inspect

import keras
import numpy as np
import pytest
from conftest import EAGER, image_network, small_unet, weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm._backend import devices


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("mse", 1.0), ("mae", np.sqrt(2 / np.pi)), (keras.losses.LogCosh(), 0.37439), ("huber", 0.42445)],
)
def test_a_fresh_model_predicts_zero(fresh_model, points, loss, expected):
    """Its loss is then E|ε|^2, E|ε| and so on, here of 1024 draws of two numbers."""
    fresh_model.compile(loss=loss, optimizer="adam", run_eagerly=EAGER)
    got = fresh_model.evaluate(np.tile(points, (4, 1)), verbose=0)
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
    model = kd.DiffusionModel(
        image_network((8, 8, 1)),
        loss_weight=loss_weight if weighted else None,
        timestep_sampling=timestep_sampling,
        seed=3,
    )
    model.network.set_weights([random.normal(0, 0.3, w.shape) for w in weights(model.network.weights)])
    eager = weighted or timestep_sampling == "batch"
    model.compile(loss="mse", metrics=["mae"], optimizer=keras.optimizers.SGD(0.0), run_eagerly=eager)
    history = model.fit(images, batch_size=8, shuffle=False, epochs=1, verbose=0).history
    generator = keras.random.SeedGenerator(3)
    losses, errors = [], []
    for x_0 in (images[:8], images[8:]):
        t = ops.convert_to_numpy(model.corruption.draw_timesteps(8, generator))
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
    return np.array(
        [ops.convert_to_numpy(model.corruption.draw_timesteps(batch_size, generator)) for _ in range(batches)]
    )


@pytest.mark.parametrize("kind", ["uniform", "batch", "stratified"])
def test_timesteps_are_uniform(kind):
    """At each place in the batch, as data may come in a fixed order."""
    t = draw_timesteps(kind, 500, 3)
    for place in range(3):
        counts = np.bincount(t[:, place], minlength=11)
        assert t.dtype == "int32" and counts[0] == 0 and len(counts) == 11
        assert np.sum((counts[1:] - 50) ** 2 / 50) < 27.9  # chi² of 9 degrees of freedom, p = 0.001


def test_timesteps_of_a_batch():
    assert np.all(np.ptp(draw_timesteps("batch", 20, 8), axis=1) == 0)
    for t, repeats in ((draw_timesteps("stratified", 20, 10), 1), (draw_timesteps("stratified", 20, 50), 5)):
        assert np.array_equal(np.sort(t, axis=1), np.tile(np.repeat(np.arange(1, 11), repeats), (20, 1)))
    assert np.any(np.diff(np.sort(draw_timesteps("uniform", 20, 10), axis=1), axis=1) == 0)


def test_half_of_the_timesteps_are_the_last():
    """The others are spread evenly, at any place in the batch."""
    t = draw_timesteps("half_at_T", 200, 40)
    assert np.array_equal(np.sort(t, axis=1)[:, :20], np.tile(np.repeat(np.arange(1, 11), 2), (200, 1)))
    assert np.all(t.max(axis=0) == 10) and np.all(t.min(axis=0) <= 5)
    assert np.all(np.sum(t == 10, axis=1) == 22)


def test_stratified_timesteps_lower_the_variance_of_a_mean_over_t():
    """Without bias: of the mean of (t/T)² over a batch, more than tenfold here."""
    means = {
        kind: np.mean((draw_timesteps(kind, 300, 32, 1000) / 1000) ** 2, axis=1) for kind in ("uniform", "stratified")
    }
    assert np.var(means["stratified"]) < 0.1 * np.var(means["uniform"])
    exact = np.mean((np.arange(1, 1001) / 1000) ** 2)
    for values in means.values():
        assert abs(np.mean(values) - exact) < 4 * np.std(values) / 300**0.5


@pytest.mark.parametrize("name", ["compile", "fit", "evaluate"])
def test_signatures_are_keras_own(name):
    assert inspect.signature(getattr(kd.DiffusionModel, name)) == inspect.signature(getattr(keras.Model, name))


def test_arguments_may_be_positional(fresh_model, points):
    model = fresh_model
    epochs = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append((epoch, sorted(logs))))
    model.compile("adam", "mae", run_eagerly=EAGER)
    model.fit(points, None, 128, 2, 0, callback, 0.0, (points,))
    assert epochs == [(0, ["loss", "val_loss"]), (1, ["loss", "val_loss"])]
    assert int(model.optimizer.iterations) == 4
    assert model.evaluate(points, None, 256, 0) == pytest.approx(model.evaluate(points, batch_size=256, verbose=0))


def test_learns(model, points):
    points = 0.5 + 0.05 * points
    losses = model.fit(points, epochs=40, batch_size=64, verbose=0).history["loss"]
    assert losses[-1] < 0.25 < losses[0]
    samples = model.sample(200, seed=0)
    assert np.abs(samples.mean(0) - 0.5).max() < 0.15 and samples.std() < 0.3


def test_labels_are_ignored_without_conditioning(points):
    histories = []
    for data in (points, kd.datasets.Batches(points, np.arange(256), 32, shuffle=False)):
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
        model.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
        histories.append(model.fit(data, epochs=1, shuffle=False, verbose=0).history["loss"])
    assert histories[0] == histories[1]


def test_evaluate_draws_the_same_each_time(model, points):
    first = model.evaluate(points, verbose=0)
    history = model.fit(points, validation_data=points, epochs=1, verbose=0).history
    assert first == pytest.approx(1.0, abs=0.3) and history["val_loss"][0] != first
    assert model.evaluate(points, verbose=0) == model.evaluate(points, verbose=0) == history["val_loss"][0]


def test_evaluation_needs_no_optimizer(fresh_model):
    fresh_model.compile(loss="mse", optimizer=None)
    assert np.isfinite(fresh_model.evaluate(np.zeros((4, 2), "float32"), verbose=0))


def test_compilation_is_chosen_anew_where_a_file_is_loaded(fresh_model, monkeypatch):
    model = fresh_model
    assert model.get_compile_config().get("jit_compile", "auto") == "auto"
    for choice in (True, False):
        monkeypatch.setattr(devices, "jit_compile", lambda: choice)
        copy = kd.DiffusionModel.from_config(model.get_config())
        copy.compile_from_config(model.get_compile_config())
        assert copy.jit_compile is choice
    model.compile(loss="mse", optimizer="adam", jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False
    monkeypatch.setattr(devices, "jit_compile", lambda: True)
    model.compile(loss="mse", optimizer="adam", run_eagerly=True)
    assert model.jit_compile is False


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = kd.DiffusionModel(image_network((8, 8, 1)), seed=0)
    model.compile(loss="mse", optimizer="adam")
    images = np.zeros((16, 8, 8, 1), "float32")
    loss = model.fit(images, epochs=1, verbose=0).history["loss"][0]
    assert loss == pytest.approx(1.0, abs=0.15)
    assert {v.dtype for v in model.ema_weights} == {"float32"}
    assert model.sample(2, kd.samplers.DDIM(2), seed=0).dtype == "float32"


class Stream(keras.utils.PyDataset):
    """One batch."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 1

    def __getitem__(self, step):
        return self.x


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras 3.15 says so of all data of Grain
@pytest.mark.parametrize("kind", ["tf.data", "with labels", "PyTorch", "bare tensors", "Grain"])
def test_takes_streams_of_others(model, points, kind):
    """On every backend, bare tensors and a smaller last batch included."""
    torch = pytest.importorskip("torch") if kind in ("PyTorch", "bare tensors") else None
    if kind == "Grain":
        stream = pytest.importorskip("grain").MapDataset.source(points).shuffle(seed=0).batch(60)
    elif torch is None:
        tensors = (points, np.arange(256)) if kind == "with labels" else points
        stream = pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices(tensors).batch(60)
    else:
        x = torch.from_numpy(points)
        x = x if kind == "bare tensors" else torch.utils.data.TensorDataset(x, torch.arange(256))
        stream = torch.utils.data.DataLoader(x, batch_size=60)
    history = model.fit(stream, validation_data=stream, epochs=2, shuffle=False, verbose=0).history
    assert history["loss"][-1] < 1.2 and len(history["val_loss"]) == 2


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
    with pytest.raises(ValueError, match="no batch. Received: data=None"):
        model.fit()


def test_a_validation_stream_is_not_consumed_either(model, points):
    def batches():
        while True:
            yield (points[:64],)

    history = model.fit(points, validation_data=batches(), validation_steps=2, epochs=3, verbose=0).history
    assert len(history["val_loss"]) == 3


def test_data_without_bounds(points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), kd.GaussianDiffusion(clip_range=None))
    model.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
    model.fit(100 * points, epochs=1, verbose=0)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_any_channels_in_batches_of_any_size(request, channels):
    """Alone in a batch, too, where PyTorch lacks a gradient of the convolution to one channel that Keras calls."""
    if request.config.getoption("--plain") and channels == 1:
        pytest.skip("this is what the fast function mends")
    for side in (8, 12, 28) if keras.backend.backend() == "torch" else (8,):
        x_t, t = keras.Input((side, side, channels)), keras.Input((), dtype="int32")
        h = kd.layers.Conv2D(4, 3, padding="same")(x_t)
        model = kd.DiffusionModel(keras.Model([x_t, t], kd.layers.Conv2D(channels, 3, padding="same")(h)))
        model.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
        for batch_size in (1, 2, 3):
            loss = model.train_on_batch(np.zeros((batch_size, side, side, channels), "float32"))
            assert np.isfinite(loss)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_data_loaders_of_bare_tensors(points, batch_size):
    """On TensorFlow and JAX, Keras takes such a batch for a tuple of its examples."""
    torch = pytest.importorskip("torch")
    x = points[:23]
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), kd.GaussianDiffusion(kd.schedules.linear(25), "x0"))
    model.compile(loss="mse", optimizer=keras.optimizers.SGD(0.0), run_eagerly=EAGER and batch_size < 5)
    loader = torch.utils.data.DataLoader(torch.tensor(x), batch_size=batch_size)
    history = model.fit(loader, validation_data=loader, shuffle=False, verbose=0).history
    for name in ("loss", "val_loss"):  # of a network that predicts 0
        assert history[name][0] == pytest.approx(np.mean(x.astype("float64") ** 2), rel=1e-5)
    assert next(iter(loader)).shape == (batch_size, 2)  # the user's own is as it was


def test_images_in_0_1_are_named():
    model = kd.DiffusionModel(image_network((8, 8, 1)))
    model.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
    x = np.random.default_rng(0).uniform(0, 1, (4, 8, 8, 1)).astype("float32")
    with pytest.warns(UserWarning, match=r"The images lie in \[0, 1\]"):
        model.fit(x, verbose=0)
    with pytest.warns(UserWarning, match=r"The images lie in \[0, 1\]"):
        kd.metrics.Extractor(lambda images: images.reshape(len(images), -1))(x)
    model.fit(2 * x - 1, verbose=0)


def test_labels_that_the_network_cannot_see_are_named():
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1))
    model.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
    with pytest.warns(UserWarning, match="The network takes no labels"):
        model.fit(np.zeros((4, 2)), np.zeros(4, int), verbose=0)
    model.fit(np.zeros((4, 2)), np.zeros(4, int), class_weight={0: 2.0}, verbose=0)


@pytest.mark.parametrize("good", [1, 2, 4])
def test_data_that_fail_leave_the_model_as_it_was(model, points, good):
    """Also on JAX, where Keras takes the values out of the variables during a step. One batch is read ahead."""

    def data():
        for _ in range(good):
            yield points[:4]
        raise OSError("The disk is gone")

    before = [ops.convert_to_numpy(v) for v in model.network.weights]
    with pytest.raises(Exception, match="The disk is gone"):
        model.fit(data(), verbose=0, shuffle=False, steps_per_epoch=10)
    after = [ops.convert_to_numpy(v) for v in model.network.weights]
    assert all(np.all(np.isfinite(value)) for value in after)
    assert model.sample(2, seed=0).shape == (2, 2)
    if int(model.optimizer.iterations) == 0:
        assert all(np.array_equal(a, b) for a, b in zip(before, after))
    model.fit(points, verbose=0)


@pytest.mark.parametrize("good", range(7))
@pytest.mark.parametrize("validated", [False, True])
def test_a_batch_that_fails_leaves_the_values(model, points, good, validated):
    """In training, in a validation, and in the first step after each of them: two batches of each, in turns."""

    class Failing(keras.utils.PyDataset):
        left = 10**9

        def __len__(self):
            return 2

        def __getitem__(self, index):
            Failing.left -= 1
            if Failing.left < 0:
                raise OSError("The disk is gone")
            return points[:4]

    model.fit(points, verbose=0)
    data = Failing()
    data[0]
    Failing.left = good + 1 + validated  # `fit` looks at the first batch
    with pytest.raises(Exception, match="The disk is gone"):
        model.fit(data, validation_data=data if validated else None, epochs=9, verbose=0)
    assert all(np.all(np.isfinite(ops.convert_to_numpy(v))) for v in [*model.variables, *model.optimizer.variables])
    assert model.sample(2, seed=0).shape == (2, 2)


@pytest.mark.parametrize("good", [0, 1])
def test_an_evaluation_that_fails_changes_nothing(model, points, good):
    def data():
        for _ in range(1 + good):
            yield (points[:4],)
        raise OSError("The disk is gone")

    model.fit(points, verbose=0)
    expected, samples = model.evaluate(points, verbose=0), model.sample(2, seed=0)
    with pytest.raises(Exception, match="The disk is gone"):
        model.evaluate(data(), steps=9, verbose=0)
    assert model.evaluate(points, verbose=0) == expected and np.array_equal(model.sample(2, seed=0), samples)


def test_weights_multiply_every_kind_of_loss():
    """Losses with one value for each image, pixel or number are the same mean, also with weights."""
    images = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype("float32")
    weight = np.arange(8.0)
    square = lambda y, y_pred: ops.square(y - y_pred)
    found = []
    for loss in (
        "mse",
        keras.losses.MeanSquaredError(),
        square,
        lambda y, y_pred: ops.mean(square(y, y_pred), axis=(1, 2, 3)),
        lambda y, y_pred: ops.mean(square(y, y_pred), axis=(1, 2, 3), keepdims=True),
    ):
        diffusion = kd.GaussianDiffusion(kd.schedules.cosine(50), "v")
        model = kd.DiffusionModel(
            image_network((8, 8, 3)), diffusion, seed=0, loss_weight=diffusion.min_snr_weight(1.0)
        )
        model.compile(loss=loss, optimizer="sgd", run_eagerly=EAGER and loss != "mse")
        found.append([model.evaluate(images, verbose=0), model.evaluate(images, sample_weight=weight, verbose=0)])
    np.testing.assert_allclose(found, found[:1] * 5, rtol=1e-5)
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), seed=0)
    model.compile(loss=lambda y, y_pred: ops.mean(square(y, y_pred)), optimizer="sgd", run_eagerly=EAGER)
    model.fit(np.zeros((4, 2)), verbose=0)
    with pytest.raises(ValueError, match="A loss that is one number for the batch has no weights"):
        model.fit(np.zeros((4, 2)), sample_weight=np.ones(4), verbose=0)


def test_data_sets_of_users_keep_their_attributes():
    """`labels` and `epoch` mean something else than in `datasets.Batches`."""

    class Own(keras.utils.PyDataset):
        labels, epoch = ["a", "b"], "first"

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.zeros((2, 2), "float32"), np.array([0, 1])

    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1, num_classes=2), seed=0)
    model.compile(loss="mse", optimizer="sgd", run_eagerly=EAGER)
    data = Own()
    model.fit(data, epochs=2, verbose=0)
    assert data.epoch == "first" and int(ops.convert_to_numpy(model.optimizer.iterations)) == 4
