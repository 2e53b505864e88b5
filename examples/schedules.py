"""What a noise schedule does to images, and which prediction is hard at which time.

    python examples/schedules.py                                    # trains a small model for the last figure
    python examples/schedules.py --model runs/flowers/model.keras   # of a trained model

A schedule is two curves, x_t = alpha_t x_0 + sigma_t ε: how much signal and how much noise x_t holds.

Everything goes to --output:

    scales.png       alpha_t², the share of signal, and the logarithm of SNR = alpha_t² / sigma_t² of each schedule
    resolutions.png  the same schedule at two resolutions: neighbouring pixels of a large image tell more of each other,
                     so that noise of the same size hides less of it (Hoogeboom et al., 2023, shift it therefore)
    difficulty.png   the error of one model by t, if it is asked for ε, for x_0 or for v: ε is hard to tell where there
                     is little noise, x_0 where there is little signal
"""

import argparse
import pathlib
import sys

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

import keras_ddpm as kd

S = kd.schedules
SCHEDULES = {
    "linear": S.linear(1000),
    "linear to 0.005": S.linear(1000, beta_end=0.005),
    "linear to 0.05": S.linear(1000, beta_end=0.05),
    "cosine": S.cosine(1000),
    "sigmoid": S.sigmoid(1000),
    "straight line": S.straight(1000),
}


def draw_scales(path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, schedule in SCHEDULES.items():
        inside = slice(1, -1)  # the logarithm is infinite at the ends
        left.plot(schedule.alpha**2 / (schedule.alpha**2 + schedule.sigma**2), label=name)
        right.plot(np.arange(1, schedule.timesteps), schedule.log_snr[inside], label=name)
    left.set(xlabel="t", title="share of signal, alpha² / (alpha² + sigma²)")
    right.set(xlabel="t", title="log SNR", ylim=(-15, 10))
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def draw_resolutions(path, seed):
    """A flower of 128x128 and its average over 8x8 pixels, with noise of the same schedule."""
    x, _ = kd.datasets.procedural_flowers(1, 128, seed=seed)
    small = x.reshape(1, 16, 8, 16, 8, 3).mean(axis=(2, 4))
    schedule, times = SCHEDULES["cosine"], [0, 200, 400, 600, 700, 800]
    rows = {
        "128x128": (x, schedule),
        "16x16": (small, schedule),
        "128x128,\nshifted": (x, S.shifted(schedule, 128, 16)),
    }
    figure = Figure(figsize=(1.5 * len(times) + 1, 4.8), layout="constrained")
    for axes_of_row, (name, (image, schedule)) in zip(figure.subplots(len(rows), len(times)), rows.items()):
        noise = np.random.default_rng(seed).standard_normal(image.shape)
        axes_of_row[0].set_ylabel(name)
        for axes, t in zip(axes_of_row, times):
            kd.plots.show(axes, schedule.alpha[t] * image + schedule.sigma[t] * noise, columns=1)
            axes.set_title(f"t = {t}" if name == "128x128" else "")
    figure.savefig(path, dpi=100)


def train(steps, seed):
    """A small model of drawn flowers."""
    x, _ = kd.datasets.procedural_flowers(1000, 16, seed=seed)
    network = kd.networks.unet((16, 16, 3), 16, (1, 2), 1, ())
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(SCHEDULES["cosine"], "v"), ema_decay=0.99, seed=seed)
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(2e-3, global_clipnorm=1.0))
    model.fit(kd.datasets.from_arrays(x, batch_size=32, steps_per_epoch=steps, seed=seed), verbose=2)
    return model


def draw_difficulty(path, model, seed, num=64):
    size, _, channels = model.data_shape
    x, _ = kd.datasets.procedural_flowers(num, size, seed=seed + 1)
    noise = np.random.default_rng(seed).standard_normal(x.shape).astype("float32")
    diffusion = model.diffusion
    times = np.unique(np.geomspace(1, diffusion.timesteps, 16).round().astype(int))
    times = np.unique([*times, *(diffusion.timesteps - times[:-1])])
    errors = {"ε": "epsilon", "x_0": "x0", "v": "v"}
    processes = {label: kd.GaussianDiffusion(diffusion.schedule, name) for label, name in errors.items()}
    errors = {label: [] for label in processes}
    for t in times:
        t_of_each = np.full(num, t)
        x_t = diffusion.q_sample(x, t_of_each, noise)
        x_0 = model.denoise(ops.convert_to_numpy(x_t), int(t), clip=False)
        for label, process in processes.items():
            got = process.target(x_0, t_of_each, process.predict_noise(x_t, t_of_each, x_0))
            difference = ops.convert_to_numpy(got - process.target(x, t_of_each, noise))
            errors[label].append(np.mean(difference**2))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, values in errors.items():
        axes.plot(times, values, marker=".", label=label)
        some = ", ".join(f"{t}: {value:.2g}" for t, value in zip(times[::5], values[::5]))
        print(f"Mean squared error of {label:3} at t = {some}")
    axes.set(xlabel="t", ylabel="mean squared error", yscale="log", ylim=(1e-5, 3))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/schedules"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a trained .keras file, of colour images")
    parser.add_argument("--steps", type=int, default=1500, help="batches to train on without --model")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    draw_scales(args.output / "scales.png")
    draw_resolutions(args.output / "resolutions.png", args.seed)
    model = keras.saving.load_model(args.model) if args.model else train(args.steps, args.seed)
    draw_difficulty(args.output / "difficulty.png", model, args.seed)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")
