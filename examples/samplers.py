"""Sample quality against the number of network calls, for every sampler. The default sampler is based on it.

    python examples/samplers.py                                                    # trains on Fashion-MNIST first
    python examples/samplers.py --model runs/samplers/model.keras --evaluations 10 20  # uses the trained model again

All samplers start from the same noise. Their samples are compared with held-out images by the kernel distance (KID,
times 1000) in the features of a judge. It is a small classifier for gray images, and the strongest network that is
available for photographs. Its accuracy is printed. The expected distance of perfect samples is 0. Its spread is shown
by the distances of as many training images. The judge also measures how many samples are in the class asked for, if it
is right on 80 % of the held-out images.

Up to 20 network calls, every sampler is measured with every spacing of the steps. "optimized" searches the times for
the model. Beyond 20 calls, DDIM with uniform steps shows what many calls bring.

Output files in --output:

    model.keras           the trained model
    guide.keras           the same model after a tenth of the training; examples/guidance.py --guide uses it
    classifier.keras      the classifier, which the next run uses again
    distances.csv         sampler, spacing, number of network calls, distance and share in class, over all seeds
    distances.png         the same as curves, for the best spacing of each sampler
    samples.png           samples from the same three noises, by sampler and number of network calls
"""

import csv
import functools
import itertools
import pathlib
import time

import common
import keras
import matplotlib.ticker
import numpy as np

import keras_ddpm as kd

S = kd.samplers
# Functions from a number of network calls to a sampler that makes as many calls, or one fewer.
SAMPLERS = {
    "DDPM": S.DDPM,
    "DDIM": S.DDIM,
    "DPMSolver": S.DPMSolver,
    "DPMSolver, order=3": functools.partial(S.DPMSolver, order=3),
    "DPMSolver, eta=1": functools.partial(S.DPMSolver, eta=1.0),
    "UniPC": S.UniPC,
    "UniPC, order=3": functools.partial(S.UniPC, order=3),
    "IPNDM": S.IPNDM,
    "Heun": lambda calls, **spacing: S.Heun((calls + 1) // 2, **spacing),
}
SPACINGS = ("uniform", "logsnr", "karras", "optimized")


def make_model(data, seed, num_classes=None, **settings):
    """Makes a small model for the images in `data`. It predicts v, which is trained faster than the noise."""
    size = data.x.shape[1:]
    settings = {"attention_resolutions": (size[0] // 4,), "num_classes": num_classes} | settings
    network = kd.networks.unet(size, 16, (1, 2, 4), 1, **settings)
    return kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="v"), seed=seed)


class Early(keras.callbacks.Callback):
    """Saves the model once, after a tenth of the training. Such a model can guide the trained one."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_begin(self, logs=None):
        self.left = max(1, self.params["epochs"] * self.params["steps"] // 10)

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()
            self.model.save(self.path)


def plot(path, rows, best, floor):
    with kd.plots.figure(path, size=(8, 6)) as axes:
        lines = {
            f"{name}, {spacing}": [row[2:4] for row in rows if row[:2] == [name, spacing]] for name, spacing in best
        }
        lines = {label: tuple(zip(*sorted(points))) for label, points in lines.items()}
        kd.plots.curves(axes, lines, xlabel="network calls", xscale="log", yscale="log")
        axes.set_ylabel(f"kernel distance × 1000 (training images: {floor[0]:.1f} ± {floor[1]:.1f})")
        ticks = sorted({row[2] for row in rows if row[0] == "DDIM"})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")


def main(
    *,
    output="runs/samplers",
    seed=0,
    data_dir: str | None = None,
    dataset="fashion_mnist",
    image_size=28,
    model: str | None = None,
    epochs=8,
    steps_per_epoch: int | None = None,
    judge="auto",
    classifier_epochs=5,
    num_samples=2000,
    num_seeds=2,
    evaluations: tuple[int, ...] = (6, 10, 20, 1000),
    spacings: tuple[str, ...] = SPACINGS,
):
    """Trains a model and measures the samples of every sampler.

    Args:
        output: folder for the output files.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test".
        image_size: side of the images in pixels, if a model is trained.
        model: trained .keras file or a preset of the package. By default a model is trained.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 images per epoch. By default all.
        judge: network whose features are compared: efficientnet, inception, classifier or a .keras file. By default
            the first of these that is available, and a classifier for gray images.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples per distance.
        num_seeds: number of distances of which the mean is taken.
        evaluations: numbers of network calls.
        spacings: spacings of the steps, of uniform, logsnr, karras and optimized.
    """
    if not spacings or set(spacings) - set(SPACINGS):
        raise common.UsageError(f"--spacings takes {', '.join(SPACINGS)}. Received: {' '.join(spacings)}")
    if not evaluations or min(evaluations) < 2 or max(evaluations) > 1000:
        raise common.UsageError(f"--evaluations must be between 2 and 1000. Received: {evaluations}")
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    trained = model and common.load_model(model)
    image_size, _, channels = trained.data_shape if trained else (image_size, None, 1)
    options = {"data_dir": data_dir, "seed": seed, "steps_per_epoch": steps_per_epoch}
    data, test = common.load(dataset, image_size, channels=channels, labels=True, **options)
    kept = out / "classifier.keras"
    found, distance_of, floor = common.make_metric(data, test, num_samples, classifier_epochs, seed, kept, judge)
    if not trained:
        trained = make_model(data, seed, attention_resolutions=(8, 4), patch_size=2)  # four times as fast
        common.train(trained, data, epochs, callbacks=[Early(out / "guide.keras")])
        trained.save(out / "model.keras")

    if "optimized" in spacings and min(evaluations) <= 20:
        paths = trained.trajectories(64, seed + 1000, **common.every_class(trained, 64))
    rows, samples = [], {}
    asked = {"batch_size": min(250, num_samples), **common.every_class(trained, num_samples)}
    labels = asked.get("labels")
    for calls in evaluations:
        few = calls <= 20
        for name, spacing in itertools.product(SAMPLERS if few else ("DDIM",), spacings if few else ("uniform",)):
            if (name, spacing) == ("Heun", "optimized"):  # which is for steps of one call
                continue
            start = time.time()
            sampler = SAMPLERS[name](calls, spacing=spacing if spacing != "optimized" else "uniform")
            if spacing == "optimized":
                sampler = S.optimized(paths, sampler)
            sets = [trained.sample(num_samples, sampler, seed + i, **asked) for i in range(num_seeds)]
            distance = np.mean([distance_of(x) for x in sets])
            share = found.share(np.concatenate(sets), np.tile(labels, num_seeds) if trained.condition else None)
            rows.append([name, spacing, len(sampler.table(trained.diffusion.schedule)), distance, share])
            samples[name, spacing, calls] = sets[0][:3]
            shown = "" if share is None else f"{share:8.1%} in class (real images: {found.accuracy:.1%})"
            shown += f"   ({time.time() - start:.0f} s)"
            print("{:18} {:9} {:5} calls: {:8.2f}".format(*rows[-1]) + shown, flush=True)
        with open(out / "distances.csv", "w", newline="") as file:
            csv.writer(file).writerows([["sampler", "spacing", "network calls", "distance", "share in class"], *rows])
    best = {}
    for name, spacing in sorted({tuple(row[:2]) for row in rows}):
        total = sum(row[3] for row in rows if row[:2] == [name, spacing] and row[2] <= 20)
        best[name] = min(best.get(name, (total, spacing)), (total, spacing))
    plot(out / "distances.png", rows, [(name, spacing) for name, (_, spacing) in best.items()], floor)
    pictures = {name: {} for name in best}
    for (name, spacing, calls), x in samples.items():
        if spacing == best[name][1] and (calls <= 20 or min(evaluations) > 20):
            pictures[name][f"{calls} calls"] = x
    kd.plots.table(out / "samples.png", pictures, columns=3)


if __name__ == "__main__":
    common.run(main)
