"""The settings for each backend and processor."""

import os
import types

import keras
import numpy as np
import pytest
from conftest import TORCH, small_unet

from keras_ddpm._backend import devices


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", False), ("TFRT_CPU_0", False), ("/job:localhost/replica:0/task:0/device:CPU:0", False), ("mps:0", True)]
    + [("xpu:0", True), ("TPU_0(process=0,(0,0,0,0))", True), ("/job:localhost/replica:0/task:0/device:GPU:0", True)],
)
def test_an_accelerator_is_whatever_keras_uses_besides_a_cpu(monkeypatch, device, expected):
    monkeypatch.setattr(devices.ops, "zeros", lambda shape: types.SimpleNamespace(device=device))
    assert devices.has_accelerator() == expected
    assert devices.jit_compile() == {"jax": True, "tensorflow": expected, "torch": False}[keras.backend.backend()]
    assert (devices.max_dense_attention() == 0) == expected


@pytest.mark.skipif(not TORCH, reason="PyTorch says what each operation makes")
def test_nothing_computes_in_float64():
    """Metal has no float64. Arrays of NumPy in float64 become float32 on their way to the device (`lift_fresh`)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            dtypes = {x.dtype for x in keras.tree.flatten(result) if isinstance(x, torch.Tensor)}
            found.update((function.name(), dtype) for dtype in dtypes)
            return result

    model = small_unet()
    x = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)).astype("float32")
    with Watch():
        model.fit(x, epochs=1, verbose=0)
        model.sample(2, seed=0)
    wide = {name for name, dtype in found if dtype == torch.float64}
    assert len(found) > 20 and wide <= {"aten::lift_fresh"}


@pytest.mark.parametrize(("flags", "bfloat16"), [("fma avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_where_the_cpu_computes_in_it(monkeypatch, flags, bfloat16):
    monkeypatch.setattr(devices.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(devices.pathlib.Path, "read_text", lambda path: flags)
    monkeypatch.setattr(devices, "has_accelerator", lambda: False)
    expected = "mixed_bfloat16" if bfloat16 and keras.backend.backend() != "jax" else "float32"
    assert devices.dtype_policy() == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "mixed_bfloat16"), (0.9, "float32"), (9.0, "float32")])
def test_bfloat16_where_the_accelerator_is_clearly_faster_in_it(monkeypatch, seconds, expected):
    monkeypatch.setattr(devices, "has_accelerator", lambda: True)
    monkeypatch.setattr(devices, "_seconds_of_product", {"float32": 1.0, "bfloat16": seconds}.get)
    assert devices.dtype_policy() == expected


@pytest.mark.parametrize(("variable", "told"), [(None, True), ("MALLOC_ARENA_MAX", False)])
def test_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch, variable, told):
    calls = []

    class Library:
        def __init__(self, name):
            assert name is None  # the C library of this process

        def mallopt(self, parameter, value):
            calls.append(parameter)
            return 1

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "2")
    monkeypatch.setattr(devices.ctypes, "CDLL", Library)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    devices.keep_memory()
    arenas = [-8] if keras.backend.backend() == "tensorflow" else []
    assert calls == ([-1, -3, *arenas] if told else [])
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    devices.keep_memory()
    assert calls == ([-1, -3, *arenas] if told else [])
