"""Files of models: whole or compact, the same for every backend, and how they are loaded."""

from keras_ddpm.saving.compact import compress as compress
from keras_ddpm.saving.loading import PRESETS as PRESETS
from keras_ddpm.saving.loading import load_model as load_model

__all__ = ["compress", "PRESETS", "load_model"]
