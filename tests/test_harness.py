"""Keras' own harness for layers, on each layer and network under each dtype policy."""

import functools

import keras
import numpy as np
import pytest
from conftest import TORCH

import keras_ddpm as kd
from keras_ddpm import layers

testing = pytest.importorskip("keras.src.testing")
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]
LAYERS = {
    layers.TimestepEmbedding: ({"dim": 4}, (2,), (2, 4)),
    layers.PositionEmbedding: ({}, (2, 4, 4, 8), (2, 4, 4, 8)),
    layers.GroupNormalization: ({"groups": 2, "activation": "swish"}, (2, 4, 4, 8), (2, 4, 4, 8)),
    layers.Conv2D: ({"filters": 4, "kernel_size": 3, "padding": "same"}, (2, 4, 4, 8), (2, 4, 4, 4)),
    layers.UpsampledConv2D: ({"filters": 4}, (2, 4, 4, 8), (2, 8, 8, 4)),
    layers.Attention: ({}, (2, 4, 4, 6), (2, 4, 4, 2)),
}
NETWORKS = {
    "mlp": lambda: kd.networks.mlp(2, 8, 1, num_classes=2),
    "unet": lambda: kd.networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, context_dim=3),
    "unet of patches": lambda: kd.networks.unet((9, 7, 1), 8, (1,), 1, (), 4, dropout=0.1, patch_size=2),
    "dit": lambda: kd.networks.dit((6, 8, 1), 4, 8, 1, 2, num_classes=2),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(monkeypatch, layer, policy):
    """Keras trains them, too. This runs without compilation, which would take a minute."""
    monkeypatch.setattr(keras.Model, "compile", functools.partialmethod(keras.Model.compile, run_eagerly=True))
    options, shape, expected = LAYERS[layer]
    keras.config.set_dtype_policy(policy)
    in_float32 = layer is layers.TimestepEmbedding
    dtype = "float32" if in_float32 else keras.config.dtype_policy().compute_dtype
    testing.TestCase().run_layer_test(
        layer,
        options,
        input_shape=shape,
        expected_output_shape=expected,
        expected_output_dtype=dtype,
        run_mixed_precision_check=not in_float32,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, policy):
    """They are made again from their configuration, and each weight has a gradient: Keras warns otherwise.

    On other backends than PyTorch the large ones would compile for minutes.
    """
    keras.config.set_dtype_policy(policy)
    network = NETWORKS[name]()
    testing.TestCase().run_class_serialization_test(network)
    assert network.output.dtype == "float32"
    if not TORCH and name != "mlp":
        return
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(25), "x0"), seed=0)
    model.compile("adam", "mse", run_eagerly=True)
    condition = [np.ones((2, *c.shape[1:]), c.dtype) for c in network.inputs[2:]]
    model.fit(np.ones((2, *model.data_shape), "float32"), *condition, verbose=0)
