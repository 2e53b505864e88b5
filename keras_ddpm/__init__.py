"""Denoising diffusion probabilistic models in Keras 3."""

import inspect as _inspect

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
from keras_ddpm import features as features
from keras_ddpm import guidance as guidance
from keras_ddpm import images as images
from keras_ddpm import layers as layers
from keras_ddpm import likelihood as likelihood
from keras_ddpm import metrics as metrics
from keras_ddpm import networks as networks
from keras_ddpm import optimizers as optimizers
from keras_ddpm import plots as plots
from keras_ddpm import samplers as samplers
from keras_ddpm import saving as saving
from keras_ddpm import schedules as schedules
from keras_ddpm import toys as toys
from keras_ddpm._devices import dtype_policy as dtype_policy
from keras_ddpm._devices import has_accelerator as has_accelerator
from keras_ddpm._devices import keep_memory as keep_memory
from keras_ddpm._replicas import is_chief as is_chief
from keras_ddpm.diffusion import GaussianDiffusion as GaussianDiffusion
from keras_ddpm.model import DiffusionModel as DiffusionModel

__version__ = "0.2.0"


def _own_names(module):
    """A `__dir__` for a module, by which tab completion shows its public names without what it imports."""
    own = {n: v for n, v in vars(module).items() if not n.startswith("_") and not _inspect.ismodule(v)}
    names = [n for n, v in own.items() if (getattr(v, "__module__", None) or __name__).startswith(__name__)]
    return lambda: names


for _module in filter(_inspect.ismodule, list(globals().values())):
    if _module.__name__.startswith(__name__):
        vars(_module)["__dir__"] = _own_names(_module)


def __dir__() -> list[str]:
    internal = {"checkpoints", "diffusion", "ema", "model", "rows", "sampling", "training"}
    return [name for name in globals() if not name.startswith("_") and name not in internal] + ["__version__"]
