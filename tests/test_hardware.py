import ctypes
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_ddpm as kd
from keras_ddpm import hardware
from keras_ddpm import networks


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, 20), global_clipnorm=1.0),
        lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, epsilon=1e-3),
        lambda: keras.optimizers.Adam(1e-2, amsgrad=True),
        lambda: keras.optimizers.SGD(1e-2),
    ],
)
@pytest.mark.parametrize("in_order", [True, False])
def test_fused_and_arranged_updates_are_keras_own(make, in_order):
    """Whether the gradients lie in memory as the variables do, or not."""
    results = []
    for changed in (False, True):
        random = np.random.default_rng(0)
        variables = [
            keras.Variable(random.normal(size=shape), dtype="float32") for shape in ((3, 3, 4, 5), (3, 3, 4, 1), (7,))
        ]
        optimizer = make()
        optimizer.build(variables)
        if changed:
            hardware.arrange([*variables, *optimizer.variables])
            hardware.fuse(optimizer)
        for _ in range(5):
            gradients = [keras.Variable(random.normal(size=v.shape), dtype="float32") for v in variables]
            if changed and in_order:
                hardware.arrange(gradients)
            optimizer.apply([gradient.value for gradient in gradients], variables)
        results.append([ops.convert_to_numpy(v) for v in variables])
    for expected, value in zip(*results):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("flags", "bfloat16"), [("fma avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_where_the_cpu_computes_in_it(monkeypatch, flags, bfloat16):
    monkeypatch.setattr(hardware.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(hardware.pathlib.Path, "read_text", lambda path: flags)
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    expected = "mixed_bfloat16" if bfloat16 and keras.backend.backend() != "jax" else "float32"
    assert hardware.dtype_policy() == expected


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the memory of the other backends has one order")
def test_convolutions_find_their_kernels_in_order():
    import torch

    variable = keras.Variable(np.arange(360.0).reshape(3, 3, 4, 10))
    before = ops.convert_to_numpy(variable)
    hardware.arrange([variable])
    assert np.array_equal(ops.convert_to_numpy(variable), before)
    assert variable.value.permute(3, 2, 0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told to keep memory")
def test_freed_memory_is_kept():
    """A large array that is allocated again is not cleared page by page again; in a process without other threads."""
    code = """
import resource, numpy, keras_ddpm
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**24)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for variable, kept in ({}, True), ({"MALLOC_ARENA_MAX": "2"}, False):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | variable, stdout=subprocess.PIPE, check=True
        )
        first, again = map(int, run.stdout.split())
        assert (again < 0.2 * first) == kept, (first, again)


def test_recorded_network_reads_its_variables():
    """A network that PyTorch records at the fiftieth step, and its weights change."""
    network = networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, num_classes=2)
    random = np.random.default_rng(0)
    network.set_weights([random.normal(0, 0.1, w.shape) for w in network.get_weights()])
    inputs = [random.normal(size=(2, 8, 8, 1)).astype("float32"), np.array([5, 9]), np.array([0, 2])]
    inputs = [ops.convert_to_tensor(value) for value in inputs]
    recording = hardware.Recording(lambda *inputs: ops.stop_gradient(network(list(inputs))))
    for _ in range(60):
        before = ops.convert_to_numpy(recording(*inputs))
    assert len(recording.recorded) == (keras.backend.backend() == "torch")
    for variable in network.weights:
        variable.assign(0.5 * variable)
    expected = ops.convert_to_numpy(network(inputs))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(ops.convert_to_numpy(recording(*inputs)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch alone records")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recorded_training_is_training(monkeypatch, dropout):
    """The weights after sixty steps, but for a network that draws random numbers, which is not recorded."""
    trained = []
    for records in (True, False):
        keras.utils.set_random_seed(0)
        model = kd.DiffusionModel(networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, dropout), seed=0)
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-3, global_clipnorm=0.1))
        if not records:
            monkeypatch.setattr(model._network_in_training, "has_effects", lambda: True)
        x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype="uint8")
        model.fit(kd.datasets.from_arrays(x, batch_size=4, steps_per_epoch=60), verbose=0)
        assert bool(model._network_in_training.recorded) == (records and not dropout)
        trained.append(model.network.get_weights())
    for recorded, plain in zip(*trained):
        np.testing.assert_allclose(recorded, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch alone records")
def test_networks_that_add_to_the_loss_are_not_recorded():
    x_t, t = keras.Input((8, 8, 1)), keras.Input((), dtype="int32")
    y = keras.layers.Conv2D(1, 3, padding="same", activity_regularizer="l2")(x_t)
    model = kd.DiffusionModel(keras.Model([x_t, t], y), seed=0)
    model.compile(loss="mse", optimizer="adam")
    model.fit(np.zeros((4, 8, 8, 1), "float32"), batch_size=4, epochs=51, verbose=0)
    assert sum(model._network_in_training.calls.values()) == 51
    assert not model._network_in_training.recorded


def test_what_looks_at_values_is_not_recorded():
    recording = hardware.Recording(lambda x: x / float(ops.max(x)))
    for largest in range(1, 60):
        x = ops.convert_to_tensor(np.array([0.5, 1.0]) * largest, "float32")
        np.testing.assert_allclose(ops.convert_to_numpy(recording(x)), [0.5, 1.0], rtol=1e-6)


def test_average_of_counts():
    """Weights that are no floats, as the counts of some of Keras' layers."""
    average, count = (keras.Variable(value, dtype="int32", trainable=False) for value in (0, 3))
    hardware.update_averages([average], [count], ops.convert_to_tensor(0.0))
    assert int(average) == 3
