"""Compares each fast function with its plain body, for every choice of inputs that need a gradient.

Then networks are trained whose first layers are frozen. `test_torch.py` runs this script in a process of its own, as a
fault of PyTorch may end the process. It prints the cases that differ, and last their number.
"""

import itertools
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

import keras_ddpm as kd
from keras_ddpm import layers
from keras_ddpm._backend import devices

BATCH = 4
SAME = [(1, 1), "same", (1, 1), 1, True]
CASES = {  # function, shape of an example, shapes of the other tensors, options
    "3x3": (layers.conv2d, (8, 8, 4), [(3, 3, 4, 6), (6,)], SAME),
    "valid": (layers.conv2d, (8, 8, 4), [(3, 3, 4, 6), (6,)], [(1, 1), "valid", (1, 1), 1, True]),
    "one filter": (layers.conv2d, (8, 8, 4), [(3, 3, 4, 1), (1,)], SAME),
    "1x1": (layers.conv2d, (8, 8, 4), [(1, 1, 4, 6), (6,)], SAME),
    "upsampled": (layers.upsampled_conv2d, (8, 8, 4), [(3, 3, 4, 6), (6,)], []),
    "group_norm": (layers.group_norm, (8, 8, 4), [(4,), (4,)], [2, 1e-6]),
    "group_norm of a pixel": (layers.group_norm, (1, 1, 4), [(4,), (4,)], [1, 1e-6]),
    "attention": (layers.attention, (64, 4), [(BATCH, 64, 4)] * 2, [8]),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "a part": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
    "repeated": lambda x: x[:1].expand(x.shape),
}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}
MODES = [(torch.enable_grad, needed) for needed in itertools.product([False, True], repeat=3)]
MODES += [(torch.no_grad, (True,) * 3), (torch.inference_mode, (True,) * 3)]


def results(function, tensors, options, mode, needed):
    """The result of the function and the gradients that are needed, in float64."""
    tensors = [x.detach().requires_grad_(needs) for x, needs in zip(tensors, needed)]
    with mode():
        y = function(*tensors, *options)
    if y.requires_grad:
        (y.float() * (1.5 + torch.sin(torch.arange(y.numel())).reshape(y.shape))).sum().backward()
    return [value.detach().double() for value in (y, *(x.grad for x in tensors)) if value is not None]


def differing():
    """Yields the names of all cases, and whether they differ."""
    for name, layout, dtype, batch, mode in itertools.product(CASES, LAYOUTS, TOLERANCES, (1, BATCH), MODES):
        function, shape, shapes, options = CASES[name]
        tensors = [torch.randn(*size).to(dtype) for size in ((batch, *shape), *shapes)]
        tensors = [x[:batch] if len(x.shape) == 3 else x for x in tensors]  # keys and values of attention
        tensors[0] = LAYOUTS[layout](tensors[0])
        fast = results(function, tensors, options, *mode)
        try:
            with devices.plain():
                plain = results(function, tensors, options, *mode)
        except RuntimeError:  # Keras lacks some gradients of one filter on a CPU
            assert name == "one filter"
            continue
        tolerance = TOLERANCES[dtype]
        same = [np.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max())) for a, b in zip(fast, plain)]
        yield (name, layout, dtype, batch, *mode), not all(same) or len(fast) != len(plain)


def train(network, num_frozen):
    """Trains a network in which the first layers with weights are frozen."""
    for layer in [layer for layer in network.layers if layer.weights and "conv" in layer.name][:num_frozen]:
        layer.trainable = False
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(), "x0"))
    model.compile("adam", "mse")
    model.fit(np.zeros((2, *model.data_shape), "float32"), verbose=0)


if __name__ == "__main__":
    torch.manual_seed(0)
    names, differ = zip(*differing())
    print(*itertools.compress(names, differ), sep="\n")
    for policy, frozen in itertools.product(["mixed_bfloat16", "mixed_float16"], [1, 2, 99]):
        keras.config.set_dtype_policy(policy)
        train(kd.networks.unet((8, 8, 3), 8, (1, 2), 1, (4,), 4), frozen)
    print(len(names), "cases,", sum(differ), "differ")
