"""Diffusion on MNIST: the assignment, with every choice it asks for tried.

    python examples/mnist.py

With the linear schedule (Ho et al., 2020) alpha_bar_t, the share of signal in the variance of x_t, goes from 1 to
almost 0 in T = 1000 steps; with T = 100 the betas have to be ten times as large, or signal is left at the end. A
network learns the noise in x_t, told the time by a sinusoid of it. First these are tried, each for --steps batches, and
sampled with 100 steps of DDPM:

    T = 100                with betas rescaled, and as they are (alpha_bar_T = 0.36: samples start from the wrong noise)
    [0, 1], standardised   data in other ranges than [-1, 1]
    noise level            the network is told 1000 sqrt(alpha_bar_t) in place of t (Chen et al., 2021)
    one t per batch        in place of one for each image, or of times spread evenly over the batch (the default)

Samples are judged by their kernel distance (KID times 1000) to held-out digits in the features of a classifier; 0 is
perfect, and that of as many training images is printed first. The rest is made with the first model, trained on.

Everything goes to --output:

    schedules.png    alpha_bar and its root for T = 1000 and 100
    embedding.png    the sinusoid of t
    choices.png      samples by choice, the same noise in each row
    samples.png      100 digits of the model that was trained on
    denoising.png    x_t, and the x_0 predicted from it, on the way to digits
    editing.png      digits, their lower half filled in, variations, and what lies between them and the next
    model.keras      that model
"""

import common
import keras
import numpy as np
from keras import ops

import keras_ddpm as kd


def make_network(told=None):
    """A small U-Net, told t, or, with the alpha of a schedule, 1000 sqrt(alpha_bar_t)."""
    unet = kd.networks.unet((28, 28, 1), 16, (1, 2, 4), 1, attention_resolutions=())
    if told is None:
        return unet
    x_t, t = (keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in unet.inputs)
    level = ops.take(np.round(1000 * told).astype("int32"), t)
    return keras.Model([x_t, t], unet([x_t, level]))


def make_choices(data):
    """From names to arguments of `make_network` and `DiffusionModel`, and scale and offset of data in [-1, 1]."""
    linear = kd.schedules.linear
    mean, std = np.mean(data), np.std(data)
    of_range = lambda *clip_range: {"diffusion": kd.GaussianDiffusion(clip_range=clip_range)}  # noqa: E731
    return {
        "T = 1000, [-1, 1]": ({}, {}, 1, 0),
        "T = 100": ({}, {"diffusion": kd.GaussianDiffusion(linear(100))}, 1, 0),
        "T = 100, betas as they are": ({}, {"diffusion": kd.GaussianDiffusion(np.linspace(1e-4, 0.02, 100))}, 1, 0),
        "[0, 1]": ({}, of_range(0, 1), 0.5, 0.5),
        "standardised": ({}, of_range((-1 - mean) / std, (1 - mean) / std), 1 / std, -mean / std),
        "told the noise level": ({"told": linear(1000).alpha}, {}, 1, 0),
        "one t per image": ({}, {"timestep_sampling": "uniform"}, 1, 0),
        "one t per batch": ({}, {"timestep_sampling": "batch"}, 1, 0),
    }


def draw_schedules(path):
    with kd.plots.figure(path, 1, 2, (10, 4)) as row:
        for axes, timesteps in zip(row, (1000, 100)):
            alpha_bar = kd.schedules.linear(timesteps).alpha ** 2
            lines = {"alpha_bar": alpha_bar, "sqrt(alpha_bar)": alpha_bar**0.5}
            if timesteps == 100:
                lines["alpha_bar, betas not rescaled"] = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
            kd.plots.curves(axes, lines, xlabel="t", title=f"T = {timesteps}: alpha_bar_T = {alpha_bar[-1]:.1e}")


def draw_embedding(path):
    sinusoid = ops.convert_to_numpy(kd.layers.TimestepEmbedding(64)(np.arange(1001)))
    with kd.plots.figure(path) as axes:
        axes.imshow(sinusoid.T, aspect="auto", interpolation="nearest")
        axes.set(xlabel="t", ylabel="entry", title="The sinusoid of t that the network is told")


def draw_editing(path, model, x, seed):
    masks = np.ones_like(x)
    masks[:, 14:] = 0
    between = kd.editing.interpolate(model, x, np.roll(x, -1, axis=0), 5)[1:4]
    columns = {
        "digit": x,
        "known": np.where(masks, x, 0),
        **{f"filled, {i}": kd.editing.inpaint(model, x, masks, seed + i) for i in (1, 2)},
        **{f"variation\n{strength}": kd.editing.variations(model, x, strength, seed) for strength in (0.3, 0.5, 0.7)},
        **{f"to next,\n{25 * (i + 1)} %": images for i, images in enumerate(between)},
    }
    kd.plots.table(path, {"": columns}, size=0.8)


def main(arguments=None):
    parser = common.make_parser(__doc__, "mnist")
    parser.add_argument("--steps", type=int, default=600, help="batches of 32 for each choice (default: 600)")
    parser.add_argument("--more-steps", type=int, default=4000, help="batches for the first model (default: 4000)")
    parser.add_argument("--classifier-epochs", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=500, help="to be judged (default: 500)")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(args.seed)
    draw_schedules(args.output / "schedules.png")
    draw_embedding(args.output / "embedding.png")
    train, test = common.load("mnist", 28, args, channels=1, labels=True)
    _, distance_of, _ = common.make_metric(train, test, args)
    data = kd.images.from_uint8(train.x)

    def fit(model, steps, scale=1, offset=0):
        batches = kd.datasets.from_arrays(
            scale * data + offset, batch_size=32, steps_per_epoch=max(1, steps // 5), seed=args.seed
        )
        common.train(model, batches, 5, warmup_steps=100, verbose=0)
        x = (model.sample(args.num_samples, kd.samplers.DDPM(100), args.seed) - offset) / scale
        return x, distance_of(x)

    rows = {}
    for name, (network, options, scale, offset) in make_choices(data).items():
        keras.utils.set_random_seed(args.seed)
        model = kd.DiffusionModel(make_network(**network), ema_decay=0.99, seed=args.seed, **options)
        x, distance = fit(model, args.steps, scale, offset)
        print(f"{name:28} kernel distance {distance:7.1f}", flush=True)
        rows[f"{name}: {distance:.0f}"] = {"": x[:12]}
    kd.plots.table(args.output / "choices.png", rows, columns=12, size=0.4)

    model = kd.DiffusionModel(make_network(), ema_decay=0.999, seed=args.seed)
    x, distance = fit(model, args.more_steps)
    print(f"The first model after {args.more_steps} batches: kernel distance {distance:.1f}")
    model.save(args.output / "model.keras")
    kd.images.save(args.output / "samples.png", x[:100])
    common.draw_denoising(args.output / "denoising.png", model, kd.samplers.DDPM(100), args.seed)
    draw_editing(args.output / "editing.png", model, kd.images.from_uint8(test.x[:6]), args.seed)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
