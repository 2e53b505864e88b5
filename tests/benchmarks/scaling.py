"""How many images a second one and two processes train on, each pinned to a core.

    python tests/benchmarks/scaling.py --backends jax tensorflow --rounds 3

The processes talk over loopback, and each has its own 16 images of a batch. Runs of one and of two processes take
turns. Each prints the median over the steps after the first five. PyTorch is missing, as Keras 3.15 has no distribution
there.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

SIZE, WIDTH, BATCH, STEPS = 32, 32, 16, 25


def train(port, processes, process):
    """Trains in this process. The first process prints the images a second of all of them."""
    os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[process]])
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        workers = [f"localhost:{port + i}" for i in range(processes)]
        task = {"type": "worker", "index": process}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})

    import keras
    import numpy as np

    import keras_ddpm as kd

    if keras.backend.backend() == "jax":
        if processes > 1:
            keras.distribution.initialize(f"localhost:{port}", processes, process)
        scope = keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    else:
        import tensorflow as tf

        scope = tf.distribute.MultiWorkerMirroredStrategy().scope()
    batch_size, ends = BATCH * processes, []
    tell = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: ends.append(time.perf_counter()))
    x = np.random.default_rng(0).integers(0, 256, (batch_size, SIZE, SIZE, 3), "uint8")
    with scope:
        network = kd.networks.unet((SIZE, SIZE, 3), WIDTH, (1, 2, 4), 1, (8,))
        model = kd.DiffusionModel(network, seed=0)
        model.compile(loss="mse", optimizer="adam")
        model.fit(kd.datasets.Batches(x, batch_size=batch_size, steps_per_epoch=STEPS), verbose=0, callbacks=[tell])
    if process == 0:
        seconds = np.median(np.diff(ends)[5:])
        print(json.dumps([batch_size / seconds, 4 * network.count_params() / 1e6]))


def measure(backend, processes):
    """Images a second, and the megabytes of all gradients."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", str(port), str(processes)]
    environment = os.environ | {"KERAS_BACKEND": backend}
    started = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(processes)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"A process of {backend} failed.")
    return json.loads(printed[0].splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["jax", "tensorflow"], choices=["jax", "tensorflow"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return train(*args.worker)
    for backend in args.backends:
        ratios = []
        for _ in range(args.rounds):
            (one, megabytes), (two, _) = measure(backend, 1), measure(backend, 2)
            ratios.append(two / one)
            print(f"{backend}: {one:.2f} and {two:.2f} images a second, gradients of {megabytes:.0f} MB", flush=True)
        print(f"{backend}: two processes are {statistics.median(ratios):.2f} times as fast as one", flush=True)


if __name__ == "__main__":
    main()
