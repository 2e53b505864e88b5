"""The inputs of a network other than x_t: the time and the condition, with their embeddings."""

import keras

from keras_ddpm import _checks
from keras_ddpm.networks import layers

__all__ = ["embed"]


def embed(x_t, dim, width, num_classes, context_dim, image_channels=None):
    """Returns the inputs other than x_t, x_t joined with the image, and the sum of embeddings, `(batch, width)`."""
    given = {"num_classes": num_classes, "context_dim": context_dim}
    _checks.require(None in given.values(), "`num_classes` and `context_dim` cannot both be given", **given)
    _checks.counts(optional=True, **given, image_channels=image_channels)
    t = keras.Input((), dtype="int32", name="t")
    x = layers.TimestepEmbedding(dim, name="time_sinusoid")(t)
    x = keras.layers.Dense(width, activation="swish", name="time_dense_1")(x)
    x = keras.layers.Dense(width, name="time_dense_2")(x)
    inputs, embedded = [t], [x]
    if num_classes is not None:
        inputs.append(keras.Input((), dtype="int32", name="label"))
        embedded.append(keras.layers.Embedding(int(num_classes) + 1, width, name="label_embedding")(inputs[-1]))
    elif context_dim is not None:
        inputs.append(keras.Input((context_dim,), name="context"))
        embedded.append(keras.layers.Dense(width, name="context_embedding")(inputs[-1]))
    if image_channels is not None:
        image = keras.Input((*x_t.shape[1:-1], image_channels), name="image")
        level = keras.Input((), name="image_noise")
        inputs += [image, level]
        sinusoids = layers.TimestepEmbedding(dim, name="image_noise_sinusoid")(1000.0 * level)
        embedded.append(keras.layers.Dense(width, name="image_noise_embedding")(sinusoids))
        x_t = keras.layers.Concatenate(name="with_image")([x_t, image])
    return inputs, x_t, keras.layers.Add(name="add_condition")(embedded) if len(embedded) > 1 else x
