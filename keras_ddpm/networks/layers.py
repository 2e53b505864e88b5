"""Layers that Keras does not have, and faster versions of layers that it has.

Convolutions, normalization and attention call a plain function of `keras.ops` that is defined below the layer.
`_backend/torch.py` has a faster function of the same name.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_ddpm import _checks
from keras_ddpm._backend import devices

__all__ = ["Attention", "Conv2D", "GroupNormalization", "PositionEmbedding", "TimestepEmbedding", "UpsampledConv2D"]


@keras.saving.register_keras_serializable(package="keras_ddpm")
class TimestepEmbedding(layers.Layer):
    """Sinusoids of the time at geometrically spaced frequencies, always in float32.

    Args:
        dim: size of the embedding, even and at least 4.
        max_period: sets the lowest frequency to 1 / max_period. The slowest sinusoid has the period 2π max_period.

    Call arguments:
        t: `(batch,)`, any dtype.

    Returns:
        `(batch, dim)`, the sines first, then the cosines.

    Raises:
        ValueError: if `dim` is odd or below 4, or `dtype` is not float32.

    Reference: Vaswani et al., 2017, section 3.5, as in Ho et al., 2020.
    """

    def __init__(self, dim: int, max_period: float = 10_000, dtype: Any = "float32", **kwargs):
        # bfloat16 cannot tell t = 998 from t = 999. So this layer ignores a global mixed precision policy.
        super().__init__(dtype=dtype, **kwargs)
        is_float32 = self.dtype_policy.name == "float32"
        _checks.require(is_float32, "The embedding of the time is computed in float32", dtype=dtype)
        _checks.require(dim >= 4 and dim % 2 == 0, "`dim` must be even and at least 4", dim=dim)
        self.dim = dim
        self.max_period = max_period

    def call(self, t):
        frequencies = ops.convert_to_tensor(_frequencies(self.dim, self.max_period), "float32")
        angles = ops.cast(t, "float32")[:, None] * frequencies
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    def compute_output_shape(self, input_shape):  # TensorFlow cannot infer it for the noise of images
        return (*input_shape, self.dim)


@keras.saving.register_keras_serializable(package="keras_ddpm")
class PositionEmbedding(layers.Layer):
    """Adds sinusoids of the row to the first half of the channels, and of the column to the second half.

    Call arguments:
        x: `(batch, height, width, channels)`. The number of channels is a multiple of 4.

    Returns:
        The same shape.

    Reference: Vaswani et al., 2017, section 3.5, in two dimensions as in Peebles and Xie, 2023.
    """

    def build(self, input_shape):
        height, width, channels = input_shape[1:]
        rows, columns = np.indices((height, width))[..., None] * _frequencies(channels // 2)
        self.positions = np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], axis=-1)

    def call(self, x):
        return x + ops.convert_to_tensor(self.positions, x.dtype)


def _frequencies(dim, max_period=10_000):
    """The `dim / 2` frequencies of the sines and cosines, from 1 down to 1 / max_period."""
    half = dim // 2
    return np.exp(-np.log(max_period) * np.arange(half) / (half - 1))


@keras.saving.register_keras_serializable(package="keras_ddpm")
class GroupNormalization(layers.GroupNormalization):
    """Keras' group normalization for images `(batch, height, width, channels)`, with fewer passes over memory.

    First, the mean and variance of each channel are computed over all positions. From them follow the mean and the
    variance of each group. Normalization, scale and shift then take one multiplication and one addition for each pixel.
    All of this is computed in float32 under any dtype policy.

    Args:
        groups: number of groups. It divides the number of channels.
        activation: activation function for the result.

    Reference: Wu and He, 2018.
    """

    def __init__(self, groups: int, activation: Any = None, **kwargs):
        super().__init__(groups, **kwargs)
        self.activation = keras.activations.get(activation)

    def call(self, x):
        gamma, beta = ops.convert_to_tensor(self.gamma), ops.convert_to_tensor(self.beta)
        x = group_norm(x, gamma, beta, self.groups, self.epsilon)
        return ops.cast(self.activation(x), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "activation": keras.activations.serialize(self.activation)}


@devices.fast_on_torch
def group_norm(x, gamma, beta, groups, epsilon):
    """Normalizes images by group, with scale gamma and shift beta, both `(channels,)`. Returns float32."""
    channels = x.shape[-1]
    grouped, pixelwise = (-1, groups, channels // groups), (-1, 1, 1, channels)
    x = ops.cast(x, "float32")
    mean = ops.mean(x, axis=(1, 2), keepdims=True)
    variance = ops.mean(ops.square(x - mean), axis=(1, 2))  # `ops.moments` computes E[x²] − E[x]², which loses digits
    mean, variance = ops.reshape(mean, grouped), ops.reshape(variance, grouped)
    group_mean = ops.mean(mean, axis=-1, keepdims=True)
    group_variance = ops.mean(variance + ops.square(mean - group_mean), axis=-1, keepdims=True)
    scale = ops.rsqrt(group_variance + epsilon) * ops.reshape(ops.cast(gamma, "float32"), grouped[1:])
    shift = ops.reshape(ops.cast(beta, "float32"), grouped[1:]) - group_mean * scale
    return x * ops.reshape(scale, pixelwise) + ops.reshape(shift, pixelwise)


@keras.saving.register_keras_serializable(package="keras_ddpm")
class Conv2D(layers.Conv2D):
    """Keras' convolution for images `(batch, height, width, channels)`, faster on PyTorch."""

    def call(self, x, training=False):
        kernel, bias = ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(self.bias) if self.use_bias else None
        options = self.strides, self.padding, self.dilation_rate, self.groups
        return self.activation(conv2d(x, kernel, bias, *options, training))


@devices.fast_on_torch
def conv2d(x, kernel, bias, strides, padding, dilation, groups, training):
    """Convolves with a kernel `(height, width, channels / groups, filters)` and adds the bias if there is one."""
    y = ops.conv(x, kernel, strides, padding, "channels_last", dilation)
    return y if bias is None else y + bias


@keras.saving.register_keras_serializable(package="keras_ddpm")
class UpsampledConv2D(layers.Layer):
    """Nearest-neighbor upsampling by two, followed by a 3x3 convolution.

    Args:
        filters: number of channels of the result.
        kernel_initializer: initializer of the 3x3 kernel.

    Call arguments:
        x: `(batch, height, width, channels)`.

    Returns:
        `(batch, 2 height, 2 width, filters)`.
    """

    def __init__(self, filters: int, kernel_initializer: Any = "glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        shape = (3, 3, input_shape[-1], self.filters)
        self.kernel = self.add_weight(shape=shape, initializer=self.kernel_initializer, name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, x):
        return upsampled_conv2d(x, ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(self.bias))

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        return (batch, height and 2 * height, width and 2 * width, self.filters)

    def load_own_variables(self, store):
        super().load_own_variables({key: store[key] for key in store.keys() if key != "transposed"})  # in older files

    def get_config(self):
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "filters": self.filters, "kernel_initializer": initializer}

    @classmethod
    def from_config(cls, config):
        return cls(**{name: value for name, value in config.items() if name != "transposed"})  # in older files


@devices.fast_on_torch
def upsampled_conv2d(x, kernel, bias):
    """Upsamples images, convolves them with a kernel `(3, 3, channels, filters)` and adds the bias."""
    x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
    return ops.conv(x, kernel, padding="same", data_format="channels_last") + bias


@keras.saving.register_keras_serializable(package="keras_ddpm")
class Attention(layers.Layer):
    """Self-attention with one head between the pixels of an image.

    On a CPU the scores of large images are computed in parts, so memory does not grow with the square of the number of
    pixels. On an accelerator, Keras' own attention runs.

    Call arguments:
        qkv: queries, keys and values side by side, `(batch, height, width, 3 channels)`.

    Returns:
        `(batch, height, width, channels)`.

    Reference: Vaswani et al., 2017, Eq. 1.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # The device is not visible inside a compiled step. So it is read here.
        self.max_dense_attention = devices.max_dense_attention()

    def call(self, qkv):
        height, width, channels = self.compute_output_shape(qkv.shape)[1:]
        query, key, value = ops.split(ops.reshape(qkv, (-1, height * width, 3 * channels)), 3, axis=-1)
        x = attention(query, key, value, self.max_dense_attention)
        return ops.reshape(x, (-1, height, width, channels))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 3)


@devices.fast_on_torch
def attention(query, key, value, max_dense):
    """Computes attention with one head. Query, key and value are `(batch, tokens, channels)`.

    At most `max_dense` queries are computed at a time. If it is 0, Keras' own attention runs.
    """
    tokens, channels = query.shape[1:]
    if not max_dense:
        return ops.dot_product_attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]
    if tokens <= max_dense:
        return _dense_attention(query, key, value)
    # `remat` computes the scores of each part again for the gradient, instead of storing them.
    size = max(size for size in range(1, max_dense + 1) if tokens % size == 0)
    parts = ops.transpose(ops.reshape(query, (-1, tokens // size, size, channels)), (1, 0, 2, 3))
    attend = keras.remat(_dense_attention)
    x = ops.transpose(ops.map(lambda part: attend(part, key, value), parts), (1, 0, 2, 3))
    return ops.reshape(x, (-1, tokens, channels))


def _dense_attention(query, key, value):
    scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.transpose(key, (0, 2, 1)))
    return ops.matmul(ops.softmax(scores), value)


def padding_to(image_shape, multiple):
    """Returns the padding of `ZeroPadding2D` that makes both sides multiples of `multiple`."""
    valid = isinstance(image_shape, (list, tuple)) and len(image_shape) == 3 and all(map(_checks.is_count, image_shape))
    _checks.require(valid, "`image_shape` must be (height, width, channels)", image_shape=image_shape)
    layout = keras.config.image_data_format()
    _checks.require(layout == "channels_last", "Images must be channels_last", image_data_format=layout)
    return tuple((-size % multiple // 2, (-size % multiple + 1) // 2) for size in image_shape[:2])
