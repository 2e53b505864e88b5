"""Files of models: whole or compact, the same for every backend, and how they are loaded."""

import contextlib
import inspect
import io
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py
import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm import _devices
from keras_ddpm import _replicas

PRESETS = pathlib.Path(__file__).parent / "presets"
# Of HDF5, for compact files. "latest" would be unreadable with older versions of h5py.
FILE_FORMAT = ("v110", "v110")
MAX_CONFIG = 2**26  # bytes; the config of a large network with T = 100,000 has less


class StoredModel(keras.Model):
    """The part of `DiffusionModel` that writes files and is read from them.

    A subclass must have the attributes `network` and `ema_weights`.
    """

    _compiled_with: dict | None = None

    @_replicas.in_scope
    @_replicas.by_chief
    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs) -> None:
        """`keras.Model.save` to a `.keras` file. A file of this name stays whole until the new one is.

        Of several processes, the first one writes.

        Raises:
            ValueError: if the file name has another ending.
        """
        path = pathlib.Path(filepath)
        _checks.require(path.suffix == ".keras", "The file name must end in .keras", filepath=filepath)
        # Keras asks, writes a folder, or writes to another machine.
        if not overwrite and path.exists() or zipped is False or "://" in str(filepath):
            return super().save(filepath, overwrite, zipped, **kwargs)
        with replacing(path, path.with_name(f"{path.stem}.saving.keras")) as temporary:
            super().save(temporary, **kwargs)

    @_replicas.in_scope
    @_replicas.by_chief
    def save_weights(self, *args, **kwargs) -> None:
        """`keras.Model.save_weights`. Of several processes, the first one writes."""
        return super().save_weights(*args, **kwargs)

    @_replicas.in_scope
    @_replicas.by_chief
    def save_compact(self, filepath: str | pathlib.Path) -> None:
        """Saves what samples: the averaged weights, in half precision, and no optimizer.

        The file has about an eighth of the size of that of `save` with Adam. It is a `.keras` file like others: the
        loaded model samples as this one up to rounding, and can be compiled and trained.

        Raises:
            ValueError: if the file name has another ending than .keras, or a weight is too large for half precision.
        """
        path = pathlib.Path(filepath)
        _checks.require(path.suffix == ".keras", "The file name must end in .keras", filepath=filepath)
        copy = type(self).from_model(self)
        with replacing(path, path.with_name(f"{path.stem}.saving.keras")) as temporary:
            keras.Model.save(copy, temporary)
            compress(temporary)

    @classmethod
    def from_model(cls, model: Any, **kwargs: Any) -> Any:
        """Makes a model of this class whose raw and averaged weights are both the average of another one.

        Args:
            model: a `DiffusionModel`. It is not changed.
            **kwargs: arguments of this class; the others are those of `model`.
        """
        copy = cls.from_config({**model.get_config(), **kwargs})
        for weights in (copy.network.weights, copy.ema_weights):
            for v, average in zip(weights, model.ema_weights):
                v.assign(keras.ops.convert_to_numpy(average))
        return copy

    @classmethod
    def from_preset(cls, preset: str | pathlib.Path, **options: Any) -> "StoredModel":
        """Loads a trained model.

        Args:
            preset: name of a model that comes with the package, the path of a `.keras` file, or an address that
                `keras.saving.load_model` knows, such as "hf://USER/REPOSITORY".
            **options: as in `keras.saving.load_model`.

        Raises:
            FileNotFoundError: if there is no such preset or file.
            ValueError: as in `load_model`.
        """
        if "://" in str(preset):
            return keras.saving.load_model(preset, **options)
        path = PRESETS / f"{preset}.keras"
        if not path.exists() and not pathlib.Path(preset).exists():
            names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.keras")))
            raise FileNotFoundError(f"There is no model file {preset}. Presets of the package: {names}.")
        return load_model(path if path.exists() else preset, **options)

    def export(self, filepath: Any, *args, **kwargs) -> None:
        """`keras.Model.export` of the network with the averaged weights: a function of x_t, t and the condition.

        It computes in float32. `export.onnx` also writes what other programs need to sample with it.
        """
        network = keras.models.clone_model(self.network, clone_function=in_float32)
        network.set_weights([keras.ops.convert_to_numpy(v) for v in self.ema_weights])
        inputs = [keras.ops.zeros((1, *v.shape[1:]), v.dtype) for v in network.inputs]
        network(inputs)  # Keras exports no model to ONNX that was never called
        with _devices.plain():
            network.export(filepath, *args, **kwargs)

    def get_compile_config(self):
        return portable(self._compiled_with or {})

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(neutral(config)))


def in_float32(layer: Any) -> Any:
    """A copy of a Keras layer or operation, without its weights, that computes in float32."""
    config = layer.get_config()
    return type(layer).from_config(config | {"dtype": "float32"} if "dtype" in config else config)


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


def compress(path: pathlib.Path) -> None:
    """Rewrites the `.keras` file at `path`: weights get 16 bits, and those that occur twice stand once."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    buffer, name_of = io.BytesIO(), {}
    with (
        h5py.File(io.BytesIO(parts["model.weights.h5"])) as source,
        h5py.File(buffer, "w", libver=FILE_FORMAT) as target,
    ):

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
