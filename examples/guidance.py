"""Asking for a class: how often samples are what was asked for, by how much guidance.

    python examples/guidance.py                                                   # trains on Fashion-MNIST first
    python examples/guidance.py --model runs/guidance/model.keras --scales 1 1.5  # the trained model again

The network is given the labels, but for one in ten, so that it learns to do with and without; classifier-free
guidance (Ho and Salimans, 2022) goes beyond the former, away from the latter: (1 - w) times the output without the
label plus w times that with it. A classifier that is trained beside it on the same images judges the samples. Its own
accuracy on held-out photographs is printed: that is what perfect samples would get. The kernel distance of
examples/samplers.py tells how far the samples are from the photographs, and what guidance costs.

Everything goes to --output:

    samples/0001.png ...  two of each class as training goes on
    model.keras           the trained model
    guidance.csv          scale, share of samples of the class asked for, distance
    guidance.png          samples from the same noises, by scale
"""

import csv

import common
import numpy as np
from samplers import load_data
from samplers import make_model
from samplers import make_parser

import keras_ddpm as kd


def main(arguments=None):
    parser = make_parser(__doc__, "guidance", num_samples=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 1.5, 2, 3, 5])
    args = parser.parse_args(arguments)
    if min(args.scales) < 0:
        parser.error(f"--scales must be 0 or more. Received: {args.scales}")
    data, test = load_data(args)
    num_classes = int(data.labels.max()) + 1
    if args.num_samples < 2 * num_classes:
        parser.error(f"--num-samples must be at least {2 * num_classes}, two of each class.")
    classifier, distance, _ = common.make_metric(data, test, args)
    if args.model:
        model = common.load_model(args.model)
    else:
        asked = np.arange(2 * num_classes) % num_classes
        grid = kd.callbacks.SampleGrid(args.output / "samples/{epoch:04d}.png", num_samples=len(asked), labels=asked)
        model = make_model(data, args, num_classes)
        common.train(model, data, args.epochs, callbacks=[grid])
        model.save(args.output / "model.keras")

    print("guidance_scale   in the class asked for   kernel distance x 1000", flush=True)
    labels = np.arange(args.num_samples) % num_classes
    rows, samples = [], {}
    for scale in args.scales:
        x = model.sample(
            args.num_samples, seed=args.seed, labels=labels, guidance_scale=scale, batch_size=min(250, len(labels))
        )
        right = np.mean(np.argmax(classifier.predict(x, batch_size=250, verbose=0), axis=1) == labels)
        error = np.sqrt(right * (1 - right) / args.num_samples)
        rows.append([scale, right, distance(x)])
        samples[f"w = {scale:g}"] = {"": x[: 2 * num_classes]}
        print(f"{scale:14g}   {right:14.1%} ± {error:.1%}   {rows[-1][2]:17.1f}", flush=True)
    with open(args.output / "guidance.csv", "w", newline="") as file:
        csv.writer(file).writerows([["guidance scale", "share in class", "distance"], *rows])
    kd.plots.table(args.output / "guidance.png", samples, columns=2 * num_classes)


if __name__ == "__main__":
    common.run(main)
