"""The inputs of a network other than x_t: the time and the condition, with their embeddings."""

import keras

from keras_ddpm import _checks
from keras_ddpm.networks import layers

__all__ = ["embed", "with_guidance_scale", "with_num_classes"]


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


def with_guidance_scale(network: keras.Model) -> keras.Model:
    """A copy of a network that is also told the guidance scale w, so that guidance needs one call instead of two.

    The copy has one more input, `scale` `(batch,)`, which is 1 / w. Its embedding is added to that of the time and
    starts at zero, so that the output is that of the network for every scale. Training a `DiffusionModel` of it with a
    `max_guidance_scale` teaches what the scale means.

    >>> guided = DiffusionModel.from_model(model, network=with_guidance_scale(model.network), max_guidance_scale=4.0)

    Args:
        network: one of `networks`, or another functional model with a layer "time_dense_2" that ends the embedding of
            the time.

    Returns:
        A functional `keras.Model` with the weights of `network`.

    Raises:
        ValueError: if there is no such layer, or the network has the input already.

    Reference: Chen et al., 2025 ("Visual generation without guidance"), section 4.
    """
    known = {layer.name: layer for layer in network.layers}
    valid = "time_dense_2" in known and "scale" not in known and len(network.inputs) > 2
    _checks.require(valid, "Expected a conditional network with a layer 'time_dense_2' that is not told the scale yet")
    width = known["time_dense_2"].units
    time, scale = keras.Input((width,), name="time_dense_2"), keras.Input((), name="scale")
    x = keras.layers.Rescaling(1000, dtype="float32", name="scale_1000")(scale)
    x = layers.TimestepEmbedding(256, name="scale_sinusoid")(x)
    x = keras.layers.Dense(width, kernel_initializer="zeros", name="scale_embedding")(x)
    added = keras.Model([time, scale], keras.layers.Add(name="add_scale")([time, x])).get_config()

    config, renamed = network.get_config(), {"time_dense_2": "add_scale"}  # what read the time reads the sum
    for layer in config["layers"]:
        layer["inbound_nodes"] = keras.tree.map_structure(lambda name: renamed.get(name, name), layer["inbound_nodes"])
    # In the order of computation, as Keras reads the layers.
    place = 1 + [layer["name"] for layer in config["layers"]].index("time_dense_2")
    config["layers"][place:place] = [layer for layer in added["layers"] if layer["name"] != "time_dense_2"]
    config["input_layers"] = [*config["input_layers"], ["scale", 0, 0]]
    result = keras.Model.from_config(config)
    for name, layer in known.items():
        result.get_layer(name).set_weights(layer.get_weights())
    return result


def with_num_classes(network: keras.Model, num_classes: int) -> keras.Model:
    """An untrained copy of a network of labels, for another number of classes."""

    def copied(layer):
        changed = {"input_dim": num_classes + 1} if layer.name == "label_embedding" else {}
        return type(layer).from_config(layer.get_config() | changed)

    return keras.models.clone_model(network, clone_function=copied)
