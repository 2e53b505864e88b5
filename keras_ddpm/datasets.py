"""Data sets: batches of x_0 for `DiffusionModel.fit`.

Every source (a name of TensorFlow Datasets, a folder, arrays, a drawing) is decoded, cropped and resized once into
8-bit images held in memory; `Batches` shuffles them one by one, flips them and scales them to [-1, 1].

To add a source, write a function that makes an array of images and hands it to `Batches`. TensorFlow is imported
in this module alone, and only to read TensorFlow's own data sets.
"""

import math
import pathlib
import threading
import urllib.error
import urllib.request
import warnings

import keras
import numpy as np
from PIL import Image

from keras_ddpm import _checks
from keras_ddpm import images


class Batches(keras.utils.PyDataset):
    """Batches of data held in memory: `x_0`, or `(x_0, label)` where there are labels.

    Shuffled, the batches of all epochs are cut from one endless row of permutations of the data: each is full, and
    all examples are seen equally often.

    Args:
        x: array `(num, ...)`: uint8 images, scaled to [-1, 1] in the batches, or finite floats, used as they are.
        labels: array `(num,)` or `None`.
        batch_size: examples in a batch.
        shuffle: whether to shuffle; otherwise an epoch is the data in their order, the last batch smaller.
        flip: whether to mirror each image with probability 1/2.
        steps_per_epoch: batches in an epoch of shuffled data; by default as many as the data fill.
        seed: seed of the order and of the flips.

    Raises:
        ValueError: if the batches are larger than the data, floats are not finite, labels and data differ in
            number, what is to be flipped is no images, or an epoch would have no steps.
    """

    def __init__(self, x, labels=None, batch_size=64, shuffle=True, flip=False, steps_per_epoch=None, seed=0):
        super().__init__()
        x, labels = np.asarray(x), None if labels is None else np.asarray(labels)
        if not 1 <= batch_size <= len(x):
            raise ValueError(
                f"`batch_size` must be between 1 and the size of the data, {len(x)}. Received: {batch_size}"
            )
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"`steps_per_epoch` must be positive or None. Received: {steps_per_epoch}")
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"There must be one label for each example. Received: {len(labels)} for {len(x)}")
        if x.dtype != "uint8" and not np.all(np.isfinite(x)):
            raise ValueError("The data hold NaN or infinite values.")
        if flip and x.ndim != 4:
            raise ValueError(f"Only images (num, height, width, channels) can be flipped. Received: shape {x.shape}")
        self.x = x
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.flip = flip
        self.seed = seed
        self.epoch = self._next_epoch = 0
        self.steps = steps_per_epoch or len(x) // batch_size if shuffle else math.ceil(len(x) / batch_size)
        self._order = {}

    @property
    def num_examples(self):
        return len(self.x)

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        if self.shuffle:
            batch = self.epoch * self.steps + step
            row = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
            chosen = np.array([self._permutation(i // len(self.x))[i % len(self.x)] for i in row])
        else:
            batch = step
            chosen = np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.x)))
        x = self.x[chosen]
        if self.flip:
            mirrored = np.random.default_rng([self.seed, 1, batch]).random(len(x)) < 0.5
            x[mirrored] = x[mirrored, :, ::-1]
        x = images.from_uint8(x) if x.dtype == "uint8" else x.astype("float32")
        return x if self.labels is None else (x, self.labels[chosen])

    def on_epoch_begin(self):
        # Once an epoch, while Keras calls `on_epoch_end` also before the first.
        self.epoch = self._next_epoch
        self._next_epoch += 1

    def _permutation(self, number):
        """The order of the data in pass `number`; a batch may reach over two passes."""
        if number not in self._order:
            self._order = {n: order for n, order in self._order.items() if n == number - 1}
            self._order[number] = np.random.default_rng([self.seed, 0, number]).permutation(len(self.x))
        return self._order[number]


def from_arrays(x, labels=None, image_size=None, **kwargs):
    """Batches of arrays.

    Args:
        x: array `(num, ...)`, or the path of a `.npy` file, or of an `.npz` file with entries `x` and, perhaps,
            `labels`. Unsigned 8-bit images are scaled from 0..255 to [-1, 1]; floats are used as they are.
        labels: array `(num,)` or `None`.
        image_size: side to which 8-bit images are cropped and resized; `None` to leave them.
        **kwargs: see `Batches`.

    Returns:
        `Batches`.

    Raises:
        ValueError: for a file without `x`, integers that are no 8-bit images, floats that are to be resized, and
            see `Batches`.
    """
    if isinstance(x, (str, pathlib.Path)):
        path, x = x, np.load(x)
        if isinstance(x, np.lib.npyio.NpzFile):
            if "x" not in x:
                raise ValueError(f"{path} must have an entry 'x'. Received: {sorted(x)}")
            x, labels = x["x"], x["labels"] if "labels" in x else labels
    x = np.asarray(x)
    if x.dtype != "uint8" and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"Arrays must hold 8-bit images or floats. Received: {x.dtype}")
    if image_size is not None:
        if x.dtype != "uint8" or x.ndim != 4:
            raise ValueError(
                f"Only 8-bit images (num, height, width, channels) can be resized. Received: {x.dtype} {x.shape}"
            )
        x = np.stack([images.resize(image, image_size) for image in x])
    return Batches(x, labels, **kwargs)


def from_folder(path, image_size=64, channels=3, labels=False, strict=False, **kwargs):
    """Batches of the image files in a folder and its sub-folders.

    Args:
        path: the folder.
        image_size: side to which images are cropped and resized.
        channels: 3 for colour, 1 for grey.
        labels: whether to yield labels: the number of the sub-folder, in alphabetical order.
        strict: whether a file that cannot be read is an error rather than a warning.
        **kwargs: see `Batches`.

    Returns:
        `Batches`.

    Raises:
        ValueError: if there is no such folder or no image in it; with `strict`, if an image cannot be read; for
            other numbers of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 or 3. Received: channels={channels}")
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}")
    endings = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
    folders = sorted({file.parent for file in files})
    x, numbers = [], []
    for file in files:
        try:
            x.append(images.load(file, image_size, channels))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            if strict:
                raise ValueError(f"{file} cannot be read as an image: {error}") from error
            warnings.warn(f"Skipped {file}, which cannot be read as an image: {error}", stacklevel=2)
        else:
            numbers.append(folders.index(file.parent))
    if not x:
        raise ValueError(f"There is no readable image in {path} (looked for {', '.join(sorted(endings))})")
    return Batches(np.stack(x), np.array(numbers, "int32") if labels else None, **kwargs)


def from_tfds(name, split="train", image_size=None, data_dir=None, labels=False, **kwargs):
    """Batches of a data set of TensorFlow Datasets with a feature `image` and, for labels, one `label`.

    A data set that has been prepared on disk is read without network; any other is downloaded.

    Args:
        name: its name, such as "oxford_flowers102" or "mnist".
        split: split or splits, as in "train[:90%]+test".
        image_size: side to which images are cropped and resized; `None` where they all are of one size.
        data_dir: folder of the prepared data sets; by default TensorFlow Datasets' own.
        labels: whether to yield labels.
        **kwargs: see `Batches`.

    Returns:
        `Batches`.

    Raises:
        ConnectionError: if the data set is not on disk and cannot be downloaded.
        ValueError: if it lacks a feature, or its images differ in size and `image_size` is not given.
    """
    x, numbers = _read_tfds(name, [split], image_size, data_dir, labels)[0]
    return Batches(x, numbers, **kwargs)


def oxford_flowers(image_size=64, batch_size=64, data_dir=None, labels=False, **kwargs):
    """Oxford Flowers 102: 8189 photographs, of which the last 10 % of each split are held out.

    All three splits are used ("train" alone is an eighth of the data). Of identical photographs one is kept.

    Args:
        image_size: side to which images are cropped and resized.
        batch_size: examples in a batch.
        data_dir: folder of the prepared data sets; by default TensorFlow Datasets' own.
        labels: whether to yield labels, 0..101.
        **kwargs: of the training batches, see `Batches`; by default they are flipped.

    Returns:
        The training `Batches` and those held out.

    Raises:
        ConnectionError: if the data set is not on disk and cannot be downloaded.

    Reference: Nilsback and Zisserman, 2008.
    """
    parts = _read_tfds(
        "oxford_flowers102",
        ["+".join(f"{split}[{part}]" for split in ("train", "validation", "test")) for part in ("90%:", ":90%")],
        image_size,
        data_dir,
        labels,
    )
    x = np.concatenate([x for x, _ in parts])
    numbers = np.concatenate([numbers for _, numbers in parts]) if labels else None
    _, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)
    held_out = len(parts[0][0])
    validation, train = (np.sort(first[chosen]) for chosen in (first < held_out, first >= held_out))
    pick = lambda chosen: (x[chosen], numbers[chosen] if labels else None, min(batch_size, len(chosen)))  # noqa: E731
    return Batches(*pick(train), **{"flip": True, **kwargs}), Batches(*pick(validation), shuffle=False)


def _read_tfds(name, splits, image_size, data_dir, labels):
    """For each split, the images as a uint8 array, and the labels as an int64 array or `None`."""
    import tensorflow_datasets as tfds

    if keras.backend.backend() != "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all of the memory that the backend needs.
    data_dir = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    prepared = sorted(data_dir.glob(f"{name}/*/dataset_info.json"))
    if prepared:
        builder = tfds.builder_from_directory(prepared[-1].parent)
    else:
        for url in list(tfds.builder_cls(name).url_infos or [])[:1]:
            _check_reachable(url, f"{name} is not in {data_dir} and cannot be downloaded")
        builder = tfds.builder(name, data_dir=data_dir)
        try:
            builder.download_and_prepare()
        except Exception as error:  # of many kinds
            raise ConnectionError(f"{name} is not in {data_dir}, and its download failed: {error}") from error
    missing = {"image", *(["label"] if labels else [])} - set(builder.info.features)
    if missing:
        raise ValueError(f"{name} has no feature {missing.pop()!r}. Its features: {sorted(builder.info.features)}")
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    parts = []
    for split in splits:
        x, numbers = [], []
        for example in tfds.as_numpy(builder.as_dataset(split, read_config=in_order)):
            x.append(example["image"] if image_size is None else images.resize(example["image"], image_size))
            numbers.append(example["label"] if labels else None)
        if len({image.shape for image in x}) > 1:
            raise ValueError(f"The images of {name} differ in size: give `image_size`.")
        parts.append((np.stack(x), np.array(numbers) if labels else None))
    return parts


def _check_reachable(url, message, seconds=5):
    """Raises ConnectionError unless the host answers in time, also where packets vanish silently."""
    failures = [f"no answer in {seconds} seconds"]

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not to this question
        except OSError as error:
            failures[0] = error
            return
        failures.clear()

    thread = threading.Thread(target=ask, daemon=True)  # because the look-up of a name knows no time limit
    thread.start()
    thread.join(seconds)
    if failures:
        raise ConnectionError(f"{message} from {url}: {failures[0]}")


def moons(num, seed=0, noise=0.05):
    """Points on two interleaving half circles, with Gaussian noise.

    Every point has an angle of its own, drawn uniformly; scikit-learn's function of the same name puts them on a
    fixed grid. The half circles have radius 1 and centres (0, 0) and (1, 1/2) before all is moved and scaled by
    1 / (3/2 + 5 noise), into the square [-1, 1]² (what lies more than five deviations outside is clipped).

    Args:
        num: how many points.
        seed: seed of the drawing, a non-negative integer or several.
        noise: standard deviation of the noise where the radius is 1.

    Returns:
        float32 points `(num, 2)` in [-1, 1], and int32 labels `(num,)`: 0 for the upper moon, 1 for the lower.

    Raises:
        ValueError: for a number that is not positive or noise below 0.
    """
    if not _checks.is_count(num) or not _checks.is_between(noise, 0, np.inf):
        raise ValueError(f"`num` must be positive and `noise` 0 or more. Received: num={num!r}, noise={noise!r}")
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=num, dtype="int32")
    angle = random.uniform(0, np.pi, num) + np.pi * labels
    x = np.column_stack([np.cos(angle) + labels, np.sin(angle) + labels / 2])
    x += noise * random.standard_normal(x.shape)
    return np.clip((x - [0.5, 0.25]) / (1.5 + 5 * noise), -1, 1).astype("float32"), labels


FLOWER_KINDS = {
    # petals, sharpness of the petals, depth of the gaps, layers, size of the centre, hues of petals and centre
    "daisy": (13, 0.55, 0.75, 1, 0.26, (0.62, 0.98), (0.11, 0.15)),
    "geranium": (5, 0.45, 0.55, 1, 0.13, (0.75, 0.98), (0.10, 0.16)),
    "lily": (6, 1.10, 0.80, 1, 0.10, (0.00, 0.12), (0.06, 0.10)),
    "sunflower": (17, 0.80, 0.50, 2, 0.42, (0.11, 0.15), (0.04, 0.08)),
    "poppy": (4, 0.35, 0.25, 2, 0.20, (0.96, 1.05), (0.20, 0.30)),
}


def procedural_flowers(num_images, image_size=32, seed=0):
    """Flowers drawn as rose curves in front of foliage, no two alike.

    Args:
        num_images: how many.
        image_size: side in pixels.
        seed: seed of the drawing; image number i is the same whatever `num_images`.

    Returns:
        float32 images `(num_images, image_size, image_size, 3)` in [-1, 1] at 8-bit levels, and int32 labels
        `(num_images,)`, the positions of the flowers' kinds in `FLOWER_KINDS`.

    Raises:
        ValueError: for numbers that are not positive.
    """
    if num_images < 1 or image_size < 1:
        raise ValueError(f"Received: num_images={num_images}, image_size={image_size}; both must be positive.")
    kinds = list(FLOWER_KINDS.values())
    x = np.empty((num_images, image_size, image_size, 3), "uint8")
    labels = np.empty(num_images, "int32")
    for index in range(num_images):
        random = np.random.default_rng([seed, index])
        labels[index] = random.integers(len(kinds))
        x[index] = _draw_flower(*kinds[labels[index]], image_size, random)
    return images.from_uint8(x), labels


def _draw_flower(petals, sharpness, gap, layers, centre_size, hues, centre_hues, image_size, random):
    uniform = random.uniform
    detail = 3  # pixels are averages of 3 x 3
    side = (np.arange(image_size * detail) + 0.5) / (image_size * detail) * 2 - 1
    y, x = side[:, None], side[None, :]

    # Foliage: a gradient of greens with soft patches of light and shadow.
    hue, light = uniform(0.18, 0.42), uniform(0.12, 0.45)
    value = light + 0.12 * uniform(-1, 1) * x + 0.12 * uniform(-1, 1) * y
    for _ in range(6):
        spread = uniform(0.15, 0.5)
        spot = np.exp(-((x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2) / spread**2)
        value = value + uniform(-0.18, 0.22) * spot
    canvas = _hsv(hue, uniform(0.35, 0.75), value)

    # The plane of the flower, seen at a slant.
    angle, tilt, radius = uniform(0, 2 * np.pi), uniform(0.72, 1.0), uniform(0.62, 0.88)
    u, v = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u, v = np.cos(angle) * u + np.sin(angle) * v, (np.cos(angle) * v - np.sin(angle) * u) / tilt
    r, phi = np.hypot(u, v) / radius, np.arctan2(v, u) + uniform(0, 2 * np.pi)
    canvas = canvas * (1 - 0.55 * np.exp(-np.maximum(r - 0.75, 0) / 0.18))[..., None]  # its shadow

    hue, saturation, value = uniform(*hues), uniform(0.55, 0.95), uniform(0.8, 1.0)
    if petals == 13:  # daisies come white as well
        saturation *= random.choice([0.08, 0.6])
    for layer in range(layers):
        scale = 1.0 - 0.28 * layer
        lobe = np.abs(np.cos(petals * phi / 2 + layer * np.pi / 2))
        edge = scale * (1 - gap + gap * lobe**sharpness)
        shade = (0.62 + 0.38 * lobe**0.7) * (0.70 + 0.30 * np.clip(r / scale, 0, 1)) + 0.06 * layer
        petal = _hsv(hue + 0.03 * (1 - r), saturation * (1.1 - 0.3 * r), value * shade)
        canvas = np.where((r < edge)[..., None], petal, canvas)

    # The centre: a dome of dots.
    dots = 0.85 + 0.15 * np.sin(40 * r) * np.sin(9 * phi)
    dome = uniform(0.55, 0.95) * dots * (1.05 - 0.5 * (r / centre_size) ** 2)
    canvas = np.where((r < centre_size)[..., None], _hsv(uniform(*centre_hues), 0.85, dome), canvas)

    canvas = canvas * uniform(0.85, 1.1)
    pixels = canvas.reshape(image_size, detail, image_size, detail, 3).mean(axis=(1, 3))
    return np.round(255 * np.clip(pixels, 0, 1)).astype("uint8")


def _hsv(hue, saturation, value):
    """Colour from hue, saturation and value, each broadcast against the others."""
    hue, saturation, value = np.broadcast_arrays(hue, saturation, value)
    ramp = (hue[..., None] * 6 + np.array([5, 3, 1])) % 6
    falloff = np.clip(np.minimum(ramp, 4 - ramp), 0, 1)
    return np.clip(value, 0, 1)[..., None] * (1 - np.clip(saturation, 0, 1)[..., None] * falloff)
