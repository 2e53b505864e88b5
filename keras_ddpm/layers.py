"""Layers that Keras does not have."""

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
        half = self.dim // 2
        frequencies = np.exp(-np.log(self.max_period) * np.arange(half) / (half - 1))
        angles = ops.cast(t, "float32")[:, None] * ops.convert_to_tensor(frequencies, "float32")
        return ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.dim)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim, "max_period": self.max_period}
