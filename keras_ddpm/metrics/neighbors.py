"""Nearest neighbors in features: which samples look real, and which are copies of training images."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from keras_ddpm import _checks
from keras_ddpm.metrics.features import Extractor, ExtractorLike

__all__ = ["Memorisation", "memorisation"]


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """The result of `memorisation`.

    Attributes:
        share: share of the generated images whose distance to the training set is below the quantile of the held-out
            images. Its expected value is `quantile` for a model that does not copy.
        standard_error: standard error of the share, from the numbers of generated and held-out images.
        quantile: the argument.
        nearest: `(num,)`. The index of the training image nearest to each generated image.
        distances: `(num,)`. The distance between the two, in features.
        held_out_distances: distances of the held-out images to their nearest training images.
    """

    share: float
    standard_error: float
    quantile: float
    nearest: np.ndarray
    distances: np.ndarray
    held_out_distances: np.ndarray


def memorisation(
    extractor: ExtractorLike,
    training_images: ArrayLike,
    held_out_images: np.ndarray,
    generated_images: ArrayLike,
    quantile: float = 0.05,
) -> Memorisation:
    """Tests whether generated images are copies of training images, by their distance to the nearest one.

    By definition a share `quantile` of held-out images lies nearer to the training set than that quantile of their
    distances. Samples of a model that does not copy do so equally often, on average. A larger share means copies, or
    images with less detail than photographs. Look at the pairs to tell which.

    Args:
        extractor: an `Extractor`, or its argument.
        training_images: `(num, height, width, channels)` in [-1, 1]. All images that the model was trained on,
            including mirrored ones.
        held_out_images: other images from the same source.
        generated_images: samples of the model.
        quantile: number in (0, 1).

    Returns:
        A `Memorisation`.

    Raises:
        ValueError: if images do not fit the extractor, `quantile` is not in (0, 1), or there are fewer than
            1 / quantile held-out images.
    """
    _checks.require(_checks.is_positive(quantile) and quantile < 1, "`quantile` must be in (0, 1)", quantile=quantile)
    num = len(held_out_images)
    _checks.require(num >= 1 / quantile, "Too few held-out images", num=num, quantile=quantile)
    extractor = extractor if isinstance(extractor, Extractor) else Extractor(extractor)
    training = extractor(training_images)
    nearest, distances = _nearest(extractor(generated_images), training)
    _, held_out = _nearest(extractor(held_out_images), training)
    # With this definition of a sample quantile, the expected share of other samples below it is exactly `quantile`.
    share = float(np.mean(distances < np.quantile(held_out, quantile, method="weibull")))
    error = float(np.sqrt(share * (1 - share) / len(distances) + quantile * (1 - quantile) / len(held_out)))
    return Memorisation(share, error, quantile, nearest, distances, held_out)


def _nearest(x, y):
    """For each row of x, the index of the nearest row of y, and its distance."""
    found = [(rows.argmin(axis=1), rows.min(axis=1)) for rows in _squared_distances(x, y)]
    indices, squares = map(np.concatenate, zip(*found))
    return indices, np.sqrt(squares)


def share_inside(x, y, k):
    """The share of x that lies in a ball around one of y, which reaches to its k-th neighbor in y."""
    radius = np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _squared_distances(y, y)])
    return float(np.concatenate([np.any(rows <= radius, axis=1) for rows in _squared_distances(x, y)]).mean())


def _squared_distances(x, y, max_pairs=10_000_000):
    """Yields the matrix of the squared distances between x and y, in blocks of rows."""
    lengths = np.sum(y**2, axis=1)
    for part in np.array_split(x, -(-len(x) * len(y) // max_pairs)):
        yield np.maximum(np.sum(part**2, axis=1)[:, None] - 2 * part @ y.T + lengths, 0)
