"""Distillation: a trained model is tuned to sample in one or two network calls, by easy consistency tuning.

    python examples/distill.py                                     # points only, in two minutes
    python examples/distill.py --model runs/samplers/model.keras   # then also images, such as Fashion-MNIST

A diffusion model predicts the mean of all data that could lie behind x_t. So one call from pure noise gives an average
of the data, and samplers need several calls. A consistency model predicts where the path of the probability-flow
equation through x_t ends, which is a sample. Easy consistency tuning (Geng et al., 2024) turns one into the other. It
trains the model to predict at x_t what it predicts at an earlier x_s with the same noise. s moves towards t in stages.

For points, the sliced Wasserstein distance is divided by the distance between two sets of fresh points, so 1 is
perfect. For images, the kernel distance is that of examples/samplers.py. The model of examples/samplers.py is suitable.

Output files in --output:

    map.png           where one call takes points of noise, before and after the tuning
    images.keras      the tuned model of images
    images.png        images by the teacher and by the tuned model, from the same noises
"""

import pathlib
import time

import common
import keras
import moons
import numpy as np

import keras_ddpm as kd

ONE, TWO = kd.samplers.Consistency(1), kd.samplers.Consistency(2)


def tune(model, data, updates, num_stages, learning_rate):
    """Returns a consistency model that started as `model`. Half of the updates belong to the last stage."""
    epochs = -(-updates // len(data))
    updates = epochs * len(data)
    fast = kd.distillation.ConsistencyModel.from_model(
        model, updates_per_stage=max(1, updates // (2 * num_stages)), num_stages=num_stages, ema_decay=0.999
    )
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, updates)
    fast.compile(loss="mse", optimizer=kd.optimizers.Adam(rate, global_clipnorm=1.0))
    start = time.time()
    fast.fit(data, epochs=epochs, callbacks=[common.Estimate()], verbose=0)
    print(f"Tuned on {updates} batches in {(time.time() - start) / 60:.1f} minutes.", flush=True)
    return fast


def draw_map(path, models, seed, num=1500):
    """Draws points of noise and where one call takes them. Each point keeps the color of the direction it came from."""
    noise = kd.sampling.noise((2,), seed, range(num))
    panels = {"noise / 2": noise / 2}
    panels |= {name: model.sample(num, ONE, seed) for name, model in models.items()}
    moons.scatter(path, panels, np.arctan2(*noise.T), cmap="twilight")


def tune_points(out, seed, teacher_steps, updates, num_samples, num_pairs):
    fresh = lambda index, num=num_samples: kd.datasets.moons(num, [seed, index], moons.NOISE)[0]  # noqa: E731
    x = fresh(0, 100_000)
    teacher = moons.train(teacher_steps, seed, x, diffusion=kd.GaussianDiffusion(kd.schedules.cosine(1000), "v"))
    batches = kd.datasets.from_arrays(x, batch_size=256, steps_per_epoch=updates, seed=seed)
    fast = tune(teacher, batches, updates, 3, 2e-3)
    draw_map(out / "map.png", {"teacher, one call": teacher, "tuned, one call": fast}, seed)
    rows = [
        ("teacher, 20 calls", teacher, kd.samplers.DPMSolver(20), num_pairs),
        ("teacher, one call", teacher, ONE, num_pairs),
        ("tuned, one call", fast, ONE, num_pairs),
        ("tuned, two calls", fast, TWO, num_pairs),
    ]
    moons.measure(rows, fresh, num_samples, num_pairs, seed)


def tune_images(
    out, seed, model, data, test, updates, num_stages, learning_rate, num_samples, num_seeds, classifier_epochs
):
    _, distance_of, _ = common.make_metric(data, test, num_samples, classifier_epochs, seed, out / "classifier.keras")
    fast = tune(model, data, updates, num_stages, learning_rate)
    fast.save(out / "images.keras")
    pictures = {}
    asked = {"batch_size": min(250, num_samples), **common.all_labels(model, num_samples)}
    print(f"Kernel distance x 1000 of {num_samples} samples, mean of {num_seeds} seeds:")
    for name, by, sampler in [
        ("teacher, 20 calls", model, kd.samplers.DPMSolver(20)),
        ("teacher, 20 calls with noise", model, kd.samplers.DPMSolver(20, eta=1.0)),
        ("teacher, one call", model, ONE),
        ("tuned, one call", fast, ONE),
        ("tuned, two calls", fast, TWO),
    ]:
        sets = [by.sample(num_samples, sampler, seed + i, **asked) for i in range(num_seeds)]
        pictures[name] = {"": sets[0][:20]}
        print(f"    {name}: {np.mean([distance_of(x) for x in sets]):.1f}", flush=True)
    kd.plots.table(out / "images.png", pictures, columns=20)


def main(
    *,
    output="runs/distill",
    seed=0,
    model: str | None = None,
    data_dir: str | None = None,
    dataset="fashion_mnist",
    teacher_steps=6000,
    point_updates=6000,
    num_points=10_000,
    num_pairs=5,
    updates=6000,
    num_stages=3,
    learning_rate=5e-4,
    batch_size=64,
    classifier_epochs=5,
    num_samples=2000,
    num_seeds=2,
):
    """Tunes a model of points, and a trained model of images.

    Args:
        output: folder for the output files.
        seed: random seed.
        model: trained .keras file of images, or a preset of the package. By default only points are sampled.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test", on which the model was trained.
        teacher_steps: number of training batches of the model of points.
        point_updates: number of batches of its tuning.
        num_points: number of points in a set.
        num_pairs: number of sets to measure.
        updates: number of batches of the tuning on images.
        num_stages: number of stages of the tuning on images.
        learning_rate: first learning rate of the tuning on images.
        batch_size: number of images per batch.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of images per distance.
        num_seeds: number of distances of which the mean is taken.
    """
    if min(teacher_steps, point_updates, updates, num_points, num_samples) < 4 or num_pairs < 2:
        raise common.UsageError("All numbers of steps, updates and samples must be 4 or more, and --num-pairs 2.")
    if min(num_stages, num_seeds) < 1:
        raise common.UsageError("--num-stages and --num-seeds must be 1 or more.")
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    if model:
        trained = common.load_model(model)
        size, _, channels = trained.data_shape
        options = {"channels": channels, "labels": True, "data_dir": data_dir, "seed": seed, "batch_size": batch_size}
        data, test = common.load(dataset, size, steps_per_epoch=min(updates, 500), **options)
    tune_points(out, seed, teacher_steps, point_updates, num_points, num_pairs)
    if model:
        arguments = updates, num_stages, learning_rate, num_samples, num_seeds, classifier_epochs
        tune_images(out, seed, trained, data, test, *arguments)


if __name__ == "__main__":
    common.run(main)
