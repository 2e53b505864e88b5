"""The run of test_checkpoints.py, which is interrupted and killed: `python interrupted_run.py FOLDER EPOCHS`."""

import pathlib
import random
import sys

import keras
import numpy as np
from keras import ops

import keras_ddpm as kd

EAGER = keras.backend.backend() != "jax"  # as in conftest.py


def make_network():
    """A network of labeled images that is compiled in a second. The dropout without a seed is Keras' usual one."""
    x_t, t, label = keras.Input((4, 4, 1)), keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    condition = keras.layers.Embedding(4, 8, name="label_embedding")(label) + kd.layers.TimestepEmbedding(8)(t)
    h = keras.layers.Conv2D(8, 3, padding="same", activation="swish")(x_t)
    h = keras.layers.Dropout(0.1)(h + keras.layers.Reshape((1, 1, 8))(condition))
    h = keras.layers.Dropout(0.1, seed=5)(keras.layers.Dense(8, activation="swish")(h))
    return keras.Model([x_t, t, label], keras.layers.Dense(1)(h))


def run(folder, callbacks=(), every=0.0, epochs=3, run_eagerly=EAGER):
    """Trains, or goes on training, for `epochs` epochs of 5 batches. Returns all that an interruption could change."""
    # `keras.utils.set_random_seed` imports TensorFlow, which takes two seconds.
    random.seed(1)
    if keras.backend.backend() == "torch":
        sys.modules["torch"].manual_seed(1)
    model = kd.DiffusionModel(make_network(), kd.GaussianDiffusion(kd.schedules.linear(25)), seed=3)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 30)
    model.compile(
        loss="mse", optimizer=kd.optimizers.Adam(rate, gradient_accumulation_steps=2), run_eagerly=run_eagerly
    )
    x = np.random.default_rng(0).integers(0, 256, (14, 4, 4, 1)).astype("uint8")
    data = kd.datasets.Batches(x, np.arange(14) % 3, batch_size=4, flip=True, steps_per_epoch=5, seed=2)
    stopping = keras.callbacks.EarlyStopping("loss", patience=100, restore_best_weights=True)
    checkpoint = kd.callbacks.Checkpoint(pathlib.Path(folder) / "checkpoints", every)
    begin = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: print("Batch", batch, flush=True))
    options = {"callbacks": [checkpoint, stopping, begin, *callbacks], "epochs": epochs, "verbose": 0}
    history = model.fit(data, validation_data=data, **options)
    result = {f"variable_{i}": ops.convert_to_numpy(v) for i, v in enumerate(model.variables)}
    result |= {f"slot_{i}": ops.convert_to_numpy(v) for i, v in enumerate(model.optimizer.variables)}
    stopped = np.array([stopping.best, stopping.wait, stopping.best_epoch])
    return result | history.history | {"epochs": history.epoch, "stopping": stopped}


if __name__ == "__main__":
    run(sys.argv[1], epochs=int(sys.argv[2]), run_eagerly=False)
