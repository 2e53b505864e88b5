"""Distances between sets of images, compared with their definitions and closed forms."""

import keras
import numpy as np
import pytest
from test_features import draw, flatten, flowers

from keras_ddpm import features, metrics, toys
from keras_ddpm.metrics import distances


def pixels(images):
    """The same as `flatten` without a model, for tests of many sets."""
    return images.reshape(len(images), -1)


def kid(**options):
    return metrics.KernelInceptionDistance(flatten(), **options)


def fid():
    return metrics.FrechetInceptionDistance(flatten())


def test_metrics_are_plain_objects():
    assert metrics.Extractor is features.Extractor and metrics.train_classifier is features.train_classifier
    metric = kid(name="pixels")
    assert not isinstance(metric, keras.metrics.Metric)
    metric.update_state(draw(3, 0), draw(4, 1))
    expected = "<KernelInceptionDistance 'pixels': 3 real and 4 generated images, extractor 'flatten'>"
    assert repr(metric) == expected
    metric.reset_state()
    assert metric.num_real == metric.num_generated == 0
    with pytest.raises(TypeError):  # weights of images
        metric(draw(9, 0), draw(9, 1), [1.0] * 9)


def test_kid_is_its_definition():
    """The double sums of Bińkowski et al., 2018, Eq. 4."""
    real, generated = draw(5, 0), draw(6, 1, -0.5)
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
    """The mean over pairs of real sets is 0, and the standard error is the deviation between the pairs."""
    metric, values, errors = metrics.KernelInceptionDistance(pixels, subset_size=50), [], []
    for seed in range(200):
        metric.reset_state()
        metric.update_state(draw(300, 2 * seed), draw(400, 2 * seed + 1))
        values.append(metric.result())
        errors.append(metric.standard_error())
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(values) < 1.25


def test_fid_of_known_moments():
    """Equals the closed form if the covariances commute, and SciPy's square root of a matrix otherwise."""
    rng = np.random.default_rng(0)
    for same_axes in (True, False):
        axes = [np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2)]
        spectra = rng.uniform(0.01, 2, (2, 4))
        c, d = ((a * s) @ a.T for a, s in zip([axes[0], axes[0 if same_axes else 1]], spectra))
        means = rng.normal(size=(2, 4))
        got = distances._frechet_distance((means[0], c), (means[1], d))
        if same_axes:
            cross = np.sqrt(spectra[0] * spectra[1]).sum()
        else:
            cross = np.trace(pytest.importorskip("scipy.linalg").sqrtm(c @ d)).real
        assert got == pytest.approx(np.sum((means[0] - means[1]) ** 2) + spectra.sum() - 2 * cross, rel=1e-9)


def test_fid_uses_unbiased_covariances():
    """They are divided by n - 1. There may be fewer images than features."""
    for num in (3, 200):
        real, generated = draw(num, 0), draw(2 * num, 1, 0.5, 0.5)
        x, y = (images.reshape(-1, 4).astype("float64") for images in (real, generated))
        c, d = np.cov(x.T), np.cov(y.T)
        cross = np.sqrt(np.maximum(np.linalg.eigvals(c @ d).real, 0)).sum()
        expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c) + np.trace(d) - 2 * cross
        assert fid()(real, generated) == pytest.approx(expected, rel=1e-6)


def test_fid_knows_its_error():
    metric, values, errors = metrics.FrechetInceptionDistance(pixels), [], []
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
    """The distance of drawn flowers grows with the strength of each corruption."""
    flowers, _ = toys.procedural_flowers(600, 8)
    real, others = flowers[:300], flowers[300:]
    random = np.random.default_rng(0)
    noise = random.standard_normal(others.shape).astype("float32")
    corruptions = {
        "noise": [np.clip(others + level * noise, -1, 1) for level in (0.1, 0.3)],
        "blur": [sum(np.roll(others, shift, axis=2) for shift in range(width)) / width for width in (2, 4)],
        "color": [np.clip(others + [shift, 0, 0], -1, 1) for shift in (0.1, 0.3)],
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


def test_p_values_of_the_same_distribution_are_uniform():
    """The p-value of different distributions is the smallest that the number of permutations allows."""
    metric, values = metrics.KernelInceptionDistance(pixels, subset_size=2), []
    for seed in range(200):
        metric.reset_state()
        metric.update_state(draw(30, 2 * seed), draw(40, 2 * seed + 1))
        values.append(metric.p_value(num_permutations=99))
    # Kolmogorov-Smirnov test at the level 1/1000: the largest gap to the uniform distribution.
    gap = np.max(np.abs(np.sort(values) - (np.arange(200) + 0.5) / 200))
    assert gap < 1.95 / 200**0.5 + 0.01
    metric.update_state(generated_images=draw(40, 0, shift=0.5))
    assert metric.p_value(num_permutations=999, max_images=30) == 1 / 1000


def test_distances_of_many_images_are_summed_in_parts():
    """The kernel matrix of many images is summed in parts, with the result of the whole matrix."""
    x, y = (draw(num, seed).reshape(num, 4).astype("float64") for seed, num in enumerate((1300, 900)))
    (got,) = distances._squared_discrepancies(*distances._united(x, y))
    k = (np.concatenate([x, y]) @ np.concatenate([x, y]).T / 4 + 1) ** 3
    expected = (k[:1300, :1300].sum() - np.trace(k[:1300, :1300])) / (1300 * 1299)
    expected += (k[1300:, 1300:].sum() - np.trace(k[1300:, 1300:])) / (900 * 899)
    assert got == pytest.approx(expected - 2 * k[:1300, 1300:].mean(), rel=1e-9)


def test_precision_and_recall_are_their_definition():
    """Compares with loops over the definition of Kynkäänniemi et al., 2019, Eq. 1-2."""
    real, generated = draw(40, 0), draw(30, 1, 0.2, 0.4)
    metric = metrics.PrecisionRecall(flatten(), k=2)
    got = metric(real, generated)

    def share(x, y):
        inside = 0
        for a in x:
            inside += any(np.linalg.norm(a - b) <= sorted(np.linalg.norm(b - c) for c in y)[2] for b in y)
        return inside / len(x)

    assert got == (share(generated, real), share(real, generated)) and 0 < min(got) and max(got) < 1
    assert metric.standard_error() == pytest.approx(
        (np.sqrt(got[0] * (1 - got[0]) / 30), np.sqrt(got[1] * (1 - got[1]) / 40))
    )
    about = metric.describe()
    assert (about["precision"], about["recall"]) == got and about["num_generated"] == 30


def test_floor_uses_real_images_and_keeps_the_generated_ones():
    metric = kid(subset_size=50)
    metric.update_state(draw(200, 0), draw(60, 1, 0.5))
    before = metric.result()
    mean, std = metric.floor(draw(300, 2), 60)
    assert metric.result() == before and abs(mean) < 3 * std < before
    with pytest.raises(ValueError, match="`num` must be an integer in 1..9. Received: num=10"):
        metric.floor(draw(9, 0), 10)


def test_dropped_modes_and_corruptions_in_features():
    """Both distances rise. Precision falls with noise, and recall with blur and with missing kinds."""
    training, held_out, others, labels, classifier = flowers()
    noisy = np.clip(others + 0.8 * np.random.default_rng(0).standard_normal(others.shape), -1, 1)
    blurred = sum(np.roll(others, (i, j), axis=(1, 2)) for i in range(4) for j in range(4)) / 16
    colored = np.clip(others + [0.7, -0.3, 0], -1, 1)
    one_kind = np.resize(others[labels == 0], others.shape)
    for metric in (
        metrics.KernelInceptionDistance(classifier, subset_size=75),
        metrics.FrechetInceptionDistance(classifier),
    ):
        metric.update_state(real_images=held_out)
        limit = metric.compare(others) + 3 * metric.standard_error()
        for name, images in {"noise": noisy, "color": colored, "one kind": one_kind}.items():
            assert metric.compare(images) > limit, (metric.name, name)
    metric = metrics.PrecisionRecall(classifier)
    metric.update_state(real_images=held_out)
    precision, recall = metric.compare(others)
    assert metric.compare(noisy)[0] < precision - 0.2
    assert metric.compare(blurred)[1] < recall - 0.15
    of_one = metric.compare(one_kind)
    assert of_one[0] > precision - 0.15 and of_one[1] < recall - 0.5


def test_the_share_of_memorised_images_is_the_quantile_on_average():
    """This holds for samples of the distribution of the data. The standard error is the deviation of the share."""
    shares, errors = [], []
    for seed in range(300):
        found = metrics.memorisation(pixels, *(draw(num, [seed, num]) for num in (100, 41, 60)), quantile=0.1)
        shares.append(found.share)
        errors.append(found.standard_error)
    assert abs(np.mean(shares) - 0.1) < 3 * np.std(shares) / 300**0.5
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / np.std(shares) < 1.25
    with pytest.raises(ValueError, match="Too few held-out images. Received: num=9, quantile=0.1"):
        metrics.memorisation(pixels, draw(9, 0), draw(9, 1), draw(9, 2), quantile=0.1)


def test_copies_are_found():
    training, held_out, others, _, classifier = flowers()
    fresh = metrics.memorisation(classifier, training, held_out, others)
    assert abs(fresh.share - 0.05) < 4 * np.sqrt(2 * 0.05 * 0.95 / 300) and fresh.quantile == 0.05
    assert fresh.distances.shape == (300,) and fresh.distances.min() > 0
    copied = others.copy()
    copied[:60] = training[100:160] + np.float32(1e-3)
    copies = metrics.memorisation(metrics.Extractor(classifier), training, held_out, copied)
    assert copies.share > 0.2 and copies.share - fresh.share > 4 * copies.standard_error
    assert np.array_equal(copies.nearest[:60], np.arange(100, 160))
    with pytest.raises(ValueError, match=r"in \(0, 1\). Received: quantile=1"):
        metrics.memorisation(classifier, training, held_out, others, quantile=1)


def save(path):
    metric = fid()
    metric.update_state(real_images=draw(9, 0))
    metric.save_real(path)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda path: kid(subset_size=10)(draw(9, 0), draw(20, 1)), "at least 10. Received: num_real=9"),
        (lambda path: kid(subset_size=1), "subset_size=1"),
        (lambda path: kid()(draw(9, 0), draw(1, 1)), "at least 1000"),
        (lambda path: metrics.PrecisionRecall(flatten(), k=0), "k=0"),
        (lambda path: kid().p_value(max_images=1), "max_images=1"),
        (lambda path: kid().p_value(num_permutations=0), "num_permutations=0"),
        (lambda path: metrics.PrecisionRecall(flatten())(draw(9, 0), draw(3, 1)), "at least 4"),
        (lambda path: fid()(draw(9, 0), draw(1, 1)), "at least 2. Received: num_generated=1"),
        (lambda path: fid()(generated_images=draw(9, 0)), "Received: num_real=0"),
        (lambda path: fid()(draw(9, 0) * np.nan, draw(9, 1)), "NaN"),
        (lambda path: fid()(draw(9, 0)[..., 0], draw(9, 1)), r"shape=\(9, 2, 2\)"),
        (lambda path: fid()(draw(9, 0)[:, :1], draw(9, 1)), r"takes images \(2, 2, 1\). Received: shape=\(1, 2, 1\)"),
        (lambda path: fid().save_real(path), "at least one"),
        (lambda path: (save(path), kid().load_real(path)), "of Kernel.* found='FrechetInceptionDistance flatten"),
    ],
)
def test_bad_input(tmp_path, use, message):
    with pytest.raises(ValueError, match=message):
        use(tmp_path / "x.npz")


def test_statistics_of_another_extractor(tmp_path):
    save(tmp_path / "x.npz")
    dense = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(4)], name="dense")
    with pytest.raises(ValueError, match="FrechetInceptionDistance dense .* found='FrechetInceptionDistance flatten"):
        metrics.FrechetInceptionDistance(dense).load_real(tmp_path / "x.npz")


def test_the_standard_error_of_few_images():
    metric = fid()
    metric.update_state(draw(19, 0), draw(30, 1))
    with pytest.raises(ValueError, match="at least 20"):
        metric.standard_error()
