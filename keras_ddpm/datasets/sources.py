"""Where data come from: arrays, folders of images, TensorFlow Datasets."""

import difflib
import hashlib
import json
import mimetypes
import multiprocessing.pool
import os
import warnings
from pathlib import Path

import keras
import numpy as np
from numpy.typing import ArrayLike

from keras_ddpm import _checks, _files, images
from keras_ddpm.datasets import cache as _cache
from keras_ddpm.datasets.batches import Batches

__all__ = ["ENDINGS", "from_arrays", "from_folder", "from_tfds", "oxford_flowers"]

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def from_arrays(
    x: ArrayLike | str | Path, labels: ArrayLike | None = None, image_size: int | None = None, **kwargs
) -> Batches:
    """Makes batches of arrays.

    Args:
        x: array `(num, ...)`, or the path of an `.npy` file, which is mapped into memory, or of an `.npz`
            file with an entry `x` and optionally `labels`. uint8 images are scaled from 0..255 to [-1, 1]. Floats are
            not scaled.
        labels: array `(num,)` or `None`.
        image_size: side to which uint8 images are cropped and resized, or `None`.
        **kwargs: arguments of `Batches`.

    Returns:
        `Batches`.

    Raises:
        ValueError: if a file is damaged, holds Python objects or has no entry `x`, the array holds integers other than
            uint8, `image_size` is given for an array that does not hold uint8 images, or `Batches` raises it.
    """
    if isinstance(x, (str, Path)):
        arrays = _files.arrays(x)
        _checks.require("x" in arrays, f"{x} must have an entry 'x'", entries=sorted(arrays))
        x, labels = arrays["x"], arrays.get("labels", labels)
    x = np.asarray(x)
    is_uint8 = x.dtype == "uint8"
    _checks.require(is_uint8 or np.issubdtype(x.dtype, np.floating), "Expected uint8 images or floats", dtype=x.dtype)
    if image_size is not None:
        _checks.require(is_uint8 and x.ndim == 4, "Only uint8 images can be resized", dtype=x.dtype, shape=x.shape)
        x = np.stack([images.resize(image, image_size) for image in x])
    return Batches(x, labels, **kwargs)


def from_folder(
    path: str | Path,
    image_size: int = 64,
    channels: int = 3,
    labels: bool = False,
    strict: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    cache: str | Path | None = None,
    **kwargs,
) -> Batches:
    """Makes batches of the image files in a folder and its subfolders.

    Hidden files and folders are ignored. Links are followed.

    Args:
        path: the folder.
        image_size: side to which images are cropped and resized.
        channels: 3 for color, 1 for gray.
        labels: whether to return labels. Each subfolder of `path` with a readable image is a class, with all images
            below it. `class_names` holds their names in alphabetical order.
        strict: whether a file that cannot be read is an error. Otherwise it is skipped with a warning.
        max_pixels: largest number of pixels of a file. Larger files cannot be read.
        cache: name of an `.npy` file. The images are decoded into it once, and read from it without filling the memory.
            If that is interrupted, the same call starts over. Names and sizes of the image files tell whether they are
            the same: delete the file after other changes. Each call reads the file once to check it.
        **kwargs: arguments of `Batches`.

    Returns:
        `Batches`.

    Raises:
        ValueError: if the folder does not exist or has no image, `channels` is neither 1 nor 3, an image cannot be read
            (with `strict`), an image is in no subfolder (with `labels`), `cache` was made of other files or with other
            settings, or `Batches` raises it.
    """
    _checks.require(channels in (1, 3), "`channels` must be 1 or 3", channels=channels)
    _checks.counts(image_size=image_size, max_pixels=max_pixels)
    path = Path(path)
    _checks.require(path.is_dir(), f"There is no folder {path}")
    files, unread = [], set()
    for file in sorted(_visible_files(path)):
        if file.suffix.lower() in ENDINGS:
            inside = len(file.relative_to(path).parts) > 1
            _checks.require(not labels or inside, f"{file} is in no subfolder of {path}, so it has no class")
            files.append(file)
        elif (mimetypes.guess_type(file)[0] or "").startswith("image/"):
            unread.add(file.suffix)

    def load(file):
        try:
            return images.load(file, image_size, channels, max_pixels), file.relative_to(path).parts[0]
        except (OSError, ValueError) as error:
            reason = f"{file} cannot be read as an image: {error}".rstrip(".")
            if strict:
                raise ValueError(f"{reason}.") from error
            return reason

    key: list = [image_size, channels, max_pixels, len(files)]
    if cache:
        stats = [(str(file.relative_to(path)), file.stat().st_size) for file in files]
        key += [hashlib.sha256(json.dumps(stats).encode()).hexdigest()]
    x, classes, skipped = _cache.decoded(files, load, len(files), key, cache)
    _checks.require(not (strict and skipped), "".join(skipped[:1]))
    for reason in skipped:
        warnings.warn(f"Skipped: {reason}", stacklevel=2)
    if unread:
        warnings.warn(f"Files ending in {', '.join(sorted(unread))} are skipped: convert them to .png", stacklevel=2)
    _checks.require(len(x), f"There is no readable image in {path} (looked for {', '.join(sorted(ENDINGS))})")
    if not labels:
        return Batches(x, **kwargs)
    names, numbers = np.unique([_checks.text(name) for name in classes], return_inverse=True)
    return Batches(x, numbers.astype("int32"), class_names=names.tolist(), **kwargs)


def _visible_files(path):
    """Yields files that are not hidden. Links are followed unless they lead to a parent folder or one seen before."""
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        here, above = os.path.realpath(folder), os.path.realpath(os.path.dirname(os.path.abspath(folder)))
        if here in seen or above.startswith(os.path.join(here, "")):
            folders[:] = []
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def from_tfds(
    name: str,
    split: str = "train",
    image_size: int | None = None,
    data_dir: str | Path | None = None,
    labels: bool = False,
    cache: str | Path | None = None,
    **kwargs,
) -> Batches:
    """Makes batches of a data set of TensorFlow Datasets with the features `image` and, for labels, `label`.

    A data set that is prepared on disk is read without network. Any other is downloaded.

    Args:
        name: name of the data set, such as "mnist", "emnist/letters" or "mnist:3.0.1". Without a version, the newest on
            disk is read.
        split: one or more splits, as in "train[:90%]+test".
        image_size: side to which images are cropped and resized. `None` if all images have the same size.
        data_dir: folder of the prepared data sets. By default, the folder of TensorFlow Datasets.
        labels: whether to return labels.
        cache: name of an `.npy` file into which the images are decoded once, as in `from_folder`.
        **kwargs: arguments of `Batches`.

    Returns:
        `Batches`.

    Raises:
        ConnectionError: if the data set is not on disk and cannot be downloaded.
        ValueError: if there is no data set of this name, it lacks a feature, its images differ in size and `image_size`
            is not given, `cache` was made of other data, or `Batches` raises it.
    """
    x, numbers, names = _read_tfds(name, split, image_size, data_dir, labels, cache)
    return Batches(x, numbers, class_names=names, **kwargs)


def oxford_flowers(
    image_size: int = 64, batch_size: int = 64, data_dir: str | Path | None = None, labels: bool = False, **kwargs
) -> tuple[Batches, Batches]:
    """Reads Oxford Flowers 102: 8189 photographs. The last 10 % of each split are held out.

    All three splits are used ("train" alone is an eighth of the data). Duplicates are removed.

    Args:
        image_size: side to which images are cropped and resized.
        batch_size: number of examples in a batch.
        data_dir: folder of the prepared data sets. By default, the folder of TensorFlow Datasets.
        labels: whether to return labels, 0..101.
        **kwargs: arguments of the training `Batches`, which are flipped by default.

    Returns:
        The training `Batches` and the held-out `Batches`.

    Raises:
        ConnectionError: if the data set is not on disk and cannot be downloaded.

    Reference: Nilsback and Zisserman, 2008.
    """
    splits = ["+".join(f"{split}[{part}]" for split in ("train", "validation", "test")) for part in ("90%:", ":90%")]
    parts = [_read_tfds("oxford_flowers102", split, image_size, data_dir, True) for split in splits]
    x, numbers = (np.concatenate(arrays) for arrays in list(zip(*parts))[:2])
    kept = np.sort(np.unique(x.reshape(len(x), -1), axis=0, return_index=True)[1])
    held_out = kept < len(parts[0][0])

    def batches(chosen, **options):
        options |= {"class_names": parts[0][2]} if labels else {}
        return Batches(x[chosen], numbers[chosen] if labels else None, min(batch_size, len(chosen)), **options)

    return batches(kept[~held_out], **{"flip": True, **kwargs}), batches(kept[held_out], shuffle=False)


def _read_tfds(name, split, image_size, data_dir, labels, cache=None):
    """Reads the images of a split as a uint8 array, the labels as an int64 array, and their names; or `None`."""
    import tensorflow_datasets as tfds

    if keras.backend.backend() != "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all of the memory that the backend needs.
    data_dir = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        builder = _downloaded(name, data_dir)
    missing = {"image", *(["label"] if labels else [])} - set(builder.info.features)
    _checks.require(not missing, f"{name} lacks the features {missing}", features=list(builder.info.features))
    # Without interleaving, the examples are in order.
    examples = builder.as_dataset(split, read_config=tfds.ReadConfig(interleave_cycle_length=1))

    def load(example):
        x = example["image"] if image_size is None else images.resize(example["image"], image_size)
        return x, int(example["label"]) if labels else None

    key = [*builder.info.full_name.rsplit("/", 1), split, image_size, labels]  # with the config and the version
    x, numbers, _ = _cache.decoded(tfds.as_numpy(examples), load, len(examples), key, cache)
    if not labels:
        return x, None, None
    return x, np.array(numbers), getattr(builder.info.features["label"], "names", None)


def _downloaded(name, data_dir):
    """The builder of a data set that is not on disk, after its download."""
    import tensorflow_datasets as tfds

    plain, options = tfds.core.naming.parse_builder_name_kwargs(name)
    try:
        builder_cls = tfds.builder_cls(str(plain))
    except tfds.core.registered.DatasetNotFoundError as error:  # whose message lists every data set
        similar = difflib.get_close_matches(str(plain), tfds.list_builders(with_community_datasets=False))
        raise ValueError(f"There is no data set {str(plain)!r}. Similar names: {similar}") from error
    configs = [None, *builder_cls.builder_configs]
    _checks.require(options.get("config") in configs, "There is no config of this name", name=name, configs=configs[1:])
    try:
        for url in list(builder_cls.url_infos or [])[:1]:
            _check_reachable(url)
        builder = tfds.builder(name, data_dir=data_dir)
        builder.download_and_prepare()
    except Exception as error:  # TensorFlow Datasets raises many types
        raise ConnectionError(f"{name} is not in {data_dir}. Its download failed: {_checks.reason(error)}") from error
    return builder


def _check_reachable(url, seconds=5):
    """Raises an error unless the host answers in time, even if packets are dropped without an error."""
    import requests  # TensorFlow Datasets downloads with it

    with multiprocessing.pool.ThreadPool(1) as pool:  # because name resolution has no time limit
        pool.apply_async(requests.head, (url,), {"timeout": seconds}).get(seconds)
