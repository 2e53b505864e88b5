"""What each fast function of `fast.py` is worth: with it and without it, in turns.

    KERAS_BACKEND=torch python tests/benchmarks/fast_functions.py
    KERAS_BACKEND=torch python tests/benchmarks/fast_functions.py --dtype-policy mixed_bfloat16 --rounds 7

Trains and samples the 63.2 M-parameter U-Net at 64x64. For each function, two models take turns in one process. One of
them computes with the plain body of `keras.ops`. Prints the median of the ratios of neighboring turns, time without the
function over time with it, and the smallest and the largest ratio.
"""

import argparse
import time

import keras
import numpy as np

import keras_ddpm as kd
from keras_ddpm._backend import devices

FUNCTIONS = {
    "training": ["arrange", "conv2d", "upsampled_conv2d", "group_norm", "attention", "adam_step"],
    "sampling": ["arrange", "conv2d", "upsampled_conv2d", "group_norm", "attention", "recorded"],
}


def make_model(args):
    keras.utils.set_random_seed(0)
    attention = (args.size // 4, args.size // 8)
    model = kd.DiffusionModel(kd.networks.unet((args.size, args.size, 3), args.width, attention_resolutions=attention))
    model.compile(loss="mse", optimizer=kd.optimizers.Adam(1e-4, global_clipnorm=1.0))
    return model


def make_task(model, task, args):
    """A function that takes some steps."""
    if task == "sampling":
        sampler = kd.samplers.DDIM(20)  # enough to be recorded
        return lambda: model.sample(args.batch_size, sampler, seed=0)
    x = np.random.default_rng(0).uniform(-1, 1, (args.batch_size, args.size, args.size, 3)).astype("float32")
    return lambda: model.train_on_batch(x)


def seconds(task, plain):
    """The time of a turn, with the functions `plain` switched off."""
    with devices.plain(plain):
        start = time.perf_counter()
        task()
        return time.perf_counter() - start


def compare(task, name, args):
    """The ratios of the times without the function and with it."""
    tasks = []
    for plain in ([], [name]):
        with devices.plain(plain):  # `arrange` acts when a model is made
            model = make_model(args)
        tasks.append((make_task(model, task, args), plain))
    for turn in tasks:
        seconds(*turn)
    turns = [[seconds(*turn) for turn in tasks] for _ in range(args.rounds)]
    return [without / with_it for with_it, without in turns]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", help="(default: all)")
    parser.add_argument("--tasks", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS))
    parser.add_argument("--dtype-policy", choices=["float32", "mixed_bfloat16"], default="float32")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="(default: 8)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each (default: 4)")
    args = parser.parse_args()
    kd.keep_memory()
    keras.config.set_dtype_policy(args.dtype_policy)
    for task in args.tasks:
        for name in FUNCTIONS[task]:
            if not args.functions or name in args.functions:
                ratios = compare(task, name, args)
                low, middle, high = np.quantile(ratios, [0, 0.5, 1])
                print(f"{task}, without {name:17} times as long: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
