"""The settings that depend on the hardware at hand, chosen here and nowhere else."""

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
