"""What `sample` costs beside the network that it calls.

    KERAS_BACKEND=jax python tests/benchmarks/sampling.py           # the 64x64 U-Net of base 64
    KERAS_BACKEND=jax python tests/benchmarks/sampling.py --small   # a 32x32 U-Net of 1.5 M parameters
    KERAS_BACKEND=jax python tests/benchmarks/sampling.py --mlp     # the MLP of points
    KERAS_BACKEND=jax python tests/benchmarks/sampling.py --memory  # memory over 50 calls

Times one step of `sample` (DDIM, and DDPM, which draws noise) and one call of the bare network, compiled as the
backend does it best, on the same batch, in turns; prints medians, and the median of the ratios or differences of
neighbours.
"""

import argparse
import resource
import time

import keras
import numpy as np
from keras import ops

import keras_ddpm as kd
from keras_ddpm._backend import devices


def bare(network):
    """The network as a function of x and t, compiled as its users would."""
    if keras.backend.backend() == "jax":
        import jax

        groups = network.trainable_variables, network.non_trainable_variables
        call = jax.jit(lambda *args: network.stateless_call(*args, training=False)[0])
        return lambda x, t: call(*[[v.value for v in group] for group in groups], [x, t])
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda x, t: network([x, t], training=False), jit_compile=devices.jit_compile())
    import torch

    return torch.no_grad()(lambda x, t: network([x, t], training=False))


def seconds(function):
    start = time.perf_counter()
    ops.convert_to_numpy(function())
    return time.perf_counter() - start


def times(model, batch_size, calls, rounds):
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((batch_size, *model.data_shape), "float32"))
    t = ops.full((batch_size,), 500, dtype="int32")
    network = bare(model.network)

    def run_network():
        for _ in range(calls):
            y = network(x, t)
        return y

    candidates = {"bare network": run_network}
    for sampler in (kd.samplers.DDIM(calls), kd.samplers.DDPM(calls)):
        candidates[type(sampler).__name__] = lambda sampler=sampler: model.sample(batch_size, sampler, seed=0)
    for run in candidates.values():
        run()
    taken = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            taken[name].append(seconds(run) / calls)
    for name, values in taken.items():
        difference = np.subtract(values, taken["bare network"])
        ratio = np.divide(values, taken["bare network"])
        print(
            f"{keras.backend.backend():10} {name:12} {1e3 * np.median(values):9.3f} ms a step, "
            f"{1e3 * np.median(difference):+8.3f} ms, ratio {np.median(ratio):.3f}",
            flush=True,
        )


def memory(model):
    """Resident memory after every tenth call, in MiB; samplers and numbers of steps change from call to call."""
    for call in range(51):
        sampler = [kd.samplers.DDIM, kd.samplers.DPMSolver, kd.samplers.DDPM, kd.samplers.Heun][call % 4]
        model.sample(16, sampler(5 + call % 8), seed=call)
        if call % 10 == 0:
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            print(
                f"{keras.backend.backend():10} after {call:2} calls: {pages * resource.getpagesize() >> 20} MiB",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small network of images")
    parser.add_argument("--mlp", action="store_true", help="points instead of images")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    args = parser.parse_args()
    kd.keep_memory()
    if args.mlp:
        model = kd.DiffusionModel(kd.networks.mlp(2, 128, 3))
    elif args.small:
        model = kd.DiffusionModel(kd.networks.unet((32, 32, 3), 24, (1, 2, 4), 1, (16,)))
    elif args.memory:
        model = kd.DiffusionModel(kd.networks.unet((32, 32, 3), 32, (1, 2), 1, ()))
    else:
        model = kd.DiffusionModel(kd.networks.unet((64, 64, 3)))
    if args.memory:
        memory(model)
    elif args.small:
        times(model, batch_size=64, calls=10, rounds=9)
    elif args.mlp:
        times(model, batch_size=256, calls=200, rounds=9)
    else:
        times(model, batch_size=4, calls=4, rounds=5)


if __name__ == "__main__":
    main()
