"""Files of models: whole or compact, the same for every backend, and how they are loaded."""

from keras_ddpm.saving.compact import compress
from keras_ddpm.saving.loading import PRESETS, load_model

__all__ = ["compress", "PRESETS", "load_model"]
