"""The networks: numbers of parameters, shapes, initial outputs, and configurations."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import networks


def randomized(network, seed=0):
    """Returns the network with random weights, none of them 0, so that every path affects the output."""
    random = np.random.default_rng(seed)
    network.set_weights([random.normal(0, 0.1, w.shape) for w in network.get_weights()])
    return network


@pytest.mark.host
@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"image_shape": (32, 32, 3), "width": 128, "width_multipliers": (1, 2, 2, 2)}, 35_746_307),
        ({"image_shape": (64, 64, 3), "attention_resolutions": (16, 8)}, 63_151_235),
    ],
)
def test_parameter_counts_of_the_paper_and_of_the_keras_example(arguments, count):
    assert networks.unet(**arguments).count_params() == count


@pytest.mark.host
def test_parameter_count_of_the_transformer():
    """The formula gives the published count of DiT-XL/2, which has fixed positions and twice the output channels."""

    def count(width, depth, patch, channels_in, channels_out, classes):
        dense = lambda n, m: n * m + m
        block = 4 * dense(width, width) + dense(width, 4 * width) + dense(4 * width, width) + dense(width, 6 * width)
        ends = dense(channels_in * patch**2, width) + dense(width, 2 * width)
        return depth * block + ends + dense(256, width) + dense(width, width) + (classes + 1) * width

    final = (1152 + 1) * 4 * 8
    assert count(1152, 28, 2, 4, 8, 1000) + final + 256 * 1152 == 675_129_632
    network = networks.dit((16, 12, 4), 2, 48, 3, 4, num_classes=10)
    pixels = 48 * 4 * 4 + 4  # a transposed convolution has one bias per channel, not one per pixel of the patch
    assert network.count_params() == count(48, 3, 2, 4, 4, 10) + pixels


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 12, 3)])
def test_transformer(shape):
    """The output is 0 at first. With other weights it depends on every token, the positions and the time."""
    network = networks.dit(shape, 4, 16, 2, 2)
    x_t, t = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32"), np.array([1, 500, 1000])
    assert np.all(ops.convert_to_numpy(network([x_t, t])) == 0)
    predict = lambda *inputs: ops.convert_to_numpy(network(list(inputs)))
    y = randomized(network) and predict(x_t, t)
    assert y.shape == x_t.shape and np.all(np.isfinite(y)) and np.std(y) > 0
    other = x_t.copy()
    other[:, 0, 0] += 1
    assert np.abs(predict(other, t) - y)[:, -1, -1].max(axis=-1).min() > 1e-5
    assert np.abs(predict(x_t, np.array([1, 500, 1]))[2] - y[2]).max() > 1e-3
    flat = predict(np.zeros_like(x_t), t)
    assert np.abs(flat[:, 0, 0] - flat[:, -1, -1]).min() > 1e-4


def test_transformer_blocks_are_the_identity_at_initialization():
    network = networks.dit((8, 8, 3), 2, 16, 2, 2)
    adds = [layer.output for layer in network.layers if layer.name.endswith("_add")]
    probe = keras.Model(network.inputs, [network.get_layer("tokens").output, *adds])
    x_t = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    tokens, *values = map(ops.convert_to_numpy, probe([x_t, np.array([3, 800])]))
    assert len(values) == 4 and np.std(tokens) > 0 and all(np.array_equal(tokens, value) for value in values)


def test_transformer_block_against_numpy():
    """One block in float64: adaptive normalization, attention with two heads, and the perceptron."""
    network = randomized(networks.dit((2, 2, 3), 1, 8, 1, 2))
    tensors = [network.get_layer(name).output for name in ("tokens", "condition_swish", "block_0_mlp_add")]
    x_t = np.random.default_rng(0).normal(size=(1, 2, 2, 3)).astype("float32")
    x, c, got = (ops.convert_to_numpy(v)[0] for v in keras.Model(network.inputs, tensors)([x_t, np.array([300])]))
    weights = {w.path.removeprefix("block_0_"): ops.convert_to_numpy(w).astype("float64") for w in network.weights}
    softmax = lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)

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
    y = ops.convert_to_numpy(randomized(network)([x_t, t]))
    assert y.shape == x_t.shape and np.all(np.isfinite(y)) and np.std(y) > 0


@pytest.mark.host
def test_downsamples_by_level():
    """The resolution halves at each level, also if two levels have the same width, as in the paper."""
    network = networks.unet((32, 32, 3), 8, (1, 2, 2, 2), 1, groups=4)
    assert network.get_layer("middle_0_add").output.shape == (None, 4, 4, 16)
    assert [layer.name for layer in network.layers if layer.name.endswith("attention_add")] == [
        "down_1_0_attention_add",
        "middle_attention_add",
        "up_1_0_attention_add",
        "up_1_1_attention_add",
    ]


def blocks(network):
    """Names of the blocks that add to an input of their own width, and a model of these inputs and the outputs."""
    adds = [layer for layer in network.layers if isinstance(layer, keras.layers.Add)]
    adds = [layer for layer in adds if not layer.input[0]._keras_history.operation.name.endswith("_skip")]
    tensors = [tensor for layer in adds for tensor in (layer.input[0], layer.output)]
    return [layer.name for layer in adds], keras.Model(network.inputs, tensors)


def test_blocks_are_the_identity_at_initialization():
    network = networks.unet((16, 16, 3), 8, (1, 2), 2, (16, 8), 4)
    names, probe = blocks(network)
    assert sum("attention" in name for name in names) == 11 and sum("attention" not in name for name in names) == 5
    x_t = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
    values = [ops.convert_to_numpy(value) for value in probe([x_t, np.array([3, 800])])]
    for name, x, y in zip(names, values[::2], values[1::2]):
        assert np.std(x) > 0 and np.array_equal(x, y), name


def test_dropout():
    network = randomized(networks.unet((8, 8, 1), 8, (1,), 1, (), 4, dropout=0.5))
    inputs = [np.ones((1, 8, 8, 1), "float32"), np.array([5])]
    still = [ops.convert_to_numpy(network(inputs)) for _ in range(2)]
    moving = [ops.convert_to_numpy(network(inputs, training=True)) for _ in range(2)]
    assert np.array_equal(*still) and not np.array_equal(*moving)


def test_mlp():
    network = networks.mlp(3, 16, 2)
    x_t, t = np.ones((2, 3), "float32"), np.array([1, 1000])
    assert np.all(ops.convert_to_numpy(network([x_t, t])) == 0)
    first, second = ops.convert_to_numpy(randomized(network)([x_t, t]))
    assert not np.allclose(first, second, rtol=1e-2)  # the output depends on the time
    assert networks.mlp(num_classes=np.int64(3)).get_layer("label_embedding").input_dim == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.unet((8, 8, 1), 8, (1,), 1, (8,), 4),
        lambda: networks.mlp(2, 16, 1),
        lambda: networks.dit((8, 8, 1), 2, 8, 1, 2),
    ],
)
def test_config(make):
    network = randomized(make())
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(network))
    assert copy.get_config() == network.get_config()
    copy.set_weights(network.get_weights())
    inputs = [np.ones((2, *network.input_shape[0][1:]), "float32"), np.array([5, 900])]
    assert np.array_equal(ops.convert_to_numpy(copy(inputs)), ops.convert_to_numpy(network(inputs)))


def test_mixed_precision():
    """The output is float32, and adjacent times have different embeddings, which bfloat16 could not tell apart."""
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
    """This is why the network warns."""
    with pytest.warns(UserWarning, match="groups=8 of one channel each"):
        network = networks.unet((8, 8, 1), 8, (1,), 1, ())
    x_t, differences = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32"), []
    x_t[1] = x_t[0]
    for each in (network, networks.unet((8, 8, 1), 8, (1,), 1, (), 4)):
        first, second = ops.convert_to_numpy(randomized(each)([x_t, np.array([1, 1000])]))
        differences.append(np.abs(first - second).max() / first.std())
    assert differences[0] < 1e-3 < 1e-2 < differences[1], differences


def test_attention_at_a_missing_resolution_warns():
    with pytest.warns(UserWarning, match=r"No level has resolution 10 for attention. Levels: \[16, 8\]"):
        networks.unet((16, 16, 1), 8, (1, 1), 1, (10,), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_shape": (7, 64, 3)}, r"8x8.*\(7, 64, 3\)"),
        ({"image_shape": (64, 64)}, r"\(64, 64\)"),
        ({"width": 20}, r"groups=8, channels=\[20, 40, 80, 160\]"),
        ({"width": 64.0}, "`width` must be an integer of at least 1. Received: width=64.0"),
        ({"num_blocks": 0}, "Received: num_blocks=0"),
        ({"groups": -8}, "Received: groups=-8"),
        ({"width_multipliers": ()}, r"Received: width_multipliers=\(\)"),
        ({"width_multipliers": (1, 1.5)}, r"Received: width_multipliers=\(1, 1.5\)"),
        ({"dropout": 1.0}, r"\[0, 1\). Received: dropout=1.0"),
        ({"dropout": "0.1"}, "Received: dropout='0.1'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.unet(**{"image_shape": (64, 64, 3), **arguments})


@pytest.mark.parametrize(("name", "value"), [("dim", 0), ("width", 16.0), ("depth", 0)])
def test_bad_sizes_of_the_perceptron(name, value):
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        networks.mlp(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("width", 30), ("width", 4), ("num_heads", 5), ("depth", 0), ("patch_size", 2.0)]
)
def test_bad_sizes_of_the_transformer(name, value):
    with pytest.raises(ValueError, match=f"must be .* Received: .*{name}={value}"):
        networks.dit((8, 8, 3), **{"num_heads": 1, name: value})


def test_patches():
    """The ends are 3x3 convolutions of patches: of 2x2 pixels side by side as channels, in and out."""
    network = randomized(networks.unet((12, 9, 3), 8, (1, 2), 1, (3,), groups=2, patch_size=2))
    assert network.output.shape == (None, 12, 9, 3) and network.get_layer("down_0_0_conv_1").output.shape[1:3] == (6, 6)
    to_patches = lambda x: x.reshape(2, 6, 2, 6, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 6, -1)
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype("float32")
    conv_in, conv_out = network.get_layer("conv_in"), network.get_layer("conv_out")
    kernel, bias = conv_in.get_weights()  # (6, 6, 3, 8): of 3x3 patches of 2x2 pixels
    kernel = kernel.reshape(3, 2, 3, 2, 3, 8).transpose(0, 2, 1, 3, 4, 5).reshape(3, 3, 12, 8)
    expected = ops.convert_to_numpy(ops.conv(to_patches(x), kernel, padding="same")) + bias
    assert np.allclose(ops.convert_to_numpy(conv_in(x)), expected, atol=1e-5)
    h = np.random.default_rng(1).normal(size=(2, 6, 6, 8)).astype("float32")
    kernel, bias = conv_out.get_weights()  # (6, 6, 3, 8), mirrored in a transposed convolution
    kernel = kernel.reshape(3, 2, 3, 2, 3, 8)[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4).reshape(3, 3, 8, 12)
    expected = ops.convert_to_numpy(ops.conv(h, kernel, padding="same"))
    assert np.allclose(to_patches(ops.convert_to_numpy(conv_out(h)) - bias), expected, atol=1e-5)
