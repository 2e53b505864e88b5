"""Optimizers."""

from typing import Any

import keras

from keras_ddpm._backend import devices

__all__ = ["Adam"]


@keras.saving.register_keras_serializable(package="keras_ddpm")
class Adam(keras.optimizers.Adam):
    """Keras' Adam. With PyTorch on a CPU it updates each variable in one pass over memory.

    It takes the arguments of `keras.optimizers.Adam` and computes the same updates. A file with this optimizer can be
    loaded on every backend.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        adam_step(self, gradient, variable, learning_rate)


@devices.fast_on_torch
def adam_step(optimizer: Adam, gradient: Any, variable: Any, learning_rate: Any) -> None:
    """Updates one variable as `keras.optimizers.Adam` does."""
    super(Adam, optimizer).update_step(gradient, variable, learning_rate)
