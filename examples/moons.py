"""Denoising diffusion in two dimensions, where everything can be plotted: two moons.

    python examples/moons.py

Points on two half circles become noise in T = 100 steps, x_t = alpha_t x_0 + sigma_t ε. A small network learns to
predict the noise ε in x_t (Ho et al., 2020). The prediction gives the score, which is the gradient of the log-density
of x_t: s = -ε / sigma_t. Following the score leads back to the moons.

The samples are compared with fresh points by the sliced Wasserstein distance. It is divided by the distance between
two sets of fresh points, so 1 is perfect. For this data set the exact denoiser is known: it is an integral over the
angle, computed here as a sum. Its samples are also measured. With T = 100, samples of DDPM with "small" variance
are too narrow even with the exact denoiser.

Output files in --output:

    forward.png     points that become noise, at several t
    reverse.png     noise that becomes points
    score.png       the learned score at t = 10, and paths of Langevin dynamics
    guidance.png    samples of each moon with increasing guidance
    samples.npy     10,000 samples
"""

import pathlib
import time

import common
import keras
import numpy as np
from keras import ops

import keras_ddpm as kd

COLORS = np.array(["tab:blue", "tab:orange"])
NOISE = 0.05


def train(steps, seed, x, labels=None):
    """Trains a model of the points, or, with labels, of each moon."""
    network = kd.networks.mlp(2, 96, num_classes=None if labels is None else 2)
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(kd.schedules.cosine(100)), seed=seed)
    optimizer = kd.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps))
    several = 1 if keras.backend.backend() == "torch" else min(20, steps)  # PyTorch cannot join steps
    model.compile(loss="mse", optimizer=optimizer, steps_per_execution=several)
    batches = kd.datasets.from_arrays(x, labels, batch_size=256, steps_per_epoch=steps, seed=seed)
    loss = model.fit(batches, verbose=0).history["loss"][0]
    print(f"Trained on {steps} batches of 256 points, mean loss {loss:.3f}.", flush=True)
    return model


def best_model(schedule, num_angles=48):
    """The model with the exact denoiser, which is the mean of x_0 given x_t.

    The moons are approximated by narrow Gaussians close together.
    """
    angle = np.pi * (np.arange(2 * num_angles) + 0.5) / num_angles
    lower = angle > np.pi
    centers = np.column_stack([np.cos(angle) + lower - 0.5, np.sin(angle) + lower / 2 - 0.25]) / (1.5 + 5 * NOISE)
    std = NOISE / (1.5 + 5 * NOISE)
    x_t, t = keras.Input((2,)), keras.Input((), dtype="int32")
    alpha, sigma = (ops.take(table.astype("float32"), t)[:, None] for table in (schedule.alpha, schedule.sigma))
    variance = alpha**2 * std**2 + sigma**2
    distance = ops.sum((x_t[:, None] - alpha[:, None] * centers.astype("float32")) ** 2, axis=2)
    center = ops.matmul(ops.softmax(-distance / (2 * variance)), centers.astype("float32"))
    x_0 = center + alpha * std**2 / variance * (x_t - alpha * center)
    return kd.DiffusionModel(keras.Model([x_t, t], x_0), kd.GaussianDiffusion(schedule, "x0"))


def sliced_wasserstein(a, b, num_directions=64):
    """Mean Wasserstein distance (of order 1) of the projections of two sets onto lines. [Rabin et al., 2012]"""
    angle = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angle), np.sin(angle)])
    return np.mean(np.abs(np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)))


def measure(rows, fresh, num_samples, num_pairs, seed):
    """Prints distances of samples to fresh points, divided by the distance of two sets of fresh points.

    Args:
        rows: tuples of a name, a model, a sampler and a number of sets of samples.
        fresh: function from an index to fresh points.
        num_samples: number of samples in a set.
        num_pairs: number of pairs of sets of fresh points.
        seed: seed of the first set of samples.

    Returns:
        The first set of samples of each row.
    """
    floor = np.mean([sliced_wasserstein(fresh(2 * i), fresh(2 * i + 1)) for i in range(1, num_pairs + 1)])
    print(f"Sliced Wasserstein distance of {num_samples} samples, divided by that of fresh points, {floor:.4f}:")
    first = []
    for name, model, sampler, num in rows:
        sets = [model.sample(num_samples, sampler, seed=seed + i, batch_size=num_samples) for i in range(num)]
        ratios = [sliced_wasserstein(points, fresh(100 + i)) / floor for i, points in enumerate(sets)]
        print(f"    {name}: {np.mean(ratios):.2f} ± {np.std(ratios) / num**0.5:.2f}", flush=True)
        first.append(sets[0])
    return first


def scatter(path, panels, colors="tab:blue", cmap=None):
    """Draws panels of points side by side, from a dict of titles and arrays `(num, 2)`."""
    with kd.plots.figure(path, 1, len(panels), (2.2 * len(panels), 2.5)) as row:
        for axes, (title, x) in zip(row, panels.items()):
            axes.scatter(*x.T, s=1, c=colors, cmap=cmap)
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
        axes.set(title=f"Score at t = {t}, data, and the ends of paths of Langevin dynamics", aspect="equal")
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])


def main(*, output="runs/moons", seed=0, steps=10_000, num_samples=10_000, num_pairs=20):
    """Trains two models, measures samples and draws figures.

    Args:
        output: folder for the output files.
        seed: random seed.
        steps: number of training batches.
        num_samples: number of samples in a set.
        num_pairs: number of sets to measure. The first row uses all of them, and the others use a quarter.
    """
    if steps < 4 or num_samples < 1 or num_pairs < 2:
        raise common.UsageError("At least 4 --steps, 1 --num-samples and 2 --num-pairs are needed.")
    start = time.time()
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    fresh = lambda index, num=num_samples: kd.datasets.moons(num, [seed, index], NOISE)
    x, labels = fresh(0, 100_000)

    model = train(steps, seed, x)
    schedule = model.diffusion.schedule
    noise = np.random.default_rng(seed).standard_normal((2000, 2))
    times = [0, 5, 10, 20, 40, 80]
    forward = {f"t = {t}": schedule.alpha[t] * x[:2000] + schedule.sigma[t] * noise for t in times}
    scatter(out / "forward.png", forward, COLORS[labels[:2000]])
    large, small = kd.samplers.DDPM(variance="large"), kd.samplers.DDPM()
    _, states, _ = model.sample(2000, large, seed=seed, return_trajectory=100)
    scatter(out / "reverse.png", {f"t = {t}": states[99 - t] for t in times[::-1]})
    draw_score(out / "score.png", model, x[:2000], seed)

    best, few = best_model(schedule), max(2, num_pairs // 4)
    rows = [
        ("trained network, large variance", model, large, num_pairs),
        ("trained network, small variance", model, small, few),
        ("exact denoiser, large variance", best, large, few),
        ("exact denoiser, small variance", best, small, few),
    ]
    samples = measure(rows, lambda index: fresh(index)[0], num_samples, num_pairs, seed)
    np.save(out / "samples.npy", samples[0])

    conditional = train(steps // 4, seed, x, labels)
    moons = np.arange(2000) % 2
    guided = {
        f"w = {w}": conditional.sample(2000, large, seed=seed, labels=moons, guidance_scale=w) for w in (0, 1, 2, 4)
    }
    scatter(out / "guidance.png", guided, COLORS[moons])
    print(f"Done in {time.time() - start:.0f} s. Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
