"""The feature extractors, and the classifier that can serve as one."""

import functools

import keras
import numpy as np
import pytest

import keras_ddpm as kd
from keras_ddpm import features, toys


def flatten(shape=(2, 2, 1), name="flatten"):
    """An extractor whose features are the pixels."""
    x = keras.Input(shape)
    return keras.Model(x, keras.layers.Flatten()(x), name=name)


def infinite():
    x = keras.Input((2, 2, 1))
    return keras.Model(x, keras.layers.Rescaling(np.inf)(keras.layers.Flatten()(x)), name="infinite")


def draw(num, seed, shift=0.0, scale=0.3):
    return (shift + scale * np.random.default_rng(seed).standard_normal((num, 2, 2, 1))).astype("float32")


@functools.cache
def flowers():
    """Training, held-out and other drawn flowers, labels of the latter, and a classifier of their kinds."""
    keras.utils.set_random_seed(0)
    x, labels = toys.procedural_flowers(1200, 16)
    classifier = features.train_classifier(x[:600], labels[:600], epochs=8)
    return x[:600], x[600:900], x[900:], labels[900:], classifier


def test_a_trained_classifier_is_an_extractor():
    _, _, others, labels, classifier = flowers()
    assert np.mean(np.argmax(classifier.predict(others, verbose=0), axis=1) == labels) > 0.8
    extractor = features.Extractor(classifier)
    assert extractor(others[:3]).shape == (3, 128) and extractor.name == "classifier"
    with pytest.raises(ValueError, match="label for each"):
        features.train_classifier(others, labels[:5])


def test_extractors(tmp_path):
    model = flatten()
    model.save(tmp_path / "flatten.keras")
    one, two = features.Extractor(model), features.Extractor(tmp_path / "flatten.keras")
    assert one.hash == two.hash and one.name == two.name == "flatten"
    dense = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    assert features.Extractor(dense).hash != one.hash
    assert features.Extractor(dense)(draw(5, 0)).shape == (5, 3)


def test_the_hash_of_the_weights():
    """The hash of files that earlier versions have written stays valid."""
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.set_weights([np.arange(12, dtype="float32").reshape(4, 3), np.ones(3, "float32")])
    assert features.Extractor(model).hash == "8fee29333184"


def test_inception_that_cannot_be_downloaded(monkeypatch):
    def refuse(**kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "InceptionV3", refuse)
    with pytest.raises(ConnectionError, match="cannot be downloaded: see `train_classifier`. URL fetch failure"):
        kd.metrics.KernelInceptionDistance()


def test_inception_takes_any_size_and_gray(monkeypatch):
    """Images are resized and gray ones get three channels. The mean of each channel stands in for InceptionV3."""
    x = keras.Input((299, 299, 3))
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(x), name="mean")
    monkeypatch.setattr(keras.applications, "InceptionV3", lambda **kwargs: model)
    images = draw(3, 0)
    extractor = features.Extractor()
    assert extractor.name == "mean"
    np.testing.assert_allclose(extractor(images), np.repeat(images.mean(axis=(1, 2)), 3, axis=1), atol=1e-3)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: features.Extractor(infinite())(draw(3, 0)), "features of the extractor infinite are NaN"),
        (lambda: features.Extractor(flatten())(draw(3, 0) * np.nan), "NaN"),
        (lambda: features.Extractor(flatten())(draw(3, 0)[..., 0]), r"shape=\(3, 2, 2\)"),
        (lambda: features.Extractor(kd.networks.mlp(2, 8, 1)), "one vector as output. Received: model='mlp'"),
        (lambda: features.Extractor(keras.Sequential([keras.Input((2, 2, 1)), keras.layers.ReLU()])), "one vector"),
    ],
)
def test_bad_input(use, message):
    with pytest.raises(ValueError, match=message):
        use()
