"""Watching the loss. `DiffusionModel.fit` adds this callback."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm._backend import replicas

__all__ = ["LossWatch", "loss_of"]


def loss_of(model: Any, y: Any, x_0: Any, t: Any, noise: Any, labels: Any = None, weight: Any = None) -> float:
    """The loss that Keras computes in training if the network predicts `y`."""
    inputs = [model.diffusion.q_sample(x_0, t, noise), t]
    inputs += model.condition.network_inputs(labels, len(x_0)) if model.condition else ()
    target = model.diffusion.target(x_0, t, noise)
    # The scope hides the losses that layers have added in the last call. Metrics stay as they are.
    with keras.StatelessScope([(v, v.value) for v in model.variables]):
        loss = model.compute_loss(tuple(map(ops.convert_to_tensor, inputs)), target, y, weight)
    return float(ops.convert_to_numpy(replicas.undivided(loss)))


class LossWatch(keras.callbacks.Callback):
    """Raises an error if the loss is not finite, and warns if it does not fall. `DiffusionModel.fit` adds it.

    Args:
        x_0: clean data. At most 256 examples are used.
        warns: whether the loss is the compiled one, without weights of examples or classes. Otherwise it cannot be
            compared with that of a network that always predicts zero.

    Raises:
        ValueError: within `every` steps after the loss has become NaN or infinite.
    """

    every = 5  # steps; reading the loss waits for an accelerator
    patience = 300  # optimizer updates

    def __init__(self, x_0: np.ndarray, warns: bool = True):
        super().__init__()
        self.x_0 = x_0[:256]
        self.warns = warns

    def on_train_begin(self, logs=None):
        """Computes the loss of a network that always predicts zero."""
        t = np.linspace(1, self.model.diffusion.timesteps, len(self.x_0)).round().astype("int32")
        noise = np.random.default_rng(0).standard_normal(self.x_0.shape).astype("float32")
        weight = self.model.aligned(self.model.corruption.weight(t))
        zeros = ops.zeros(noise.shape)
        self.trivial = loss_of(self.model, zeros, self.x_0, t, noise, weight=weight) if self.warns else np.inf
        self.start = self._updates()
        self._recent = []

    def _updates(self):
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # The loss is the mean of the epoch so far. Once it is NaN, it stays NaN.
        self._recent.append((batch, (logs or {}).get("loss", 0.0)))
        if len(self._recent) >= self.every:
            self._check()

    def _check(self):
        recent, self._recent = self._recent, []
        hint = "the data hold NaN, values outside the `clip_range` or unknown labels, or the learning rate is too high"
        for batch, loss in recent:
            found = f"The loss is {float(loss)} at step {batch + 1} of epoch {self._epoch + 1}"
            _checks.require(np.isfinite(float(loss)), f"{found}: {hint}. The average is that of the step before")

    def on_epoch_end(self, epoch, logs=None):
        self._check()
        loss = (logs or {}).get("loss", 0.0)
        if loss > 0.9 * self.trivial and self._updates() - self.start >= self.patience:
            warnings.warn(
                f"After epoch {epoch + 1} the loss is {loss:.3f}; always predicting zero gives {self.trivial:.3f}. "
                "The network has learned next to nothing: check the learning rate and the data.",
                stacklevel=2,
            )
