"""The inputs of a network other than x_t: the time and the condition, with their embeddings."""

import keras

from keras_ddpm import _checks
from keras_ddpm.networks import layers

__all__ = ["embed"]


def embed(dim, width, num_classes, context_dim):
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
