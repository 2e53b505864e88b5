"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import contextlib
import hashlib
import json
import pathlib
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks, _files
from keras_ddpm._backend import devices, replicas

__all__ = ["Checkpoint", "variables_of"]


class Checkpoint(keras.callbacks.Callback):
    """Writes checkpoints during `DiffusionModel.fit`, and lets `fit` go on from the newest one in the folder.

    >>> model.fit(data, epochs=100, callbacks=[Checkpoint("runs/checkpoints")])

    The same call starts a run and resumes it. A checkpoint holds the weights, the average, the optimizer, all random
    seeds, the epoch, the batch, the metrics so far, the history, and what has changed in the attributes of the other
    callbacks. With data whose order depends on the epoch alone, such as `datasets.Batches`, a run that was interrupted
    ends with the same bits as one that was not, also on another machine with the same software. The batches of the
    epoch that were seen before are read again, without training on them.

    A learning rate that is a number is part of the state, so a changed one has no effect. A changed schedule has.

    A file is written under another name, synchronized with the disk and renamed, so that a kill leaves no partial one.
    Damaged files are set aside with a warning. A checkpoint with NaN or infinite values is not written.

    Ctrl-C and SIGTERM end the run with a checkpoint before the next batch; a second one ends it at once. The run then
    raises `KeyboardInterrupt` or `SystemExit`. Their handlers are left alone if they are not Python's own, and if there
    are several processes. These would stop at different steps and wait for each other, so a signal ends them at once,
    and the run goes on from the last checkpoint.

    Args:
        folder: folder of the checkpoints, created if it does not exist.
        every: seconds from one checkpoint to the next. The end of `fit` writes one, too.
        keep: number of checkpoints to keep.

    Raises:
        ValueError: if an argument is out of range, or before training if the newest checkpoint is of another model.
    """

    def __init__(self, folder: str | pathlib.Path, every: float = 600.0, keep: int = 3):
        super().__init__()
        _checks.require(_checks.is_between(every, 0, np.inf), "`every` must be 0 seconds or more", every=every)
        _checks.counts(keep=keep)
        self.folder = pathlib.Path(folder)
        self.every = every
        self.keep = keep
        self._pending = None

    @contextlib.contextmanager
    def running(
        self, model: keras.Model, callbacks: list, initial_epoch: int = 0, earlier_epochs: int = 0
    ) -> Iterator[tuple[int, int]]:
        """A context in which `fit` runs. It yields the last two arguments. `DiffusionModel.fit` calls it.

        Args:
            model: the compiled model.
            callbacks: the other callbacks, whose changes belong to a checkpoint.
            initial_epoch: the first epoch if there is no checkpoint.
            earlier_epochs: epochs of the data in earlier calls of `fit`, if there is no checkpoint.
        """
        self._callbacks = callbacks
        self._unchanged = [_attributes(callback, {}) for callback in callbacks]
        self._signal = self._train_function = self._epoch = self._history = None
        self._logs = {}
        self._time = time.monotonic()
        self._pending = self._newest(model)
        if self._pending:
            initial_epoch, earlier_epochs = self._pending["position"][0], self._pending["earlier_epochs"]
            for callback in callbacks:
                if isinstance(callback, keras.callbacks.CSVLogger) and replicas.is_chief():
                    _rewind(callback, initial_epoch)
        self._earlier_epochs = earlier_epochs
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is not threading.main_thread() or replicas.several():
            handlers = {}
        self._handlers = {number: own for number, own in handlers.items() if signal.getsignal(number) == own}
        for number in self._handlers:
            signal.signal(number, self._on_signal)
        try:
            yield initial_epoch, earlier_epochs
        finally:
            self._restore_handlers()
            self._pending = None
            self._stop_skipping(model)

    def on_train_begin(self, logs=None):
        if self._pending and self._pending["position"][1]:
            self._train_function, self.model.train_function = self.model.train_function, self._skip

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        if self._pending and self._pending["ended"]:
            self._restore()
            self.model.reset_metrics()  # as Keras does before this call
        self._restore_history()

    def on_train_batch_begin(self, batch, logs=None):
        position = [self._epoch, batch]
        if self._pending:
            if position >= self._pending["position"]:
                self._restore()
                self._restore_history()
        elif self._signal or time.monotonic() - self._time >= self.every:
            self._save(position)

    def on_train_batch_end(self, batch, logs=None):
        self._logs = logs or {}

    def on_train_end(self, logs=None):
        if self._epoch is None:  # no epoch was left
            if self._pending:
                if replicas.is_chief():
                    print(f"{self.folder} holds a finished run, so nothing was trained. Give more epochs to go on.")
                self._restore()
            self._restore_history()
        else:
            self._save([self._epoch + 1, 0], ended=True)

    def _save(self, position, ended=False):
        """Writes a checkpoint of the state before the batch at `position`. Ends the run if there was a signal.

        At the end of `fit`, the state is that before the other callbacks end, and before a next epoch begins. Of
        several processes, the first one writes, and all read.
        """
        self._time = time.monotonic()
        values = [replicas.value_of(v) for v in variables_of(self.model)]
        said = self._written(position, ended, values) or "The first process writes the checkpoints."
        if self._signal:
            print(f"\nStopped by {signal.Signals(self._signal).name}. {said}", file=sys.stderr)
            raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

    @replicas.by_chief
    def _written(self, position, ended, values):
        """Writes a checkpoint, and returns what there is to say about it."""
        floats = [value for value in values if keras.backend.is_float_dtype(value.dtype.name)]
        arrays: dict = {}
        changed = []
        for callback, unchanged in zip(self._callbacks, self._unchanged):
            found: dict = {}
            attributes = _attributes(callback, found)
            changed.append({name: value for name, value in attributes.items() if unchanged.get(name) != value})
            arrays |= found if changed[-1] else {}
        history = self.model.history
        state = {
            "position": position,
            "earlier_epochs": self._earlier_epochs,
            "ended": ended,
            "variables": _encode(values, arrays),
            "callbacks": changed,
            "history": _encode([history.epoch, history.history], arrays),
            "logs": {name: float(value) for name, value in self._logs.items()},
            "random": _encode([random.getstate(), np.random.get_state(), devices.random_state()], arrays),  # noqa: NPY002
        }
        path = self.folder / f"{position[0]:06}-{position[1]:08}.npz"
        try:
            _checks.require(all(np.all(np.isfinite(value)) for value in floats), "Values are NaN or infinite")
            _write(path, state, arrays)
            for old in self._paths()[: -self.keep]:
                old.unlink()
            return f"`fit` with the same checkpoint folder goes on from {path}."
        except (OSError, ValueError) as error:
            said = f"No checkpoint was written. {str(error).rstrip('.')}. The ones before it are in {self.folder}."
            warnings.warn(said, stacklevel=3)
            return said

    def _restore(self):
        """Puts the pending checkpoint into the model and the callbacks."""
        state, self._pending = self._pending, None
        self._stop_skipping(self.model)
        for v, value in zip(variables_of(self.model), state["variables"]):
            v.assign(value.view(ops.convert_to_numpy(v).dtype) if value.dtype.kind == "V" else value)
        for callback, attributes in zip(self._callbacks, state["callbacks"]):
            for name, value in attributes.items():
                setattr(callback, name, value)
        self._history = state["history"]
        self._logs = state["logs"]
        of_python, of_numpy, of_backend = state["random"]
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        devices.set_random_state(of_backend)

    def _restore_history(self):
        """Keras clears the history when training begins, after this callback."""
        if self._history:
            self.model.history.epoch, self.model.history.history = self._history
            self._history = None

    def _newest(self, model):
        """The state of the newest checkpoint that is whole, or `None`."""
        if replicas.is_chief():
            for temporary in self.folder.glob("*.npz.tmp"):  # of a run that was killed
                temporary.unlink(missing_ok=True)
        for path in reversed(self._paths()):
            try:
                state = _read(path)
            except ValueError as error:
                warnings.warn(f"{error}. It is set aside, and the one before it is taken.", stacklevel=2)
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".damaged"))
                continue
            expected = [tuple(v.shape) for v in variables_of(model)]
            fits = [value.shape for value in state["variables"]] == expected
            names = len(state["callbacks"]) == len(self._callbacks)
            _checks.require(fits, f"{path} is a checkpoint of another model or optimizer")
            _checks.require(names, f"{path} was written with other callbacks", number=len(self._callbacks))
            return state
        return None

    def _paths(self):
        return sorted(path for path in self.folder.glob("*.npz") if re.fullmatch(r"\d{6}-\d{8}", path.stem))

    def _skip(self, *args):
        """Takes the place of Keras' `train_function`: reads the data, and changes nothing."""
        *state, data = args
        if hasattr(data, "__next__"):  # on PyTorch the data themselves
            for _ in range(self.model.steps_per_execution):
                next(data)
        return (dict(self._pending["logs"]), *state) if state else dict(self._pending["logs"])

    def _stop_skipping(self, model):
        if self._train_function is not None:
            model.train_function, self._train_function = self._train_function, None

    def _on_signal(self, number, frame):
        self._signal = number
        self._restore_handlers()

    def _restore_handlers(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def variables_of(model: keras.Model) -> list:
    """All variables that training changes: of the `model`, its optimizer and its metrics."""
    return [*model.variables, *getattr(model.optimizer, "variables", []), *model.metrics_variables]


def _rewind(logger, epoch):
    """Removes the rows of the epochs that will be run again, and lets the logger append to the others."""
    logger.append = True
    path = pathlib.Path(logger.filename)
    if path.exists():
        header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
        kept = [row for row in rows if int(b"0" + row.split(logger.sep.encode())[0]) < epoch]
        path.write_bytes(header + b"".join(kept))


# Files. A checkpoint is an .npz file. The name of an array is its checksum; the state refers to arrays by these names.


def _attributes(callback, arrays):
    """The attributes that can be stored, encoded."""
    encoded = {}
    for name, value in vars(callback).items():
        with contextlib.suppress(TypeError):
            if name not in ("params", "_model"):  # which Keras sets
                encoded[name] = _encode(value, arrays)
    return encoded


def _encode(value, arrays):
    """Turns a value into one that JSON can store. Arrays are added to `arrays`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value, order="C")
        name = _checksum(array)
        arrays[name] = array
        return {"array": name}
    if isinstance(value, list):
        return [_encode(entry, arrays) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(entry, arrays) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, arrays), _encode(entry, arrays)] for key, entry in value.items()]}
    raise TypeError


def _decode(value, arrays):
    if isinstance(value, list):
        return [_decode(entry, arrays) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "array":
        return arrays[content][()]
    if kind == "tuple":
        return tuple(_decode(content, arrays))
    return {_decode(key, arrays): _decode(entry, arrays) for key, entry in content}


def _checksum(array):
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def _write(path, state, arrays):
    text = np.frombuffer(json.dumps(state).encode(), "uint8")
    arrays["state-" + _checksum(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    with _files.replacing(path, path.with_suffix(".npz.tmp")) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _read(path):
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        _checks.require(all(_checksum(array) == name.removeprefix("state-") for name, array in arrays.items()), "")
        (text,) = [array.tobytes() for name, array in arrays.items() if name.startswith("state-")]
        state = json.loads(text)
        state["callbacks"] = [
            {name: _decode(value, arrays) for name, value in attributes.items()} for attributes in state["callbacks"]
        ]
        return state | {name: _decode(state[name], arrays) for name in ("variables", "history", "random")}
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"The checkpoint {path} is damaged ({type(error).__name__})") from error
