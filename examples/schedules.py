"""What a noise schedule does to images, and which prediction is difficult at which time.

    python examples/schedules.py                                    # trains a small model for the last figure
    python examples/schedules.py --model runs/flowers/model.keras   # uses a trained model of color images

A schedule consists of two curves, x_t = alpha_t x_0 + sigma_t ε. They are the scales of signal and noise in x_t.

Output files in --output:

    scales.png       for each schedule the share of signal, alpha_t², and the logarithm of SNR = alpha_t² / sigma_t²
    resolutions.png  the same schedule at two resolutions. Neighboring pixels of a large image resemble each other, so
                     the same noise hides less of it. Therefore Hoogeboom et al., 2023, shift the schedule.
    difficulty.png   the error of one model by t, as a prediction of ε, x_0 or v. ε is difficult if there is little
                     noise, and x_0 is difficult if there is little signal.
"""

import pathlib

import common
import keras
import numpy as np
from keras import ops

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
    with kd.plots.figure(path, 1, 2, (10, 4)) as (left, right):
        signal = {name: s.alpha**2 / (s.alpha**2 + s.sigma**2) for name, s in SCHEDULES.items()}
        kd.plots.curves(left, signal, xlabel="t", title="share of signal, alpha² / (alpha² + sigma²)")
        # The logarithm is infinite at both ends.
        log_snr = {name: (np.arange(1, s.timesteps), s.log_snr[1:-1]) for name, s in SCHEDULES.items()}
        kd.plots.curves(right, log_snr, xlabel="t", title="log SNR", ylim=(-15, 10))


def reduce(x, factor):
    """Reduces images by averaging over squares of pixels."""
    num, side, _, channels = x.shape
    return x.reshape(num, side // factor, factor, side // factor, factor, channels).mean(axis=(2, 4))


def draw_resolutions(path, x, seed):
    """Draws a flower and its average over 4x4 pixels, with the noise of the same schedule."""
    schedule, times = SCHEDULES["cosine"], [0, 200, 400, 600, 700, 800]
    small = reduce(x, 4)
    large_size, small_size = (f"{len(image[0])}x{len(image[0])}" for image in (x, small))
    rows = {
        large_size: (x, schedule),
        small_size: (small, schedule),
        f"{large_size},\nshifted": (x, S.shifted(schedule, len(x[0]), len(small[0]))),
    }
    noisy = {name: {} for name in rows}
    for name, (image, schedule) in rows.items():
        noise = np.random.default_rng(seed).standard_normal(image.shape)
        for t in times:
            noisy[name][f"t = {t}"] = schedule.alpha[t] * image + schedule.sigma[t] * noise
    kd.plots.table(path, noisy, size=1.4)


def train(x, steps, seed):
    """Trains a small model of 16x16 images."""
    network = kd.networks.unet((16, 16, 3), 16, (1, 2), 1, ())
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(SCHEDULES["cosine"], "v"), ema_decay=0.99, seed=seed)
    common.train(model, kd.datasets.from_arrays(x, batch_size=32, steps_per_epoch=steps, seed=seed), 1)
    return model


def draw_difficulty(path, model, x, seed):
    noise = np.random.default_rng(seed).standard_normal(x.shape).astype("float32")
    diffusion = model.diffusion
    times = np.unique(np.geomspace(1, diffusion.timesteps, 16).round().astype(int))
    times = np.unique([*times, *(diffusion.timesteps - times[:-1])])
    errors = {"ε": "epsilon", "x_0": "x0", "v": "v"}
    processes = {label: kd.GaussianDiffusion(diffusion.schedule, name) for label, name in errors.items()}
    errors = {label: [] for label in processes}
    for t in times:
        t_of_each = np.full(len(x), t)
        x_t = diffusion.q_sample(x, t_of_each, noise)
        x_0 = model.denoise(ops.convert_to_numpy(x_t), int(t), clip=False)
        for label, process in processes.items():
            got = process.target(x_0, t_of_each, process.predict_noise(x_t, t_of_each, x_0))
            difference = ops.convert_to_numpy(got - process.target(x, t_of_each, noise))
            errors[label].append(np.mean(difference**2))
    for label, values in errors.items():
        some = ", ".join(f"{t}: {value:.2g}" for t, value in zip(times[::5], values[::5]))
        print(f"Mean squared error of {label:3} at t = {some}")
    with kd.plots.figure(path) as axes:
        lines = {label: (times, values) for label, values in errors.items()}
        kd.plots.curves(axes, lines, xlabel="t", ylabel="mean squared error", yscale="log", ylim=(1e-5, 3))


def main(*, output="runs/schedules", seed=0, data_dir: str | None = None, model: str | None = None, steps=1500):
    """Draws the schedules and the errors of a model.

    Args:
        output: folder for the output files.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        model: trained .keras file of color images. By default a small model is trained.
        steps: number of training batches of 32 images.
    """
    out = pathlib.Path(output)
    keras.utils.set_random_seed(seed)
    batches = common.load("oxford_flowers102", 64, data_dir=data_dir, seed=seed)
    x, held_out = (kd.images.from_uint8(part.x) for part in batches)
    draw_scales(out / "scales.png")
    draw_resolutions(out / "resolutions.png", held_out[:1], seed)
    trained = common.load_model(model) if model else train(reduce(x, 4), steps, seed)
    size = trained.data_shape[0]
    if size > 64 or 64 % size:
        raise ValueError(f"The image side of {model} must divide 64. Received: {size}")
    draw_difficulty(out / "difficulty.png", trained, reduce(held_out[:64], 64 // size), seed)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
