"""Diffusion on MNIST: the assignment, with every choice that it asks for.

    python examples/mnist.py

alpha_bar_t is the share of signal in the variance of x_t. With the linear schedule (Ho et al., 2020) it falls from 1
to almost 0 in T = 1000 steps. With T = 100 the betas must be ten times as large, or signal is left at the end. A
network learns the noise in x_t and receives the time as a sinusoid. Each of the following choices is trained for
--steps batches and sampled with 100 steps of DDPM:

    T = 100                with rescaled betas, and with the original betas (alpha_bar_T = 0.36, so sampling starts
                           from the wrong noise)
    [0, 1], standardized   data in other ranges than [-1, 1]
    noise level            the network receives 1000 sqrt(alpha_bar_t) instead of t (Chen et al., 2021)
    one t per batch        instead of one t per image, or of times spread evenly over the batch (the default)

Samples are compared with held-out digits by their kernel distance (KID times 1000) in the features of a classifier.
A distance of 0 is perfect. The distance of as many training images is printed first. The other figures show the first
model, trained for longer.

Output files in --output:

    schedules.png    alpha_bar and its root for T = 1000 and 100
    embedding.png    the sinusoid of t
    choices.png      samples of each choice, with the same noise in each row
    samples.png      100 digits of the model that was trained for longer
    denoising.png    x_t during sampling, and the x_0 predicted from it
    editing.png      digits, inpainting of their lower half, variations, and interpolations to the next digit
    model.keras      the model that was trained for longer
    checkpoints/     from which --resume goes on after Ctrl-C or a crash
    settings.json    the settings with which it goes on
"""

import common
import keras
import numpy as np
from keras import ops

import keras_ddpm as kd


def make_network(alpha=None):
    """Makes a small U-Net. With the alpha of a schedule, it receives 1000 sqrt(alpha_bar_t) instead of t."""
    unet = kd.networks.unet((28, 28, 1), 16, (1, 2, 4), 1, attention_resolutions=())
    if alpha is None:
        return unet
    x_t, t = (keras.Input(tensor.shape[1:], dtype=tensor.dtype) for tensor in unet.inputs)
    level = ops.take(np.round(1000 * alpha).astype("int32"), t)
    return keras.Model([x_t, t], unet([x_t, level]))


def make_choices(data):
    """A dict from names to arguments of `make_network` and `DiffusionModel`, and the scale and offset of the data."""
    linear = kd.schedules.linear
    mean, std = np.mean(data), np.std(data)
    of_range = lambda *clip_range: {"diffusion": kd.GaussianDiffusion(clip_range=clip_range)}
    return {
        "T = 1000, [-1, 1]": ({}, {}, 1, 0),
        "T = 100": ({}, {"diffusion": kd.GaussianDiffusion(linear(100))}, 1, 0),
        "T = 100, original betas": ({}, {"diffusion": kd.GaussianDiffusion(np.linspace(1e-4, 0.02, 100))}, 1, 0),
        "[0, 1]": ({}, of_range(0, 1), 0.5, 0.5),
        "standardized": ({}, of_range((-1 - mean) / std, (1 - mean) / std), 1 / std, -mean / std),
        "noise level": ({"alpha": linear(1000).alpha}, {}, 1, 0),
        "one t per image": ({}, {"timestep_sampling": "uniform"}, 1, 0),
        "one t per batch": ({}, {"timestep_sampling": "batch"}, 1, 0),
    }


def draw_schedules(path):
    with kd.plots.figure(path, 1, 2, (10, 4)) as row:
        for axes, timesteps in zip(row, (1000, 100)):
            alpha_bar = kd.schedules.linear(timesteps).alpha ** 2
            lines = {"alpha_bar": alpha_bar, "sqrt(alpha_bar)": alpha_bar**0.5}
            if timesteps == 100:
                lines["alpha_bar, original betas"] = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
            kd.plots.curves(axes, lines, xlabel="t", title=f"T = {timesteps}: alpha_bar_T = {alpha_bar[-1]:.1e}")


def draw_embedding(path):
    sinusoid = ops.convert_to_numpy(kd.layers.TimestepEmbedding(64)(np.arange(1001)))
    with kd.plots.figure(path) as axes:
        axes.imshow(sinusoid.T, aspect="auto", interpolation="nearest")
        axes.set(xlabel="t", ylabel="entry", title="Sinusoid of t, an input of the network")


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


def main(
    *,
    output="runs/mnist",
    resume=False,
    overwrite=False,
    seed=0,
    data_dir: str | None = None,
    steps=600,
    more_steps=4000,
    classifier_epochs=3,
    num_samples=500,
):
    """Trains a model for each choice, measures samples and draws figures.

    Args:
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        steps: number of training batches of 32 images for each choice.
        more_steps: number of training batches for the model of the other figures.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples per distance.
    """
    out = common.open_output(output, resume, overwrite)
    common.check_settings(out, {"seed": seed, "steps": steps, "more_steps": more_steps})
    keras.utils.set_random_seed(seed)
    draw_schedules(out / "schedules.png")
    draw_embedding(out / "embedding.png")
    train, test = common.load("mnist", 28, data_dir=data_dir, seed=seed, channels=1, labels=True)
    _, distance_of, _ = common.make_metric(train, test, num_samples, classifier_epochs, seed)
    data = kd.images.from_uint8(train.x)

    def fit(name, model, steps, scale=1, offset=0):
        x = scale * data + offset
        batches = kd.datasets.from_arrays(x, batch_size=32, steps_per_epoch=max(1, steps // 5), seed=seed)
        checkpoints = out / "checkpoints" / name
        common.train(model, batches, 5, warmup_steps=100, checkpoints=checkpoints, verbose=0)
        samples = (model.sample(num_samples, kd.samplers.DDPM(100), seed) - offset) / scale
        return samples, distance_of(samples)

    rows = {}
    for name, (network, options, scale, offset) in make_choices(data).items():
        keras.utils.set_random_seed(seed)
        model = kd.DiffusionModel(make_network(**network), ema_decay=0.99, seed=seed, **options)
        samples, distance = fit(name, model, steps, scale, offset)
        print(f"{name:28} kernel distance {distance:7.1f}", flush=True)
        rows[f"{name}: {distance:.0f}"] = {"": samples[:12]}
    kd.plots.table(out / "choices.png", rows, columns=12, size=0.4)

    model = kd.DiffusionModel(make_network(), ema_decay=0.999, seed=seed)
    samples, distance = fit("longer", model, more_steps)
    print(f"The first model after {more_steps} batches: kernel distance {distance:.1f}")
    model.save(out / "model.keras")
    kd.images.save(out / "samples.png", samples[:100])
    common.draw_denoising(out / "denoising.png", model, kd.samplers.DDPM(100), seed)
    draw_editing(out / "editing.png", model, kd.images.from_uint8(test.x[:6]), seed)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
