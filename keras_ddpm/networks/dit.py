"""The diffusion transformer of Peebles and Xie."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.networks import layers
from keras_ddpm.networks.embedding import embed

__all__ = ["dit"]


def dit(
    image_shape: Sequence[int],
    patch_size: int = 2,
    width: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    num_classes: int | None = None,
    context_dim: int | None = None,
    image_channels: int | None = None,
) -> keras.Model:
    """The diffusion transformer of Peebles and Xie: patches, and adaptive layer normalization with gates at zero.

    The default is their DiT-S/2. If a side of the images is not a multiple of `patch_size`, the input is padded with
    zeros and the output is cropped. The output is float32 under any dtype policy.

    Args:
        image_shape: `(height, width, channels)`.
        patch_size: side of the square patches. Each patch is a token.
        width: size of the tokens; at least 8, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: number of attention heads.
        num_classes: number K of labels 0..K − 1 to condition on. The label embedding is added to the time embedding.
        context_dim: size of the vectors to condition on instead of labels.
        image_channels: channels of images to condition on, as in `unet`.

    Returns:
        A functional `keras.Model` with the inputs and the output of `unet`.

    Raises:
        ValueError: if an argument is invalid, or both `num_classes` and `context_dim` are given.

    Reference: Peebles and Xie, 2023, section 3.2, "adaLN-Zero".
    """
    _checks.counts(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
    valid = width >= 8 and width % 4 == width % num_heads == 0
    _checks.require(valid, "`width` >= 8 must be a multiple of 4 and of `num_heads`", width=width, num_heads=num_heads)
    padding = layers.padding_to(image_shape, patch_size)
    x_t = keras.Input(tuple(image_shape), name="x_t")
    conditions, x, embedding = embed(x_t, 256, width, num_classes, context_dim, image_channels)
    condition = keras.layers.Activation("swish", name="condition_swish")(embedding)

    def modulation(num, name):
        """`num` vectors `(batch, 1, width)` that depend on the condition and are zero at initialization."""
        vectors = keras.layers.Dense(num * width, kernel_initializer="zeros", name=f"{name}_modulation")(condition)
        return ops.split(keras.layers.Reshape((1, num * width), name=f"{name}_reshape")(vectors), num, axis=-1)

    def normalize(x, name, shift, scale):
        x = keras.layers.LayerNormalization(epsilon=1e-6, center=False, scale=False, name=f"{name}_norm")(x)
        return x * (1.0 + scale) + shift

    x = keras.layers.ZeroPadding2D(padding, name="pad")(x)
    patches = keras.layers.Conv2D(width, patch_size, patch_size, name="patches")
    x = layers.PositionEmbedding(name="positions")(patches(x))
    grid = x.shape[1:]
    x = keras.layers.Reshape((-1, width), name="tokens")(x)
    for block in range(depth):
        name = f"block_{block}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(6, name)
        h = normalize(x, f"{name}_1", shift_1, scale_1)
        attention = keras.layers.MultiHeadAttention(num_heads, width // num_heads, name=f"{name}_attention")
        x = keras.layers.Add(name=f"{name}_attention_add")([x, gate_1 * attention(h, h)])
        h = normalize(x, f"{name}_2", shift_2, scale_2)
        h = keras.layers.Dense(4 * width, activation=keras.activations.gelu, name=f"{name}_dense_1")(h)
        h = keras.layers.Dense(width, name=f"{name}_dense_2")(h)
        x = keras.layers.Add(name=f"{name}_mlp_add")([x, gate_2 * h])
    x = keras.layers.Reshape(grid, name="grid")(normalize(x, "out", *modulation(2, "out")))
    options = {"kernel_initializer": "zeros", "dtype": "float32", "name": "pixels"}
    x = keras.layers.Conv2DTranspose(image_shape[-1], patch_size, patch_size, **options)(x)
    x = keras.layers.Cropping2D(padding, dtype="float32", name="crop")(x)
    return keras.Model([x_t, *conditions], x, name="dit")
