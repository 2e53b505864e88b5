"""Distillation: a trained model is turned into one that samples in one or two network calls.

    python examples/distill.py                                     # points, in two minutes
    python examples/distill.py --model runs/samplers/model.keras   # then also images, such as Fashion-MNIST
    python examples/distill.py --model runs/samplers/model.keras --guide runs/samplers/guide.keras --guidance-scale 2

A diffusion model predicts the mean of all data that could lie behind x_t. So one call from pure noise gives an average
of the data, and samplers need several calls. But a sampler that adds no noise turns each noise into one sample. A
second model can learn which one, from many pairs of noise and sample (Luhman and Luhman, 2021; Liu et al., 2022). If
its examples are guided samples, it needs no guidance.

For points, the teacher is the exact denoiser of examples/moons.py. Their sliced Wasserstein distance is divided by the
distance between two sets of fresh points, so 1 is perfect. For images, the kernel distance is that of
examples/samplers.py, which also trains suitable models.

Output files in --output:

    map.png           where one call takes points of noise: with the exact denoiser, and after the distillation
    pairs.npy         samples of the teacher; pairs.json says how they were made
    model.keras       the distilled model of images
    checkpoints/      from which --resume goes on after Ctrl-C or a crash
    classifier.keras  the classifier, which the next run uses again
    images.png        images of the teacher and of the distilled model, from the same noises
"""

import time

import common
import keras
import moons
import numpy as np

import keras_ddpm as kd

ONE, TEN = kd.samplers.DDIM(1), kd.samplers.UniPC(10)


def two(model):
    """Two calls, at T and at 0.7 T."""
    end = model.diffusion.timesteps
    return kd.samplers.DDIM(2, spacing=(end, round(0.7 * end)))


def draw_map(path, panels, seed, num=1500):
    """Draws points of noise and where they are taken. Each point keeps the color of the direction it came from."""
    noise = kd.samplers.loop.noise((2,), seed, np.arange(num))
    panels = {name: model.sample(num, sampler, seed) for name, (model, sampler) in panels.items()}
    moons.scatter(path, {"noise / 2": noise / 2, **panels}, np.arctan2(*noise.T), cmap="hsv")


def distill_points(out, seed, num_pairs, epochs, num_points, num_sets):
    fifty = kd.samplers.DPMSolver(50)
    teacher = moons.best_model(kd.schedules.cosine(100))
    data = kd.distillation.pairs(teacher, num_pairs, fifty, seed, batch_size=min(256, num_pairs))
    diffusion = kd.GaussianDiffusion(teacher.diffusion.schedule, "v")
    fast = kd.DiffusionModel(kd.networks.mlp(2, 128, 3), diffusion, timestep_sampling="half_at_T", seed=seed)
    common.train(fast, data, epochs, loss="mae", verbose=0)
    seed += 1  # other noises than those of the pairs
    draw_map(
        out / "map.png",
        {"exact, one call": (teacher, ONE), "exact, 50 calls": (teacher, fifty), "distilled, one call": (fast, ONE)},
        seed,
    )
    few = max(2, num_sets // 4)
    rows = [
        ("exact denoiser, 50 calls", teacher, fifty, few),
        ("exact denoiser, one call", teacher, ONE, few),
        ("distilled, one call", fast, ONE, few),
        ("distilled, two calls", fast, two(fast), few),
    ]
    fresh = lambda index: kd.datasets.moons(num_points, [seed, index], moons.NOISE)[0]
    moons.measure(rows, fresh, num_points, num_sets, seed)


def make_pairs(out, how, model, num_pairs, seed, batch_size, **options):
    """Makes pairs, or reads those that were made in the same way."""
    file, note = out / "pairs.npy", out / "pairs.json"
    options |= common.every_class(model, num_pairs)
    if not common.is_noted(note, how):
        start = time.time()
        np.save(file, kd.distillation.pairs(model, num_pairs, TEN, seed, batch_size=1, verbose=1, **options).x)
        common.write_note(note, how)
        print(f"Made {num_pairs} pairs in {(time.time() - start) / 60:.1f} minutes.", flush=True)
    x = np.load(file, mmap_mode="r")
    return kd.distillation.Pairs(
        x, options.get("labels"), batch_size, seed=seed, diffusion=model.diffusion, noise_seed=seed
    )


def distill_images(out, seed, model, guided, data, epochs, learning_rate, metric, num_samples, num_seeds):
    _, distance_of, _ = metric
    fast = kd.DiffusionModel.from_model(model, timestep_sampling="half_at_T", loss_weight=None, sampler=ONE, seed=seed)
    start = time.time()
    common.train(fast, data, epochs, learning_rate, loss="mae", checkpoints=out / "checkpoints")
    print(f"Trained for {(time.time() - start) / 60:.1f} minutes in this run.", flush=True)
    fast.save(out / "model.keras")
    pictures = {}
    asked = common.every_class(model, num_samples)
    print(f"Kernel distance x 1000 of {num_samples} samples, mean of {num_seeds} seeds:")
    for name, by, sampler, options in [
        ("teacher, 10 calls", model, TEN, {}),
        ("teacher, 10 calls with noise", model, kd.samplers.DPMSolver(10, eta=1.0), {}),
        ("teacher, 9 calls of Heun", model, kd.samplers.Heun(5), {}),  # the best on Fashion-MNIST without guidance
        *([("teacher, 10 guided calls", model, TEN, guided)] if guided else []),
        ("teacher, one call", model, ONE, {}),
        ("distilled, one call", fast, ONE, {}),
        ("distilled, two calls", fast, two(fast), {}),
    ]:
        # Other noises than those of the pairs.
        sets = [by.sample(num_samples, sampler, seed + 1 + i, **asked, **options) for i in range(num_seeds)]
        pictures[name] = {"": sets[0][:20]}
        print(f"    {name}: {np.mean([distance_of(x) for x in sets]):.1f}", flush=True)
    kd.plots.table(out / "images.png", pictures, columns=20)


def main(
    *,
    output="runs/distill",
    resume=False,
    overwrite=False,
    seed=0,
    model: str | None = None,
    guide: str | None = None,
    guidance_scale=1.0,
    data_dir: str | None = None,
    dataset="fashion_mnist",
    num_pairs=60_000,
    epochs=12,
    learning_rate=1e-3,
    batch_size=64,
    classifier_epochs=5,
    num_samples=2000,
    num_seeds=2,
    num_point_pairs=50_000,
    point_epochs=30,
    num_points=10_000,
    num_sets=20,
):
    """Distills the exact denoiser of points, and a trained model of images.

    Args:
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        model: trained .keras file of images, or a preset of the package. By default only points are sampled.
        guide: .keras file of a worse version of the model, which guides it.
        guidance_scale: guidance scale of the pairs of images.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test", with which images are compared.
        num_pairs: number of pairs of images.
        epochs: number of training epochs on images.
        learning_rate: highest learning rate on images.
        batch_size: number of images per batch.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of images per distance.
        num_seeds: number of distances of which the mean is taken.
        num_point_pairs: number of pairs of points.
        point_epochs: number of training epochs on points.
        num_points: number of points in a set.
        num_sets: number of pairs of sets of fresh points. A quarter as many sets of samples are measured.
    """
    counts = {"num-pairs": num_pairs, "num-point-pairs": num_point_pairs, "num-samples": num_samples}
    counts |= {"num-points": num_points, "num-sets": num_sets, "batch-size": batch_size}
    counts |= {"epochs": epochs, "point-epochs": point_epochs, "num-seeds": num_seeds}
    for name, count in counts.items():
        low = 1 if name in ("epochs", "point-epochs", "num-seeds", "batch-size") else 2
        if count < low:
            raise common.UsageError(f"--{name} must be at least {low}. Received: {count}")
    if batch_size > num_pairs:
        raise common.UsageError(f"--batch-size must be at most --num-pairs, {num_pairs}. Received: {batch_size}")
    common.check_learning_rate(learning_rate)
    if guide and guidance_scale == 1:
        raise common.UsageError("--guide needs a --guidance-scale other than 1.")
    if not model and guidance_scale != 1:
        raise common.UsageError("--guidance-scale needs a --model.")
    out = common.open_output(output, resume, overwrite)
    keras.utils.set_random_seed(seed)
    if model:
        trained = common.load_model(model)
        if trained.diffusion.prediction == "epsilon":
            raise common.UsageError(f"{model} predicts the noise, which says nearly nothing about x_0 at T.")
        size, _, channels = trained.data_shape
        options = {"channels": channels, "labels": True, "data_dir": data_dir, "seed": seed}
        train, test = common.load(dataset, size, **options)
        if train.x.shape[1:] != trained.data_shape:
            raise common.UsageError(f"{model} makes images {trained.data_shape}. --dataset has {train.x.shape[1:]}.")
        guided = {"guidance": kd.guidance.Guidance(guide=common.load_model(guide))} if guide else {}
        guided |= {"guidance_scale": guidance_scale} if guidance_scale != 1 else {}
        trained.sample(1, ONE, seed, **common.every_class(trained, 1), **guided)  # says what does not fit
    distill_points(out, seed, num_point_pairs, point_epochs, num_points, num_sets)
    if model:
        metric = common.make_metric(train, test, num_samples, classifier_epochs, seed, out / "classifier.keras")
        models = [common.checksum(*of.ema_weights) for of in (trained, *filter(None, [guided.get("guide")]))]
        how = {"models": models, "guidance_scale": guidance_scale, "num_pairs": num_pairs, "seed": seed}
        data = make_pairs(out, how, trained, num_pairs, seed, batch_size, **guided)
        distill_images(out, seed, trained, guided, data, epochs, learning_rate, metric, num_samples, num_seeds)
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main)
