"""Networks: functional models from `[x_t, t]`, or `[x_t, t, condition]`, to a tensor shaped like `x_t`.

The networks do not depend on the diffusion process. Any `keras.Model` with these inputs and this output can be used
instead. At initialization each network outputs zeros.

The condition is a label or a vector. The layer "label_embedding" embeds K labels and, as the last of its K + 1 entries,
no label. A vector of zeros means no condition.

To add a network, write a function that returns a `keras.Model` and uses `_embedding` for the time and the condition.
"""

import random
import warnings
from collections.abc import Sequence

import keras
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import layers


def unet(
    image_shape: Sequence[int],
    width: int = 64,
    width_multipliers: Sequence[int] = (1, 2, 4, 8),
    num_blocks: int = 2,
    attention_resolutions: Sequence[int] = (16,),
    groups: int = 8,
    dropout: float = 0.0,
    num_classes: int | None = None,
    context_dim: int | None = None,
    patch_size: int = 1,
) -> keras.Model:
    """The U-Net of Ho et al.: residual blocks with group normalization, and self-attention at low resolution.

    If a side of the images is not a multiple of patch_size · 2^(levels − 1), the input is padded with zeros and the
    output is cropped. The output is float32 under any dtype policy.

    Example:

    >>> network = unet((64, 64, 3))
    >>> network([x_t, t]).shape  # x_t: (batch, 64, 64, 3), t: (batch,)

    Args:
        image_shape: `(height, width, channels)`.
        width: channels at full resolution; even and at least 4.
        width_multipliers: channels of each level, as multiples of `width`. Each level has half the resolution of the
            level before.
        num_blocks: residual blocks per level on the way down. The way up has one more per level.
        attention_resolutions: resolutions with self-attention. The resolution of a level is its longer side after
            padding.
        groups: groups of the normalization layers; divides the channels of every level.
        dropout: dropout rate in the residual blocks, in [0, 1).
        num_classes: number K of labels 0..K − 1 to condition on. The label embedding is added to the time embedding.
        context_dim: size of the vectors to condition on instead of labels.
        patch_size: side of the square patches that the first convolution turns into one pixel, and the last convolution
            turns back. Resolutions are counted in patches. With 2, a quarter as many pixels are left.

    Returns:
        A functional `keras.Model` with inputs `x_t` `(batch, height, width, channels)`, `t` `(batch,)`, int32, and,
        if conditioned, `label` `(batch,)`, int32, or `context` `(batch, context_dim)`.

    Raises:
        ValueError: if an argument is invalid, the images are too small for the number of levels, `groups` does not
            divide the channels, or both `num_classes` and `context_dim` are given.

    Reference: Ho et al., 2020, appendix B.
    """
    _checks.counts(width=width, num_blocks=num_blocks, groups=groups, patch_size=patch_size)
    valid = len(width_multipliers) and all(map(_checks.is_count, width_multipliers))
    _checks.require(valid, "Expected one or more positive integers", width_multipliers=width_multipliers)
    _checks.require(_checks.is_between(dropout, 0, 1) and dropout < 1, "`dropout` must be in [0, 1)", dropout=dropout)
    widths = [width * multiplier for multiplier in width_multipliers]
    divided = all(channels % groups == 0 for channels in widths)
    _checks.require(divided, "`groups` must divide the channels of every level", groups=groups, channels=widths)
    if groups in widths:
        warnings.warn(f"With groups={groups} of one channel each, the normalization hides the time.", stacklevel=2)
    stride = patch_size * 2 ** (len(widths) - 1)
    padding = _padding(image_shape, stride)
    _checks.require(min(image_shape[:2]) >= stride, f"Levels need {stride}x{stride} or more", image_shape=image_shape)
    longer_side = max(size + sum(sides) for size, sides in zip(image_shape, padding))
    resolutions = [longer_side // patch_size >> level for level in range(len(widths))]
    for missed in sorted(set(attention_resolutions) - set(resolutions)):
        warnings.warn(f"No level has resolution {missed} for attention. Levels: {resolutions}", stacklevel=2)

    def normalize(x, name, activation="swish"):
        # The paper's epsilon; the default of Keras is 1e-3.
        return layers.GroupNormalization(groups, activation, epsilon=1e-6, name=f"{name}_norm")(x)

    def residual_block(x, channels, name, attention=False):
        h = _conv(channels, name=f"{name}_conv_1")(normalize(x, f"{name}_1"))
        h = normalize(h + keras.layers.Dense(channels, name=f"{name}_time")(time), f"{name}_2")
        if dropout:
            # Without a seed, Keras takes PyTorch's own random numbers, which are not in the model's file.
            h = keras.layers.Dropout(dropout, seed=random.randrange(2**31), name=f"{name}_dropout")(h)
        h = _conv(channels, scale=0.0, name=f"{name}_conv_2")(h)
        if x.shape[-1] != channels:
            x = _conv(channels, kernel_size=1, name=f"{name}_skip")(x)
        x = keras.layers.Add(name=f"{name}_add")([x, h])
        return attention_block(x, f"{name}_attention") if attention else x

    def attention_block(x, name):
        channels = x.shape[-1]
        # A 1x1 convolution adds the bias faster than a dense layer on PyTorch. The scale of 2 gives queries, keys and
        # values the initialization of three separate layers.
        qkv = _conv(3 * channels, 1, scale=2.0, name=f"{name}_qkv")(normalize(x, name, None))
        h = layers.Attention(name=f"{name}_attention")(qkv)
        h = _conv(channels, 1, scale=0.0, name=f"{name}_out")(h)
        return keras.layers.Add(name=f"{name}_add")([x, h])

    x_t = keras.Input(tuple(image_shape), name="x_t")
    conditions, embedding = _embedding(width, 4 * width, num_classes, context_dim)
    time = keras.layers.Activation("swish", name="time_swish")(embedding)
    time = keras.layers.Reshape((1, 1, 4 * width), name="time_pixel")(time)

    # Down.
    x = keras.layers.ZeroPadding2D(padding, name="pad")(x_t)
    x = _conv(width, 3 * patch_size, patch_size, name="conv_in")(x)
    skips = [x]
    for level, channels in enumerate(widths):
        for block in range(num_blocks):
            x = residual_block(x, channels, f"down_{level}_{block}", resolutions[level] in attention_resolutions)
            skips.append(x)
        if level < len(widths) - 1:
            x = _conv(channels, strides=2, name=f"down_{level}_downsample")(x)
            skips.append(x)

    # Middle.
    x = residual_block(x, x.shape[-1], "middle_0")
    x = attention_block(x, "middle_attention")
    x = residual_block(x, x.shape[-1], "middle_1")

    # Up.
    for level, channels in reversed(list(enumerate(widths))):
        for block in range(num_blocks + 1):
            x = ops.concatenate([x, skips.pop()], axis=-1)
            x = residual_block(x, channels, f"up_{level}_{block}", resolutions[level] in attention_resolutions)
        if level > 0:
            x = layers.UpsampledConv2D(channels, name=f"up_{level}_upsample")(x)

    options = {"kernel_initializer": "zeros", "padding": "same", "dtype": "float32", "name": "conv_out"}
    if patch_size == 1:
        conv_out = layers.Conv2D(image_shape[-1], 3, **options)
    else:
        conv_out = keras.layers.Conv2DTranspose(image_shape[-1], 3 * patch_size, patch_size, **options)
    x = conv_out(normalize(x, "out"))
    x = keras.layers.Cropping2D(padding, dtype="float32", name="crop")(x)
    return keras.Model([x_t, *conditions], x, name="unet")


def dit(
    image_shape: Sequence[int],
    patch_size: int = 2,
    width: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    num_classes: int | None = None,
    context_dim: int | None = None,
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

    Returns:
        A functional `keras.Model` with the inputs and the output of `unet`.

    Raises:
        ValueError: if an argument is invalid, or both `num_classes` and `context_dim` are given.

    Reference: Peebles and Xie, 2023, section 3.2, "adaLN-Zero".
    """
    _checks.counts(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
    valid = width >= 8 and width % 4 == width % num_heads == 0
    _checks.require(valid, "`width` >= 8 must be a multiple of 4 and of `num_heads`", width=width, num_heads=num_heads)
    padding = _padding(image_shape, patch_size)
    x_t = keras.Input(tuple(image_shape), name="x_t")
    conditions, embedding = _embedding(256, width, num_classes, context_dim)
    condition = keras.layers.Activation("swish", name="condition_swish")(embedding)

    def modulation(num, name):
        """`num` vectors `(batch, 1, width)` that depend on the condition and are zero at initialization."""
        vectors = keras.layers.Dense(num * width, kernel_initializer="zeros", name=f"{name}_modulation")(condition)
        return ops.split(keras.layers.Reshape((1, num * width), name=f"{name}_reshape")(vectors), num, axis=-1)

    def normalize(x, name, shift, scale):
        x = keras.layers.LayerNormalization(epsilon=1e-6, center=False, scale=False, name=f"{name}_norm")(x)
        return x * (1.0 + scale) + shift

    x = keras.layers.ZeroPadding2D(padding, name="pad")(x_t)
    patches = keras.layers.Conv2D(width, patch_size, patch_size, name="patches")
    x = layers.PositionEmbedding(name="positions")(patches(x))
    grid = x.shape[1:]
    x = keras.layers.Reshape((-1, width), name="tokens")(x)
    for block in range(depth):
        name = f"block_{block}"
        shift, scale, gate, *of_mlp = modulation(6, name)
        h = normalize(x, f"{name}_1", shift, scale)
        attention = keras.layers.MultiHeadAttention(num_heads, width // num_heads, name=f"{name}_attention")
        x = keras.layers.Add(name=f"{name}_attention_add")([x, gate * attention(h, h)])
        shift, scale, gate = of_mlp
        h = normalize(x, f"{name}_2", shift, scale)
        h = keras.layers.Dense(4 * width, activation=keras.activations.gelu, name=f"{name}_dense_1")(h)
        h = keras.layers.Dense(width, name=f"{name}_dense_2")(h)
        x = keras.layers.Add(name=f"{name}_mlp_add")([x, gate * h])
    x = keras.layers.Reshape(grid, name="grid")(normalize(x, "out", *modulation(2, "out")))
    x = keras.layers.Conv2DTranspose(
        image_shape[-1], patch_size, patch_size, kernel_initializer="zeros", dtype="float32", name="pixels"
    )(x)
    x = keras.layers.Cropping2D(padding, dtype="float32", name="crop")(x)
    return keras.Model([x_t, *conditions], x, name="dit")


def mlp(
    dim: int = 2, width: int = 128, depth: int = 3, num_classes: int | None = None, context_dim: int | None = None
) -> keras.Model:
    """A residual multi-layer perceptron for points.

    Args:
        dim: number of coordinates of a point.
        width: size of the hidden layers; even and at least 4.
        depth: number of residual blocks.
        num_classes: number K of labels 0..K − 1 to condition on. The label embedding is added to the time embedding.
        context_dim: size of the vectors to condition on instead of labels.

    Returns:
        A functional `keras.Model` with inputs `x_t` `(batch, dim)`, `t` `(batch,)`, int32, and, if conditioned,
        `label` `(batch,)`, int32, or `context` `(batch, context_dim)`.

    Raises:
        ValueError: if an argument is invalid, or both `num_classes` and `context_dim` are given.
    """
    _checks.counts(dim=dim, width=width, depth=depth)
    x_t = keras.Input((dim,), name="x_t")
    conditions, time = _embedding(width, width, num_classes, context_dim)
    x = keras.layers.Dense(width, name="dense_in")(x_t)
    for block in range(depth):
        h = keras.layers.Add(name=f"block_{block}_add_time")([x, time])
        h = keras.layers.Activation("swish", name=f"block_{block}_swish_1")(h)
        h = keras.layers.Dense(width, activation="swish", name=f"block_{block}_dense_1")(h)
        h = keras.layers.Dense(width, name=f"block_{block}_dense_2")(h)
        x = keras.layers.Add(name=f"block_{block}_add")([x, h])
    x = keras.layers.Activation("swish", name="swish_out")(x)
    x = keras.layers.Dense(dim, kernel_initializer="zeros", dtype="float32", name="dense_out")(x)
    return keras.Model([x_t, *conditions], x, name="mlp")


def _embedding(dim, width, num_classes, context_dim):
    """Returns the inputs other than x_t, and the sum of their embeddings, `(batch, width)`."""
    given = {"num_classes": num_classes, "context_dim": context_dim}
    _checks.require(None in given.values(), "`num_classes` and `context_dim` cannot both be given", **given)
    _checks.counts(optional=True, **given)
    t = keras.Input((), dtype="int32", name="t")
    x = layers.TimestepEmbedding(dim, name="time_sinusoid")(t)
    x = keras.layers.Dense(width, activation="swish", name="time_dense_1")(x)
    x = keras.layers.Dense(width, name="time_dense_2")(x)
    if num_classes is not None:
        condition = keras.Input((), dtype="int32", name="label")
        embedded = keras.layers.Embedding(int(num_classes) + 1, width, name="label_embedding")(condition)
    elif context_dim is not None:
        condition = keras.Input((context_dim,), name="context")
        embedded = keras.layers.Dense(width, name="context_embedding")(condition)
    else:
        return [t], x
    return [t, condition], keras.layers.Add(name="add_condition")([x, embedded])


def _padding(image_shape, multiple):
    """Returns the padding of `ZeroPadding2D` that makes both sides multiples of `multiple`."""
    valid = isinstance(image_shape, (list, tuple)) and len(image_shape) == 3 and all(map(_checks.is_count, image_shape))
    _checks.require(valid, "`image_shape` must be (height, width, channels)", image_shape=image_shape)
    layout = keras.config.image_data_format()
    _checks.require(layout == "channels_last", "Images must be channels_last", image_data_format=layout)
    return tuple((-size % multiple // 2, (-size % multiple + 1) // 2) for size in image_shape[:2])


def _conv(channels, kernel_size=3, strides=1, scale=1.0, **kwargs):
    initializer = keras.initializers.VarianceScaling(scale, "fan_avg", "uniform") if scale else "zeros"
    return layers.Conv2D(channels, kernel_size, strides, padding="same", kernel_initializer=initializer, **kwargs)
