"""Classifier-free guidance: how often samples belong to the requested class, by guidance scale.

    python examples/guidance.py                                                   # trains on Fashion-MNIST first
    python examples/guidance.py --model runs/guidance/model.keras --scales 1 1.5  # uses the trained model again

The network receives labels, except for one image in ten. So it learns to predict with a label and without.
Classifier-free guidance (Ho and Salimans, 2022) extrapolates from the output without a label toward the output with
it: the result is (1 - w) times the first plus w times the second.

A classifier of the same images judges the samples. Its accuracy on held-out photographs is printed. Perfect samples
would be in the requested class equally often. The kernel distance, as in examples/samplers.py, shows how far guidance
moves the samples away from the photographs.

Output files in --output:

    samples/0001.png ...  two samples of each class after each epoch
    model.keras           the trained model
    checkpoints/          from which --resume goes on after Ctrl-C or a crash
    guidance.csv          guidance scale, share of samples in the requested class, and distance
    guidance.png          samples from the same noises, by guidance scale
"""

import csv

import common
import keras
import numpy as np
from samplers import make_model

import keras_ddpm as kd


def main(
    *,
    output="runs/guidance",
    resume=False,
    overwrite=False,
    seed=0,
    data_dir: str | None = None,
    dataset="fashion_mnist",
    image_size=28,
    model: str | None = None,
    epochs=4,
    steps_per_epoch: int | None = None,
    classifier_epochs=5,
    num_samples=1000,
    scales: tuple[float, ...] = (0, 1, 1.5, 2, 3, 5),
):
    """Trains a model with labels and measures its samples at every guidance scale.

    Args:
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test".
        image_size: side of the images in pixels.
        model: trained .keras file or a preset of the package. By default a model is trained.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 images per epoch. By default all.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples at each scale.
        scales: guidance scales.
    """
    if not scales or min(scales) < 0:
        raise common.UsageError(f"--scales must be 0 or more. Received: {scales}")
    out = common.open_output(output, resume or model, overwrite)
    keras.utils.set_random_seed(seed)
    options = {"data_dir": data_dir, "seed": seed, "steps_per_epoch": steps_per_epoch}
    data, test = common.load(dataset, image_size, channels=1, labels=True, **options)
    num_classes = int(data.labels.max()) + 1
    if num_samples < 2 * num_classes:
        raise common.UsageError(f"--num-samples must be at least {2 * num_classes}, which is two of each class.")
    classifier, distance_of, _ = common.make_metric(data, test, num_samples, classifier_epochs, seed)
    if model:
        trained = common.load_model(model)
    else:
        labels = np.arange(2 * num_classes) % num_classes
        grid = kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png", num_samples=len(labels), labels=labels)
        trained = make_model(data, seed, num_classes)
        common.train(trained, data, epochs, checkpoints=out / "checkpoints", callbacks=[grid])
        trained.save(out / "model.keras")

    print("guidance_scale   in the requested class   kernel distance x 1000", flush=True)
    labels = np.arange(num_samples) % num_classes
    rows, samples = [], {}
    for scale in scales:
        batch_size = min(250, num_samples)
        x = trained.sample(num_samples, seed=seed, labels=labels, guidance_scale=scale, batch_size=batch_size)
        share = np.mean(np.argmax(classifier.predict(x, batch_size=250, verbose=0), axis=1) == labels)
        error = np.sqrt(share * (1 - share) / num_samples)
        rows.append([scale, share, distance_of(x)])
        samples[f"w = {scale:g}"] = {"": x[: min(20, 2 * num_classes)]}
        print(f"{scale:14g}   {share:14.1%} ± {error:.1%}   {rows[-1][2]:17.1f}", flush=True)
    with open(out / "guidance.csv", "w", newline="") as file:
        csv.writer(file).writerows([["guidance scale", "share in class", "distance"], *rows])
    kd.plots.table(out / "guidance.png", samples, columns=min(20, 2 * num_classes))


if __name__ == "__main__":
    common.run(main)
