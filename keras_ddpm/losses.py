"""Losses of images for `compile`, beside those of Keras."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ddpm import _checks
from keras_ddpm.conditions import seen

__all__ = ["PerceptualLoss"]


class PerceptualLoss(keras.losses.Loss):
    """The squared error of images, plus their distance in the features of a trained network.

    The squared error alone makes petals into brush strokes, as a network that is not sure of an edge predicts the mean
    of what it could be. The model must predict x_0 (`GaussianDiffusion(prediction="x0")`). From strong noise, the mean
    of many images is the right prediction. So the distance counts where the squared error is small.

    At each pixel of each map, the channels are divided by their length. The distance is the squared difference of these
    vectors. Its means over the pixels of each map are added.

    A model that is compiled with this loss is saved without it: call `compile` again after loading.

    >>> network = metrics.efficientnet_lite(2)
    >>> model.compile(loss=losses.PerceptualLoss(network, 0.1, size=96), optimizer="adam")

    Args:
        features: function from images `(batch, height, width, 3)` in [-1, 1] to a list of maps `(batch, ..., channels)`
            or vectors `(batch, channels)`, through which gradients flow: a Keras model, or a function of the backend.
        weight: factor of the distance, positive.
        size: side to which images are enlarged first; `None` to leave them as they are.
        max_error: the distance counts for images whose mean squared error is below this, positive. Samples are less
            varied if it counts for all.

    Returns:
        When called with images of the data and predicted images: the loss of each image, `(batch,)`.

    Raises:
        ValueError: if `features` is not a function, or another argument is not positive.

    Reference: Zhang et al., 2018 ("The unreasonable effectiveness of deep features as a perceptual metric"), Eq. 1,
        with equal weights; Ma et al., 2026 ("PixelGen"), on training with it.
    """

    def __init__(
        self, features: Callable, weight: float = 0.1, size: int | None = None, max_error: float = 0.1, **kwargs
    ):
        super().__init__(**kwargs)
        _checks.require(callable(features), "`features` must be a function", features=features)
        for name, value in {"weight": weight, "max_error": max_error}.items():
            _checks.require(_checks.is_positive(value), f"`{name}` must be positive", **{name: value})
        _checks.counts(optional=True, size=size)
        self.features, self.weight, self.size, self.max_error = features, weight, size, max_error

    def call(self, y_true: Any, y_pred: Any) -> Any:
        distance = 0.0
        for of_data, of_prediction in zip(self._maps(y_true), self._maps(y_pred)):
            squares = ops.sum((ops.stop_gradient(of_data) - of_prediction) ** 2, axis=-1)
            distance += ops.mean(ops.reshape(squares, (ops.shape(squares)[0], -1)), axis=-1)
        error = ops.mean((y_true - y_pred) ** 2, axis=(1, 2, 3))
        return error + ops.where(error < self.max_error, self.weight * distance, 0.0)

    def _maps(self, images):
        """The maps of images. Their channels have length 1."""
        if self.size is not None:
            images = seen(images, None, None, (self.size, self.size))
        maps = [ops.cast(v, "float32") for v in self.features(images)]
        return [v * ops.rsqrt(ops.sum(v * v, axis=-1, keepdims=True) + 1e-6) for v in maps]
