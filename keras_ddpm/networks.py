"""Networks: functional models from `[x_t, t]`, or `[x_t, t, condition]`, to a tensor shaped like `x_t`.

They know nothing of diffusion; any `keras.Model` with these inputs and this output serves as well. Each of them
outputs zeros at initialisation. The condition is a label, embedded by a layer of the name "label_embedding" that has
one more entry, the last, for no label; or a vector, of which zeros stand for no condition.

To add one, write a function that returns a `keras.Model` and takes its embedding of time and condition from
`_embedding`.
"""

import warnings

import keras
from keras import layers
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.layers import Attention
from keras_ddpm.layers import Conv2D
from keras_ddpm.layers import GroupNormalization
from keras_ddpm.layers import PositionEmbedding
from keras_ddpm.layers import TimestepEmbedding
from keras_ddpm.layers import UpsampledConv2D


def unet(
    image_shape,
    width=64,
    width_multipliers=(1, 2, 4, 8),
    num_blocks=2,
    attention_resolutions=(16,),
    groups=8,
    dropout=0.0,
    num_classes=None,
    context_dim=None,
):
    """The U-Net of Ho et al.: residual blocks with group normalisation, self-attention at low resolution.

    Images whose sides are no multiples of 2^(levels − 1) are padded with zeros at the input and the result is
    cropped, so that any size works. The output is float32, also under a mixed dtype policy.

    Example:

    >>> network = unet((64, 64, 3))
    >>> network([x_t, t]).shape  # x_t: (batch, 64, 64, 3), t: (batch,)

    Args:
        image_shape: `(height, width, channels)`.
        width: channels at full resolution.
        width_multipliers: channels of each level, as multiples of `width`; each level halves the resolution.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: levels whose longer side, after padding, is listed have self-attention.
        groups: groups of the normalisations; divides the channels of every level.
        dropout: rate of the dropout inside the residual blocks.
        num_classes: number K of labels to condition on, 0..K − 1; the embedding is added to that of the time.
        context_dim: size of vectors to condition on, instead of labels.

    Returns:
        A functional `keras.Model` with inputs `x_t` `(batch, height, width, channels)`, `t` `(batch,)`, int32, and,
        if conditioned, `label` `(batch,)`, int32, or `context` `(batch, context_dim)`.

    Raises:
        ValueError: for a shape that is none, an image too small for the levels, channels that the groups do not
            divide, or no positive number of labels or size of vectors, or both.

    Reference: Ho et al., 2020, appendix B.
    """
    stride = 2 ** (len(width_multipliers) - 1)
    padding = _padding(image_shape, stride)
    if min(image_shape[:2]) < stride:
        raise ValueError(
            f"{len(width_multipliers)} levels need images of at least {stride}x{stride}. "
            f"Received: image_shape={image_shape}"
        )
    for multiplier in width_multipliers:
        if width * multiplier % groups:
            raise ValueError(
                f"The channels of every level must be multiples of groups={groups}. "
                f"Received: width={width}, width_multipliers={width_multipliers}"
            )
        if width * multiplier == groups:
            warnings.warn(
                f"With groups={groups} of one channel each, the normalisation takes out what a block is told of the "
                f"time. Received: width={width}, width_multipliers={width_multipliers}",
                stacklevel=2,
            )
    longer_side = max(size + sum(sides) for size, sides in zip(image_shape, padding))
    resolutions = [longer_side >> level for level in range(len(width_multipliers))]
    for missed in sorted(set(attention_resolutions) - set(resolutions)):
        warnings.warn(
            f"No level is {missed} wide: there is no attention at {missed}. Levels: {resolutions}", stacklevel=2
        )

    def normalize(x, name, activation="swish"):
        # The paper's epsilon; Keras' is 1e-3.
        return GroupNormalization(groups, activation, epsilon=1e-6, name=f"{name}_norm")(x)

    def residual_block(x, channels, name):
        h = _conv(channels, name=f"{name}_conv_1")(normalize(x, f"{name}_1"))
        h_time = layers.Dense(channels, kernel_initializer=_initializer(), name=f"{name}_time")(time)
        h = normalize(h + h_time, f"{name}_2")
        if dropout:
            h = layers.Dropout(dropout, name=f"{name}_dropout")(h)
        h = _conv(channels, scale=0.0, name=f"{name}_conv_2")(h)
        if x.shape[-1] != channels:
            x = _conv(channels, kernel_size=1, name=f"{name}_skip")(x)
        return layers.Add(name=f"{name}_add")([x, h])

    def attention_block(x, name):
        channels = x.shape[-1]
        # Convolutions, as PyTorch's add the bias on the way; and initialised as three layers would be.
        qkv = _conv(3 * channels, 1, scale=2.0, name=f"{name}_qkv")(normalize(x, name, None))
        h = Attention(name=f"{name}_attention")(qkv)
        h = _conv(channels, 1, scale=0.0, name=f"{name}_out")(h)
        return layers.Add(name=f"{name}_add")([x, h])

    x_t = keras.Input(tuple(image_shape), name="x_t")
    conditions, embedding = _embedding(width, 4 * width, num_classes, context_dim)
    time = layers.Activation("swish", name="time_swish")(embedding)
    time = layers.Reshape((1, 1, 4 * width), name="time_pixel")(time)

    # Down.
    x = layers.ZeroPadding2D(padding, name="pad")(x_t)
    x = _conv(width, name="conv_in")(x)
    skips = [x]
    for level, multiplier in enumerate(width_multipliers):
        for block in range(num_blocks):
            x = residual_block(x, width * multiplier, f"down_{level}_{block}")
            if resolutions[level] in attention_resolutions:
                x = attention_block(x, f"down_{level}_{block}_attention")
            skips.append(x)
        if level < len(width_multipliers) - 1:
            x = _conv(width * multiplier, strides=2, name=f"down_{level}_downsample")(x)
            skips.append(x)

    # Middle.
    x = residual_block(x, x.shape[-1], "middle_0")
    x = attention_block(x, "middle_attention")
    x = residual_block(x, x.shape[-1], "middle_1")

    # Up.
    for level, multiplier in reversed(list(enumerate(width_multipliers))):
        for block in range(num_blocks + 1):
            x = ops.concatenate([x, skips.pop()], axis=-1)
            x = residual_block(x, width * multiplier, f"up_{level}_{block}")
            if resolutions[level] in attention_resolutions:
                x = attention_block(x, f"up_{level}_{block}_attention")
        if level > 0:
            x = UpsampledConv2D(width * multiplier, _initializer(), name=f"up_{level}_upsample")(x)
    assert not skips

    x = _conv(image_shape[-1], scale=0.0, dtype="float32", name="conv_out")(normalize(x, "out"))
    x = layers.Cropping2D(padding, dtype="float32", name="crop")(x)
    return keras.Model([x_t, *conditions], x, name="unet")


def dit(image_shape, patch_size=2, width=384, depth=12, num_heads=6, num_classes=None, context_dim=None):
    """The diffusion transformer of Peebles and Xie: patches, and adaptive layer normalisation with gates at zero.

    The defaults are their DiT-S/2. Images whose sides are no multiples of the patch are padded with zeros at the input
    and the result is cropped. The output is float32, also under a mixed dtype policy.

    Args:
        image_shape: `(height, width, channels)`.
        patch_size: side of the square patches, each a token.
        width: size of the tokens, a multiple of 4 and of `num_heads`.
        depth: number of blocks.
        num_heads: heads of the attention.
        num_classes: number K of labels to condition on, 0..K − 1; the embedding is added to that of the time.
        context_dim: size of vectors to condition on, instead of labels.

    Returns:
        A functional `keras.Model` with the inputs and the output of `unet`.

    Raises:
        ValueError: for a shape that is none, a width that is no such multiple, a size that is no positive integer,
            or no positive number of labels or size of vectors, or both.

    Reference: Peebles and Xie, 2023, section 3.2, "adaLN-Zero".
    """
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": num_heads}
    if not all(map(_checks.is_count, sizes.values())) or width % 4 or width % num_heads:
        raise ValueError(
            f"Sizes must be positive integers, the width a multiple of 4 and of the number of heads. Received: {sizes}"
        )
    padding = _padding(image_shape, patch_size)
    x_t = keras.Input(tuple(image_shape), name="x_t")
    conditions, embedding = _embedding(256, width, num_classes, context_dim)
    condition = layers.Activation("swish", name="condition_swish")(embedding)

    def modulation(num, name):
        """`num` vectors that depend on the condition, zeros at first, each `(batch, 1, width)`."""
        vectors = layers.Dense(num * width, kernel_initializer="zeros", name=f"{name}_modulation")(condition)
        return ops.split(layers.Reshape((1, num * width), name=f"{name}_reshape")(vectors), num, axis=-1)

    def normalize(x, shift, scale, name):
        x = layers.LayerNormalization(epsilon=1e-6, center=False, scale=False, name=f"{name}_norm")(x)
        return x * (1 + scale) + shift

    x = layers.ZeroPadding2D(padding, name="pad")(x_t)
    patches = layers.Conv2D(width, patch_size, patch_size, kernel_initializer=_initializer(), name="patches")
    x = PositionEmbedding(name="positions")(patches(x))
    grid = x.shape[1:]
    x = layers.Reshape((-1, width), name="tokens")(x)
    for block in range(depth):
        name = f"block_{block}"
        shift, scale, gate, *of_mlp = modulation(6, name)
        h = normalize(x, shift, scale, f"{name}_1")
        attention = layers.MultiHeadAttention(num_heads, width // num_heads, name=f"{name}_attention")
        x = layers.Add(name=f"{name}_attention_add")([x, gate * attention(h, h)])
        shift, scale, gate = of_mlp
        h = normalize(x, shift, scale, f"{name}_2")
        h = layers.Dense(4 * width, activation=keras.activations.gelu, name=f"{name}_dense_1")(h)
        h = layers.Dense(width, name=f"{name}_dense_2")(h)
        x = layers.Add(name=f"{name}_mlp_add")([x, gate * h])
    x = layers.Reshape(grid, name="grid")(normalize(x, *modulation(2, "out"), "out"))
    x = layers.Conv2DTranspose(
        image_shape[-1], patch_size, patch_size, kernel_initializer="zeros", dtype="float32", name="pixels"
    )(x)
    x = layers.Cropping2D(padding, dtype="float32", name="crop")(x)
    return keras.Model([x_t, *conditions], x, name="dit")


def mlp(dim=2, width=128, depth=3, num_classes=None, context_dim=None):
    """A residual multi-layer perceptron, for points.

    Args:
        dim: numbers in a point.
        width: size of the hidden layers.
        depth: number of residual blocks.
        num_classes: number K of labels to condition on, 0..K − 1; the embedding is added to that of the time.
        context_dim: size of vectors to condition on, instead of labels.

    Returns:
        A functional `keras.Model` with inputs `x_t` `(batch, dim)`, `t` `(batch,)`, int32, and, if conditioned,
        `label` `(batch,)`, int32, or `context` `(batch, context_dim)`.

    Raises:
        ValueError: for no positive number of labels or size of vectors, or both.
    """
    x_t = keras.Input((dim,), name="x_t")
    conditions, time = _embedding(width, width, num_classes, context_dim)
    x = layers.Dense(width, name="dense_in")(x_t)
    for block in range(depth):
        h = layers.Activation("swish", name=f"block_{block}_swish_1")(
            layers.Add(name=f"block_{block}_add_time")([x, time])
        )
        h = layers.Dense(width, activation="swish", name=f"block_{block}_dense_1")(h)
        h = layers.Dense(width, name=f"block_{block}_dense_2")(h)
        x = layers.Add(name=f"block_{block}_add")([x, h])
    x = layers.Activation("swish", name="swish_out")(x)
    x = layers.Dense(dim, kernel_initializer="zeros", dtype="float32", name="dense_out")(x)
    return keras.Model([x_t, *conditions], x, name="mlp")


def _embedding(dim, width, num_classes, context_dim):
    """The inputs beside x_t, and the sum of their embeddings, `(batch, width)`."""
    sizes = [size for size in (num_classes, context_dim) if size is not None]
    if len(sizes) > 1 or not all(map(_checks.is_count, sizes)):
        raise ValueError(
            "A network is conditioned on a number of labels or on vectors of a size. "
            f"Received: num_classes={num_classes!r}, context_dim={context_dim!r}"
        )
    t = keras.Input((), dtype="int32", name="t")
    x = TimestepEmbedding(dim, name="time_sinusoid")(t)
    x = layers.Dense(width, activation="swish", kernel_initializer=_initializer(), name="time_dense_1")(x)
    x = layers.Dense(width, kernel_initializer=_initializer(), name="time_dense_2")(x)
    if num_classes is not None:
        condition = keras.Input((), dtype="int32", name="label")
        embedded = layers.Embedding(num_classes + 1, width, name="label_embedding")(condition)
    elif context_dim is not None:
        condition = keras.Input((context_dim,), name="context")
        embedded = layers.Dense(width, kernel_initializer=_initializer(), name="context_embedding")(condition)
    else:
        return [t], x
    return [t, condition], layers.Add(name="add_condition")([x, embedded])


def _padding(image_shape, multiple):
    """What `ZeroPadding2D` has to add so that both sides are multiples."""
    if len(image_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in image_shape):
        raise ValueError(f"`image_shape` must be (height, width, channels). Received: image_shape={image_shape}")
    return tuple((-size % multiple // 2, (-size % multiple + 1) // 2) for size in image_shape[:2])


def _conv(channels, kernel_size=3, strides=1, scale=1.0, **kwargs):
    initializer = _initializer(scale) if scale else "zeros"
    return Conv2D(channels, kernel_size, strides, padding="same", kernel_initializer=initializer, **kwargs)


def _initializer(scale=1.0):
    return keras.initializers.VarianceScaling(scale, mode="fan_avg", distribution="uniform")
