"""Files of models: what they say of `compile`, complete and the same for every backend, and how they are loaded."""

import contextlib
import inspect
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import keras

from keras_ddpm import _checks

MAX_CONFIG = 2**26  # bytes; the config of a large network with T = 100,000 has less


def load_model(path: str | pathlib.Path, **options: Any) -> keras.Model:
    """Loads a `DiffusionModel` from a `.keras` file, as `keras.saving.load_model` does, and says what is wrong with it.

    Args:
        path: the file.
        **options: as in `keras.saving.load_model`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds another kind of model, or would unpack to more than it can need.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            _checks.require("config.json" in sizes, "It is no .keras file")
            _checks.require(sizes["config.json"] <= MAX_CONFIG, "Its config is too large", bytes=sizes["config.json"])
            bounded = sum(sizes.values()) <= 100 * path.stat().st_size
            _checks.require(bounded, "It unpacks to far more than its size", bytes=sum(sizes.values()))
            _checks.require(archive.testzip() is None, "A part of it is damaged")
        model = keras.saving.load_model(path, **options)
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a model. {reason}") from error
    _checks.require(hasattr(model, "diffusion"), f"{path} is not a diffusion model", found=type(model).__name__)
    return model


@contextlib.contextmanager
def replacing(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context that writes the file `temporary`, which then takes the place of `path`.

    A kill leaves the file `path` as it was, or replaces it by the whole new one, which has reached the disk.
    """
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if sys.platform != "win32":  # the new name, too, must reach the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def portable(value: Any) -> Any:
    """Serializes a value: the arguments of `compile`, or an object or a container among them.

    Keras 3.15 forgets some arguments of losses and metrics, such as `delta` of `Huber`. They are added.
    """
    if isinstance(value, dict):
        return {name: portable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry) for entry in value]
    config = keras.saving.serialize_keras_object(value)
    if isinstance(value, (keras.losses.Loss, keras.metrics.Metric)):
        # A version of Keras without this attribute is taken to forget nothing.
        known = getattr(value, "_fn_kwargs", None) or {}
        accepted = inspect.signature(type(value)).parameters
        forgotten = {name: entry for name, entry in known.items() if name in accepted and name not in config["config"]}
        config["config"] |= keras.saving.serialize_keras_object(forgotten)
    return neutral(config)


def neutral(config: Any) -> Any:
    """Replaces a backend's optimizers in a `config`, which another backend does not have, by the public ones."""
    if isinstance(config, list):
        return [neutral(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    config = {name: neutral(entry) for name, entry in config.items()}
    if str(config.get("module")).startswith("keras.src.backend."):
        config["module"] = "keras.optimizers"
    return config
