"""Settings that depend on the backend and the processor, and the switch between plain and fast implementations."""

import contextlib
import ctypes
import functools
import os
import pathlib
import sys
import timeit
from collections.abc import Callable, Iterable, Iterator

import keras
from keras import ops

from keras_ddpm._backend import replicas

# Names of functions of `_backend.torch`, and of those that are switched off. Tests compare fast and plain ones.
FAST: set[str] = set()
plain_functions: set[str] = set()


def fast_on_torch(plain: Callable) -> Callable:
    """Decorates a function that has a faster implementation of the same name in `_backend.torch`.

    On PyTorch the function of that module is called first. If it returns `NotImplemented`, the plain function runs. On
    other backends the plain function always runs. The two agree up to rounding.
    """
    name = plain.__name__
    FAST.add(name)

    @functools.wraps(plain)
    def function(*args, **kwargs):
        if keras.backend.backend() == "torch" and name not in plain_functions:
            from keras_ddpm._backend import torch

            result = getattr(torch, name)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return plain(*args, **kwargs)

    return function


@contextlib.contextmanager
def plain(names: Iterable[str] = FAST) -> Iterator[None]:
    """A context in which PyTorch runs the plain functions of these names, by default all.

    They hold for every batch size when they are traced, which the fast ones do not.
    """
    added = {*names} - plain_functions
    plain_functions.update(added)
    try:
        yield
    finally:
        plain_functions.difference_update(added)


@fast_on_torch
def random_state() -> list:
    """The random states that the backend keeps for the whole process, as arrays. Only PyTorch has some."""
    return []


@fast_on_torch
def set_random_state(states: list) -> None:
    """Sets what `random_state` has returned. States of another backend or of other devices are ignored."""


@fast_on_torch
def arrange(variables: list) -> None:
    """Arranges variables in memory as the backend reads them fastest. Only PyTorch needs it."""


def has_accelerator() -> bool:
    """Whether Keras places its tensors on an accelerator rather than a CPU."""
    return "cpu" not in str(ops.zeros(1).device).lower()


def jit_compile() -> bool:
    """What `jit_compile="auto"` means for this package: XLA on JAX, and on TensorFlow with an accelerator.

    On a CPU, TensorFlow's own kernels are faster than XLA's. With several replicas of TensorFlow, XLA hangs. On
    PyTorch, `torch.compile` recompiles a Keras model for minutes before the first step.
    """
    backend = keras.backend.backend()
    return backend == "jax" or (backend == "tensorflow" and has_accelerator() and replicas.program_parts() == 1)


def max_dense_attention() -> int:
    """The largest number of queries whose scores are computed at once. 0 means that Keras' own attention is used.

    On a CPU two matrix products are three times as fast as PyTorch's fused kernel, but they store the scores.
    """
    return 0 if has_accelerator() else 1024


def dtype_policy() -> str:
    """The faster dtype policy for large networks, "mixed_bfloat16" or "float32".

    On an accelerator, times one matrix product in each dtype. On a CPU, reads the CPU flags: bfloat16 only with
    AVX512-BF16 or AMX, and not with XLA, which does not use them.
    """
    if has_accelerator():
        faster = _seconds_of_product("bfloat16") < 0.75 * _seconds_of_product("float32")
    else:
        cpu = pathlib.Path("/proc/cpuinfo")
        flags = cpu.read_text() if cpu.exists() else ""
        faster = ("avx512_bf16" in flags or "amx_bf16" in flags) and not jit_compile()
    return "mixed_bfloat16" if faster else "float32"


def _seconds_of_product(dtype, size=4096, times=3):
    x = keras.random.normal((size, size), seed=0, dtype=dtype)
    taken = timeit.repeat(lambda: float(ops.matmul(x, x)[0, 0]), number=1, repeat=1 + times)
    return min(taken[1:])  # the first compiles


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, if the C library is glibc.

    By default, glibc returns the large arrays of each training step to the system, which has to clear the pages before
    the next step gets them. Call this function once, before the first step. It changes nothing if the environment holds
    a `MALLOC_` variable. On TensorFlow all threads then share one arena, as other arenas always return their memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**31 - 1) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes; older versions take no more
        if keras.backend.backend() == "tensorflow":
            mallopt(-8, 1)  # M_ARENA_MAX
