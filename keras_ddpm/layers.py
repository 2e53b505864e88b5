"""Layers that Keras does not have, or not as fast."""

import keras
import numpy as np
from keras import layers
from keras import ops

from keras_ddpm import hardware


@keras.saving.register_keras_serializable(package="keras_ddpm")
class TimestepEmbedding(layers.Layer):
    """Sinusoids of the time at geometrically spaced frequencies, always in float32.

    Args:
        dim: size of the embedding, even.
        max_period: the slowest sinusoid's period is 2π times this.

    Call arguments:
        t: `(batch,)`, any dtype.

    Returns:
        `(batch, dim)`, the sines first, then the cosines.

    Reference: Vaswani et al., 2017, section 3.5, as in Ho et al., 2020.
    """

    def __init__(self, dim, max_period=10_000, **kwargs):
        # bfloat16 cannot tell t = 998 from t = 999, so a mixed precision policy does not reach this layer.
        super().__init__(**{**kwargs, "dtype": "float32"})
        if dim < 4 or dim % 2:
            raise ValueError(f"`dim` must be even and at least 4. Received: dim={dim}")
        self.dim = dim
        self.max_period = max_period

    def call(self, t):
        frequencies = ops.convert_to_tensor(_frequencies(self.dim, self.max_period), "float32")
        angles = ops.cast(t, "float32")[:, None] * frequencies
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.dim)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim, "max_period": self.max_period}


@keras.saving.register_keras_serializable(package="keras_ddpm")
class PositionEmbedding(layers.Layer):
    """Adds sinusoids of the position: of the row in the first half of the channels, of the column in the second.

    Call arguments:
        x: `(batch, height, width, channels)`, with channels a multiple of 4.

    Returns:
        The same shape.

    Reference: Vaswani et al., 2017, section 3.5, in two dimensions as in Peebles and Xie, 2023.
    """

    def call(self, x):
        height, width, channels = x.shape[1:]
        rows, columns = np.indices((height, width))[..., None] * _frequencies(channels // 2)
        positions = np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], axis=-1)
        return x + ops.convert_to_tensor(positions, x.dtype)


def _frequencies(dim, max_period=10_000):
    """Those of `dim / 2` sines and as many cosines, from 1 to 1 / max_period."""
    half = dim // 2
    return np.exp(-np.log(max_period) * np.arange(half) / (half - 1))


@keras.saving.register_keras_serializable(package="keras_ddpm")
class GroupNormalization(layers.GroupNormalization):
    """Keras' own for images, `(batch, height, width, channels)`, with fewer passes over memory.

    Each channel's mean and variance come from one reduction over the positions, those of a group from its channels
    (the variance within them and that between their means), and scale and shift are applied as one multiplication
    and one addition a pixel, in float32 under any dtype policy. On PyTorch images in bfloat16 go to its own function,
    which Keras does not call: it sums in float32, but a difference of squares, too coarse for images in float32.

    Args:
        groups: number of groups; divides the channels.
        activation: applied to the result.

    Reference: Wu and He, 2018.
    """

    def __init__(self, groups, activation=None, **kwargs):
        super().__init__(groups, **kwargs)
        self.activation = keras.activations.get(activation)

    def call(self, x):
        on_torch = keras.backend.backend() == "torch" and self.compute_dtype == "bfloat16"
        normalize = self._normalize_torch if on_torch else self._normalize
        return ops.cast(self.activation(normalize(x)), self.compute_dtype)

    def _normalize(self, x):
        channels = x.shape[-1]
        grouped, pixelwise = (-1, self.groups, channels // self.groups), (-1, 1, 1, channels)
        x = ops.cast(x, "float32")
        mean = ops.mean(x, axis=(1, 2), keepdims=True)
        variance = ops.mean(ops.square(x - mean), axis=(1, 2))  # `ops.moments` takes E[x²] − E[x]², which cancels
        mean, variance = ops.reshape(mean, grouped), ops.reshape(variance, grouped)
        group_mean = ops.mean(mean, axis=-1, keepdims=True)
        group_variance = ops.mean(variance + ops.square(mean - group_mean), axis=-1, keepdims=True)
        scale = ops.rsqrt(group_variance + self.epsilon) * ops.reshape(self.gamma, grouped)
        shift = ops.reshape(self.beta, grouped) - group_mean * scale
        return x * ops.reshape(scale, pixelwise) + ops.reshape(shift, pixelwise)

    def _normalize_torch(self, x):
        import torch

        gamma, beta = ops.convert_to_tensor(self.gamma), ops.convert_to_tensor(self.beta)
        x = torch.nn.functional.group_norm(torch.permute(x, (0, 3, 1, 2)), self.groups, gamma, beta, self.epsilon)
        return torch.permute(x, (0, 2, 3, 1))

    def get_config(self):
        return {**super().get_config(), "activation": keras.activations.serialize(self.activation)}


@keras.saving.register_keras_serializable(package="keras_ddpm")
class Conv2D(layers.Conv2D):
    """Keras' own for `(batch, height, width, channels)`, with shorter ways on PyTorch.

    There Keras turns images to channels first and back in memory, around each convolution. Merely seen as channels
    first, they lie in memory as PyTorch's convolutions like them best. Narrow images are convolved several at once,
    with their columns interleaved and a dilated kernel. To train, 1x1 kernels are matrices, whose gradient is faster.
    """

    def call(self, x, training=False):
        if keras.backend.backend() != "torch":
            return super().call(x)
        import torch

        kernel, bias = ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(self.bias) if self.use_bias else None
        plain = self.strides == self.dilation_rate == (1, 1) and self.groups == 1
        pixelwise = self.kernel_size == (1, 1)
        if training and plain and pixelwise:
            return self.activation(torch.nn.functional.linear(x, kernel[0, 0].T, bias))
        padding = self.padding
        if padding == "same" and self.strides != (1, 1):  # PyTorch has no such word for strides
            reach = [dilation * (size - 1) + 1 for dilation, size in zip(self.dilation_rate, self.kernel_size)]
            missing = [max(n - (size % s or s), 0) for n, size, s in zip(reach, x.shape[1:3], self.strides)]
            (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
            x = torch.nn.functional.pad(x, (0, 0, left, right, top, bottom)) if any(missing) else x
            padding = "valid"
        centred = padding == "same" and all(size % 2 for size in self.kernel_size)
        several = hardware.images_at_once(x) if plain and centred and not pixelwise else 1
        dilation = (1, several) if plain else self.dilation_rate
        x = torch.permute(_interleave(x, several), (0, 3, 1, 2))
        kernel = torch.permute(kernel, (3, 2, 0, 1))
        x = torch.nn.functional.conv2d(x, kernel, bias, self.strides, padding, dilation, self.groups)
        return self.activation(_separate(torch.permute(x, (0, 2, 3, 1)), several))


def _interleave(x, several):
    """Images, `several` at a time in one, whose first columns are the first of each, then come the second of each."""
    if several == 1:
        return x
    batch, height, width, channels = x.shape
    x = ops.transpose(ops.reshape(x, (batch // several, several, height, width, channels)), (0, 2, 3, 1, 4))
    return ops.reshape(x, (batch // several, height, several * width, channels))


def _separate(x, several):
    """What `_interleave` has made one."""
    if several == 1:
        return x
    batch, height, width, channels = x.shape
    x = ops.transpose(ops.reshape(x, (batch, height, width // several, several, channels)), (0, 3, 1, 2, 4))
    return ops.reshape(x, (batch * several, height, width // several, channels))


@keras.saving.register_keras_serializable(package="keras_ddpm")
class UpsampledConv2D(layers.Layer):
    """Nearest-neighbour upsampling by two and a 3x3 convolution of the result.

    On PyTorch at 4/9 of its multiplications: where pixels are repeated, several entries of the kernel meet the same,
    and are added up beforehand. The two are one transposed convolution of stride two, whose 4x4 kernel is the 3x3 one
    convolved with 2x2 ones. On TensorFlow that is no faster, and its gradient is far slower with XLA.

    Args:
        filters: channels of the result.
        kernel_initializer: of the 3x3 kernel.

    Call arguments:
        x: `(batch, height, width, channels)`.

    Returns:
        `(batch, 2 height, 2 width, filters)`.
    """

    # One axis of the 4x4 kernel from the 3x3 one, which a transposed convolution has the other way round.
    SUMS = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])

    def __init__(self, filters, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        def initialize(shape, dtype):
            return ops.transpose(self.kernel_initializer((3, 3, input_shape[-1], self.filters), dtype), (0, 1, 3, 2))

        # The order of axes of Keras' own transposed convolution.
        self.kernel = self.add_weight((3, 3, self.filters, input_shape[-1]), initialize, name="kernel")
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, x):
        kernel, bias = ops.convert_to_tensor(self.kernel), ops.convert_to_tensor(self.bias)
        if keras.backend.backend() != "torch":
            x = ops.repeat(ops.repeat(x, 2, axis=1), 2, axis=2)
            return ops.conv(x, ops.transpose(kernel, (0, 1, 3, 2)), padding="same") + bias
        import torch

        filters, channels = kernel.shape[2:]
        kernel = torch.permute(kernel, (3, 0, 1, 2)).reshape(channels, 9, filters)  # as `hardware.arrange` laid it out
        kernel = torch.matmul(ops.cast(np.kron(self.SUMS, self.SUMS), kernel.dtype), kernel)
        kernel = torch.permute(kernel.reshape(channels, 4, 4, filters), (0, 3, 1, 2))
        x = torch.nn.functional.conv_transpose2d(torch.permute(x, (0, 3, 1, 2)), kernel, bias, stride=2, padding=1)
        return torch.permute(x, (0, 2, 3, 1))

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        return (batch, height and 2 * height, width and 2 * width, self.filters)

    def get_config(self):
        initializer = keras.initializers.serialize(self.kernel_initializer)
        return {**super().get_config(), "filters": self.filters, "kernel_initializer": initializer}


@keras.saving.register_keras_serializable(package="keras_ddpm")
class Attention(layers.Layer):
    """Self-attention of one head between the pixels of an image.

    On a CPU in memory that is not quadratic in their number, on accelerators as Keras does it.

    Call arguments:
        qkv: queries, keys and values side by side, `(batch, height, width, 3 channels)`.

    Returns:
        `(batch, height, width, channels)`.

    Reference: Vaswani et al., 2017, Eq. 1.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.longest_written_out = hardware.longest_written_out()  # inside a compiled step there is no device to see

    def call(self, qkv):
        height, width, channels = self.compute_output_shape(qkv.shape)[1:]
        query, key, value = ops.split(ops.reshape(qkv, (-1, height * width, 3 * channels)), 3, axis=-1)
        if height * width <= self.longest_written_out:
            x = _attend(query, key, value)
        elif self.longest_written_out and keras.backend.backend() != "torch":
            # For some queries at a time, whose scores are computed again for the gradient.
            tokens = height * width
            size = max(size for size in range(1, self.longest_written_out + 1) if tokens % size == 0)
            parts = ops.transpose(ops.reshape(query, (-1, tokens // size, size, channels)), (1, 0, 2, 3))
            attend = keras.remat(_attend)
            x = ops.transpose(ops.map(lambda part: attend(part, key, value), parts), (1, 0, 2, 3))
        else:
            x = ops.dot_product_attention(query[:, :, None], key[:, :, None], value[:, :, None])
        return ops.reshape(x, (-1, height, width, channels))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 3)


def _attend(query, key, value):
    """Attention written out, `(batch, tokens, channels)`."""
    scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.transpose(key, (0, 2, 1)))
    return ops.matmul(ops.softmax(scores), value)
