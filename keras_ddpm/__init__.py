"""Denoising diffusion probabilistic models in Keras 3."""

from keras_ddpm import callbacks
from keras_ddpm import datasets
from keras_ddpm import editing
from keras_ddpm import hardware
from keras_ddpm import images
from keras_ddpm import layers
from keras_ddpm import likelihood
from keras_ddpm import metrics
from keras_ddpm import networks
from keras_ddpm import plots
from keras_ddpm import samplers
from keras_ddpm import schedules
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.model import DiffusionModel

__all__ = [
    "DiffusionModel",
    "GaussianDiffusion",
    "callbacks",
    "datasets",
    "editing",
    "hardware",
    "images",
    "layers",
    "likelihood",
    "metrics",
    "networks",
    "plots",
    "samplers",
    "schedules",
]
