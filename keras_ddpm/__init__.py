"""Denoising diffusion probabilistic models in Keras 3."""

from keras_ddpm import callbacks as callbacks
from keras_ddpm import datasets as datasets
from keras_ddpm import editing as editing
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
from keras_ddpm.diffusion import GaussianDiffusion as GaussianDiffusion
from keras_ddpm.model import DiffusionModel as DiffusionModel

__version__ = "0.2.0"


def __dir__() -> list[str]:
    internal = {"checkpoints", "diffusion", "ema", "model", "sampling", "training"}
    return [name for name in globals() if not name.startswith("_") and name not in internal] + ["__version__"]
