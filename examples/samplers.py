"""Sample quality against the number of network calls, for every sampler. The default sampler is based on it.

    python examples/samplers.py                                                    # trains on Fashion-MNIST first
    python examples/samplers.py --model runs/samplers/model.keras --evaluations 10 20  # uses the trained model again

All samplers start from the same noise. Their samples are compared with held-out images by the kernel distance (KID,
times 1000) in the features of a small classifier. The classifier is trained first, and its accuracy is printed. The
expected distance of perfect samples is 0. Its spread is shown by the distances of as many training images.

Output files in --output:

    model.keras           the trained model
    distances.csv         sampler, spacing, number of network calls and distance
    distances.png         the same as curves
    samples.png           samples from the same three noises, by sampler and number of network calls
"""

import csv
import functools
import pathlib
import time

import common
import keras

import keras_ddpm as kd

S = kd.samplers
# Functions from a number of network calls to a sampler that makes as many calls, or one fewer.
SAMPLERS = {
    "DDPM": S.DDPM,
    "DDPM, large": functools.partial(S.DDPM, variance="large"),
    "DDIM": S.DDIM,
    "DPMSolver": S.DPMSolver,
    "DPMSolver, eta=1": functools.partial(S.DPMSolver, eta=1.0),
    "Heun": lambda calls, **spacing: S.Heun((calls + 1) // 2, **spacing),
    "Langevin": lambda calls, **spacing: S.Langevin(calls - 1, step_size=0.4, **spacing),
    "DDIM + Langevin": lambda calls, **spacing: S.Langevin(predictor=S.DDIM((calls + 1) // 2, **spacing)),
}
SPACINGS = ["uniform", "logsnr", "karras"]


def make_model(data, seed, num_classes=None):
    """Makes a small model for the images in `data`. It predicts v, which is trained faster than the noise."""
    size = data.x.shape[1:]
    network = kd.networks.unet(size, 16, (1, 2, 4), 1, attention_resolutions=(size[0] // 4,), num_classes=num_classes)
    return kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="v"), seed=seed)


def plot(path, rows, floor):
    with kd.plots.figure(path, size=(8, 6)) as axes:
        lines = {name: tuple(zip(*[row[2:] for row in rows if row[:2] == [name, "uniform"]])) for name in SAMPLERS}
        axes.axhspan(0, sum(floor), color="lightgray", label="training images, mean + deviation")
        kd.plots.curves(axes, lines, xlabel="network calls", xscale="log", yscale="log")
        axes.set_ylabel("kernel distance × 1000")
        ticks = sorted({row[2] for row in rows if row[0] == "DDIM"})
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()


def main(
    *,
    output="runs/samplers",
    seed=0,
    data_dir: str | None = None,
    dataset="fashion_mnist",
    image_size=28,
    model: str | None = None,
    epochs=4,
    steps_per_epoch: int | None = None,
    classifier_epochs=5,
    num_samples=500,
    evaluations: tuple[int, ...] = (5, 10, 20, 50, 100, 1000),
):
    """Trains a model and measures the samples of every sampler.

    Args:
        output: folder for the output files.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test".
        image_size: side of the images in pixels.
        model: trained .keras file. By default a model is trained.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 images per epoch. By default all.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples per distance.
        evaluations: numbers of network calls.
    """
    if not evaluations or min(evaluations) < 2 or max(evaluations) > 1000:
        raise common.UsageError(f"--evaluations must be between 2 and 1000. Received: {evaluations}")
    out = pathlib.Path(output)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    options = {"data_dir": data_dir, "seed": seed, "steps_per_epoch": steps_per_epoch}
    data, test = common.load(dataset, image_size, channels=1, labels=True, **options)
    _, distance_of, floor = common.make_metric(data, test, num_samples, classifier_epochs, seed)
    if model:
        trained = common.load_model(model)
    else:
        trained = make_model(data, seed)
        common.train(trained, data, epochs)
        trained.save(out / "model.keras")

    rows, samples = [], {name: {} for name in SAMPLERS}
    for calls in evaluations:
        for name, make in SAMPLERS.items():
            for spacing in SPACINGS if calls <= 20 else SPACINGS[:1]:
                start = time.time()
                sampler = make(calls, spacing=spacing)
                x = trained.sample(num_samples, sampler, seed=seed, batch_size=min(250, num_samples))
                rows.append([name, spacing, len(sampler.table(trained.diffusion.schedule)), distance_of(x)])
                if spacing == "uniform":
                    samples[name][f"{calls} calls"] = x[:3]
                print(
                    "{:16} {:8} {:5} calls: {:8.2f}".format(*rows[-1]) + f"   ({time.time() - start:.0f} s)", flush=True
                )
        with open(out / "distances.csv", "w", newline="") as file:
            csv.writer(file).writerows([["sampler", "spacing", "network calls", "distance"], *rows])
    plot(out / "distances.png", rows, floor)
    kd.plots.table(out / "samples.png", samples, columns=3)


if __name__ == "__main__":
    common.run(main)
