"""The settings for each backend and processor."""

import os

import keras
import pytest

from keras_ddpm._backend import devices


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
