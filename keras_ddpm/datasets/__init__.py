"""Data sets: batches of x_0 for `DiffusionModel.fit`.

Each source (a data set of TensorFlow Datasets, a folder, arrays) is decoded, cropped and resized once, into 8-bit
images in memory. `Batches` shuffles them, flips them and scales them to [-1, 1].

To add a source, write a function that makes an array of images and passes it to `Batches`. Only this module imports
TensorFlow, and only to read TensorFlow Datasets.
"""

from keras_ddpm.datasets.batches import Batches
from keras_ddpm.datasets.sources import ENDINGS, from_arrays, from_folder, from_tfds, oxford_flowers
from keras_ddpm.datasets.toys import FLOWER_KINDS, moons, procedural_flowers

__all__ = [
    "Batches",
    "ENDINGS",
    "from_arrays",
    "from_folder",
    "from_tfds",
    "oxford_flowers",
    "FLOWER_KINDS",
    "moons",
    "procedural_flowers",
]
