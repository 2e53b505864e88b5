"""Layers that Keras does not have, or not as fast."""

import keras
import numpy as np
from keras import layers
from keras import ops


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
    and one addition a pixel. Computed in float32 under any dtype policy.

    Reference: Wu and He, 2018.
    """

    def call(self, x):
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
        return ops.cast(x * ops.reshape(scale, pixelwise) + ops.reshape(shift, pixelwise), self.compute_dtype)
