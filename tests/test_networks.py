import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import hardware
from keras_ddpm import layers
from keras_ddpm import networks


def randomised(network, seed=0):
    """The network with no weight at zero, so that every path through it counts."""
    random = np.random.default_rng(seed)
    network.set_weights([random.normal(0, 0.1, w.shape) for w in network.get_weights()])
    return network


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"image_shape": (32, 32, 3), "width": 128, "width_multipliers": (1, 2, 2, 2)}, 35_746_307),
        ({"image_shape": (64, 64, 3), "attention_resolutions": (16, 8)}, 63_151_235),
    ],
)
def test_parameter_counts_of_the_paper_and_of_the_keras_example(arguments, count):
    assert networks.unet(**arguments).count_params() == count


def test_parameter_count_of_the_transformer():
    """As Peebles and Xie's code prints for DiT-XL/2, which counts fixed positions and has twice the channels out."""

    def count(width, depth, patch, channels_in, channels_out, classes):
        dense = lambda n, m: n * m + m  # noqa: E731
        block = 4 * dense(width, width) + dense(width, 4 * width) + dense(4 * width, width) + dense(width, 6 * width)
        ends = dense(channels_in * patch**2, width) + dense(width, 2 * width)
        return depth * block + ends + dense(256, width) + dense(width, width) + (classes + 1) * width

    final = (1152 + 1) * 4 * 8
    assert count(1152, 28, 2, 4, 8, 1000) + final + 256 * 1152 == 675_129_632
    network = networks.dit((16, 12, 4), 2, 48, 3, 4, num_classes=10)
    pixels = 48 * 4 * 4 + 4  # a transposed convolution has one bias a channel, not one a pixel of the patch
    assert network.count_params() == count(48, 3, 2, 4, 4, 10) + pixels


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 12, 3)])
def test_transformer(shape):
    """Zero at first; then every token sees every other, its position and the time."""
    network = networks.dit(shape, 4, 16, 2, 2)
    x_t, t = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32"), np.array([1, 500, 1000])
    assert np.all(ops.convert_to_numpy(network([x_t, t])) == 0)
    predict = lambda *inputs: ops.convert_to_numpy(network(list(inputs)))  # noqa: E731
    y = randomised(network) and predict(x_t, t)
    assert y.shape == x_t.shape and np.all(np.isfinite(y)) and np.std(y) > 0
    other = x_t.copy()
    other[:, 0, 0] += 1
    assert np.abs(predict(other, t) - y)[:, -1, -1].max(axis=-1).min() > 1e-5
    assert np.abs(predict(x_t, np.array([1, 500, 1]))[2] - y[2]).max() > 1e-3
    flat = predict(np.zeros_like(x_t), t)
    assert np.abs(flat[:, 0, 0] - flat[:, -1, -1]).min() > 1e-4


def test_transformer_blocks_are_the_identity_at_initialisation():
    network = networks.dit((8, 8, 3), 2, 16, 2, 2)
    adds = [layer.output for layer in network.layers if layer.name.endswith("_add")]
    probe = keras.Model(network.inputs, [network.get_layer("tokens").output, *adds])
    x_t = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    tokens, *values = map(ops.convert_to_numpy, probe([x_t, np.array([3, 800])]))
    assert len(values) == 4 and np.std(tokens) > 0 and all(np.array_equal(tokens, value) for value in values)


def test_transformer_block_against_numpy():
    """Adaptive normalisation, attention with two heads and the perceptron of one block, in float64."""
    network = randomised(networks.dit((2, 2, 3), 1, 8, 1, 2))
    tensors = [network.get_layer(name).output for name in ("tokens", "condition_swish", "block_0_mlp_add")]
    x_t = np.random.default_rng(0).normal(size=(1, 2, 2, 3)).astype("float32")
    x, c, got = (ops.convert_to_numpy(v)[0] for v in keras.Model(network.inputs, tensors)([x_t, np.array([300])]))
    weights = {w.path.removeprefix("block_0_"): ops.convert_to_numpy(w).astype("float64") for w in network.weights}
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)  # noqa: E731

    def normalize(x, shift, scale):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * (1 + scale) + shift

    modulation = np.split(c @ weights["modulation/kernel"] + weights["modulation/bias"], 6)
    h = normalize(x, *modulation[:2])
    q, k, v = (
        np.einsum("td,dhe->hte", h, weights[f"attention/{name}/kernel"]) + weights[f"attention/{name}/bias"][:, None]
        for name in ("query", "key", "value")
    )
    h = softmax(q @ k.swapaxes(1, 2) / 2) @ v
    h = np.einsum("hte,hed->td", h, weights["attention/attention_output/kernel"])
    x = x + modulation[2] * (h + weights["attention/attention_output/bias"])
    h = normalize(x, *modulation[3:5]) @ weights["dense_1/kernel"] + weights["dense_1/bias"]
    h = h * (1 + np.vectorize(math.erf)(h / np.sqrt(2))) / 2
    x = x + modulation[5] * (h @ weights["dense_2/kernel"] + weights["dense_2/bias"])
    np.testing.assert_allclose(got, x, atol=1e-4)


@pytest.mark.parametrize(("shape", "attention"), [((28, 28, 1), 7), ((13, 22, 5), 12), ((4, 16, 2), 4)])
def test_any_shape(shape, attention):
    network = networks.unet(shape, 8, (1, 1, 2), 1, (attention,), 4)
    x_t, t = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32"), np.array([1, 500, 1000])
    assert np.all(ops.convert_to_numpy(network([x_t, t])) == 0)
    y = ops.convert_to_numpy(randomised(network)([x_t, t]))
    assert y.shape == x_t.shape and np.all(np.isfinite(y)) and np.std(y) > 0


def test_downsamples_by_level():
    """The paper's widths repeat; the resolution halves all the same."""
    network = networks.unet((32, 32, 3), 8, (1, 2, 2, 2), 1, groups=4)
    assert network.get_layer("middle_0_add").output.shape == (None, 4, 4, 16)
    assert [layer.name for layer in network.layers if layer.name.endswith("attention_add")] == [
        "down_1_0_attention_add",
        "middle_attention_add",
        "up_1_0_attention_add",
        "up_1_1_attention_add",
    ]


def blocks(network):
    """Names, inputs on the skip and outputs of the blocks that add to an input of their own width."""
    adds = [layer for layer in network.layers if isinstance(layer, keras.layers.Add)]
    adds = [layer for layer in adds if not layer.input[0]._keras_history.operation.name.endswith("_skip")]
    tensors = [tensor for layer in adds for tensor in (layer.input[0], layer.output)]
    return [layer.name for layer in adds], keras.Model(network.inputs, tensors)


def test_blocks_are_the_identity_at_initialisation():
    network = networks.unet((16, 16, 3), 8, (1, 2), 2, (16, 8), 4)
    names, probe = blocks(network)
    assert sum("attention" in name for name in names) == 11 and sum("attention" not in name for name in names) == 5
    x_t = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
    values = [ops.convert_to_numpy(value) for value in probe([x_t, np.array([3, 800])])]
    for name, x, y in zip(names, values[::2], values[1::2]):
        assert np.std(x) > 0 and np.array_equal(x, y), name


@pytest.mark.parametrize("longest", [64, 63, 0])
def test_attention_against_numpy(monkeypatch, longest):
    """GroupNorm, one head, and the un-normalised input on the skip; written out, in parts, and left to Keras."""
    monkeypatch.setattr(hardware, "longest_written_out", lambda: longest)
    network = randomised(networks.unet((8, 8, 3), 8, (1,), 1, (8,), groups=2))
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


def test_dropout():
    network = randomised(networks.unet((8, 8, 1), 8, (1,), 1, (), 4, dropout=0.5))
    inputs = [np.ones((1, 8, 8, 1), "float32"), np.array([5])]
    still = [ops.convert_to_numpy(network(inputs)) for _ in range(2)]
    moving = [ops.convert_to_numpy(network(inputs, training=True)) for _ in range(2)]
    assert np.array_equal(*still) and not np.array_equal(*moving)


def test_mlp():
    network = networks.mlp(3, 16, 2)
    x_t, t = np.ones((2, 3), "float32"), np.array([1, 1000])
    assert np.all(ops.convert_to_numpy(network([x_t, t])) == 0)
    first, second = ops.convert_to_numpy(randomised(network)([x_t, t]))
    assert not np.allclose(first, second, rtol=1e-2)  # the time arrives


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.unet((8, 8, 1), 8, (1,), 1, (8,), 4),
        lambda: networks.mlp(2, 16, 1),
        lambda: networks.dit((8, 8, 1), 2, 8, 1, 2),
    ],
)
def test_config(make):
    network = randomised(make())
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(network))
    assert copy.get_config() == network.get_config()
    copy.set_weights(network.get_weights())
    inputs = [np.ones((2, *network.input_shape[0][1:]), "float32"), np.array([5, 900])]
    assert np.array_equal(ops.convert_to_numpy(copy(inputs)), ops.convert_to_numpy(network(inputs)))


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


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends take them as they are")
def test_narrow_images_are_convolved_at_once(monkeypatch):
    import torch

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
    plain.set_weights([kernel.transpose(0, 1, 3, 2), bias])
    expected = ops.convert_to_numpy(plain(x.repeat(2, axis=1).repeat(2, axis=2)))
    assert expected.shape == ours.compute_output_shape(x.shape)
    y = ops.convert_to_numpy(ops.cast(ours(x), "float32"))
    # Sums of 27 products, whose factors are rounded to 24 or 8 binary digits.
    np.testing.assert_allclose(y, expected, atol={"float32": 1e-5, "mixed_bfloat16": 27 * 2**-8}[policy])
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


def test_mixed_precision():
    """Neighbouring times stay apart, which bfloat16 cannot do, and the output is float32."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = networks.unet((8, 8, 1), 8, (1,), 1, (8,), 4)
    transformer = networks.dit((8, 8, 1), 4, 8, 1, 2)
    y = transformer([np.ones((2, 8, 8, 1), "float32"), np.array([1, 2])])
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert transformer.get_layer("block_0_dense_1").compute_dtype == "bfloat16"
    times = np.array([998, 999])
    first, second = ops.convert_to_numpy(
        keras.Model(network.inputs[1], network.get_layer("time_sinusoid").output)(times)
    )
    assert np.abs(first - second).max() > 0.5
    y = network([np.ones((2, 8, 8, 1), "float32"), times])
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert network.get_layer("middle_0_conv_1").compute_dtype == "bfloat16"
    assert {v.dtype for v in network.trainable_variables} == {"float32"}


def test_groups_of_one_channel_hide_the_time():
    """Which is why the network warns."""
    with pytest.warns(UserWarning, match="groups=8 of one channel each.*width=8"):
        network = networks.unet((8, 8, 1), 8, (1,), 1, ())
    x_t, differences = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32"), []
    x_t[1] = x_t[0]
    for network in (network, networks.unet((8, 8, 1), 8, (1,), 1, (), 4)):
        first, second = ops.convert_to_numpy(randomised(network)([x_t, np.array([1, 1000])]))
        differences.append(np.abs(first - second).max() / first.std())
    assert differences[0] < 1e-3 < 1e-2 < differences[1], differences


def test_attention_that_is_never_met_warns():
    with pytest.warns(UserWarning, match=r"no attention at 10. Levels: \[16, 8\]"):
        networks.unet((16, 16, 1), 8, (1, 1), 1, (10,), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (7, 64, 3)}, r"8x8.*\(7, 64, 3\)"),
        ({"image_shape": (64, 64)}, r"\(64, 64\)"),
        ({"image_shape": (64, 64, 3), "width": 20}, "groups=8.*width=20"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.unet(**arguments)


@pytest.mark.parametrize("arguments", [{"width": 30}, {"num_heads": 5}, {"depth": 0}, {"patch_size": 2.0}])
def test_bad_sizes_of_the_transformer(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"multiple of 4 and .*'{name}': {value}"):
        networks.dit((8, 8, 3), **arguments)
