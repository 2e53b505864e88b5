"""How model files are loaded. Every file goes through `load_model`."""

import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras
import numpy as np

from keras_ddpm import _checks, _files

__all__ = ["PRESETS", "load_model"]

PRESETS = pathlib.Path(__file__).parent / "presets"

PARTS = ["config.json", "metadata.json", "model.weights.h5"]  # which Keras writes for a `DiffusionModel`
MAX_CONFIG = 2**24  # bytes; the config of a large network with T = 100,000 has less
MAX_DEPTH = 100  # of lists and dicts in each other; a network within five others has less
MAX_SIZE = 2**24  # of one axis in a network
MAX_EXAMPLE = 2**26  # numbers in one example
MAX_NAMES = 2**14  # of weights and of groups
SPARE = 2**20  # numbers that a small file may hold or need in any case

_turn = threading.RLock()


def load_model(
    path: str | pathlib.Path,
    *,
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Loads a `DiffusionModel` as `keras.saving.load_model` does, after checks of the file.

    The file must hold what Keras writes, in plain parts without links. It may unpack to a few times its size, and make
    a few times as many numbers as it stores. SECURITY.md says what is not checked.

    Args:
        path: a `.keras` file; a folder of its parts, as `DiffusionModel.save_to_preset` writes it; or an address:
            "hf://USER/REPOSITORY", or one that TensorFlow can read.
        custom_objects: classes and functions of your own by name, which the file refers to.
        compile: whether to compile the model as it was when it was saved.
        safe_mode: whether to refuse Python code in the file, such as lambda layers. `False` lets the file do anything.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a check fails, the file is damaged, or it holds another kind of model.
    """
    if "://" not in str(path) and not os.path.exists(path):
        raise FileNotFoundError(f"There is no file {path}")
    try:
        with _local(path) as file, _turn, _at_most(_checked(file, custom_objects)):
            return keras.saving.load_model(file, custom_objects, compile, safe_mode)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} cannot be loaded as a model. {_checks.reason(error)}") from error


@contextlib.contextmanager
def _local(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A context with the file, or with a copy of what is in a folder or at an address."""
    if "://" not in str(path) and not os.path.isdir(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "model.keras")
        if str(path).startswith("hf://"):  # where Keras stores the parts as files
            import huggingface_hub

            path = huggingface_hub.snapshot_download(str(path).removeprefix("hf://"), allow_patterns=PARTS)
        if os.path.isdir(path):
            with zipfile.ZipFile(copy, "w") as archive:
                for name in PARTS:
                    _checks.require(os.path.isfile(part := pathlib.Path(path, name)), f"It has no file {name}")
                    archive.write(part, name)
        else:
            import tensorflow as tf

            tf.io.gfile.copy(str(path), str(copy))
        yield copy


def _checked(path: pathlib.Path, custom_objects: dict[str, Any] | None) -> int:
    """Checks a file without making anything that it describes. Returns how many numbers a model of it may have."""
    _checks.require(path.suffix == ".keras", "The file name must end in .keras")
    _files.regular(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        _checks.require(sorted(names) == PARTS, f"It must hold {', '.join(PARTS)} and nothing else", found=names)
        _files.bounded(archive, ratio=20, floor=MAX_CONFIG)
        size = archive.getinfo(PARTS[0]).file_size
        _checks.require(size <= MAX_CONFIG, "Its config is too large", bytes=size)
        text, _, weights = map(archive.read, PARTS)  # which raises an error if a checksum is wrong
    config = json.loads(text)
    # A name can stand for another class than usual, as in `DiffusionModel.from_preset`.
    expected = keras.saving.get_registered_object("keras_ddpm>DiffusionModel")
    name = config.get("registered_name")
    found = keras.saving.get_registered_object(name, custom_objects)
    valid = isinstance(found, type) and issubclass(found, expected)
    needed = f"It is not a diffusion model of class {expected.__name__}"
    _checks.require(valid, needed, found=name or config["class_name"])
    for name, entry in _entries(config["config"]["network"]):
        size = math.prod(filter(None, entry)) if name == "batch_shape" else 0
        _checks.require(size <= MAX_EXAMPLE, "An example has too many numbers", shape=entry)
        size = entry if isinstance(entry, int) and name not in ("seed", "shared_object_id") else 0
        _checks.require(size <= MAX_SIZE, "A number in its config is too large", **{str(name): entry})
    with h5py.File(io.BytesIO(weights)) as file:
        sizes = list(itertools.islice(_sizes(file, {file}, len(weights)), MAX_NAMES + 1))
    _checks.require(len(sizes) <= MAX_NAMES, "It has too many weights")
    num = sum(sizes)
    # Equal weights are stored once in a compact file, in two bytes a number.
    _checks.require(num <= 4 * len(weights) + SPARE, "Its weights repeat each other too often", numbers=num)
    return 2 * num + SPARE  # an optimizer that was never built is not in the file


def _entries(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yields the entries of a config, and those of the dicts and lists in it, each with its name or number."""
    _checks.require(depth <= MAX_DEPTH, "Its config is nested too deeply")
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield name, entry
        if isinstance(entry, (dict, list)):
            yield from _entries(entry, depth + 1)


def _sizes(group: h5py.Group, seen: set, num_bytes: int) -> Iterator[int]:
    """Yields the number of values of every weight in a group. The bytes of each must stand in the file, as they are."""
    for key in group:
        name = f"{group.name}/{key}"
        is_plain = isinstance(group.get(key, getlink=True), h5py.HardLink)
        _checks.require(is_plain, "Its weights refer to another place by a link", name=name)
        item = group[key]
        if isinstance(item, h5py.Group):
            _checks.require(item not in seen and len(seen) < MAX_NAMES, "Its groups of weights do not form a tree")
            seen.add(item)
            yield from _sizes(item, seen, num_bytes)
            continue
        is_array = isinstance(item, h5py.Dataset) and item.dtype.kind in "biufV" and item.dtype.names is None
        _checks.require(is_array, "A weight is not an array of numbers", name=name)
        is_plain = not (item.chunks or item.external or item.is_virtual)
        is_whole = is_plain and item.nbytes == item.id.get_storage_size() <= num_bytes
        _checks.require(is_whole, "A weight is not stored whole and as it is", name=name, shape=item.shape)
        yield item.size


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """A context in which this thread cannot make variables of Keras with more numbers in total."""
    made, thread = 0, threading.get_ident()

    def initialize(variable, initializer, shape=None, *args, **kwargs):
        nonlocal made
        if callable(initializer) and threading.get_ident() == thread:
            made += math.prod(np.atleast_1d(shape).tolist())
            _checks.require(made <= most, "Its config asks for more weights than it stores", numbers=made)
        before(variable, initializer, shape, *args, **kwargs)

    before = keras.Variable.__init__
    keras.Variable.__init__ = initialize
    try:
        yield
    finally:
        keras.Variable.__init__ = before
