"""Updates compared with Keras' own Adam."""

import importlib

import keras
import numpy as np
import pytest
from conftest import TORCH
from keras import ops

import keras_ddpm as kd
from keras_ddpm._backend import devices


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": keras.optimizers.schedules.CosineDecay(1e-2, 20), "global_clipnorm": 1.0},
        {"learning_rate": 1e-2, "weight_decay": 0.1, "epsilon": 1e-3},
        {"learning_rate": 1e-2, "amsgrad": True},
        {"learning_rate": 1e-2, "gradient_accumulation_steps": 2},
    ],
)
@pytest.mark.parametrize("in_order", [True, False])
def test_updates_are_keras_own(options, in_order):
    """Whether the gradients lie in memory as the variables do, or not."""
    results = []
    for make in (keras.optimizers.Adam, kd.optimizers.Adam):
        random = np.random.default_rng(0)
        variables = [
            keras.Variable(random.normal(size=shape), dtype="float32") for shape in ((3, 3, 4, 5), (3, 3, 4, 1), (7,))
        ]
        optimizer = make(**options)
        optimizer.build(variables)
        devices.arrange([*variables, *optimizer.variables])
        for _ in range(6):
            gradients = [keras.Variable(random.normal(size=v.shape), dtype="float32") for v in variables]
            if in_order:
                devices.arrange(gradients)
            optimizer.apply([gradient.value for gradient in gradients], variables)
        results.append([ops.convert_to_numpy(v) for v in variables])
    for expected, value in zip(*results):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not TORCH, reason="nothing is fused on the other backends")
@pytest.mark.fast
@pytest.mark.parametrize("in_order", [True, False])
def test_updates_are_fused_if_memory_is_in_order(monkeypatch, in_order):
    calls = []
    adam = importlib.import_module("torch.optim.adam")  # which torch.optim hides
    monkeypatch.setattr(adam, "adam", lambda *args, **options: calls.append(options["fused"]))
    variable, gradient = (keras.Variable(np.ones((3, 3, 4, 5), "float32")) for _ in range(2))
    optimizer = kd.optimizers.Adam()
    optimizer.build([variable])
    devices.arrange([variable, *optimizer.variables, *[gradient] * in_order])
    optimizer.apply([gradient.value], [variable])
    assert calls == [True] * in_order


def test_the_optimizer_is_saved(tmp_path, points):
    model = kd.DiffusionModel(kd.networks.mlp(2, 8, 1), seed=0)
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-3, global_clipnorm=1.0))
    model.fit(points, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is kd.optimizers.Adam
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for ours, theirs in zip(model.optimizer.variables, loaded.optimizer.variables):
        assert np.array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))


@pytest.mark.skipif(not TORCH, reason="nothing is fused on the other backends")
def test_an_optimizer_with_other_private_names_is_not_fused():
    from keras_ddpm._backend import torch as fast

    variable = keras.Variable(np.ones(3, "float32"))
    assert fast.adam_step(object(), variable.value, variable, 0.1) is NotImplemented
