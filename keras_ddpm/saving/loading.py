"""How model files are loaded. Every file goes through `load_model`."""

import pathlib
import zipfile
from typing import Any

import keras

from keras_ddpm import _checks

__all__ = ["PRESETS", "load_model"]

PRESETS = pathlib.Path(__file__).parent / "presets"

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
