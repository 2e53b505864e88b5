"""Denoising diffusion in two dimensions, where everything can be seen: two moons.

    python examples/moons.py

Points on two half circles are turned into noise in T = 100 steps, x_t = alpha_t x_0 + sigma_t ε, and a small network
learns to predict the noise ε in x_t (Ho et al., 2020). Its prediction gives the score, the gradient of the
log-density of x_t: s = -ε / sigma_t. Following the score leads back to the moons.

How right the samples are is measured by the sliced Wasserstein distance to fresh points, over its value for two sets
of fresh points: 1 is perfect. The best possible denoiser is known here, as an integral over the angle (computed as a
sum), and its samples are measured too: with T = 100, those with DDPM's "small" variance stay too narrow, whatever the
network.

Everything goes to --output:

    forward.png     points becoming noise, at several t
    reverse.png     noise becoming points again
    score.png       the learned score at t = 10, and paths of Langevin dynamics on it
    guidance.png    points asked for by moon, with growing guidance
    samples.npy     10,000 points
"""

import time

import common
import keras
import numpy as np
from keras import ops

import keras_ddpm as kd

COLOURS = np.array(["tab:blue", "tab:orange"])
NOISE = 0.05


def train(steps, seed, x, labels=None):
    """A model of the points, or, with labels, of each moon."""
    network = kd.networks.mlp(2, 96, num_classes=None if labels is None else 2)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(100)), seed=seed)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps))
    model.compile(loss="mse", optimizer=optimizer, steps_per_execution=min(20, steps))
    batches = kd.datasets.from_arrays(x, labels, batch_size=256, steps_per_epoch=steps, seed=seed)
    loss = model.fit(batches, verbose=0).history["loss"][0]
    print(f"Trained on {steps} batches of 256 points, mean loss {loss:.3f}.", flush=True)
    return model


def best_model(schedule, num_angles=48):
    """The model whose prediction of x_0 is exact: its mean given x_t, for Gaussians close together on both moons."""
    angle = np.pi * (np.arange(2 * num_angles) + 0.5) / num_angles
    lower = angle > np.pi
    centres = np.column_stack([np.cos(angle) + lower - 0.5, np.sin(angle) + lower / 2 - 0.25]) / (1.5 + 5 * NOISE)
    std = NOISE / (1.5 + 5 * NOISE)
    x_t, t = keras.Input((2,)), keras.Input((), dtype="int32")
    alpha, sigma = (ops.take(table.astype("float32"), t)[:, None] for table in (schedule.alpha, schedule.sigma))
    variance = alpha**2 * std**2 + sigma**2
    distance = ops.sum((x_t[:, None] - alpha[:, None] * centres.astype("float32")) ** 2, axis=2)
    centre = ops.matmul(ops.softmax(-distance / (2 * variance)), centres.astype("float32"))
    x_0 = centre + alpha * std**2 / variance * (x_t - alpha * centre)
    return kd.DiffusionModel(keras.Model([x_t, t], x_0), kd.GaussianDiffusion(schedule, "x0"))


def sliced_wasserstein(a, b, num_directions=64):
    """Mean Wasserstein distance (of order 1) of the projections of two sets on lines. [Rabin et al., 2012]"""
    angle = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angle), np.sin(angle)])
    return np.mean(np.abs(np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)))


def scatter(path, panels, colours="tab:blue"):
    """Panels of points side by side, from titles to arrays `(num, 2)`."""
    with kd.plots.figure(path, 1, len(panels), (2.2 * len(panels), 2.5)) as row:
        for axes, (title, x) in zip(row, panels.items()):
            axes.scatter(*x.T, s=1, c=colours)
            axes.set(title=title, xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", xticks=[], yticks=[])


def draw_score(path, model, points, seed, t=10):
    x = np.stack(np.meshgrid(*[np.linspace(-1.6, 1.6, 33, dtype="float32")] * 2), axis=-1).reshape(-1, 2)
    score = -model.diffusion.predict_noise(x, np.full(len(x), t), model.denoise(x, t, clip=False))
    score = ops.convert_to_numpy(score) / model.diffusion.schedule.sigma[t]
    length = np.linalg.norm(score, axis=1, keepdims=True)
    langevin = kd.samplers.Langevin(100, step_size=0.1, num_updates=10)
    _, paths, _ = model.sample(5, langevin, seed=seed, return_trajectory=100)
    with kd.plots.figure(path, size=(6, 6)) as axes:
        axes.scatter(*points.T, s=3, c="tab:blue", alpha=0.3)
        axes.quiver(*x.T, *(score / length**0.5).T, length, angles="xy", width=0.002, cmap="Greys", clim=(-10, 30))
        axes.plot(*paths[-25:].transpose(2, 0, 1), linewidth=1)
        axes.scatter(*paths[-1].T, s=20, c="black", zorder=3)
        axes.set(title=f"The score at t = {t}, data, and the ends of paths of Langevin dynamics", aspect="equal")
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])


def main(arguments=None):
    parser = common.make_parser(__doc__, "moons")
    parser.add_argument("--steps", type=int, default=10_000, help="batches to train on")
    parser.add_argument("--num-samples", type=int, default=10_000)
    parser.add_argument("--num-pairs", type=int, default=20, help="sets of samples to measure")
    args = parser.parse_args(arguments)
    if args.steps < 4 or args.num_samples < 1 or args.num_pairs < 2:
        parser.error("needs at least 4 --steps, 1 --num-samples and 2 --num-pairs.")
    start = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    fresh = lambda seed, num=args.num_samples: kd.datasets.moons(num, [args.seed, seed], NOISE)  # noqa: E731
    x, labels = fresh(0, 100_000)

    model = train(args.steps, args.seed, x)
    schedule = model.diffusion.schedule
    noise = np.random.default_rng(args.seed).standard_normal((2000, 2))
    times = [0, 5, 10, 20, 40, 80]
    forward = {f"t = {t}": schedule.alpha[t] * x[:2000] + schedule.sigma[t] * noise for t in times}
    scatter(args.output / "forward.png", forward, COLOURS[labels[:2000]])
    large, small = kd.samplers.DDPM(variance="large"), kd.samplers.DDPM()
    _, states, _ = model.sample(2000, large, seed=args.seed, return_trajectory=100)
    scatter(args.output / "reverse.png", {f"t = {t}": states[99 - t] for t in times[::-1]})
    draw_score(args.output / "score.png", model, x[:2000], args.seed)

    floor = np.mean([sliced_wasserstein(fresh(2 * i)[0], fresh(2 * i + 1)[0]) for i in range(1, args.num_pairs + 1)])
    print(
        f"Sliced Wasserstein distance of {args.num_samples} points to as many, over that of fresh points, {floor:.4f}:"
    )
    best, few = best_model(schedule), max(2, args.num_pairs // 4)
    for name, sampled, sampler, num in [
        ("trained network, large variance", model, large, args.num_pairs),
        ("trained network, small variance", model, small, few),
        ("exact denoiser, large variance", best, large, few),
        ("exact denoiser, small variance", best, small, few),
    ]:
        sets = [
            sampled.sample(args.num_samples, sampler, seed=args.seed + i, batch_size=args.num_samples)
            for i in range(num)
        ]
        ratios = [sliced_wasserstein(points, fresh(100 + i)[0]) / floor for i, points in enumerate(sets)]
        print(f"    {name}: {np.mean(ratios):.2f} ± {np.std(ratios) / num**0.5:.2f}", flush=True)
        if (sampled, sampler) == (model, large):
            np.save(args.output / "samples.npy", sets[0])

    conditional = train(args.steps // 4, args.seed, x, labels)
    asked = np.arange(2000) % 2
    scales = [0, 1, 2, 4]
    guided = {
        f"w = {w}": conditional.sample(2000, large, seed=args.seed, labels=asked, guidance_scale=w) for w in scales
    }
    scatter(args.output / "guidance.png", guided, COLOURS[asked])
    print(f"Done in {time.time() - start:.0f} s. Wrote {args.output}.")


if __name__ == "__main__":
    common.run(main)
