import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_ddpm import DiffusionModel
from keras_ddpm import GaussianDiffusion
from keras_ddpm import hardware
from keras_ddpm import networks
from keras_ddpm import samplers
from keras_ddpm import schedules


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
        variables = [keras.Variable(random.normal(size=shape), dtype="float32") for shape in ((3, 3, 4, 5), (7,))]
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told to keep memory")
def test_freed_memory_is_kept():
    """A large array that is allocated again is not cleared page by page again."""
    import resource

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**24)  # 128 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1000  # of 32768 pages


def test_recorded_network_reads_its_variables():
    """A program of many steps, kept from one call to the next, against the same steps one by one."""
    network = networks.unet((8, 8, 1), 8, (1, 2), 1, (4,), 4, num_classes=2)
    random = np.random.default_rng(0)
    network.set_weights([random.normal(0, 0.1, w.shape) for w in network.get_weights()])
    model = DiffusionModel(network, GaussianDiffusion(schedules.cosine(60)))
    options = {"seed": 0, "labels": 1, "guidance_scale": 2.0}
    before = model.sample(2, samplers.DDIM(60), **options)
    for average in model.ema_weights:
        average.assign(0.5 * average)
    samples = model.sample(2, samplers.DDIM(60), **options)
    assert np.abs(samples - before).max() > 0.1
    stepwise = model.sample(2, samplers.DDIM(60), return_trajectory=60, **options)[0]
    np.testing.assert_allclose(samples, stepwise, atol=1e-5)
