"""How good samples are after how many network calls, for every sampler: the figures behind the default.

    python examples/samplers.py                                                    # trains on Fashion-MNIST first
    python examples/samplers.py --model runs/samplers/model.keras --evaluations 10 20  # the trained model again

Each sampler starts from the same noise. The distance of its samples to held-out images is the kernel distance (KID,
here times 1000) in the features of a small classifier, which is trained first; its accuracy is printed. It is 0 for
perfect samples, on average: how far it strays from that is shown by the distances of as many images of the training
data.

Everything goes to --output:

    model.keras           the trained model
    distances.csv         sampler, spacing, network calls, distance
    distances.png         the same as curves
    samples.png           samples from the same three noises, by sampler and network calls
"""

import argparse
import csv
import functools
import pathlib
import sys
import time

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_ddpm as kd

S = kd.samplers
# From a number of network calls to the sampler that makes as many, or one less.
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


def train(data, epochs, seed, num_classes=None, callbacks=None):
    """A small model of the images in `data`."""
    network = kd.networks.unet(
        data.x.shape[1:], 16, (1, 2, 4), num_blocks=1, attention_resolutions=(7,), num_classes=num_classes
    )
    model = kd.DiffusionModel(network, kd.GaussianDiffusion(prediction="v"), seed=seed)
    print(f"Training: {network.count_params():,} parameters, {epochs} epochs of {len(data)} batches.", flush=True)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, epochs * len(data) - 200), warmup_target=2e-3, warmup_steps=200
    )
    model.compile(loss="mse", optimizer=keras.optimizers.Adam(learning_rate, global_clipnorm=1.0))
    model.fit(data, epochs=epochs, callbacks=callbacks, verbose=2)
    return model


def train_classifier(data, test, steps_per_epoch):
    """A small classifier of the images in `data`, from images to logits."""
    classifier = keras.Sequential(
        [
            keras.Input(data.x.shape[1:]),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(64, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(int(data.labels.max()) + 1),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adam", loss, metrics=["accuracy"], jit_compile=kd.hardware.jit_compile())
    classifier.fit(
        kd.images.from_uint8(data.x), data.labels, batch_size=128, epochs=5, steps_per_epoch=steps_per_epoch, verbose=0
    )
    accuracy = classifier.evaluate(kd.images.from_uint8(test.x), test.labels, verbose=0, return_dict=True)["accuracy"]
    print(f"The classifier is right on {accuracy:.1%} of {len(test.x)} held-out images.", flush=True)
    return classifier


def distance_to(test, classifier, num):
    """From images to the kernel distance of their features to those of the images in `test`, times 1000."""
    features = keras.Model(classifier.inputs, classifier.layers[-2].output, name="features")
    metric = kd.metrics.KernelInceptionDistance(features, subset_size=num)
    metric.update_state(real_images=kd.images.from_uint8(test.x))

    def distance(images):
        metric.reset_generated()
        return 1000 * metric(generated_images=images)

    return distance


def print_distances_of_images(distance, data, num, seed):
    """Prints and returns mean and standard deviation over ten draws of `num` images; `distance` is of images."""
    random = np.random.default_rng(seed)
    draws = [random.choice(data.x, num, replace=False) for _ in range(10)]
    distances = [distance(kd.images.from_uint8(draw)) for draw in draws]
    mean, std = np.mean(distances), np.std(distances)
    print(f"{num} samples a row. Distance of as many training images: {mean:.1f} ± {std:.1f} (10 draws).", flush=True)
    return mean, std


def plot(path, rows, floor):
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in SAMPLERS:
        points = [row[2:] for row in rows if row[:2] == [name, "uniform"]]
        axes.plot(*zip(*points), marker=".", label=name)
    axes.axhspan(0, floor, color="lightgrey", label="training images, mean + deviation")
    axes.set(xlabel="network calls", ylabel="kernel distance × 1000", xscale="log", yscale="log")
    ticks = sorted({row[2] for row in rows if row[0] == "DDIM"})
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def draw(path, samples, evaluations):
    figure = Figure(figsize=(1.5 + 1.6 * len(evaluations), 0.6 * len(SAMPLERS) + 0.4), layout="constrained")
    grid = figure.subplots(len(SAMPLERS), len(evaluations), squeeze=False)
    for row, name in zip(grid, SAMPLERS):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, calls in zip(row, evaluations):
            kd.plots.show(axes, samples[name, calls], columns=3)
            axes.set_title(f"{calls} calls" if axes in grid[0] else "")
    figure.savefig(path, dpi=120)


def make_parser(doc, output, num_samples):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist", help="labelled data set with splits train and test")
    parser.add_argument("--data-dir", help="folder of prepared data sets (default: TensorFlow Datasets' own)")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--model", help="a trained .keras file, instead of training")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(output))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps-per-epoch", type=int, help="shorter epochs")
    parser.add_argument("--num-samples", type=int, default=num_samples)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load_data(args):
    """Batches of training and of held-out images; makes the output folder, too."""
    args.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    load = functools.partial(
        kd.datasets.from_tfds, args.dataset, image_size=args.image_size, data_dir=args.data_dir, labels=True
    )
    data = load(split="train", batch_size=32, steps_per_epoch=args.steps_per_epoch, seed=args.seed)
    return data, load(split="test", batch_size=32)


def main(arguments=None):
    parser = make_parser(__doc__, "runs/samplers", num_samples=500)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50, 100, 1000])
    args = parser.parse_args(arguments)
    if min(args.evaluations) < 2 or max(args.evaluations) > 1000:
        parser.error(f"--evaluations must be between 2 and 1000. Received: {args.evaluations}")
    data, test = load_data(args)
    distance = distance_to(test, train_classifier(data, test, args.steps_per_epoch), args.num_samples)
    if args.model:
        model = keras.saving.load_model(args.model)
    else:
        model = train(data, args.epochs, args.seed)
        model.save(args.output / "model.keras")

    floor = print_distances_of_images(distance, data, args.num_samples, args.seed)
    rows, samples = [], {}
    for calls in args.evaluations:
        for name, make in SAMPLERS.items():
            for spacing in SPACINGS if calls <= 20 else SPACINGS[:1]:
                start = time.time()
                sampler = make(calls, spacing=spacing)
                x = model.sample(args.num_samples, sampler, seed=args.seed, batch_size=min(250, args.num_samples))
                rows.append([name, spacing, len(sampler.table(model.diffusion.schedule)), distance(x)])
                if spacing == "uniform":
                    samples[name, calls] = x[:3]
                print(
                    "{:16} {:8} {:5} calls: {:8.2f}".format(*rows[-1]) + f"   ({time.time() - start:.0f} s)", flush=True
                )
        with open(args.output / "distances.csv", "w", newline="") as file:
            csv.writer(file).writerows([["sampler", "spacing", "network calls", "distance"], *rows])
    plot(args.output / "distances.png", rows, sum(floor))
    draw(args.output / "samples.png", samples, args.evaluations)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")
