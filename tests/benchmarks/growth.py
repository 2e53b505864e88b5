"""How the cost of a training step and of sampling grows with the size of images, the batch and the width.

    KERAS_BACKEND=torch python tests/benchmarks/growth.py --output figures.json --plot figures.png
    KERAS_BACKEND=torch python tests/benchmarks/growth.py --samples    # memory of sample(n) as n grows
    KERAS_BACKEND=jax python tests/benchmarks/growth.py --attention    # memory of training with attention everywhere

Each point is a process of its own: the median of five steps and the largest memory. Everything but what is varied is
small: 32x32 images, width 32, batches of 8, three levels, attention at the lowest. The numbers beside the names are
the growth from point to point, of the time and of the memory above that of the smallest job.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time

import keras
import numpy as np

import keras_ddpm as kd

AXES = {"size": (32, 64, 128), "batch_size": (8, 16, 32, 64), "width": (32, 64, 128)}
SAMPLES = (256, 1024, 4096, 10_000)
SIDES = (32, 64, 96)


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def train(size=32, batch_size=8, width=32, steps=8):
    """The median seconds of a step, and the largest memory in MiB."""
    kd.keep_memory()
    network = kd.networks.unet((size, size, 3), width, (1, 2, 4), 1, (size // 4,))
    model = kd.DiffusionModel(network, seed=0)
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-4))
    ends = []
    x = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), dtype="uint8")
    data = kd.datasets.from_arrays(x, batch_size=batch_size, steps_per_epoch=steps)
    end = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter()))
    model.fit(data, verbose=0, callbacks=[end])
    return float(np.median(np.diff(ends)[-5:])), memory()


def attend(size, steps=3):
    """The seconds of a step with attention between all pixels, four times over, and the largest memory in MiB."""
    model = kd.DiffusionModel(kd.networks.unet((size, size, 1), 8, (1,), 1, (size,), 4), seed=0)
    model.compile(loss="mse", optimizer="adam")
    x = np.zeros((2, size, size, 1), "float32")
    model.fit(x, verbose=0)
    start = time.perf_counter()
    model.fit(x, epochs=steps, verbose=0)
    return (time.perf_counter() - start) / steps, memory()


def sample(num):
    """The seconds for a sample, and the largest memory in MiB."""
    model = kd.DiffusionModel(kd.networks.unet((32, 32, 3), 8, (1, 1, 1), 1, (8,), 4))
    start = time.perf_counter()
    model.sample(num, kd.samplers.DDIM(1), seed=0)
    return (time.perf_counter() - start) / num, memory()


def measure(function, **arguments):
    """The function's answer in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([function, arguments])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def draw(path, found):
    with kd.plots.figure(path, 2, len(found), size=(3.2 * len(found), 5), sharex="col") as axes:
        for (above, below), (name, points) in zip(axes.T, found.items()):
            values = AXES[name]
            above.plot(values, [seconds for seconds, _ in points], "o-")
            below.plot(values, [mib for _, mib in points], "o-")
            below.set(xlabel=name.replace("_", " "), xticks=values, ylim=(0, None))
            above.set(ylim=(0, None))
        axes[0, 0].set_ylabel("seconds a step")
        axes[1, 0].set_ylabel("memory, MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", action="store_true", help="memory of sample(n) instead")
    parser.add_argument(
        "--attention", action="store_true", help="memory and time of attention between all pixels instead"
    )
    parser.add_argument("--output", help="a .json file for the figures")
    parser.add_argument("--plot", help="a .png file for curves")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        function, arguments = json.loads(args.worker)
        return print(json.dumps({"train": train, "sample": sample, "attend": attend}[function](**arguments)))
    if args.samples:
        for num in SAMPLES:
            seconds, mib = measure("sample", num=num)
            print(f"sample({num:6}): {1e3 * seconds:.1f} ms each, {mib:.0f} MiB", flush=True)
        return
    if args.attention:
        for size in SIDES:
            seconds, mib = measure("attend", size=size)
            print(f"attention between {size**2:5} pixels: {seconds:.2f} s a step, {mib:.0f} MiB", flush=True)
        return
    found = {name: [measure("train", **{name: value}) for value in values] for name, values in AXES.items()}
    for name, points in found.items():
        base = points[0][1]
        for value, (seconds, mib) in zip(AXES[name], points):
            print(f"{name} {value:4}: {seconds:.3f} s a step, {mib:.0f} MiB ({mib - base:+.0f})")
        print(f"{name}: time x " + ", ".join(f"{b[0] / a[0]:.1f}" for a, b in itertools.pairwise(points)))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(found, file, indent=2)
    if args.plot:
        draw(args.plot, found)


if __name__ == "__main__":
    main()
