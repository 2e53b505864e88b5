"""What the examples share: their arguments, their data and how they train."""

import argparse
import functools
import pathlib
import sys

import keras
import numpy as np

import keras_ddpm as kd

DATASETS = ["oxford_flowers102", "mnist", "fashion_mnist", "procedural"]  # no folders, even where one has such a name


def make_parser(doc, name):
    """The arguments of every example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("runs", name), help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--data-dir", help="folder of prepared data sets (default: TensorFlow Datasets' own)")
    return parser


def run(main):
    """Starts an example; what is wrong with its arguments or data is said in one line."""
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")


def load(name, image_size, args, *, channels=3, labels=False, insist=False, strict=False, num_drawn=2048, **options):
    """Training and held-out batches of a data set, or of drawn flowers where it can be neither read nor downloaded.

    Args:
        name: of TensorFlow Datasets, "procedural" for the flowers, or a folder of images.
        image_size: side in pixels.
        args: has `data_dir` and `seed`.
        channels: of the flowers and of the images in a folder.
        labels: whether to yield labels.
        insist: whether to raise ConnectionError instead of drawing flowers.
        strict: whether to fail on images in the folder that cannot be read.
        num_drawn: number of drawn flowers.
        **options: of the training batches.
    """
    options = {"batch_size": 32, "seed": args.seed, **options}
    if name not in DATASETS and pathlib.Path(name).is_dir():
        folder = kd.datasets.from_folder(name, image_size, channels, labels, strict, batch_size=1)
        return split(folder.x, folder.labels, **{"flip": True, **options})
    of_name = functools.partial(kd.datasets.from_tfds, name, image_size=image_size, data_dir=args.data_dir)
    try:
        if name == "oxford_flowers102":
            return kd.datasets.oxford_flowers(image_size, data_dir=args.data_dir, labels=labels, **options)
        if name != "procedural":
            train = of_name(split="train", labels=labels, **options)
            return train, of_name(split="test", labels=labels, batch_size=options["batch_size"], shuffle=False)
    except ConnectionError as error:
        if insist:
            raise
        print(f"\n*** NOT TRAINING ON {name}: {error}\n*** Going on with drawn flowers.\n")
    print(f"Drawing {num_drawn} flowers.", flush=True)
    x, numbers = kd.datasets.procedural_flowers(num_drawn, image_size, seed=args.seed)
    x = kd.images.to_uint8(x.mean(axis=-1, keepdims=True) if channels == 1 else x)
    return split(x, numbers if labels else None, **{"flip": True, **options})


def load_model(path):
    """A trained model of images."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"There is no model {path}. `python examples/flowers.py` trains one.")
    model = keras.saving.load_model(path)
    if not isinstance(model, kd.DiffusionModel) or len(model.data_shape) != 3:
        raise ValueError(f"{path} is no diffusion model of images.")
    return model


def split(x, labels=None, batch_size=32, seed=0, **options):
    """Nine tenths of the data to train on, and a tenth that is held out."""
    order = np.random.default_rng(seed).permutation(len(x))
    held_out = max(1, len(x) // 10)
    if held_out == len(x):
        raise ValueError(f"Some images are to be held out: at least 2 are needed. Received: {len(x)}")
    pick = lambda chosen: (x[chosen], None if labels is None else labels[chosen])  # noqa: E731
    train = kd.datasets.Batches(*pick(order[held_out:]), batch_size, seed=seed, **options)
    return train, kd.datasets.Batches(*pick(order[:held_out]), min(batch_size, held_out), shuffle=False)


def train(model, data, epochs, learning_rate=2e-3, warmup_steps=200, loss="mse", **options):
    """Adam with a linear warm-up and a cosine decay to 0; returns the losses by epoch."""
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, epochs * len(data) - warmup_steps), warmup_target=learning_rate, warmup_steps=warmup_steps
    )
    model.compile(loss=loss, optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0))
    return model.fit(data, epochs=epochs, **{"verbose": 2, **options}).history


def make_metric(train, test, args):
    """A classifier of the data, and the kernel distance to the images in `test` in its features, with its floor.

    Args:
        train: labelled batches, that the classifier learns from.
        test: held-out ones.
        args: has `classifier_epochs`, `num_samples` and `seed`.

    Returns:
        The classifier, a function from images to their distance times 1000, and the floor: mean and deviation of the
        distances of as many training images.
    """
    images = kd.images.from_uint8(train.x)
    classifier = kd.metrics.train_classifier(images, train.labels, args.classifier_epochs)
    x = kd.images.from_uint8(test.x)
    accuracy = classifier.evaluate(x, test.labels, verbose=0, return_dict=True)["accuracy"]
    print(f"The classifier is right on {accuracy:.1%} of {len(x)} held-out images.", flush=True)
    num = min(args.num_samples, len(x))
    metric = kd.metrics.KernelInceptionDistance(classifier, subset_size=num)
    metric.update_state(real_images=x)
    mean, std = (1000 * value for value in metric.floor(images, num, seed=args.seed))
    print(f"{num} samples a row. Kernel distance of as many training images x 1000: {mean:.1f} ± {std:.1f} (10 draws).")
    return classifier, lambda images: 1000 * metric.compare(images), (mean, std)


def draw_denoising(path, model, sampler, seed, num=5):
    """Writes how samples come out of noise: x_t above, the prediction of x_0 below."""
    steps = [int(rows[0, 0]) for rows in sampler.steps(model.diffusion.schedule)]
    _, x_t, x_0 = model.sample(num, sampler, seed, return_trajectory=10)
    arrivals = [*steps[1:], 0]
    names = [f"t = {arrivals[i - 1]}" for i in np.linspace(0, len(steps), 11).round().astype(int)[1:]]
    rows = {"x_t": dict(zip(names, x_t)), "x_0": dict(zip(names, x_0))}
    kd.plots.table(path, rows, size=0.5)
