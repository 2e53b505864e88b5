"""What the examples share: command lines, data, training and a metric."""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import typing
import zlib

import numpy as np


@contextlib.contextmanager
def quiet():
    """Hides what libraries write to standard error, unless an exception ends the block."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryFile() as hidden, os.fdopen(os.dup(2), "wb") as standard_error:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            standard_error.write(hidden.read())
            raise
        finally:
            os.dup2(standard_error.fileno(), 2)


@contextlib.contextmanager
def quiet_import():
    """Hides what TensorFlow's libraries say about missing accelerators. A missing backend gets one line."""
    try:
        with quiet():
            yield
    except (ImportError, ValueError) as error:
        if getattr(error, "name", None) == "keras_ddpm":
            sys.exit("The package is not installed. Run `pip install .` in the folder of README.md.")
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        print(f"Keras cannot use the backend {backend}: {error}", file=sys.stderr)
        print('Choose KERAS_BACKEND=tensorflow, jax or torch. `pip install ".[jax]"` adds one.', file=sys.stderr)
        sys.exit(1)


with quiet_import():  # so examples import this module first
    import keras

    import keras_ddpm as kd

# Names of data sets. A folder of the same name is ignored.
DATASETS = ["oxford_flowers102", "mnist", "fashion_mnist", "procedural"]
# A judge that is right on fewer held-out images does not tell whether samples are in the class asked for.
TRUSTED = 0.8


class UsageError(ValueError):
    """Raised for arguments that are out of range or exclude each other. The exit status is 2."""


def run(main, *parts, commands=(), presets=None):
    """Calls `main` with the arguments of the command line, and prints errors in one line.

    The arguments are the parameters of `main` that have a default or an annotation. The default or the annotation
    gives the type, and the `Args:` section of the docstring gives the help. Keyword-only parameters become flags.
    `main` receives only what the command line contains.

    Args:
        main: function to call. The docstring of its module is the description.
        *parts: functions that receive the `**settings` of `main`. Their parameters become flags, too.
        commands: functions of which the command line names one. `main` receives it as `command`, and it receives the
            `**settings` of `main`.
        presets: dict from names to dicts of settings, which the help shows next to the defaults.
    """
    kd.keep_memory()
    description = main.__globals__["__doc__"]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if commands:
        choice = parser.add_subparsers(metavar="command", required=True)
        for command in commands:
            summary = inspect.getdoc(command).partition("\n")[0]
            chosen = choice.add_parser(command.__name__, help=summary, description=summary)
            chosen.set_defaults(command=command)
            add_arguments(chosen, main)
            add_arguments(chosen, command)
    else:
        for function in (main, *parts):
            add_arguments(parser, function, presets)
    given = vars(parser.parse_args())
    try:
        main(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as the shell counts Ctrl-C
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {' '.join(str(error).split())}")


def distribute(devices):
    """A context in which models are made and trained on several devices. One device needs none."""
    backend = keras.backend.backend()
    if devices == 1:
        return contextlib.nullcontext()
    if backend == "torch":
        raise UsageError("Keras 3.15 has no distribution on PyTorch. Choose KERAS_BACKEND=jax or tensorflow.")
    if backend == "jax":
        found = keras.distribution.list_devices()
    else:
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        found = [device.name for device in found]
    if not 1 <= devices <= len(found):
        raise UsageError(f"--devices must be in 1..{len(found)}, the number of devices. Received: {devices}")
    if backend == "jax":
        return keras.distribution.DataParallel(devices=found[:devices]).scope()
    return tf.distribute.MirroredStrategy(found[:devices]).scope()


def open_output(output, resume=False, overwrite=False):
    """The folder for the output files. The checkpoints of an earlier run are kept, removed or refused."""
    out = pathlib.Path(output)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"Cannot write to --output {out}: {error}") from error
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other.")
    if overwrite:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    files = sorted((out / "checkpoints").glob("**/*.npz"))
    if files and not resume:
        raise UsageError(
            f"{out} holds a run. Go on with it by --resume, replace it by --overwrite, or change --output."
        )
    if resume:
        print(f"Going on from {files[-1]}" if files else f"There is no run in {out}. A new one starts.")
    else:
        (out / "settings.json").unlink(missing_ok=True)
    print(f"Output: {out}")
    return out


def number(text):
    """Reads a number that is neither infinite nor NaN."""
    if not np.isfinite(float(text)):
        raise ValueError
    return float(text)


def add_arguments(parser, function, presets=None):
    """Adds the parameters of a function to a parser, as described in `run`."""
    documented = inspect.getdoc(function).partition("Args:\n")[2]
    texts = dict(re.findall(r"^    (\w+): (.+(?:\n {5,}.+)*)", documented, re.MULTILINE))
    for name, parameter in inspect.signature(function).parameters.items():
        default, kind = parameter.default, parameter.annotation
        if default is kind is parameter.empty:
            continue
        if kind is parameter.empty:
            kind = type(default)
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        options = {"type": number if kind is float else kind}
        if kind is bool:
            options = {"action": "store_true"}
        elif typing.get_origin(kind) is typing.Literal:
            options = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            entry = typing.get_args(kind)[0]
            options = {"type": number if entry is float else entry, "nargs": "*"}
        flag = "--" + name.replace("_", "-") if parameter.kind is parameter.KEYWORD_ONLY else name
        if flag == name and default is not parameter.empty:
            options.setdefault("nargs", "?")
        values = {"default": default} | {preset: settings.get(name) for preset, settings in (presets or {}).items()}
        note = "; ".join(f"{of}: {value}" for of, value in values.items() if type(value) in (int, float, str, tuple))
        text = texts[name] + (f" ({note})" if note else "")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)


def load(
    name,
    image_size,
    *,
    data_dir=None,
    seed=0,
    batch_size=32,
    steps_per_epoch=None,
    channels=3,
    labels=False,
    strict=False,
    num_drawn=2048,
    require_real_data=False,
):
    """Batches of training data and of held-out data.

    If the data can be neither read nor downloaded, drawn flowers take their place.

    Args:
        name: name of a data set of TensorFlow Datasets, "procedural" for drawn flowers, or a folder of images.
        image_size: side of the images in pixels.
        data_dir: folder of prepared data sets.
        seed: random seed.
        batch_size: number of images per batch.
        steps_per_epoch: number of training batches per epoch, by default all.
        channels: number of channels of drawn flowers and of the images in a folder.
        labels: whether to yield labels.
        strict: whether to raise an error for files in the folder that cannot be read.
        num_drawn: number of drawn flowers.
        require_real_data: whether to raise ConnectionError instead of drawing flowers.

    Returns:
        Two `kd.datasets.Batches`.
    """
    options = {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "seed": seed}
    if pathlib.Path(name).is_file():
        raise ValueError(f"{name} is a file. Expected the name of a data set, or a folder of images.")
    if name not in DATASETS and pathlib.Path(name).is_dir():
        folder = kd.datasets.from_folder(
            name, image_size, channels=channels, labels=labels, strict=strict, batch_size=1
        )
        return split(folder.x, folder.labels, folder.class_names, flip=True, **options)
    source = {"image_size": image_size, "data_dir": data_dir, "labels": labels}
    try:
        if name == "oxford_flowers102":
            return kd.datasets.oxford_flowers(**source, **options)
        if name != "procedural":
            train = kd.datasets.from_tfds(name, "train", **source, **options)
            return train, kd.datasets.from_tfds(name, "test", **source, batch_size=batch_size, shuffle=False)
    except ConnectionError as error:
        if require_real_data:
            raise
        print(f"\n*** NOT TRAINING ON {name}: {error}\n*** Training on drawn flowers instead.\n")
    print(f"Drawing {num_drawn} flowers.", flush=True)
    x, kinds = kd.datasets.procedural_flowers(num_drawn, image_size, seed=seed)
    x = kd.images.to_uint8(x.mean(axis=-1, keepdims=True) if channels == 1 else x)
    kinds, names = (kinds, list(kd.datasets.FLOWER_KINDS)) if labels else (None, None)
    return split(x, kinds, names, flip=True, **options)


def split(x, labels=None, class_names=None, batch_size=32, seed=0, **options):
    """Batches of nine tenths of the data for training, and of the held-out tenth."""
    order = np.random.default_rng(seed).permutation(len(x))
    held_out = max(1, len(x) // 10)
    if held_out == len(x):
        raise ValueError(f"At least 2 images are needed, because one tenth is held out. Received: {len(x)}")
    pick = lambda chosen: (x[chosen], None if labels is None else labels[chosen])
    both = {"class_names": class_names}
    train = kd.datasets.Batches(*pick(order[held_out:]), batch_size, seed=seed, **both, **options)
    return train, kd.datasets.Batches(*pick(order[:held_out]), min(batch_size, held_out), shuffle=False, **both)


def load_model(path, conditions=("label",)):
    """Loads a trained model of images: a preset of the package, or a file. It may need conditions of these names."""
    try:
        model = kd.DiffusionModel.from_preset(path)
    except FileNotFoundError as error:
        raise ValueError(f"{error} `python examples/flowers.py` trains a model.") from error
    if len(model.data_shape) != 3:
        raise ValueError(f"{path} is not a diffusion model of images.")
    if missing := {*(model.condition.given if model.condition else ())} - {*conditions}:
        raise ValueError(f"{path} needs a condition that this example does not provide: {', '.join(sorted(missing))}.")
    return model


def sampler_of(model, num_steps):
    """Returns the model's sampler, with `num_steps` steps if that is not `None`."""
    own = model.default_sampler
    return own if num_steps is None else dataclasses.replace(own, num_steps=num_steps)


def every_class(model, num, **options):
    """Options of `sample` for all classes in turn, and these options. Empty for a model without classes."""
    return {"labels": np.arange(num) % model.condition.num_classes, **options} if model.condition else {}


def check_learning_rate(value):
    if not 0 < value <= 1:
        raise UsageError(f"The learning rate must be in (0, 1]. Received: {value}")


def train(
    model,
    data,
    epochs,
    learning_rate=2e-3,
    warmup_steps=200,
    loss="mse",
    *,
    minutes=None,
    checkpoints=None,
    callbacks=(),
    **options,
):
    """Trains with Adam, a linear warm-up and a cosine decay to 0. Returns the losses of each epoch.

    Args:
        model: the model.
        data: batches of training data.
        epochs: number of epochs.
        learning_rate: highest learning rate.
        warmup_steps: number of batches during which the learning rate rises.
        loss: loss of Keras.
        minutes: how long to train, whatever `epochs` is. The learning rate then falls with the time.
        checkpoints: folder of checkpoints. If it holds one, training goes on from there.
        callbacks: further callbacks.
        **options: as in `fit`.
    """
    if epochs < 1 or warmup_steps < 0:
        raise UsageError(f"At least 1 epoch and 0 warm-up steps are needed. Received: {epochs} and {warmup_steps}")
    check_learning_rate(learning_rate)
    if minutes is None:
        deadline = None
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, epochs * len(data) - warmup_steps), warmup_target=learning_rate, warmup_steps=warmup_steps
        )
    elif 0 < minutes < np.inf:
        deadline = Deadline(minutes, learning_rate, warmup_steps)
        epochs, rate = 1_000_000, learning_rate
    else:
        raise UsageError(f"--minutes must be more than 0. Received: {minutes}")
    model.compile(loss=loss, optimizer=kd.optimizers.Adam(rate, global_clipnorm=1.0))
    callbacks = [
        *callbacks,
        *([deadline] if deadline else []),
        Estimate(deadline=deadline),
        *([kd.callbacks.Checkpoint(checkpoints)] if checkpoints else []),
    ]
    try:
        return model.fit(data, epochs=epochs, callbacks=callbacks, **{"verbose": 2, **options}).history
    except (KeyboardInterrupt, SystemExit):
        if checkpoints:
            print("The same command with --resume goes on.", file=sys.stderr)
        raise


class Estimate(keras.callbacks.Callback):
    """Says once in a run how long the rest of the training will take, after so many seconds of it.

    Args:
        seconds: seconds of training before it says so.
        deadline: a `Deadline` that ends the training, or `None`.
    """

    def __init__(self, seconds=10, deadline=None):
        super().__init__()
        self.seconds, self.deadline = seconds, deadline
        self.times, self.epochs_left = [], 0

    def get_state(self):
        return {}  # so each run says its own

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs_left = self.params["epochs"] - epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.times is None:
            return
        self.times.append(time.monotonic())
        recent = np.diff(self.times[-4:])
        steady = len(recent) == 3 and max(recent) < 3 * min(recent)  # neither compiled nor skipped
        if steady and self.times[-1] - self.times[0] > self.seconds:
            step = np.median(recent)
            left = step * (self.epochs_left * self.params["steps"] - batch - 1)
            minutes = max(1, round((self.deadline.left if self.deadline else left) / 60))
            print(f"\nThe training will take about {minutes} min, at {step:.3g} s per batch.", flush=True)
            self.times = None


class Deadline(keras.callbacks.Callback):
    """Ends the training after some minutes. The learning rate falls toward 0 by then, as half a cosine of the time.

    The learning rate is constant in an epoch. It is the one of the time at which the epoch begins.

    Args:
        minutes: number of minutes.
        learning_rate: highest learning rate.
        warmup_steps: number of batches during which the learning rate rises.
    """

    def __init__(self, minutes, learning_rate, warmup_steps):
        super().__init__()
        self.seconds, self.learning_rate, self.warmup_steps = 60 * minutes, learning_rate, warmup_steps

    @property
    def left(self):
        """Seconds until the end."""
        return self.start + self.seconds - time.monotonic()

    def on_train_begin(self, logs=None):
        self.start = time.monotonic()

    def get_state(self):
        return {"seconds": self.seconds - self.left}

    def set_state(self, state):
        self.start = time.monotonic() - state["seconds"]

    def on_epoch_begin(self, epoch, logs=None):
        share = min(1, 1 - self.left / self.seconds)
        middle = int(self.model.optimizer.iterations) + self.params["steps"] / 2
        warm = min(1, middle / max(1, self.warmup_steps))
        self.model.optimizer.learning_rate = self.learning_rate * warm * (1 + np.cos(np.pi * share)) / 2

    def on_train_batch_end(self, batch, logs=None):
        if self.left <= 0:
            self.model.stop_training = True


def checksum(*arrays):
    """A number that tells arrays from others."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(keras.ops.convert_to_numpy(array)), found)
    return found


def read_note(note):
    return json.loads(note.read_text()) if note.exists() else None


def is_noted(note, how):
    """Whether a note says that files were made in this way. Any other note is removed."""
    if read_note(note) == how:
        return True
    note.unlink(missing_ok=True)
    return False


def write_note(note, how):
    """Writes a note, which other processes see whole."""
    temporary = note.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(how) + "\n")
    temporary.replace(note)


def check_settings(out, settings):
    """Raises an error if a folder holds results with other settings, which settings.json tells."""
    note = out / "settings.json"
    if read_note(note) not in (None, settings):
        raise UsageError(f"{out} holds results with other settings. Choose another --output.")
    write_note(note, settings)


class Judge(kd.metrics.Extractor):
    """An extractor that computes the features of an image once. It may tell the classes of images.

    Attributes:
        accuracy: share of held-out images of which it tells the right class. `None` if it does not tell classes.
    """

    def __init__(self, extractor):
        super().__init__(extractor)
        self.known, self.accuracy = {}, None

    def __call__(self, images, batch_size=64):
        keys = [digest(image) for image in images]
        new = {key: image for key, image in zip(keys, images) if key not in self.known}
        if new:
            features = super().__call__(np.stack([*new.values()]), batch_size)
            self.known.update(zip(new, features.astype("float32")))
        return np.stack([self.known[key] for key in keys]).astype("float64")

    def keep(self, folder, images):
        """Reads the features of images from a file in a folder. The file is written first if there is none."""
        file = folder / f"features-{self.name}-{self.hash}-{checksum(images):08x}.npy"
        if file.exists():
            self.known.update(zip(map(digest, images), np.load(file)))
        else:
            print(f"Computing the features of {len(images)} images: {file}", flush=True)
            np.save(file, self(images).astype("float32"))

    def examine(self, predict, images, labels):
        """Measures on held-out images how often the classes of a function are right. It is used if that is enough."""
        accuracy = float(np.mean(predict(images) == labels))
        print(f"Judge: {self.name}, which is right on {accuracy:.1%} of {len(images)} held-out images.", flush=True)
        if accuracy < TRUSTED:
            print(f"This is below {TRUSTED:.0%}, so the share of samples in the class asked for is not measured.")
        else:
            self.predict, self.accuracy = predict, accuracy

    def share(self, images, labels):
        """The share of images in the class asked for. `None` without labels, or if the judge does not tell classes."""
        return None if self.accuracy is None or labels is None else float(np.mean(self.predict(images) == labels))


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image, "float32")).digest()


def find_extractor(judge, train):
    """The extractor of this name or file. `None` stands for a classifier. "auto" is as described in `make_judge`."""
    known = {
        "efficientnet": kd.metrics.efficientnet_lite0,
        "inception": kd.metrics.Extractor,
        "classifier": lambda: None,
    }
    if judge != "auto":
        if judge not in known and not pathlib.Path(judge).exists():
            raise UsageError(f"--judge takes {', '.join(known)} or a .keras file. Received: {judge}")
        return known[judge]() if judge in known else kd.metrics.Extractor(judge)
    if train.x.shape[-1] > 1 or train.labels is None:
        for name in ("efficientnet", "inception"):
            try:
                return known[name]()
            except (ImportError, ConnectionError) as error:
                print(f"{error}\nSo another network is the judge.", flush=True)
    return None


def make_judge(train, test, classifier_epochs, path, judge="auto"):
    """Chooses the network that judges samples, and says how often it is right on held-out images.

    Args:
        train: batches of training data. With labels, a linear probe of the features or a classifier is trained.
        test: held-out batches.
        classifier_epochs: number of training epochs of the classifier.
        path: file of the classifier. One that was trained in the same way is used again. A note in JSON tells how. The
            features of the data are kept next to it. `None` keeps nothing.
        judge: "efficientnet", "inception", "classifier" or a .keras file. "auto" is the first of these that is
            available, and a classifier for gray images with labels.
    """
    x, held_out = (kd.images.from_uint8(data.x) for data in (train, test))
    if extractor := find_extractor(judge, train):
        found = Judge(extractor)
        for images in (x, held_out) if path else ():
            found.keep(path.parent, images)
        if train.labels is not None:
            probe = kd.metrics.LinearProbe(found(x), train.labels)
            found.examine(lambda images: probe.predict(found(images)), held_out, test.labels)
        return found
    if train.labels is None:
        raise ValueError("A classifier needs labels. Choose another --judge.")
    how = path and {"data": checksum(train.x, train.labels), "epochs": classifier_epochs}
    if path and is_noted(path.with_suffix(".json"), how):
        classifier = keras.saving.load_model(path, compile=False)
    else:
        print("Training a classifier.", flush=True)
        classifier = kd.metrics.train_classifier(x, train.labels, classifier_epochs)
        if path:
            classifier.save(path)
            write_note(path.with_suffix(".json"), how)
    found = Judge(classifier)
    predict = lambda images: np.argmax(classifier.predict(images, batch_size=250, verbose=0), axis=1)
    found.examine(predict, held_out, test.labels)
    return found


def make_metric(train, test, num_samples, classifier_epochs, seed, path=None, judge="auto"):
    """Makes a kernel distance in the features of a judge.

    Args:
        train, test, classifier_epochs, path, judge: as in `make_judge`.
        num_samples: number of samples of a comparison.
        seed: random seed of the floor.

    Returns:
        The judge, a function from images to their distance times 1000, and the floor. The floor is the mean and the
        standard deviation of the distance of as many training images.
    """
    found = make_judge(train, test, classifier_epochs, path, judge)
    num = min(num_samples, len(test.x))
    metric = kd.metrics.KernelInceptionDistance(found, subset_size=num)
    metric.update_state(real_images=kd.images.from_uint8(test.x))
    mean, std = (1000 * value for value in metric.floor(kd.images.from_uint8(train.x), num, seed=seed))
    print(f"Kernel distance x 1000 of {num} training images: {mean:.1f} ± {std:.1f} (10 draws).")
    return found, lambda images: 1000 * metric.compare(images), (mean, std)


def draw_denoising(path, model, sampler, seed, num=5):
    """Draws how samples emerge from noise: x_t above, the prediction of x_0 below."""
    steps = [int(rows["t"][0]) for rows in sampler.steps(model.diffusion.schedule)]
    _, x_t, x_0 = model.sample(num, sampler, seed, return_trajectory=10)
    arrivals = [*steps[1:], 0]
    names = [f"t = {arrivals[i - 1]}" for i in np.linspace(0, len(steps), 11).round().astype(int)[1:]]
    rows = {"x_t": dict(zip(names, x_t)), "x_0": dict(zip(names, x_0))}
    kd.plots.table(path, rows, size=0.5)


def save_denoising(path, x_t, x_0, scale):
    """Writes an animation of samples that emerge from noise: x_t on the left, the predictions of x_0 on the right."""
    frames = [np.concatenate([kd.images.grid(x), kd.images.grid(y)], axis=1) for x, y in zip(x_t, x_0)]
    kd.images.save_gif(path, frames, max(1, scale // 2))
