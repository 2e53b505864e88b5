"""Trains on images in a file that is larger than memory, and on images in memory.

    python tests/benchmarks/memory_map.py images.npy --gigabytes 20

The file is written first if it does not exist: drawn flowers, each shifted and colored differently. After one pass over
the file, each of the two data sets trains for some steps, several times in turn. The resident memory is that of the
process that trains on the file.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

SIZE, BATCH, STEPS = 64, 32, 80
IN_MEMORY = 20_000


def write(path, gigabytes):
    """Writes 8-bit images to a plain `.npy` file."""
    import keras_ddpm as kd

    kinds = kd.images.to_uint8(kd.datasets.procedural_flowers(512, SIZE)[0])
    num = int(gigabytes * 1e9) // kinds[0].nbytes
    random = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype="uint8", shape=(num, *kinds.shape[1:]))
    for start in range(0, num, 512):
        shifts = random.integers(0, SIZE, 2)
        images = np.roll(kinds, shifts, axis=(1, 2)) ^ random.integers(0, 32, (len(kinds), 1, 1, 3), "uint8")
        file[start : start + 512] = images[: num - start]
    file.flush()


def resident(name):
    """A line of the status of this process, in GB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith(name))


def train(path):
    """Prints the images a second of training on a file, or on `IN_MEMORY` of its images, and the largest memory."""
    import keras

    import keras_ddpm as kd

    x = np.load(path, mmap_mode="r")
    if kept := sys.argv[3] == "memory":
        x = np.array(x[:IN_MEMORY])
    data = kd.datasets.Batches(x, batch_size=BATCH, steps_per_epoch=STEPS, flip=True, num_workers=1)
    model = kd.DiffusionModel(kd.networks.unet((SIZE, SIZE, 3), 8, (1, 2, 4), 1, (8,), 4, patch_size=2), seed=0)
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-4))
    seconds = []
    if not kept:  # every page once, as the first epoch would read it
        for start in range(0, len(x), 4096):
            x[start : start + 4096].max()
            kd.datasets.cache.forget(x)
    for _ in range(4):
        start = time.perf_counter()
        model.fit(data, verbose=0)
        seconds.append(time.perf_counter() - start)
    print(BATCH * STEPS / statistics.median(seconds[1:]), resident("VmHWM"), keras.backend.backend())


def main():
    if sys.argv[2:3] == ["--worker"]:
        return train(sys.argv[1])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.file.exists():
        write(args.file, args.gigabytes)
    ratios = []
    for _ in range(args.rounds):
        found = {}
        for name in ("memory", "file"):
            command = [sys.executable, __file__, args.file, "--worker", name]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            speed, memory, backend = printed.split()[-3:]
            found[name] = float(speed), float(memory)
            print(f"{backend}, {name}: {found[name][0]:.1f} images a second, {found[name][1]:.2f} GB", flush=True)
        ratios.append(found["file"][0] / found["memory"][0])
    print(f"Training on the file is {statistics.median(ratios):.3f} times as fast.")


if __name__ == "__main__":
    main()
