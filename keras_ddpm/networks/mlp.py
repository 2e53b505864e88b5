"""A multi-layer perceptron for points."""

import keras

from keras_ddpm import _checks
from keras_ddpm.networks.embedding import embed

__all__ = ["mlp"]


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
    conditions, x, time = embed(x_t, width, width, num_classes, context_dim)
    x = keras.layers.Dense(width, name="dense_in")(x)
    for block in range(depth):
        h = keras.layers.Add(name=f"block_{block}_add_time")([x, time])
        h = keras.layers.Activation("swish", name=f"block_{block}_swish_1")(h)
        h = keras.layers.Dense(width, activation="swish", name=f"block_{block}_dense_1")(h)
        h = keras.layers.Dense(width, name=f"block_{block}_dense_2")(h)
        x = keras.layers.Add(name=f"block_{block}_add")([x, h])
    x = keras.layers.Activation("swish", name="swish_out")(x)
    x = keras.layers.Dense(dim, kernel_initializer="zeros", dtype="float32", name="dense_out")(x)
    return keras.Model([x_t, *conditions], x, name="mlp")
