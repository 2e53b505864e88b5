"""A linear classifier of features, which tells whether samples belong to the class asked for."""

import numpy as np
from numpy.typing import ArrayLike

from keras_ddpm import _checks

__all__ = ["LinearProbe"]


class LinearProbe:
    """Classifies features by ridge regression of the one-hot classes on the standardized features.

    >>> probe = LinearProbe(extractor(training_images), labels)
    >>> probe.accuracy(extractor(held_out_images), held_out_labels)  # how far the probe can be trusted
    >>> probe.accuracy(extractor(samples), requested_labels)

    The ridge is the power of ten, times the number of images, with the best leave-one-out accuracy. All leave-one-out
    predictions come from one eigendecomposition.

    Args:
        features: `(num, dim)`.
        labels: `(num,)`.

    Attributes:
        leave_one_out: share of the images that are classified correctly by a fit without them.

    Raises:
        ValueError: if there are fewer than two images, or the number of labels differs.

    Reference: Hastie, Tibshirani and Friedman, 2009, Eq. 7.64 (leave-one-out residuals of linear fits).
    """

    def __init__(self, features: ArrayLike, labels: ArrayLike):
        features, labels = np.asarray(features, "float64"), np.asarray(labels)
        valid = features.ndim == 2 and labels.shape == features.shape[:1] and len(labels) > 1
        _checks.require(valid, "Expected two vectors or more, each with a label", x=features.shape, labels=labels.shape)
        num = len(labels)
        self.mean, scale = features.mean(axis=0), features.std(axis=0)
        self.scale = np.where(scale > 0, scale, 1)
        self.classes, indices = np.unique(labels, return_inverse=True)
        targets = np.eye(len(self.classes))[indices]
        self.prior = targets.mean(axis=0)
        x = self._standardized(features)
        values, vectors = np.linalg.eigh(x.T @ x)
        x = x @ vectors
        self.leave_one_out = -1.0
        for ridge in num * 10.0 ** np.arange(1, -5, -1):
            weights = x.T @ (targets - self.prior) / (values + ridge)[:, None]
            leverages = x**2 @ (1 / (values + ridge)) + 1 / num
            residuals = targets - self.prior - x @ weights
            left_out = targets - residuals / (1 - leverages)[:, None]
            accuracy = float(np.mean(left_out.argmax(axis=1) == indices))
            if accuracy > self.leave_one_out:
                self.leave_one_out, self.ridge, self.weights = accuracy, ridge, vectors @ weights

    def _standardized(self, features: ArrayLike) -> np.ndarray:
        return (np.asarray(features, "float64") - self.mean) / self.scale

    def predict(self, features: ArrayLike) -> np.ndarray:
        """Returns the label `(num,)` of each row of `features`."""
        scores = self._standardized(features) @ self.weights + self.prior
        return self.classes[scores.argmax(axis=1)]

    def accuracy(self, features: ArrayLike, labels: ArrayLike) -> float:
        """Computes the share of features whose predicted label is the given one."""
        return float(np.mean(self.predict(features) == np.asarray(labels)))
