"""Distances between sets of features: KID, FID, precision and recall."""

import abc
import copy
import pathlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from keras_ddpm import _checks, _files
from keras_ddpm.metrics.features import Extractor, ExtractorLike
from keras_ddpm.metrics.neighbors import share_inside

__all__ = ["FrechetInceptionDistance", "KernelInceptionDistance", "PrecisionRecall"]


class _Distance(abc.ABC):
    """Base of the metrics, which compare the features of a set of real and a set of generated images.

    Subclasses define `result` and `standard_error`. A set is a list of arrays of features, one for each update.
    """

    def __init__(self, extractor: ExtractorLike, name: str):
        self.name = name
        self.extractor = extractor if isinstance(extractor, Extractor) else Extractor(extractor)
        self.reset_state()

    def __repr__(self) -> str:
        numbers = f"{self.num_real} real and {self.num_generated} generated images"
        return f"<{type(self).__name__} {self.name!r}: {numbers}, extractor {self.extractor.name!r}>"

    @abc.abstractmethod
    def result(self) -> Any:
        """Computes the distance between the two sets."""

    @abc.abstractmethod
    def standard_error(self) -> Any:
        """Estimates the standard error of `result`."""

    def reset_state(self) -> None:
        """Removes all images."""
        self._real: list[np.ndarray] = []
        self.reset_generated()

    def reset_generated(self) -> None:
        """Removes the generated images, for the next model or epoch."""
        self._generated: list[np.ndarray] = []

    def update_state(self, real_images: ArrayLike | None = None, generated_images: ArrayLike | None = None) -> None:
        """Adds images to one set or to both.

        Args:
            real_images: `(num, height, width, channels)` in [-1, 1], or `None`.
            generated_images: the same. The number of images may differ.

        Raises:
            ValueError: if an argument is not an array of images, does not fit the extractor, or holds NaN.
        """
        if real_images is not None:
            self._real.append(self.extractor(real_images))
        if generated_images is not None:
            self._generated.append(self.extractor(generated_images))

    def __call__(self, real_images: ArrayLike | None = None, generated_images: ArrayLike | None = None) -> Any:
        """Calls `update_state` and returns the result."""
        self.update_state(real_images, generated_images)
        return self.result()

    def save_real(self, path: str | pathlib.Path) -> None:
        """Writes the features of the real images to an `.npz` file.

        Raises:
            ValueError: if there are no real images.
        """
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        about = {"metric": type(self).__name__, "extractor": self.extractor.name, "hash": self.extractor.hash}
        np.savez(path, features=np.concatenate(self._real), **about)  # type: ignore[arg-type]

    def load_real(self, path: str | pathlib.Path) -> None:
        """Replaces the real images by those of a file that `save_real` wrote.

        Raises:
            ValueError: if the file belongs to another metric or extractor.
        """
        arrays = _files.arrays(path)
        found = [str(arrays.get(key, "?")) for key in ("metric", "extractor", "hash")]
        expected = [type(self).__name__, self.extractor.name, self.extractor.hash]
        valid = found[::2] == expected[::2] and np.ndim(arrays.get("features", 0)) == 2
        _checks.require(valid, f"{path} must hold features of {' '.join(expected)}", found=" ".join(found))
        self._real = [arrays["features"]]

    @property
    def num_real(self) -> int:
        """Number of real images."""
        return sum(map(len, self._real))

    @property
    def num_generated(self) -> int:
        """Number of generated images."""
        return sum(map(len, self._generated))

    def values(self) -> dict[str, float]:
        """Returns the result and its standard error in a dict, by name."""
        return {self.name: self.result(), f"{self.name}_standard_error": self.standard_error()}

    def describe(self) -> dict[str, Any]:
        """Returns a dict of the values, both numbers of images, and the name and hash of the extractor."""
        about = {"num_real": self.num_real, "num_generated": self.num_generated}
        return {**self.values(), **about, "extractor": self.extractor.name, "extractor_hash": self.extractor.hash}

    def compare(self, generated_images: ArrayLike) -> Any:
        """Replaces the generated images and returns the result."""
        self.reset_generated()
        return self(generated_images=generated_images)

    def floor(self, images: np.ndarray, num: int, num_draws: int = 10, seed: int = 0) -> tuple[Any, Any]:
        """Computes the result for real images in place of the generated ones, as a reference. The state is kept.

        Args:
            images: other real images than the metric holds. The extractor must not be trained on them.
            num: number of images in a draw, without replacement.
            num_draws: number of draws.
            seed: seed of the draws.

        Returns:
            Mean and standard deviation of the results, each of the type of `result`. The deviation does not include the
            randomness of the real images in the metric.

        Raises:
            ValueError: if `num` is larger than the number of images.
        """
        _checks.counts(high=len(images), num=num)
        random = np.random.default_rng(seed)
        chosen = [random.choice(len(images), num, replace=False) for _ in range(num_draws)]
        needed, rows = np.unique(chosen, return_inverse=True)
        features = self.extractor(images[needed])
        trial, values = copy.copy(self), []
        for indices in rows.reshape(num_draws, num):
            trial._generated = [features[indices]]
            values.append(trial.result())
        return np.mean(values, axis=0).tolist(), np.std(values, axis=0, ddof=1).tolist()

    def _features(self, at_least):
        """The features of both sets, which must have at least `at_least` images."""
        _checks.counts(low=at_least, num_real=self.num_real, num_generated=self.num_generated)
        return np.concatenate(self._real), np.concatenate(self._generated)


class KernelInceptionDistance(_Distance):
    """KID: the unbiased squared maximum mean discrepancy of features, with the kernel k(x, y) = (x·y / dim + 1)³.

    The smaller set is split at random into k disjoint subsets of at least `subset_size` images, the larger set into as
    many. The result is the mean of the k distances, a Python float. (Papers often report it times 1000.) Its expected
    value is 0 if both sets come from the same distribution. The standard error is the deviation of the k values / √k.

    Args:
        extractor: an `Extractor`, or its argument.
        subset_size: smallest number of images in a subset, at least 2.
        seed: seed of the split.
        name: name of the metric.

    Raises:
        ValueError: by `result`, if a set has fewer images than a subset.

    Reference: Bińkowski et al., 2018, Eq. 4 and section 4.
    """

    def __init__(self, extractor: ExtractorLike = None, subset_size: int = 1000, seed: int = 0, name: str = "kid"):
        _checks.counts(low=2, subset_size=subset_size)
        self.subset_size = subset_size
        self.seed = seed
        super().__init__(extractor, name)

    def _distances(self):
        sets = self._features(at_least=self.subset_size)
        num = min(map(len, sets)) // self.subset_size
        random = np.random.default_rng(self.seed)
        parts = [np.array_split(features[random.permutation(len(features))], num) for features in sets]
        return [_squared_discrepancies(*_united(x, y))[0] for x, y in zip(*parts)]

    def result(self) -> float:
        return float(np.mean(self._distances()))

    def standard_error(self) -> float:
        """Estimates the standard error of `result`. NaN if there is one subset."""
        distances = self._distances()
        return float(np.std(distances, ddof=1) / len(distances) ** 0.5) if len(distances) > 1 else float("nan")

    def p_value(self, num_permutations: int = 1000, max_images: int = 1000) -> float:
        """Estimates the probability of a distance at least this large if both sets come from one distribution.

        This is a permutation test: the images are repeatedly divided into two sets at random. The p-value is the share
        of distances that are at least as large as the original distance, which is counted among them.

        Args:
            num_permutations: number of permutations. The smallest possible p-value is 1 / (1 + num_permutations).
            max_images: largest number of images of each set. Larger sets are reduced at random.

        Raises:
            ValueError: if a set has fewer than 2 images, or an argument is too small.

        Reference: Gretton et al., 2012, section 3 and theorem 12.
        """
        _checks.counts(num_permutations=num_permutations)
        _checks.counts(low=2, max_images=max_images)
        random = np.random.default_rng(self.seed)
        features, first = _united(*(x[random.permutation(len(x))[:max_images]] for x in self._features(at_least=2)))
        divided = random.permuted(np.repeat(first, num_permutations, axis=0), axis=1)
        value, *values = _squared_discrepancies(features, np.concatenate([first, divided]))
        return float((1 + np.sum(values >= value)) / (1 + num_permutations))


def _united(x, y):
    """Joins the features of two sets, and makes a row that is 1 for the first set and 0 for the second."""
    return np.concatenate([x, y]), np.repeat([1.0, 0.0], [len(x), len(y)])[None]


def _squared_discrepancies(features, first):
    """Computes the unbiased estimate for each row of `first`, which divides `features` into two sets, see `_united`."""
    within_first = with_first = total = 0.0
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // 1000)):
        kernel = (features[rows] @ features.T / features.shape[1] + 1) ** 3
        kernel[np.arange(len(rows)), rows] = 0  # the pairs of an image with itself
        within_first += np.sum(first @ kernel.T * first[:, rows], axis=1)
        with_first += first[:, rows] @ kernel.sum(axis=1)
        total += kernel.sum()
    between = with_first - within_first
    within_second = total - within_first - 2 * between
    n = first.sum(axis=1)
    m = len(features) - n
    return within_first / (n * (n - 1)) + within_second / (m * (m - 1)) - 2 * between / (n * m)


class PrecisionRecall(_Distance):
    """Precision, the share of generated images that look real, and recall, the share of real images that are covered.

    Every image of a set has a ball that reaches to its k-th nearest neighbor in the set. Precision is the share of the
    generated images that lie in a ball of a real one. Recall is the share of the real images that lie in a ball of a
    generated one. The result is the pair of both. It depends on the numbers of images, so use as many of each set.

    Args:
        extractor: an `Extractor`, or its argument.
        k: which neighbor.
        name: name of the metric.

    Raises:
        ValueError: if k is not a positive integer, and by `result`, if a set has k images or fewer.

    Reference: Kynkäänniemi et al., 2019, section 2 and Eq. 1-2.
    """

    def __init__(self, extractor: ExtractorLike = None, k: int = 3, name: str = "precision_recall"):
        _checks.counts(k=k)
        self.k = k
        super().__init__(extractor, name)

    def result(self) -> tuple[float, float]:
        real, generated = self._features(at_least=self.k + 1)
        return share_inside(generated, real, self.k), share_inside(real, generated, self.k)

    def standard_error(self) -> tuple[float, ...]:
        """Computes the binomial standard error of each share p given the other set, sqrt(p (1 − p) / n)."""
        shares = zip(self.result(), (self.num_generated, self.num_real))
        return tuple(float(np.sqrt(p * (1 - p) / n)) for p, n in shares)

    def values(self) -> dict[str, float]:
        names = ("precision", "recall", "precision_standard_error", "recall_standard_error")
        return dict(zip(names, self.result() + self.standard_error()))


class FrechetInceptionDistance(_Distance):
    """FID: the squared 2-Wasserstein distance between Gaussians with the means and covariances of the features.

    The result is a Python float. It falls with the number of images, so only values of equal numbers are comparable.
    The standard error is a jackknife estimate: it uses the values without each tenth of the images.

    Args:
        extractor: an `Extractor`, or its argument.
        name: name of the metric.

    Raises:
        ValueError: by `result`, if a set has fewer than 2 images, and by `standard_error`, if a set has fewer than 20.

    Reference: Heusel et al., 2017, Eq. 6.
    """

    num_groups = 10

    def __init__(self, extractor: ExtractorLike = None, name: str = "fid"):
        super().__init__(extractor, name)

    def result(self) -> float:
        return _frechet_distance(*map(_gaussian, self._features(at_least=2)))

    def standard_error(self) -> float:
        sets = self._features(at_least=2 * self.num_groups)
        groups = [slice(group, None, self.num_groups) for group in range(self.num_groups)]
        values = [_frechet_distance(*(_gaussian(np.delete(x, group, axis=0)) for x in sets)) for group in groups]
        return float(np.sqrt((self.num_groups - 1) * np.var(values)))


def _gaussian(x):
    """Mean and covariance of `(num, dim)`."""
    return x.mean(axis=0), np.atleast_2d(np.cov(x.T))


def _frechet_distance(p, q):
    """Distance of two Gaussians `(mean, covariance)`. tr √(C D) is computed as tr √(√C D √C), which is symmetric."""
    (mean_p, c), (mean_q, d) = p, q
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ d @ root), 0)).sum()
    return float(np.sum((mean_p - mean_q) ** 2) + np.trace(c) + np.trace(d) - 2 * cross)
