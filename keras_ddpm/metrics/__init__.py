"""Distances between sets of images in the features of a network: KID, FID, precision and recall, memorization.

    >>> kid = keras_ddpm.metrics.KernelInceptionDistance()
    >>> for batch in held_out:
    ...     kid.update_state(real_images=batch)
    >>> kid.update_state(generated_images=model.sample(2000, seed=0))
    >>> kid.result(), kid.standard_error()
    >>> kid.floor(training_images, 2000)  # the result of as many real images

Images are float arrays `(num, height, width, channels)` in [-1, 1]. They are not rounded to 8 bits here. Features are
collected on the host in float64, so a metric cannot be compiled into a model. A value depends on the number of images
and on the extractor. Report both (`describe`), and the value for as many real images (`floor`).

To add a metric, write a subclass of `_Distance`.
"""

from keras_ddpm.metrics import distances, efficientnet, features, neighbors, probe
from keras_ddpm.metrics.distances import *
from keras_ddpm.metrics.efficientnet import *
from keras_ddpm.metrics.features import *
from keras_ddpm.metrics.neighbors import *
from keras_ddpm.metrics.probe import *

__all__ = [*distances.__all__, *efficientnet.__all__, *features.__all__, *neighbors.__all__, *probe.__all__]
