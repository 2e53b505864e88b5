"""Exported files: ONNX Runtime samples from them what the model samples."""

import json
import sys

import keras
import numpy as np
import onnx_sampling
import pytest
from conftest import TORCH, image_network, randomize, weights

import keras_ddpm as kd

pytest.importorskip({"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnx"}[keras.backend.backend()])
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("uncompiled")

SHAPE = (8, 8, 3)
TABLES = {
    "two orders": kd.samplers.UniPC(6),
    "earlier noise": kd.samplers.IPNDM(6),
    "two calls": kd.samplers.Heun(3, spacing="logsnr"),
    "noise": kd.samplers.DDPM(4),
}


def unet(shape, **kwargs):
    return kd.networks.unet(shape, 8, (1, 2), 1, (4,), 4, **kwargs)


# Keras 3.15 cannot export the transposed convolution of `dit` on PyTorch. Elsewhere a U-Net takes longest.
ANY = unet if TORCH else image_network


def make_model(num_classes=None, schedule=None, prediction="v", clip_range=(-1.0, 1.0), dtype="float32", network=ANY):
    keras.config.set_dtype_policy(dtype)
    diffusion = kd.GaussianDiffusion(schedule or kd.schedules.cosine(50), prediction, clip_range)
    names = [f"kind {label}" for label in range(num_classes)] if num_classes else None
    model = kd.DiffusionModel(network(SHAPE, num_classes=num_classes), diffusion, class_names=names)
    randomize(model.network)
    for average, v in zip(model.ema_weights, model.network.weights):
        average.assign(np.float16(keras.ops.convert_to_numpy(v)))  # so that half precision changes nothing
    return model


MODELS = {
    "unconditional": {"prediction": "epsilon", "schedule": kd.schedules.linear(50)},
    "guided": {
        "num_classes": 3,
        "prediction": "x0",
        "schedule": kd.schedules.zero_terminal_snr(kd.schedules.linear(50)),
        "network": unet,
    },
    "not clipped": {"clip_range": None},
}


@pytest.mark.parametrize("kind", MODELS)
def test_onnx_runtime_samples_what_the_model_samples(tmp_path, kind):
    """From the same x_T, with three images in a batch, although the network was traced with another number."""
    model = make_model(**MODELS[kind])
    scale, interval = (2.0, (5, 40)) if kind == "guided" else (1.0, None)
    folder = kd.export.onnx(model, tmp_path / "exported", TABLES, guidance_scale=scale, guidance_interval=interval)
    guidance = {"guidance_scale": scale, "guidance": kd.guidance.Guidance(interval=interval)} if interval else {}
    labels = np.array([2, 0, 1], "int32") if model.condition else None
    x_t = kd.samplers.loop.prior(model.diffusion, SHAPE, 3, np.arange(3))
    for name, sampler in TABLES.items():
        if name == "noise":
            continue
        got = onnx_sampling.sample(folder, "sample", name, x_t, labels)
        expected = model.sample(3, sampler, seed=3, labels=labels, **guidance)
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)
    described = json.loads((folder / "model.json").read_text())
    assert described["shape"] == list(SHAPE) and described["opset"] == kd.export._OPSET
    assert described["inputs"] == ["x_t", "t"] + (["label"] if labels is not None else [])
    assert described["class_names"] == (["kind 0", "kind 1", "kind 2"] if model.condition else None)


def test_guidance_in_one_call(tmp_path, monkeypatch):
    """A network that is told the scale has it from 1 to the largest one, and two calls a step beyond."""
    import onnxruntime

    network = kd.networks.with_guidance_scale(kd.networks.mlp(4, 8, 1, num_classes=3))
    randomize(network)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="v"), max_guidance_scale=3.0)
    sampler, labels = kd.samplers.DDIM(3), np.array([2, 0], "int32")
    folder = kd.export.onnx(model, tmp_path, {"d": sampler}, guidance_scale=2.0)
    described = json.loads((folder / "model.json").read_text())
    assert described["inputs"] == ["x_t", "t", "label", "scale"] and described["max_guidance_scale"] == 3
    calls = []

    class Session(onnxruntime.InferenceSession):
        def run(self, *args):
            calls.append(args)
            return super().run(*args)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    x_t, found = kd.samplers.loop.prior(model.diffusion, (4,), 0, np.arange(2)), []
    for scale, num_calls in [(2.0, 3), (3.0, 3), (4.0, 6)]:
        calls.clear()
        found.append(onnx_sampling.sample(folder, "sample", "d", x_t, labels, scale))
        expected = model.sample(2, sampler, seed=0, labels=labels, guidance_scale=scale)
        np.testing.assert_allclose(found[-1], expected, atol=1e-3)
        assert len(calls) == num_calls
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.skipif(not TORCH, reason="takes longest to compile elsewhere")
def test_images_as_conditions(tmp_path):
    """The network gets an image of its size, and the level of its noise."""
    import onnxruntime

    network = kd.networks.unet((8, 8, 1), 8, (1,), 1, (), 4, image_channels=2)
    randomize(network)
    model = kd.DiffusionModel(network)
    folder = kd.export.onnx(model, tmp_path, {"d": kd.samplers.DDIM(3)}, half_precision=False)
    assert json.loads((folder / "model.json").read_text())["inputs"] == ["x_t", "t", "image", "image_noise"]
    x_t, image = (np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, k)).astype("float32") for k in (1, 2))
    inputs = {"x_t": x_t, "t": np.array([3, 900], "int32"), "image": image}
    inputs["image_noise"] = np.array([0, 0.5], "float32")
    (got,) = onnxruntime.InferenceSession(folder / "denoiser.onnx").run(["y"], inputs)
    expected = keras.ops.convert_to_numpy(model(tuple(inputs.values())))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_masks(tmp_path):
    """The rows for filling in make each step but the last five times, and keep the known pixels."""
    model = make_model()
    folder = kd.export.onnx(model, tmp_path, {"noise": TABLES["noise"]})
    rows = json.loads((folder / "samplers.json").read_text())["inpaint"]["noise"]
    assert [row["t"] for row in rows] == sum(([t] * 5 for t in (50, 38, 25)), [12])[1:] + [12]
    random = np.random.default_rng(0)
    x_0, mask = random.uniform(-1, 1, (2, *SHAPE)).astype("float32"), np.zeros((2, 8, 8, 1), bool)
    mask[:, :4] = True
    draw = lambda number: np.random.default_rng(number).standard_normal((2, *SHAPE), "float32")
    x = onnx_sampling.sample(folder, "inpaint", "noise", draw(1000), draw=draw, known=(x_0, mask))
    np.testing.assert_array_equal(x[:, :4], x_0[:, :4])
    assert np.all(np.abs(x) <= 1) and np.std(x[:, 4:]) > 0.1


def test_half_precision_halves_the_file(tmp_path):
    """Large weights are rounded to half precision, small ones and the frequencies of t are not."""
    model = kd.DiffusionModel(kd.networks.mlp(2, 128, 1), kd.GaussianDiffusion(clip_range=None))
    sizes, outputs = [], []
    for half in (False, True):
        folder = kd.export.onnx(model, tmp_path / str(half), {"d": kd.samplers.DDIM(5)}, half_precision=half)
        sizes.append((folder / "denoiser.onnx").stat().st_size)
        x_t = kd.samplers.loop.prior(model.diffusion, (2,), 0, np.arange(4))
        outputs.append(onnx_sampling.sample(folder, "sample", "d", x_t))
    assert sizes[1] < 0.6 * sizes[0]
    np.testing.assert_allclose(*outputs, atol=0.02)


def test_a_network_in_mixed_precision_computes_in_float32(tmp_path):
    model = make_model(dtype="mixed_bfloat16")
    folder = kd.export.onnx(model, tmp_path, {"d": kd.samplers.DDIM(3)})
    same = make_model()
    for v, value in zip(same.ema_weights, weights(model.ema_weights), strict=True):
        v.assign(value)
    x_t = kd.samplers.loop.prior(model.diffusion, SHAPE, 0, np.arange(2))
    got = onnx_sampling.sample(folder, "sample", "d", x_t)
    np.testing.assert_allclose(got, same.sample(2, kd.samplers.DDIM(3), seed=0), atol=1e-4)


def test_the_default_tables_start_with_the_default_sampler(tmp_path):
    model = make_model()
    tables = kd.export.default_tables(model)
    assert next(iter(tables.values())) == model.default_sampler and len(tables) == 4  # T = 50
    model.sampler = kd.samplers.UniPC(6, spacing="logsnr")
    assert next(iter(kd.export.default_tables(model).items())) == ("UniPC, 6 steps", model.sampler)
    model.sampler = kd.samplers.DDPM()
    assert next(iter(kd.export.default_tables(model))) == "DDPM, 50 steps"


def test_safetensors(tmp_path):
    read = pytest.importorskip("safetensors.numpy")
    model = make_model(num_classes=3)
    kd.export.safetensors(model, tmp_path / "average.safetensors")
    arrays = read.load_file(tmp_path / "average.safetensors")
    assert len(arrays) == len(model.ema_weights)
    for v, value in zip(model.network.weights, weights(model.ema_weights)):
        np.testing.assert_array_equal(arrays[v.path], value)


def nested():
    """A network of two models whose layers have the same names."""

    def inner(name):
        x = keras.Input((2,))
        h = keras.layers.Dense(4, activation="tanh", name="first")(x)
        return keras.Model(x, keras.layers.Dense(2, name="last")(h), name=name)

    x_t, t = keras.Input((2,), name="x_t"), keras.Input((), dtype="int32", name="t")
    return keras.Model([x_t, t], inner("right")(inner("left")(x_t)))


def test_safetensors_of_nested_models(tmp_path, monkeypatch):
    """Four of eight tensors had the names of the others."""
    read = pytest.importorskip("safetensors.numpy")
    model = kd.DiffusionModel(nested())
    randomize(model.network)
    model = kd.DiffusionModel(model.network)
    kd.export.safetensors(model, tmp_path / "x.safetensors")
    arrays = read.load_file(tmp_path / "x.safetensors")
    names = [
        f"{model}/{layer}/{v}" for model in ("left", "right") for layer in ("first", "last") for v in ("bias", "kernel")
    ]
    assert sorted(arrays) == sorted(names)
    np.testing.assert_array_equal(arrays["right/last/kernel"], weights(model.ema_weights)[-2])
    monkeypatch.setattr(kd.export, "_paths", lambda network: [(id(v), "same") for v in network.weights])
    with pytest.raises(ValueError, match="Two weights have the same path"):
        kd.export.safetensors(model, tmp_path / "y.safetensors")


def test_nested_models_compute_in_float32(tmp_path, monkeypatch):
    """Of the exported network, as Keras 3.15 writes no nested models in ONNX on PyTorch."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = kd.DiffusionModel(nested())
    exported = []
    monkeypatch.setattr(keras.Model, "export", lambda self, *args, **kwargs: exported.append(self))
    model.export(tmp_path / "x")
    (network,) = exported
    dense = [layer for inner in network.layers for layer in getattr(inner, "layers", []) if layer.weights]
    assert [layer.compute_dtype for layer in dense] == ["float32"] * 4
    for got, expected in zip(weights(network.weights), weights(model.ema_weights), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_bad_exports(tmp_path, monkeypatch):
    model = kd.DiffusionModel(image_network((4, 4, 1)), kd.GaussianDiffusion(kd.schedules.cosine(10)))
    with pytest.raises(ValueError, match="The schedule has only 10 steps"):
        kd.export.onnx(model, tmp_path / "x", {"too many": kd.samplers.DDIM(11)})
    with pytest.raises(ValueError, match="`guidance_scale` must be in"):
        kd.export.onnx(model, tmp_path / "x", guidance_scale=-1.0)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        kd.export.onnx(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    monkeypatch.undo()
    big = kd.DiffusionModel(kd.networks.mlp(2, 128, 1), kd.GaussianDiffusion(clip_range=None))
    for v in big.ema_weights:
        v.assign(np.full(v.shape, 1e6))
    with pytest.raises(ValueError, match="too large for half precision"):
        kd.export.onnx(big, tmp_path / "x", {"d": kd.samplers.DDIM(3)})
