"""Files: complete, and for every backend. tests/attacks has those that are refused."""

import hashlib
import json
import pathlib
import re
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
from conftest import EAGER, randomize
from keras import ops
from PIL import Image

import keras_ddpm as kd
from keras_ddpm.saving import compact

HERE = pathlib.Path(__file__).parent


def random_pair(shape=(4, 6)):
    random = np.random.default_rng(0)
    return [random.uniform(0.1, 1, shape).astype("float32") for _ in range(2)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.losses.Huber(0.1),
        lambda: keras.losses.CosineSimilarity(axis=0),
        lambda: keras.losses.Tversky(0.3, 0.7),
        lambda: keras.losses.MeanAbsoluteError(reduction="sum"),
        lambda: keras.losses.CategoricalFocalCrossentropy(gamma=3.0),
        lambda: "log_cosh",
    ],
)
def test_no_argument_of_a_loss_is_forgotten(fresh_model, make):
    """Keras 3.15 forgets `delta` of Huber and `axis` of others."""
    model, loss = fresh_model, make()
    model.compile(loss=loss, metrics=[keras.metrics.CosineSimilarity(axis=0)], optimizer="adam")
    copy = kd.DiffusionModel.from_config(model.get_config())
    copy.compile_from_config(json.loads(json.dumps(model.get_compile_config())))
    y, y_pred = random_pair((4, 2))
    assert float(copy.compute_loss(y=y, y_pred=y_pred)) == float(model.compute_loss(y=y, y_pred=y_pred))
    values = [float(m.compute_metrics(None, y, y_pred)["cosine_similarity"]) for m in (model, copy)]
    assert values[0] == values[1]


def test_forgotten_arguments_without_keras_private_attribute(model, monkeypatch):
    """Such a version of Keras is taken to store all arguments itself."""
    loss = keras.losses.Huber(0.1)
    monkeypatch.delattr(loss, "_fn_kwargs")
    assert "delta" not in compact.portable(loss)["config"]


@pytest.mark.parametrize(
    "optimizer", ["adam", "sgd", keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(1e-3))]
)
def test_files_name_no_backend(tmp_path, fresh_model, points, optimizer):
    """Keras writes the module of PyTorch's optimizers, which is missing where PyTorch is."""
    model = fresh_model
    model.compile(loss="mse", optimizer=optimizer, run_eagerly=EAGER)
    model.fit(points, verbose=0)
    model.save(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        assert "keras.src.backend" not in archive.read("config.json").decode()
    copy = kd.saving.load_model(tmp_path / "x.keras")
    for got, expected in zip(copy.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(ops.convert_to_numpy(got), ops.convert_to_numpy(expected))
    copy.fit(points, verbose=0)


def test_a_file_that_names_a_backend(model):
    """As Keras writes it on PyTorch."""
    config = model.get_compile_config()
    config["optimizer"]["module"] = "keras.src.backend.torch.optimizers.torch_adam"
    before = set(sys.modules)
    copy = kd.DiffusionModel.from_config(model.get_config())
    copy.compile_from_config(config)
    assert isinstance(copy.optimizer, keras.optimizers.Adam)
    assert not any(name.startswith("keras.src.backend.torch.optimizers") for name in set(sys.modules) - before)


def test_a_loaded_model_draws_the_same_dropout(tmp_path):
    """Of `networks.unet`. A layer of one's own needs a seed on PyTorch."""
    images = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")
    network = kd.networks.unet((4, 4, 1), 8, (1,), 1, (), groups=4, dropout=0.5)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.linear(25)), seed=3)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2), run_eagerly=EAGER)
    model.fit(images, batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "x.keras")
    copy = kd.saving.load_model(tmp_path / "x.keras")
    for each in (model, copy):
        each.fit(images, batch_size=4, shuffle=False, verbose=0)
    for got, expected in zip(copy.weights, model.weights, strict=True):
        assert np.array_equal(ops.convert_to_numpy(got), ops.convert_to_numpy(expected))


@pytest.mark.parametrize("scales", [True, False])
def test_mixed_float16_scales_the_loss(tmp_path, scales):
    """As `compile` of Keras does for a model with this policy."""
    keras.config.set_dtype_policy("mixed_float16")
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
    options = {} if scales else {"auto_scale_loss": False}
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3), **options)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == scales
    model.fit(np.zeros((8, 2), "float32"), batch_size=4, verbose=0)
    copy = kd.DiffusionModel.from_config(model.get_config())
    copy.compile_from_config(model.get_compile_config())
    assert isinstance(copy.optimizer, keras.optimizers.LossScaleOptimizer) == scales
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")  # as in a new process
    loaded = kd.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer) == scales
    assert int(ops.convert_to_numpy(loaded.optimizer.iterations)) == 2


@pytest.mark.parametrize("name", ["x.h5", "x.hdf5", "x", "x.weights.h5"])
def test_other_endings(tmp_path, model, name):
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.save(tmp_path / name)


def test_another_kind_of_model(tmp_path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="It is not a diffusion model of class DiffusionModel.*Sequential"):
        kd.saving.load_model(tmp_path / "x.keras")


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*x.keras"):
        kd.saving.load_model(tmp_path / "x.keras")


@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, model, number):
    """Flipped bits and truncated files: an error in one line, or the same model."""
    path = tmp_path / "x.keras"
    model.save(path)
    content, random = path.read_bytes(), np.random.default_rng(0)
    expected = [ops.convert_to_numpy(v) for v in model.weights]
    for _ in range(number):
        damaged = bytearray(content)
        place = random.integers(len(content))
        if random.random() < 0.2:
            damaged = damaged[:place]
        else:
            damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            got = kd.saving.load_model(path)
        except ValueError as error:
            assert "cannot be loaded as a model" in str(error) and "\n" not in str(error)
        else:
            assert all(np.array_equal(ops.convert_to_numpy(v), value) for v, value in zip(got.weights, expected))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a format of TensorFlow")
def test_export_holds_the_average(tmp_path, model, points):
    import tensorflow as tf

    model.fit(points, verbose=0)
    model.save(tmp_path / "x.keras")
    kd.saving.load_model(tmp_path / "x.keras").export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    served = exported.serve([points[:4], np.arange(4, dtype="int32")])
    expected = model.average.predict(points[:4], np.arange(4))
    assert np.allclose(served, expected, atol=1e-6)
    assert not np.allclose(served, model.network([points[:4], np.arange(4)]), atol=1e-4)


def test_a_save_that_fails_leaves_the_file_before(tmp_path, model, monkeypatch):
    path = tmp_path / "x.keras"
    model.save(path)
    content = path.read_bytes()
    model.save(path)  # writes over it
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_own_variables", lambda self, store: (_ for _ in ()).throw(OSError(28, "Full")))
        with pytest.raises(OSError, match="Full"):
            model.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.keras"]
    assert len(path.read_bytes()) == len(content) and kd.saving.load_model(path)


@pytest.fixture(scope="module")
def of_labels():
    """A trained model of three labels with names."""
    network = kd.networks.mlp(2, 64, 1, num_classes=3)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(), 0.5, seed=0, class_names=["lily", "rose", "tulip"])
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-2), run_eagerly=EAGER)
    x = np.random.default_rng(0).uniform(-1, 1, (16, 2)).astype("float32")
    model.fit(x, np.arange(16) % 3, batch_size=4, verbose=0)
    return model


@pytest.mark.parametrize("load", [kd.DiffusionModel.from_preset, kd.saving.load_model, keras.saving.load_model])
def test_compact_files(tmp_path, of_labels, load):
    """Two bytes a weight, the same samples up to rounding, and trainable."""
    of_labels.save_compact(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        weights = archive.getinfo("model.weights.h5").compress_size
    assert weights < 2 * of_labels.network.count_params() + 8_000
    copy = load(tmp_path / "x.keras")
    for network, average in zip(copy.network.weights, copy.ema_weights, strict=True):
        assert np.array_equal(ops.convert_to_numpy(network), ops.convert_to_numpy(average))
    options = {"sampler": kd.samplers.DDIM(5), "seed": 0, "labels": "rose", "guidance_scale": 2}
    assert np.mean(np.abs(copy.sample(4, **options) - of_labels.sample(4, **options))) < 2e-3
    assert not copy.compiled
    copy.compile(loss="mse", optimizer="adam", run_eagerly=EAGER)
    copy.fit(np.zeros((4, 2)), np.zeros(4, "int32"), verbose=0)
    copy.save(tmp_path / "y.keras")
    assert kd.saving.load_model(tmp_path / "y.keras").condition.class_names == ("lily", "rose", "tulip")


def test_weights_that_half_precision_cannot_hold(tmp_path, model):
    model.average.weights[0].assign(np.full(model.average.weights[0].shape, 1e5))
    with pytest.raises(ValueError, match="too large for half precision"):
        model.save_compact(tmp_path / "x.keras")
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        model.save_compact(tmp_path / "x.h5")
    assert not [*tmp_path.iterdir()]


def test_presets(tmp_path, model, monkeypatch):
    """A name of the package, a path, or an address that Keras loads."""
    assert kd.DiffusionModel.presets["flowers64"].startswith("A model of photographs of flowers")
    for module in (kd.saving, kd.saving.loading):
        monkeypatch.setattr(module, "PRESETS", tmp_path)
    model.save_compact(tmp_path / "points.keras")
    (tmp_path / "points.md").write_text("# points\n\nA model of points.\n\nMore.\n")
    assert kd.DiffusionModel.presets == {"points": "A model of points."}
    assert kd.DiffusionModel.from_preset("points").data_shape == (2,)
    assert kd.DiffusionModel.from_preset(tmp_path / "points.keras").data_shape == (2,)
    with pytest.raises(FileNotFoundError, match="no model file lines. Presets of the package: points"):
        kd.DiffusionModel.from_preset("lines")
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        with zipfile.ZipFile(tmp_path / "points.keras") as archive:
            archive.extractall(tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    assert kd.DiffusionModel.from_preset("hf://someone/points", compile=False).data_shape == (2,)
    assert asked == [("someone/points", ["config.json", "metadata.json", "model.weights.h5"])]


def test_a_folder_to_share(tmp_path, of_labels, monkeypatch):
    """It holds what Keras reads at an address, and a card, which is kept. The example of the card runs."""
    yaml = pytest.importorskip("yaml")
    folder = tmp_path / "flower points"
    of_labels.save_to_preset(folder)
    names = ["README.md", "config.json", "metadata.json", "model.weights.h5"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for loaded in (kd.DiffusionModel.from_preset(folder), kd.saving.load_model(str(folder))):
        assert not loaded.compiled and loaded.condition.class_names == ("lily", "rose", "tulip")
        samples = [of.sample(4, kd.samplers.DDIM(5), 0, labels="rose") for of in (of_labels, loaded)]
        assert np.mean(np.abs(samples[0] - samples[1])) < 2e-3
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["library_name"] == "keras" and header["pipeline_tag"] == "unconditional-image-generation"
    assert "keras_ddpm" in header["tags"] and not {"license", "datasets"} & {*header}
    assert f"{of_labels.network.count_params():,}" in text and "| names of the classes | lily, rose, tulip |" in text
    assert f"`{of_labels.default_sampler}`" in text and "epsilon, T = 1000" in text
    client = types.SimpleNamespace(snapshot_download=lambda repository, allow_patterns: str(folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    found = {}
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert found["samples"].shape == (4, 2)
    of_labels.save_to_preset(folder)
    with pytest.warns(UserWarning, match=r"README.md was kept, but this model has .*parameters \| [\d,]+ \|.*none"):
        kd.DiffusionModel(kd.networks.mlp(2, 8, 1)).save_to_preset(folder)
    (folder / "README.md").write_text("mine")
    of_labels.save_to_preset(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_an_address_that_tensorflow_reads(tmp_path, model):
    pytest.importorskip("tensorflow")
    model.save(tmp_path / "x.keras")
    assert kd.saving.load_model(f"file://{tmp_path}/x.keras").data_shape == (2,)
    with pytest.raises(ValueError, match="^https://example.com/x.keras cannot be loaded as a model"):
        kd.saving.load_model("https://example.com/x.keras")


class OfMyOwn(kd.DiffusionModel):
    """Not registered with Keras."""


class Other(kd.DiffusionModel):
    """Neither."""


def test_a_subclass_keeps_its_class(tmp_path, model):
    model.save(tmp_path / "x.keras")
    assert type(OfMyOwn.from_preset(tmp_path / "x.keras")) is OfMyOwn
    OfMyOwn.from_preset(tmp_path / "x.keras").save(tmp_path / "y.keras")
    own = {"OfMyOwn": OfMyOwn}
    assert type(kd.saving.load_model(tmp_path / "y.keras", custom_objects=own)) is OfMyOwn
    with pytest.raises(ValueError, match="not a diffusion model of class DiffusionModel. Received: found='OfMyOwn'"):
        kd.saving.load_model(tmp_path / "y.keras")
    with pytest.raises(ValueError, match="It is not a diffusion model of class Other"):
        Other.from_preset(tmp_path / "y.keras")


def test_options_of_loading(tmp_path):
    """As Keras names them. Without the safe mode, the file's own code is read."""
    x_t, t = keras.Input((2,)), keras.Input((), dtype="int32")
    double = keras.layers.Lambda(lambda x: 2 * x, output_shape=(2,))
    model = kd.DiffusionModel(keras.Model([x_t, t], double(keras.layers.Dense(2)(x_t))))
    model.compile(loss="mse", optimizer="adam")
    model.save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="cannot be loaded as a model. Requested the deserialization of a .*[Ll]ambda"):
        kd.saving.load_model(tmp_path / "x.keras")
    loaded = kd.saving.load_model(tmp_path / "x.keras", safe_mode=False, compile=False)
    assert not loaded.compiled
    x = np.ones((1, 2), "float32")
    np.testing.assert_allclose(*(ops.convert_to_numpy(of((x, np.ones(1, "int32")))) for of in (model, loaded)))


def test_saving_to_an_address_and_through_a_link(tmp_path, model, monkeypatch):
    """Keras writes to an address. A link stays one, and the file that it leads to is replaced."""
    (tmp_path / "all").mkdir()
    (tmp_path / "latest.keras").symlink_to("all/v1.keras")
    for save in (model.save, model.save_compact):
        (tmp_path / "all/v1.keras").write_text("old")
        save(tmp_path / "latest.keras")
        assert (tmp_path / "latest.keras").is_symlink() and zipfile.is_zipfile(tmp_path / "all/v1.keras")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["all", "latest.keras", "v1.keras"]
    asked = []
    monkeypatch.setattr(keras.Model, "save", lambda self, path, *args, **kwargs: asked.append(path))
    model.save("hf://someone/points")
    assert asked == ["hf://someone/points"]


def test_flowers64():
    """The model that comes with the package draws the flowers of the file, on every backend."""
    model = kd.DiffusionModel.from_preset("flowers64")
    names = ["sunflower", "rose", "water lily", "tiger lily"]
    x = model.sample(4, kd.samplers.DPMSolver(8), seed=0, labels=names, guidance_scale=2.0)
    expected = kd.images.from_uint8(np.asarray(Image.open(HERE / "flowers64.png")))
    assert np.mean(np.abs(kd.images.grid(x, 4) - expected)) < 2 / 127.5
    assert model.guidance_scale == 3.0 and model.default_sampler == kd.samplers.UniPC(6)


@pytest.mark.parametrize(
    "name, hash_of_file",
    [
        ("flowers64", "2ff5d899e64084acb0b18e0274fd15f65e01c4c8e836e1860c6bf1f7543dcf3a"),
        ("flowers128", "b1a49112f688d6ddd46d588b88804fbccbcad6778a3d60bb1981a7dc60fec7b0"),
    ],
)
def test_files_of_presets(name, hash_of_file):
    assert {*kd.DiffusionModel.presets} == {"flowers64", "flowers128"}
    content = (kd.saving.PRESETS / f"{name}.keras").read_bytes()
    assert len(content) < 16 * 2**20 and hashlib.sha256(content).hexdigest() == hash_of_file


def test_flowers128():
    """It keeps the picture that it enlarges."""
    model = kd.DiffusionModel.from_preset("flowers128")
    small = kd.images.from_uint8(np.asarray(Image.open(HERE / "flowers64.png")))[None, 2:66, 2:66]
    large = kd.editing.upscale(model, small, seed=0, num_steps=2, labels="sunflower")
    assert large.shape == (1, 128, 128, 3)
    assert np.sqrt(np.mean((large.reshape(1, 64, 2, 64, 2, 3).mean(axis=(2, 4)) - small) ** 2)) < 0.1


def unnamed(width=4):
    """A network of layers whose names Keras makes anew in a copy, and of nested models with layers of one name."""
    x_t, t = keras.Input((4,)), keras.Input((), dtype="int32")
    inner = [keras.Sequential([keras.Input((width,)), keras.layers.Dense(width, name="dense")]) for _ in range(2)]
    x = keras.Sequential([keras.layers.Dense(width), keras.layers.Dense(width)])(x_t)
    return keras.Model([x_t, t], inner[1](inner[0](x)))


def test_copies_keep_weights_whatever_their_names(tmp_path):
    network = unnamed()
    randomize(network)
    model = kd.DiffusionModel(network, seed=0)
    sampler = kd.samplers.DDIM(3)
    copy = kd.DiffusionModel.from_model(model, ema_decay=0.5)
    np.testing.assert_array_equal(copy.sample(3, sampler, 0), model.sample(3, sampler, 0))
    model.save_compact(tmp_path / "m.keras")
    loaded = kd.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded.sample(3, sampler, 0), model.sample(3, sampler, 0), atol=0.02)
    with pytest.raises(ValueError, match="`network` must have the weights of the model"):
        kd.DiffusionModel.from_model(model, network=unnamed())


def test_copies_for_other_classes():
    network = kd.networks.mlp(2, 8, 1, num_classes=3)
    randomize(network)
    model = kd.DiffusionModel(network, class_names=["a", "b", "c"])
    copy = kd.DiffusionModel.from_model(model, class_names=["c", "x", "a", "y"])
    sample = lambda model, labels: model.sample(2, kd.samplers.DDIM(3), 0, labels=labels)
    for name, old in [("c", "c"), ("a", "a"), ("x", "b"), ("y", "b"), (None, None)]:
        np.testing.assert_array_equal(sample(copy, name), sample(model, old))
    same = kd.DiffusionModel.from_model(model, class_names=["x", "b", "c"])
    np.testing.assert_array_equal(sample(same, "x"), sample(model, "a"))
    np.testing.assert_array_equal(sample(same, "b"), sample(model, "b"))
    unnamed = kd.DiffusionModel(network)
    other = kd.DiffusionModel.from_model(unnamed, class_names=["x", "y"])  # in the order of the old labels
    np.testing.assert_array_equal(sample(other, "y"), sample(unnamed, 1))
    renamed = kd.DiffusionModel.from_model(unnamed, class_names=["x", "y", "z"])
    np.testing.assert_array_equal(sample(renamed, "z"), sample(unnamed, 2))
