"""Smaller files, and configurations that every backend can read."""

import inspect
import io
import pathlib
import zipfile
from typing import Any

import h5py
import keras
import numpy as np

from keras_ddpm import _checks

__all__ = ["compress", "in_float32", "neutral", "portable"]

# Of HDF5, for compact files. "latest" would be unreadable with older versions of h5py.
FILE_FORMAT = ("v110", "v110")


def compress(path: pathlib.Path) -> None:
    """Rewrites the `.keras` file at `path`: stores weights in 16 bits, and identical weights once."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights, buffer, name_of = io.BytesIO(parts["model.weights.h5"]), io.BytesIO(), dict[tuple, str]()
    with h5py.File(weights) as source, h5py.File(buffer, "w", libver=FILE_FORMAT) as target:

        def copy(name, item):
            if isinstance(item, h5py.Group):
                target.require_group(name).attrs.update(item.attrs)
                return
            value = item[()]
            if value.dtype == np.float32:
                fits = np.all(np.abs(value) <= np.finfo("float16").max)
                _checks.require(fits, "A weight is infinite, NaN or too large for half precision", name=name)
                value = value.astype("float16")
            first = name_of.setdefault((value.dtype, value.shape, value.tobytes()), name)
            target[name] = value if first == name else target[first]
            target[name].attrs.update(item.attrs)

        source.visititems(copy)
    parts["model.weights.h5"] = buffer.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def in_float32(layer: Any) -> Any:
    """A copy of a Keras layer or operation, without its weights, that computes in float32."""
    config = layer.get_config()
    return type(layer).from_config(config | {"dtype": "float32"} if "dtype" in config else config)


def portable(value: Any) -> Any:
    """Serializes a value: the arguments of `compile`, or an object or a container among them.

    Keras 3.15 forgets some arguments of losses and metrics, such as `delta` of `Huber`. They are added.
    """
    if keras.tree.is_nested(value):
        return keras.tree.map_structure(portable, value)
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

    def public(entry):
        if isinstance(entry, dict) and str(entry.get("module")).startswith("keras.src.backend."):
            return entry | {"module": "keras.optimizers"}

    return keras.tree.traverse(public, config, top_down=False)
