import ctypes
import importlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import hardware


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


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="nothing is fused on the other backends")
@pytest.mark.parametrize("in_order", [True, False])
def test_updates_are_fused_where_memory_is_in_order(monkeypatch, in_order):
    calls = []
    adam = importlib.import_module("torch.optim.adam")  # which torch.optim hides
    monkeypatch.setattr(adam, "adam", lambda *args, **options: calls.append(options["fused"]))
    variable, gradient = (keras.Variable(np.ones((3, 3, 4, 5), "float32")) for _ in range(2))
    optimizer = keras.optimizers.Adam()
    optimizer.build([variable])
    hardware.arrange([variable, *optimizer.variables, *[gradient] * in_order])
    hardware.fuse(optimizer)
    optimizer.apply([gradient.value], [variable])
    assert calls == [True] * in_order


@pytest.mark.parametrize(("flags", "bfloat16"), [("fma avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_where_the_cpu_computes_in_it(monkeypatch, flags, bfloat16):
    monkeypatch.setattr(hardware.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(hardware.pathlib.Path, "read_text", lambda path: flags)
    monkeypatch.setattr(hardware, "has_accelerator", lambda: False)
    expected = "mixed_bfloat16" if bfloat16 and keras.backend.backend() != "jax" else "float32"
    assert hardware.dtype_policy() == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "mixed_bfloat16"), (0.9, "float32"), (9.0, "float32")])
def test_bfloat16_where_the_accelerator_is_clearly_faster_in_it(monkeypatch, seconds, expected):
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    monkeypatch.setattr(hardware, "_seconds_of_product", {"float32": 1.0, "bfloat16": seconds}.get)
    assert hardware.dtype_policy() == expected


def test_larger_products_take_longer():
    small, large = (hardware._seconds_of_product("float32", size) for size in (64, 2048))
    assert 0 < small < large


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


def test_average_of_counts():
    """Weights that are no floats, as the counts of some of Keras' layers."""
    average, count = (keras.Variable(value, dtype="int32", trainable=False) for value in (0, 3))
    hardware.update_averages([average], [count], ops.convert_to_tensor(0.0))
    assert int(average) == 3
