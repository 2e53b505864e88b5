"""Data sets: batches of x_0 for `DiffusionModel.fit`.

Each source (a data set of TensorFlow Datasets, a folder, arrays) is decoded, cropped and resized once, into 8-bit
images in memory. `Batches` shuffles them, flips them and scales them to [-1, 1].

To add a source, write a function that makes an array of images and passes it to `Batches`. Only this module imports
TensorFlow, and only to read TensorFlow Datasets.
"""

from keras_ddpm.datasets import batches, sources, toys
from keras_ddpm.datasets.batches import *
from keras_ddpm.datasets.sources import *
from keras_ddpm.datasets.toys import *

__all__ = [*batches.__all__, *sources.__all__, *toys.__all__]
