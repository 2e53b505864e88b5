"""Denoising diffusion probabilistic models in Keras 3."""

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("jax", "tensorflow", "torch"):
        raise
    _hint = f"Install it by `pip install {error.name}`, or set KERAS_BACKEND to another backend."
    raise ModuleNotFoundError(f"Keras' backend {error.name} is not installed. {_hint}", name=error.name) from error
from keras_ddpm import callbacks as callbacks
from keras_ddpm import datasets as datasets
from keras_ddpm import distillation as distillation
from keras_ddpm import editing as editing
from keras_ddpm import export as export
from keras_ddpm import guidance as guidance
from keras_ddpm import images as images
from keras_ddpm import likelihood as likelihood
from keras_ddpm import metrics as metrics
from keras_ddpm import networks as networks
from keras_ddpm import optimizers as optimizers
from keras_ddpm import plots as plots
from keras_ddpm import samplers as samplers
from keras_ddpm import saving as saving
from keras_ddpm import schedules as schedules
from keras_ddpm._backend.devices import dtype_policy as dtype_policy
from keras_ddpm._backend.devices import has_accelerator as has_accelerator
from keras_ddpm._backend.devices import keep_memory as keep_memory
from keras_ddpm._backend.replicas import is_chief as is_chief
from keras_ddpm.datasets import toys as toys
from keras_ddpm.diffusion import GaussianDiffusion as GaussianDiffusion
from keras_ddpm.metrics import features as features
from keras_ddpm.model import DiffusionModel as DiffusionModel
from keras_ddpm.networks import layers as layers

__version__ = "0.2.0"

__all__ = [
    "DiffusionModel",
    "GaussianDiffusion",
    "callbacks",
    "datasets",
    "distillation",
    "dtype_policy",
    "editing",
    "export",
    "features",
    "guidance",
    "has_accelerator",
    "images",
    "is_chief",
    "keep_memory",
    "layers",
    "likelihood",
    "metrics",
    "networks",
    "optimizers",
    "plots",
    "samplers",
    "saving",
    "schedules",
    "toys",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
