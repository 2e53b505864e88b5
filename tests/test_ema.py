"""The moving average compared with its recurrence."""

import types

import keras
import numpy as np
import pytest
from conftest import EAGER, weights
from keras import ops

import keras_ddpm as kd
from keras_ddpm import ema


def expected_average(before, after, n, decay):
    decay = min(decay, 1 - (1 + n) ** -0.75)
    return [decay * average + (1 - decay) * raw for average, raw in zip(before, after)]


@pytest.mark.parametrize("accumulation", [None, 2])
def test_ema_follows_its_recurrence(points, accumulation):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), ema_decay=0.5, seed=0)
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation)
    model.compile(loss="mse", optimizer=optimizer, run_eagerly=EAGER and accumulation is None)
    average, updates = weights(model.ema_weights), 0
    for step in range(1, 9):
        model.train_on_batch(points[:32])
        if step % (accumulation or 1) == 0:
            average = expected_average(average, weights(model.network.trainable_variables), updates, 0.5)
            updates += 1
        for got, expected in zip(weights(model.ema_weights), average):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
        if updates == 1:  # the first update copies
            assert all(map(np.array_equal, weights(model.ema_weights), weights(model.network.trainable_variables)))
    assert updates == 8 // (accumulation or 1)


def test_a_frozen_layer_keeps_its_place_in_the_average(tmp_path, points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 16, 1), seed=0)
    model.network.get_layer("block_0_dense_1").trainable = False
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-2), run_eagerly=EAGER)
    model.fit(points, epochs=2, batch_size=32, verbose=0)
    samples = model.sample(4, kd.samplers.DDIM(3), seed=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.network.get_layer("block_0_dense_1").trainable
    assert np.array_equal(loaded.sample(4, kd.samplers.DDIM(3), seed=0), samples)


def test_sample_reads_the_chosen_weights(model, points):
    model.fit(points, epochs=1, verbose=0)
    average, raw = (model.sample(8, seed=0, use_ema=use_ema) for use_ema in (True, False))
    assert not np.allclose(average, raw, atol=1e-4)
    for average_variable, v in zip(model.ema_weights, model.network.trainable_variables):
        average_variable.assign(ops.copy(v))
    np.testing.assert_allclose(model.sample(8, seed=0), raw, atol=1e-6)


def test_average_of_counts():
    """Weights that are no floats, as the counts of some of Keras' layers."""
    network = types.SimpleNamespace(weights=[keras.Variable(0, dtype="int32", trainable=False)])
    average = ema.Average(network, 0.5, keras.layers.Layer().add_weight)
    network.weights[0].assign(3)
    average.update(before=0, after=1)
    assert int(average.weights[0]) == 3
