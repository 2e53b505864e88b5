"""What a noise schedule does to images, and which prediction is hard at which time.

    python examples/schedules.py                                    # trains a small model for the last figure
    python examples/schedules.py --model runs/flowers/model.keras   # of a trained model of colour images

A schedule is two curves, x_t = alpha_t x_0 + sigma_t ε: how much signal and how much noise x_t holds.

Everything goes to --output:

    scales.png       alpha_t², the share of signal, and the logarithm of SNR = alpha_t² / sigma_t² of each schedule
    resolutions.png  the same schedule at two resolutions: neighbouring pixels of a large image tell more of each other,
                     so that noise of the same size hides less of it (Hoogeboom et al., 2023, shift it therefore)
    difficulty.png   the error of one model by t, if it is asked for ε, for x_0 or for v: ε is hard to tell where there
                     is little noise, x_0 where there is little signal
"""

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
        # The logarithm is infinite at the ends.
        log_snr = {name: (np.arange(1, s.timesteps), s.log_snr[1:-1]) for name, s in SCHEDULES.items()}
        kd.plots.curves(right, log_snr, xlabel="t", title="log SNR", ylim=(-15, 10))


def reduce(x, factor):
    """Averages over squares of pixels."""
    num, side, _, channels = x.shape
    return x.reshape(num, side // factor, factor, side // factor, factor, channels).mean(axis=(2, 4))


def draw_resolutions(path, x, seed):
    """A flower and its average over 4x4 pixels, with noise of the same schedule."""
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
    """A small model of 16x16 images."""
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


def main(arguments=None):
    parser = common.make_parser(__doc__, "schedules")
    parser.add_argument("--model", help="a trained .keras file, of colour images")
    parser.add_argument("--steps", type=int, default=1500, help="batches to train on without --model")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(args.seed)
    data, held_out = (kd.images.from_uint8(batches.x) for batches in common.load("oxford_flowers102", 64, args))
    draw_scales(args.output / "scales.png")
    draw_resolutions(args.output / "resolutions.png", held_out[:1], args.seed)
    model = common.load_model(args.model) if args.model else train(reduce(data, 4), args.steps, args.seed)
    size = model.data_shape[0]
    if size > 64 or 64 % size:
        raise ValueError(f"The images of {args.model} must have a side that divides 64. Received: {size}")
    draw_difficulty(args.output / "difficulty.png", model, reduce(held_out[:64], 64 // size), args.seed)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
