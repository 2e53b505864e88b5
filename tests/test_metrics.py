"""Distances of sets, against their definitions and closed forms."""

import keras
import numpy as np
import pytest

import keras_ddpm as kd
from keras_ddpm import metrics


def flatten(shape=(2, 2, 1), name="flatten"):
    """The extractor whose features are the pixels."""
    x = keras.Input(shape)
    return keras.Model(x, keras.layers.Flatten()(x), name=name)


class Pixels(metrics.Extractor):
    """The same without a model, where there are many sets."""

    def __init__(self):
        self.name, self.hash = "pixels", ""

    def __call__(self, images):
        return images.reshape(len(images), -1).astype("float64")


def draw(num, seed, shift=0.0, scale=0.3):
    return (shift + scale * np.random.default_rng(seed).standard_normal((num, 2, 2, 1))).astype("float32")


def kid(**options):
    return metrics.KernelInceptionDistance(flatten(), **options)


def fid():
    return metrics.FrechetInceptionDistance(flatten())


def test_kid_is_its_definition():
    """The double sums of Bińkowski et al., 2018, Eq. 4."""
    real, generated = draw(5, 0), draw(6, 1, 0.5)
    metric = kid(subset_size=5)
    value = metric(real, generated)
    x, y = real.reshape(5, 4).astype("float64"), generated.reshape(6, 4).astype("float64")

    def kernel(a, b):
        return (sum(a * b) / 4 + 1) ** 3

    expected = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected += sum(kernel(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 30
    assert isinstance(value, float) and value == pytest.approx(expected, rel=1e-12)
    assert np.isnan(metric.standard_error())


def test_kid_has_no_bias_and_knows_its_error():
    """Real against real: 0 on average; and the error it states is the deviation from draw to draw."""
    metric, values, errors = metrics.KernelInceptionDistance(Pixels(), subset_size=50), [], []
    for seed in range(200):
        metric.reset_state()
        metric.update_state(draw(300, 2 * seed), draw(400, 2 * seed + 1))
        values.append(metric.result())
        errors.append(metric.standard_error())
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.25


def test_fid_of_known_moments():
    """Against the closed form for covariances that commute, and scipy's square root of a matrix for any."""
    rng = np.random.default_rng(0)
    for same_axes in (True, False):
        axes = [np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2)]
        spectra = rng.uniform(0.01, 2, (2, 4))
        c, d = ((a * s) @ a.T for a, s in zip([axes[0], axes[0 if same_axes else 1]], spectra))
        means = rng.normal(size=(2, 4))
        got = metrics._frechet_distance((means[0], c), (means[1], d))
        if same_axes:
            cross = np.sqrt(spectra[0] * spectra[1]).sum()
        else:
            cross = np.trace(pytest.importorskip("scipy.linalg").sqrtm(c @ d)).real
        assert got == pytest.approx(np.sum((means[0] - means[1]) ** 2) + spectra.sum() - 2 * cross, rel=1e-9)


def test_fid_is_that_of_the_moments():
    """With n - 1, and also where there are fewer images than features."""
    for num in (3, 200):
        real, generated = draw(num, 0), draw(2 * num, 1, 0.5, 0.5)
        x, y = (images.reshape(-1, 4).astype("float64") for images in (real, generated))
        c, d = np.cov(x.T), np.cov(y.T)
        cross = np.sqrt(np.maximum(np.linalg.eigvals(c @ d).real, 0)).sum()
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c) + np.trace(d) - 2 * cross
        assert fid()(real, generated) == pytest.approx(expected, rel=1e-6)


def test_fid_knows_its_error():
    metric, values, errors = metrics.FrechetInceptionDistance(Pixels()), [], []
    for seed in range(100):
        metric.reset_state()
        metric.update_state(draw(200, 2 * seed), draw(200, 2 * seed + 1, 0.2))
        values.append(metric.result())
        errors.append(metric.standard_error())
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.3


@pytest.mark.parametrize("make", [lambda: kid(subset_size=7), fid])
def test_streaming_is_one_shot(make, tmp_path):
    real, generated = draw(101, 0), draw(60, 1, 0.3)
    whole, stream = make(), make()
    whole.update_state(real, generated)
    for start in range(0, 101, 13):
        stream.update_state(real_images=real[start : start + 13])
    stream.update_state(generated_images=generated[:1])
    stream.update_state(generated_images=generated[1:])
    assert stream.result() == pytest.approx(whole.result(), rel=1e-9)
    assert stream.standard_error() == pytest.approx(whole.standard_error(), rel=1e-9)
    about = stream.describe()
    assert (about["num_real"], about["num_generated"], about["extractor"]) == (101, 60, "flatten")
    assert about[whole.name] == stream.result() and len(about["extractor_hash"]) == 12

    whole.save_real(tmp_path / "deep/real.npz")
    loaded = make()
    loaded.load_real(tmp_path / "deep/real.npz")
    loaded.update_state(generated_images=generated)
    assert loaded.result() == whole.result()
    loaded.reset_generated()
    loaded.update_state(generated_images=real)
    assert loaded.result() < whole.result()


@pytest.mark.parametrize("make", [lambda: kid(subset_size=100), fid])
def test_corruptions_increase_the_distance(make):
    """Of drawn flowers, with more of each corruption."""
    flowers, _ = kd.datasets.procedural_flowers(600, 8)
    real, others = flowers[:300], flowers[300:]
    random = np.random.default_rng(0)
    noise = random.standard_normal(others.shape).astype("float32")
    corruptions = {
        "noise": [np.clip(others + level * noise, -1, 1) for level in (0.1, 0.3)],
        "blur": [sum(np.roll(others, shift, axis=2) for shift in range(width)) / width for width in (2, 4)],
        "colour": [np.clip(others + [shift, 0, 0], -1, 1) for shift in (0.1, 0.3)],
        "dropped modes": [others[np.arange(300) % kept] for kept in (20, 3)],
    }
    extractor = flatten((8, 8, 3))
    metric = type(make())(extractor, **({"subset_size": 100} if make is not fid else {}))
    metric.update_state(real, others)
    floor = metric.result()
    for name, (less, more) in corruptions.items():
        values = [floor]
        for images in (less, more):
            metric.reset_generated()
            metric.update_state(generated_images=images)
            values.append(metric.result())
        assert np.all(np.diff(values) > 0), (name, values)


def test_extractors(tmp_path):
    model = flatten()
    model.save(tmp_path / "flatten.keras")
    one, two = metrics.Extractor(model), metrics.Extractor(tmp_path / "flatten.keras")
    assert one.hash == two.hash and one.name == two.name == "flatten"
    dense = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    assert metrics.Extractor(dense).hash != one.hash
    assert metrics.Extractor(dense)(draw(5, 0)).shape == (5, 3)


def test_inception_that_cannot_be_had(monkeypatch):
    def refuse(**kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.applications, "InceptionV3", refuse)
    with pytest.raises(ConnectionError, match="cannot be downloaded. Give an `extractor`"):
        metrics.KernelInceptionDistance()


def test_inception_takes_any_size_and_grey(monkeypatch):
    """Its input is resized and made colour; here it is stood in for by the mean of each channel."""
    x = keras.Input((299, 299, 3))
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(x))
    monkeypatch.setattr(keras.applications, "InceptionV3", lambda **kwargs: model)
    images = draw(3, 0)
    got = metrics.Extractor()(images)
    np.testing.assert_allclose(got, np.repeat(images.mean(axis=(1, 2)), 3, axis=1), atol=1e-3)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda path: kid(subset_size=10)(draw(9, 0), draw(20, 1)),
            "at least 10 images in each set. Received: 9 real and 20 gen",
        ),
        (lambda path: kid(subset_size=1), "subset_size=1"),
        (lambda path: fid()(draw(9, 0), draw(1, 1)), "at least 2 images. Received: 1 generated"),
        (lambda path: fid()(generated_images=draw(9, 0)), "Received: 0 real"),
        (lambda path: fid()(draw(9, 0) * np.nan, draw(9, 1)), "NaN"),
        (lambda path: fid()(draw(9, 0)[..., 0], draw(9, 1)), r"shape \(9, 2, 2\)"),
        (lambda path: fid()(draw(9, 0)[:, :1], draw(9, 1)), r"takes images \(2, 2, 1\). Received: \(1, 2, 1\)"),
        (lambda path: fid()(draw(9, 0), draw(9, 1), [1.0] * 9), "no weights"),
        (lambda path: (fid().save_real(path), kid().load_real(path)), "is of FrechetInceptionDistance flatten"),
        (lambda path: metrics.Extractor(kd.networks.mlp(2, 8, 1)), "makes one vector of each. Received: mlp"),
        (lambda path: metrics.Extractor(keras.Sequential([keras.Input((2, 2, 1)), keras.layers.ReLU()])), "one vector"),
    ],
)
def test_bad_input(tmp_path, use, message):
    with pytest.raises(ValueError, match=message):
        use(tmp_path / "x.npz")


def test_statistics_of_another_extractor(tmp_path):
    fid().save_real(tmp_path / "x.npz")
    dense = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(4)], name="dense")
    with pytest.raises(ValueError, match="is of FrechetInceptionDistance flatten .* Expected: .* dense"):
        metrics.FrechetInceptionDistance(dense).load_real(tmp_path / "x.npz")


def test_the_standard_error_of_few_images():
    metric = fid()
    metric.update_state(draw(19, 0), draw(30, 1))
    with pytest.raises(ValueError, match="at least 20"):
        metric.standard_error()
