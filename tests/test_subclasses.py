"""What Keras documents for subclasses of `keras.Model` holds for subclasses of `DiffusionModel`."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ddpm as kd


class Custom(kd.DiffusionModel):
    """Overrides what Keras' guides override, with their signatures. Nothing is optional in these."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = keras.metrics.Mean(name="seen")
        self.steps = set()

    @property
    def metrics(self):
        return [self.seen]

    def train_step(self, *args):
        self.steps.add("train")
        return super().train_step(*args)

    def test_step(self, *args):
        self.steps.add("test")
        return super().test_step(*args)

    def compute_loss(self, x, y, y_pred, sample_weight):
        x_t, t, label = x
        self.seen.update_state(ops.cast(label, "float32"))
        late = ops.cast(t > 25, "float32")[:, None] * x_t
        return ops.mean(ops.square(y - y_pred) + late) + sum(self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "latest": ops.max(x[1])}


class AddsThree(keras.layers.Layer):
    def call(self, x):
        self.add_loss(3.0 + 0.0 * ops.mean(x))
        return x


def make(cls):
    """A model whose network always predicts zero and adds a loss of 4, and a frozen optimizer."""
    network = kd.networks.mlp(2, 8, 1, num_classes=3)
    regularized = keras.layers.Dense(2, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.25))
    network = keras.Model(network.inputs, AddsThree()(regularized(network.output)))
    diffusion = kd.GaussianDiffusion(kd.schedules.cosine(25), "x0")
    return cls(network, diffusion, label_dropout=0.0, seed=0), keras.optimizers.SGD(0.0)


@pytest.mark.parametrize("loss", ["mse", None])
def test_overrides(points, loss):
    model, optimizer = make(Custom)
    model.compile(optimizer, loss, metrics=["mse"])
    labels = np.full(256, 2)
    callbacks = [kd.callbacks.LossByTimestep(points, 1, [25])]
    exact = np.mean(np.square(points))  # the targets are x_0
    for _ in range(2):  # the second time, layers hold losses of compiled steps and of samples
        history = model.fit(points, labels, validation_data=(points, labels), callbacks=callbacks, verbose=0).history
        model.sample(2, labels=0)
        model.sample(2, labels=0, use_ema=False)
    assert model.steps == {"train", "test"} and history["seen"] == history["val_seen"] == [2.0]
    assert 0 < history["latest"][0] <= 25
    # `LossByTimestep` calls the network by `denoise`. So there is the loss of the regularizer, and none of the layer.
    np.testing.assert_allclose(history["loss_at_25"], exact + 1, rtol=1e-5)


def test_layers_and_regularizers_add_losses(points):
    model, optimizer = make(kd.DiffusionModel)
    model.compile(optimizer, "mse", metrics=["mse"])
    history = model.fit(
        points, np.zeros(256, "int32"), validation_data=(points, np.zeros(256, "int32")), verbose=0
    ).history
    exact = np.mean(np.square(points))
    for name, expected in {"loss": exact + 4, "mse": exact, "val_loss": exact + 4, "val_mse": exact}.items():
        np.testing.assert_allclose(history[name], expected, rtol=1e-5)
