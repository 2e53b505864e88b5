"""Layers compared with NumPy and with the layers of Keras.

On PyTorch, each test runs with the fast functions and with the plain ones.
"""

import keras
import numpy as np
import pytest
from conftest import TORCH, randomize
from keras import ops

from keras_ddpm import layers, networks
from keras_ddpm._backend import devices


@pytest.fixture(autouse=True, params=["fast", "plain"] if TORCH else ["plain"])
def form(request, plain_functions):
    """Which functions compute."""
    if request.param == "plain":
        plain_functions()
    return request.param


@pytest.mark.parametrize("longest", [64, 63, 0])
def test_attention_against_numpy(monkeypatch, longest):
    """GroupNorm, one head, and the un-normalised input on the skip; written out, in parts, and left to Keras."""
    monkeypatch.setattr(devices, "max_dense_attention", lambda: longest)
    network = networks.unet((8, 8, 3), 8, (1,), 1, (8,), groups=2)
    randomize(network, 0.1)
    name = "middle_attention"
    probe = keras.Model(
        network.inputs, network.get_layer(f"{name}_add").input[:1] + [network.get_layer(f"{name}_add").output]
    )
    x_t = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")
    x, y = (ops.convert_to_numpy(value).astype("float64") for value in probe([x_t, np.array([3, 800])]))

    def dense(h, part):
        kernel, bias = (ops.convert_to_numpy(w) for w in network.get_layer(f"{name}_{part}").weights)
        return h @ kernel[0, 0] + bias

    groups = x.reshape(2, 64, 2, 4)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    gamma, beta = (ops.convert_to_numpy(w) for w in network.get_layer(f"{name}_norm").weights)
    h = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(2, 64, 8) * gamma + beta
    query, key, value = np.split(dense(h, "qkv"), 3, axis=-1)
    scores = query @ key.swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = x + dense(weights @ value, "out").reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_normalization_is_keras_own(offset):
    """Also where the mean is far larger than the deviations, where squares would cancel."""
    x = np.random.default_rng(0).normal(offset, [0.1, 0.2, 1.0, 0.5, 2.0, 0.1], (3, 5, 4, 6)).astype("float32")
    ours, keras_own = layers.GroupNormalization(3, epsilon=1e-6), keras.layers.GroupNormalization(3, epsilon=1e-6)
    for layer in (ours, keras_own):
        layer.build(x.shape)
        layer.set_weights([np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)])
    exact = x.astype("float64").reshape(3, 20, 3, 2)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / np.sqrt(exact.var((1, 3), keepdims=True) + 1e-6)
    exact = exact.reshape(x.shape) * np.linspace(0.5, 2, 6) + np.linspace(-1, 1, 6)
    errors = [np.abs(ops.convert_to_numpy(layer(x)) - exact).max() for layer in (ours, keras_own)]
    # float32 knows the offset to 6e-8 of it, and the normalisation divides by deviations of 0.1.
    assert errors[0] < 1e-5 + 5e-6 * offset and errors[0] < 2 * errors[1] + 1e-6
    assert ours.get_config().keys() - keras_own.get_config().keys() == {"activation"}


def test_group_normalization_in_bfloat16():
    x = ops.cast(np.random.default_rng(0).normal(3.0, 1.0, (2, 8, 8, 16)), "bfloat16")
    options = {"groups": 4, "activation": "swish", "epsilon": 1e-6}
    y = layers.GroupNormalization(**options, dtype="mixed_bfloat16")(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    expected = layers.GroupNormalization(**options)(ops.cast(x, "float32"))
    # bfloat16 has 8 binary digits; the result is rounded twice at most.
    y, expected = (ops.convert_to_numpy(ops.cast(value, "float32")) for value in (y, expected))
    np.testing.assert_allclose(y, expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2},
        {"strides": (3, 2), "kernel_size": (2, 4)},
        {"strides": 2, "padding": "valid"},
        {"kernel_size": 1, "activation": "swish"},
        {"dilation_rate": 2},
        {"use_bias": False},
        pytest.param({"kernel_size": (2, 3)}, marks=pytest.mark.filterwarnings("ignore:Using padding='same'")),
        {"kernel_size": (1, 5), "batch": 7},
        {"kernel_size": (5, 3), "batch": 12},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_convolution_is_keras_own(options, training):
    x = np.random.default_rng(0).normal(size=(options.get("batch", 2), 6, 5, 3)).astype("float32")
    options = {name: value for name, value in options.items() if name != "batch"}
    options = {"filters": 4, "kernel_size": 3, "padding": "same", **options}
    ours, keras_own = layers.Conv2D(**options), keras.layers.Conv2D(**options)
    for layer in (ours, keras_own):
        layer.build(x.shape)
    ours.set_weights([w + 0.1 for w in keras_own.get_weights()])
    keras_own.set_weights(ours.get_weights())
    y, expected = ops.convert_to_numpy(ours(x, training=training)), ops.convert_to_numpy(keras_own(x))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not TORCH, reason="other backends take them as they are")
@pytest.mark.fast
def test_narrow_images_are_convolved_at_once(monkeypatch, form):
    import torch

    if form == "plain":
        pytest.skip("interleaving is fast alone")
    seen = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, *args: seen.append(x.shape) or convolve(x, *args))
    for shape in [(8, 8, 8, 4), (8, 16, 16, 4), (6, 4, 4, 4), (5, 7, 3, 4), (3, 7, 7, 4)]:
        layers.Conv2D(4, 3, padding="same")(np.zeros(shape, "float32"))
    layers.Conv2D(4, 1)(np.zeros((8, 8, 8, 4), "float32"))  # whose pixels are in rows of any length
    assert seen == [(2, 4, 8, 32), (8, 4, 16, 16), (1, 4, 4, 24), (1, 4, 7, 15), (1, 4, 7, 21), (8, 4, 8, 8)]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_upsampled_convolution_is_a_convolution_of_repeated_pixels(policy):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 4, 3)).astype("float32")
    ours = layers.UpsampledConv2D(6, dtype=policy)
    ours.build(x.shape)
    ours.set_weights([random.normal(size=w.shape) for w in ours.get_weights()])
    plain = keras.layers.Conv2D(6, 3, padding="same")
    plain.build(x.shape)
    kernel, bias = ours.get_weights()
    plain.set_weights([kernel, bias])
    expected = ops.convert_to_numpy(plain(x.repeat(2, axis=1).repeat(2, axis=2)))
    assert expected.shape == ours.compute_output_shape(x.shape)
    y = ops.convert_to_numpy(ops.cast(ours(x), "float32"))
    # Sums of 27 products, whose factors are rounded to 24 or 8 binary digits, as is the result.
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 27 * 2**-8}[policy]
    rounding = {"float32": 1e-7, "mixed_bfloat16": 2**-8}[policy]
    np.testing.assert_allclose(y, expected, rtol=rounding, atol=tolerance)
    from_config = layers.UpsampledConv2D.from_config(ours.get_config())
    assert from_config.get_config() == ours.get_config()


def test_timestep_embedding():
    layer = layers.TimestepEmbedding(6, max_period=100)
    assert layer.get_config()["dim"] == 6 and layer.get_config()["max_period"] == 100
    angles = np.array([0, 3, 1000])[:, None] * np.array([1, 1 / 10, 1 / 100])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(np.array([0, 3, 1000]))), expected, atol=1e-4)
    with pytest.raises(ValueError, match="dim=5"):
        layers.TimestepEmbedding(5)
    with pytest.raises(ValueError, match="in float32. Received: dtype='mixed_bfloat16'"):
        layers.TimestepEmbedding(6, dtype="mixed_bfloat16")
