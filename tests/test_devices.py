"""The settings by backend and processor."""

import keras
import pytest

from keras_ddpm import _devices


@pytest.mark.parametrize(("flags", "bfloat16"), [("fma avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_where_the_cpu_computes_in_it(monkeypatch, flags, bfloat16):
    monkeypatch.setattr(_devices.pathlib.Path, "exists", lambda path: True)
    monkeypatch.setattr(_devices.pathlib.Path, "read_text", lambda path: flags)
    monkeypatch.setattr(_devices, "has_accelerator", lambda: False)
    expected = "mixed_bfloat16" if bfloat16 and keras.backend.backend() != "jax" else "float32"
    assert _devices.dtype_policy() == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, "mixed_bfloat16"), (0.9, "float32"), (9.0, "float32")])
def test_bfloat16_where_the_accelerator_is_clearly_faster_in_it(monkeypatch, seconds, expected):
    monkeypatch.setattr(_devices, "has_accelerator", lambda: True)
    monkeypatch.setattr(_devices, "_seconds_of_product", {"float32": 1.0, "bfloat16": seconds}.get)
    assert _devices.dtype_policy() == expected
