"""The U-Net of Ho et al."""

import random
import warnings
from collections.abc import Sequence

import keras
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.networks import layers
from keras_ddpm.networks.embedding import embed

__all__ = ["unet"]


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
    image_channels: int | None = None,
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
        image_channels: channels of images to condition on, also beside labels or vectors. They have the size of x_t,
            and are joined to its channels.

    Returns:
        A functional `keras.Model` with inputs `x_t` `(batch, height, width, channels)`, `t` `(batch,)`, int32, and,
        if conditioned, `label` `(batch,)`, int32, or `context` `(batch, context_dim)`; `image` `(batch, height, width,
        image_channels)`, and `image_noise` `(batch,)`, the level of noise in the image as in `conditions.seen`.

    Raises:
        ValueError: if an argument is invalid, the images are too small for the number of levels, `groups` does not
            divide the channels, or both `num_classes` and `context_dim` are given.

    Reference: Ho et al., 2020, appendix B; Ho et al., 2022 ("Cascaded diffusion models"), section 3, on images.
    """
    _checks.counts(width=width, num_blocks=num_blocks, groups=groups, patch_size=patch_size)
    valid = _checks.are_counts(width_multipliers) and len(width_multipliers)
    _checks.require(valid, "Expected one or more positive integers", width_multipliers=width_multipliers)
    valid, needed = _checks.are_counts(attention_resolutions), "Expected a sequence of positive integers"
    _checks.require(valid, needed, attention_resolutions=attention_resolutions)
    _checks.share(dropout=dropout)
    widths = [width * multiplier for multiplier in width_multipliers]
    divided = all(channels % groups == 0 for channels in widths)
    _checks.require(divided, "`groups` must divide the channels of every level", groups=groups, channels=widths)
    if groups in widths:
        warnings.warn(f"With groups={groups} of one channel each, the normalization hides the time.", stacklevel=2)
    stride = patch_size * 2 ** (len(widths) - 1)
    padding = layers.padding_to(image_shape, stride)
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
    conditions, x, embedding = embed(x_t, width, 4 * width, num_classes, context_dim, image_channels)
    time = keras.layers.Activation("swish", name="time_swish")(embedding)
    time = keras.layers.Reshape((1, 1, 4 * width), name="time_pixel")(time)

    # Down.
    x = keras.layers.ZeroPadding2D(padding, name="pad")(x)
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


def _conv(channels, kernel_size=3, strides=1, scale=1.0, **kwargs):
    initializer = keras.initializers.VarianceScaling(scale, "fan_avg", "uniform") if scale else "zeros"
    return layers.Conv2D(channels, kernel_size, strides, padding="same", kernel_initializer=initializer, **kwargs)
