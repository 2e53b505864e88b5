"""The averaged weights at the end of training."""

import keras
from keras import ops

__all__ = ["EMAWeights"]


class EMAWeights(keras.callbacks.Callback):
    """Leaves the averaged weights in the network when training ends, as `keras.callbacks.SwapEMAWeights` does.

    `sample` and `evaluate` use the average with and without it. Use it if the network itself, `model.network`, goes on
    to other programs. The raw weights are lost, unless a `Checkpoint` holds them.
    """

    def on_train_end(self, logs=None):
        for v, average in zip(self.model.network.weights, self.model.ema_weights):
            v.assign(ops.copy(average))  # two variables of JAX must not share their memory
