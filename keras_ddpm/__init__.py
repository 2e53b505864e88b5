"""Denoising diffusion probabilistic models in Keras 3."""

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("jax", "tensorflow", "torch"):
        raise
    _hint = f"Install it by `pip install {error.name}`, or set KERAS_BACKEND to another backend."
    raise ModuleNotFoundError(f"Keras' backend {error.name} is not installed. {_hint}", name=error.name) from error
from keras_ddpm import (
    callbacks,
    datasets,
    distillation,
    editing,
    export,
    guidance,
    images,
    likelihood,
    losses,
    metrics,
    networks,
    optimizers,
    plots,
    samplers,
    saving,
    schedules,
)
from keras_ddpm._backend.devices import dtype_policy, has_accelerator, keep_memory
from keras_ddpm._backend.replicas import is_chief
from keras_ddpm.datasets import toys
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.metrics import features
from keras_ddpm.model import DiffusionModel
from keras_ddpm.networks import layers

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
    "losses",
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
