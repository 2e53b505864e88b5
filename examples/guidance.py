"""Classifier-free guidance: how often samples belong to the requested class, by guidance scale.

    python examples/guidance.py                                                   # trains on Fashion-MNIST first
    python examples/guidance.py --model runs/guidance/model.keras --scales 1 1.5  # uses the trained model again
    python examples/guidance.py --model runs/samplers/model.keras --guide runs/samplers/guide.keras --scales 1 1.5 2

The network receives labels, except for one image in ten. So it learns to predict with a label and without.
Classifier-free guidance (Ho and Salimans, 2022) extrapolates from the output without a label toward the output with
it: the result is (1 - w) times the first plus w times the second.

A classifier of the same images judges the samples, or a pretrained network that is available for photographs. Its
accuracy on held-out images is printed. Perfect samples would be in the requested class equally often. A judge that is
right on less than 80 % does not tell. The kernel distance, as in examples/samplers.py, shows how far guidance
moves the samples away from the photographs.

With --guide, a worse version of the model takes the place of the model without a label (autoguidance, Karras et al.,
2024). The model may be one without labels. examples/samplers.py trains such a model, and keeps it as it was after a
tenth of the training.

Output files in --output:

    samples/0001.png ...  two samples of each class after each epoch
    model.keras           the trained model
    checkpoints/          from which --resume goes on after Ctrl-C or a crash
    guidance.csv          guidance scale, share of samples in the requested class, and distance
    classifier.keras      the classifier, which the next run uses again
    guidance.png          samples from the same noises, by guidance scale
"""

import csv
import pathlib

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
    guide: str | None = None,
    epochs=4,
    steps_per_epoch: int | None = None,
    judge="auto",
    classifier_epochs=5,
    num_samples=1000,
    scales: tuple[float, ...] = (0, 1, 1.5, 2, 3, 5),
    interval: tuple[int, ...] | None = None,
    num_steps: int | None = None,
):
    """Trains a model with labels and measures its samples at every guidance scale.

    Args:
        output: folder for the output files.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        seed: random seed.
        data_dir: folder of prepared data sets. By default the folder of TensorFlow Datasets.
        dataset: labeled data set with splits "train" and "test".
        image_size: side of the images in pixels, if a model is trained.
        model: trained .keras file or a preset of the package. By default a model is trained.
        guide: .keras file of a worse version of the model, which guides it.
        epochs: number of training epochs.
        steps_per_epoch: number of batches of 32 images per epoch. By default all.
        judge: network whose features are compared: efficientnet, inception, classifier or a .keras file. By default
            the first of these that is available, and a classifier for gray images.
        classifier_epochs: number of training epochs of the classifier.
        num_samples: number of samples at each scale.
        scales: guidance scales.
        interval: lowest and highest time t of guidance. Outside of it, the scale is 1. By default, all times.
        num_steps: number of steps of the model's sampler. By default 20 of a sampler without noise, so the same
            pictures change from scale to scale.
    """
    if not scales or min(scales) < 0:
        raise common.UsageError(f"--scales must be 0 or more. Received: {scales}")
    if num_steps is not None and num_steps < 1:
        raise common.UsageError(f"--num-steps must be at least 1. Received: {num_steps}")
    if model and (resume or overwrite):
        raise common.UsageError("--model is trained already, so --resume and --overwrite have no effect.")
    out = pathlib.Path(output) if model else common.open_output(output, resume, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(seed)
    trained = model and common.load_model(model)
    image_size, _, channels = trained.data_shape if trained else (image_size, None, 1)
    options = {"data_dir": data_dir, "seed": seed, "steps_per_epoch": steps_per_epoch}
    data, test = common.load(dataset, image_size, channels=channels, labels=True, **options)
    num_classes = int(data.labels.max()) + 1
    guidance = kd.guidance.Guidance(interval=interval, guide=common.load_model(guide) if guide else None)
    options = {"batch_size": min(250, num_samples), "guidance": guidance}
    if num_samples < 2 * num_classes:
        raise common.UsageError(f"--num-samples must be at least {2 * num_classes}, which is two of each class.")
    kept = out / "classifier.keras"
    found, distance_of, floor = common.make_metric(data, test, num_samples, classifier_epochs, seed, kept, judge)
    if not trained:
        labels = np.arange(2 * num_classes) % num_classes
        grid = kd.callbacks.SampleGrid(out / "samples/{epoch:04d}.png", num_samples=len(labels), labels=labels)
        trained = make_model(data, seed, num_classes)
        common.train(trained, data, epochs, checkpoints=out / "checkpoints", callbacks=[grid])
        trained.save(out / "model.keras")

    print("guidance_scale   in the requested class   kernel distance x 1000", flush=True)
    if found.accuracy and trained.condition:
        print(f"   real images   {found.accuracy:22.1%}   {floor[0]:22.1f}", flush=True)
    rows, samples = [], {}
    options |= common.every_class(trained, num_samples)
    sampler = kd.samplers.DPMSolver(20) if num_steps is None else common.sampler_of(trained, num_steps)
    for scale in scales:
        x = trained.sample(num_samples, sampler, seed, guidance_scale=scale, **options)
        share = found.share(x, options.get("labels"))
        shown = "-" if share is None else f"{share:.1%} ± {np.sqrt(share * (1 - share) / num_samples):.1%}"
        rows.append([scale, share, distance_of(x)])
        samples[f"w = {scale:g}"] = {"": x[: min(20, 2 * num_classes)]}
        print(f"{scale:14g}   {shown:>22}   {rows[-1][2]:22.1f}", flush=True)
    with open(out / "guidance.csv", "w", newline="") as file:
        csv.writer(file).writerows([["guidance scale", "share in class", "distance"], *rows])
    kd.plots.table(out / "guidance.png", samples, columns=min(20, 2 * num_classes))


if __name__ == "__main__":
    common.run(main)
