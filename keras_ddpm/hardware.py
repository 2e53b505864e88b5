"""What depends on the hardware and the backend at hand: the settings, and the shorter ways that PyTorch knows."""

import ctypes
import functools
import os
import pathlib
import sys
import time

import keras
from keras import ops


def has_accelerator():
    """Whether Keras puts its tensors on something faster than a CPU."""
    return "cpu" not in str(ops.zeros(1).device).lower()


def jit_compile():
    """What `jit_compile="auto"` means for this package: XLA on JAX, and on TensorFlow with an accelerator.

    On a CPU TensorFlow's own kernels are faster than XLA's; `torch.compile` of a Keras model recompiles for minutes
    before the first step.
    """
    backend = keras.backend.backend()
    return backend == "jax" or (backend == "tensorflow" and has_accelerator())


def dtype_policy():
    """The faster policy for large networks, "mixed_bfloat16" or "float32".

    On an accelerator a matrix product in each decides. On a CPU, where one without instructions for bfloat16 would take
    minutes, it is for x86 with such instructions, which XLA does not use.
    """
    if has_accelerator():
        in_float32, in_bfloat16 = map(_seconds_of_product, ("float32", "bfloat16"))
        faster = in_bfloat16 < 0.75 * in_float32
    else:
        cpu = pathlib.Path("/proc/cpuinfo")
        flags = cpu.read_text() if cpu.exists() else ""
        faster = ("avx512_bf16" in flags or "amx_bf16" in flags) and not jit_compile()
    return "mixed_bfloat16" if faster else "float32"


def _seconds_of_product(dtype, size=4096, times=3):
    x = keras.random.normal((size, size), seed=0, dtype=dtype)
    taken = []
    for _ in range(1 + times):  # the first compiles
        start = time.perf_counter()
        float(ops.matmul(x, x)[0, 0])
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def keep_memory():
    """Lets the process keep the memory that it frees, where the C library is glibc.

    Otherwise the large arrays of each step are given back to the system, which clears them page by page before the next
    step gets them: a quarter of the time of a training step on PyTorch. TensorFlow's threads have to share one arena
    for it, as the others always give back what they free. A MALLOC_ variable in the environment is left its say.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 2**31 - 1) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes; older versions take no more
        if keras.backend.backend() == "tensorflow":
            mallopt(-8, 1)  # M_ARENA_MAX


keep_memory()  # at import: a thread stays in the arena that it has


def arrange(variables):
    """Lays the kernels of convolutions out in memory as PyTorch's convolutions read them; no other backend can."""
    if keras.backend.backend() == "torch":
        for variable in variables:
            if len(variable.shape) == 4:
                data = variable.value.data
                variable.value.data = data.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def update_averages(averages, variables, decay):
    """average = variable + decay (average − variable), on PyTorch in one pass over memory; a count is copied."""
    for average, v in zip(averages, variables):
        if not keras.backend.is_float_dtype(v.dtype):
            average.assign(v)
        elif keras.backend.backend() == "torch":
            average.value.data.lerp_(v.value.data, 1.0 - decay)
        else:
            average.assign(v + decay * (average - v))


def images_at_once(x):
    """How many images, `(batch, height, width, channels)`, PyTorch convolves fastest as one, columns interleaved.

    On a CPU oneDNN multiplies tiles of 16 pixels of a row. Images of 8 pixels fill half of each, and the gradient of a
    kernel likes rows that are longer still. Those that are 16 wide gain nothing.
    """
    batch, _, width, _ = x.shape
    if x.device.type != "cpu" or width >= 16:
        return 1
    return max(number for number in range(1, 32 // width + 1) if batch % number == 0)


def longest_written_out():
    """The largest number of queries whose attention is written out at once, as two products; 0 to leave it to Keras.

    On a CPU that is three times as fast as PyTorch's kernel, which needs no memory for the scores. In bfloat16 they are
    rounded to it.
    """
    return 0 if has_accelerator() else 1024


def fuse(optimizer):
    """Makes an update of Adam, with clipping by the global norm, two passes over memory on PyTorch's CPU."""
    if isinstance(optimizer, keras.optimizers.Adam) and hasattr(optimizer, "_parallel_update_step"):
        if not (optimizer.amsgrad or has_accelerator()):
            optimizer._parallel_update_step = functools.partial(_fused_adam, optimizer)
            if optimizer.global_clipnorm:
                optimizer._clip_gradients = lambda gradients: gradients  # the update does


def _fused_adam(optimizer, gradients, variables, learning_rate):
    import torch
    from torch.optim.adam import adam

    momentums, velocities = (
        [several[optimizer._get_variable_index(v)].value for v in variables]
        for several in (optimizer._momentums, optimizer._velocities)
    )
    values = [v.value for v in variables]
    step = int(optimizer.iterations)
    if any(len(set(map(_order, group))) > 1 for group in zip(values, gradients, momentums, velocities)):
        # PyTorch's walks through memory, whatever lies there.
        gradients = type(optimizer)._clip_gradients(optimizer, gradients)
        return type(optimizer)._parallel_update_step(optimizer, gradients, variables, learning_rate)
    # As PyTorch's own is slow where the order is not that of the axes.
    values, gradients, momentums, velocities = (
        [x.as_strided((x.numel(),), (1,)) for x in tensors] for tensors in (values, gradients, momentums, velocities)
    )
    clip = optimizer.global_clipnorm
    norm = clip and torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    adam(
        values,
        gradients,
        momentums,
        velocities,
        [],
        [torch.tensor(float(step)) for _ in values],
        fused=True,
        amsgrad=False,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        lr=float(learning_rate),
        weight_decay=0.0,  # Keras has applied it
        eps=optimizer.epsilon / (1 - optimizer.beta_2 ** (step + 1)) ** 0.5,  # Keras adds it before the correction
        maximize=False,
        grad_scale=(
            (torch.clamp(norm / clip, min=1.0) + (norm - norm)).float() if clip else None
        ),  # NaN where the norm is infinite
    )


def _order(x):
    """How a tensor lies in memory."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape) if size > 1)
