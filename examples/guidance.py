"""Asking for a class: how often samples are what was asked for, by how much guidance.

    python examples/guidance.py                                                   # trains on Fashion-MNIST first
    python examples/guidance.py --model runs/guidance/model.keras --scales 1 1.5  # the trained model again

The network is given the labels, but for one in ten, so that it learns to do with and without; classifier-free
guidance (Ho and Salimans, 2022) goes beyond the former, away from the latter: (1 - w) times the output without the
label plus w times that with it. A classifier that is trained beside it on the same images judges the samples. Its own
accuracy on held-out photographs is printed: that is what perfect samples would get. So is the kernel distance of
examples/samplers.py, which says what guidance costs: samples that are all alike.

Everything goes to --output:

    samples/0001.png ...  two of each class as training goes on
    model.keras           the trained model
    guidance.csv          scale, share of samples of the class asked for, distance
    guidance.png          samples from the same noises, by scale
"""

import argparse
import csv
import functools
import pathlib

import keras
import numpy as np
from matplotlib.figure import Figure
from samplers import extractor
from samplers import kernel_distance_to
from samplers import train
from samplers import train_classifier

import keras_ddpm as kd


def draw(path, samples, columns):
    """One row of images for each scale."""
    figure = Figure(figsize=(0.45 * columns + 0.8, 0.5 * len(samples)), layout="constrained")
    for axes, (scale, x) in zip(figure.subplots(len(samples), squeeze=False)[:, 0], samples.items()):
        axes.imshow(kd.images.grid(x, columns), cmap="gray")
        axes.set_ylabel(f"w = {scale:g}", rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist", help="labelled data set with splits train and test")
    parser.add_argument("--data-dir", help="folder of prepared data sets (default: TensorFlow Datasets' own)")
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--model", help="a trained .keras file, instead of training")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/guidance"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 1.5, 2, 3, 5])
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--steps-per-epoch", type=int, help="shorter epochs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    load = functools.partial(
        kd.datasets.from_tfds, args.dataset, image_size=args.image_size, data_dir=args.data_dir, labels=True
    )
    data = load(split="train", batch_size=32, steps_per_epoch=args.steps_per_epoch, seed=args.seed)
    test = load(split="test", batch_size=32)
    num_classes = int(data.labels.max()) + 1
    if args.num_samples < 2 * num_classes:
        parser.error(f"--num-samples must be at least {2 * num_classes}, two of each class.")
    classifier = train_classifier(data, test, args.steps_per_epoch)
    if args.model:
        model = keras.saving.load_model(args.model)
    else:
        asked = np.arange(2 * num_classes) % num_classes
        grid = kd.callbacks.SampleGrid(args.output / "samples/{epoch:04d}.png", num_samples=len(asked), labels=asked)
        model = train(data, args.epochs, args.seed, num_classes, [grid])
        model.save(args.output / "model.keras")

    extract = extractor(classifier)
    distance = kernel_distance_to(extract(kd.images.from_uint8(test.x)))
    print(
        f"{args.num_samples} samples a row. Distance of as many real images: "
        f"{distance(extract(kd.images.from_uint8(data.x[: args.num_samples]))):.1f}.\n"
        "guidance_scale   in the class asked for   kernel distance x 1000",
        flush=True,
    )
    labels = np.arange(args.num_samples) % num_classes
    rows, samples = [], {}
    for scale in args.scales:
        x = model.sample(
            args.num_samples, seed=args.seed, labels=labels, guidance_scale=scale, batch_size=min(250, len(labels))
        )
        right = np.mean(np.argmax(classifier.predict(x, batch_size=250, verbose=0), axis=1) == labels)
        error = np.sqrt(right * (1 - right) / args.num_samples)
        rows.append([scale, right, distance(extract(x))])
        samples[scale] = x[: 2 * num_classes]
        print(f"{scale:14g}   {right:14.1%} ± {error:.1%}   {rows[-1][2]:17.1f}", flush=True)
    with open(args.output / "guidance.csv", "w", newline="") as file:
        csv.writer(file).writerows([["guidance scale", "share in class", "distance"], *rows])
    draw(args.output / "guidance.png", samples, 2 * num_classes)


if __name__ == "__main__":
    main()
