"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import contextlib
import functools
import json
import pathlib
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks, _files
from keras_ddpm._backend import devices, replicas

__all__ = ["Checkpoint", "variables_of"]

# What Keras' callbacks know of the steps before. `min_delta` is left out, as Keras turns its sign at the first use.
# Keras may rename the private ones. Then these begin anew.
STATE_OF_KERAS = (
    *("best", "best_epoch", "best_weights", "wait", "stopped_epoch", "cooldown_counter", "keys"),
    *("_batches_seen_since_last_saving", "_last_batch_seen", "_global_train_batch", "_global_test_batch"),
    "_ema_weights_in_model",
)


class Checkpoint(keras.callbacks.Callback):
    """Writes checkpoints during `DiffusionModel.fit`, and lets `fit` go on from the newest one in the folder.

    >>> model.fit(data, epochs=100, callbacks=[Checkpoint("runs/checkpoints")])

    The same call starts a run and resumes it. A checkpoint holds the weights, the average, the optimizer, all random
    seeds, the epoch, the batch, the metrics so far, the history, and the state of the other callbacks. With data whose
    order depends on the epoch alone, such as `datasets.Batches`, a run that was interrupted ends with the same bits as
    one that was not, also on another machine with the same software. The batches of the epoch that were seen before are
    read again, without training on them. A run that `EarlyStopping` ended is finished, until its patience is raised.

    The state of Keras' callbacks is restored. Other callbacks opt in with two methods. `get_state()` returns a dict, in
    which JSON and arrays may stand. `set_state(state)` gets it back after `on_train_begin`, once or twice. A warning
    names callbacks that begin anew.

    A learning rate that is a number is part of the state, so a changed one has no effect. A changed schedule has.

    A file is written under another name, synchronized with the disk and renamed, so that a kill leaves no partial file.
    Damaged files are set aside with a warning. A checkpoint with NaN or infinite values is not written.

    Ctrl-C and SIGTERM end the run with a checkpoint before the next batch; a second one ends it at once. The run then
    raises `KeyboardInterrupt` or `SystemExit`. Custom signal handlers are kept. With several processes no handler is
    installed, as the processes would stop at different steps and wait for each other. A signal then ends them at once,
    and the run goes on from the last checkpoint.

    Args:
        folder: folder of the checkpoints, created if it does not exist.
        every: seconds from one checkpoint to the next. The end of `fit` writes one, too.
        keep: number of checkpoints to keep.

    Raises:
        ValueError: if an argument is out of range, or before training if the newest checkpoint is of another model,
            another run uses the folder, or there is a `keras.callbacks.BackupAndRestore`, too.
    """

    def __init__(self, folder: str | pathlib.Path, every: float = 600.0, keep: int = 3):
        super().__init__()
        _checks.require(_checks.is_between(every, 0, np.inf), "`every` must be 0 seconds or more", every=every)
        _checks.counts(keep=keep)
        self.folder = pathlib.Path(folder)
        self.every = every
        self.keep = keep

    @contextlib.contextmanager
    def running(self, model: keras.Model, callbacks: list, begin: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """A context in which `fit` runs. It yields where the run begins. `DiffusionModel.fit` calls it.

        Args:
            model: the compiled model.
            callbacks: the other callbacks, whose state belongs to a checkpoint.
            begin: the first epoch and the epochs of the data in earlier calls of `fit`, if there is no checkpoint.
        """
        rival = any(isinstance(callback, keras.callbacks.BackupAndRestore) for callback in callbacks)
        _checks.require(not rival, "Give `Checkpoint` or `BackupAndRestore`, as each sets the first epoch")
        self._callbacks = _named(callbacks)
        self._position: Any = None  # of the next batch: epoch and number
        self._signal, self._stopped = None, False
        self._time = time.monotonic()
        alone = threading.current_thread() is threading.main_thread() and not replicas.several()
        handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL} if alone else {}
        lock = _files.locked(self.folder) if replicas.is_chief() else contextlib.nullcontext()
        with lock, contextlib.ExitStack() as self._skipping, contextlib.ExitStack() as self._handlers:
            self._pending = self._newest(model)
            begin = self._resumed() if self._pending else begin
            self._earlier_epochs = begin[1]
            for number, own in handlers.items():
                if signal.getsignal(number) == own:
                    self._handlers.callback(signal.signal, number, own)
                    signal.signal(number, self._on_signal)
            yield begin

    def _resumed(self):
        """The first epoch, and how many epochs the data had before it. Says which callbacks begin anew."""
        states, (epoch, _) = self._pending["callbacks"], self._pending["position"]
        anew = [name for name, c in self._callbacks.items() if name not in states and _state_of(c) != {}]
        if anew:
            warnings.warn(f"{self.folder} holds no state of these callbacks, which begin anew: {anew}", stacklevel=4)
        for name, callback in self._callbacks.items():
            if isinstance(callback, keras.callbacks.CSVLogger) and replicas.is_chief():
                _rewind(callback, epoch)
            state = states.get(name, {})
            if isinstance(callback, keras.callbacks.EarlyStopping) and state.get("stopped_epoch"):
                epoch = sys.maxsize if state["wait"] >= callback.patience else epoch
        return epoch, self._pending["earlier_epochs"]

    def on_epoch_begin(self, epoch, logs=None):
        """Restores the state before the batches that are skipped, as the data may no longer have any after them."""
        first, self._position = self._position is None, [epoch, 0]
        if not (self._pending and first):
            self._go_on()  # if it is pending, the data had fewer batches than before
            return
        self._restore()
        if self._pending["ended"]:
            self._go_on()
            self.model.reset_metrics()  # as Keras does before this call
        elif train := getattr(self.model, "train_function", None):  # otherwise Keras trains until it is restored again
            logs = {name: ops.convert_to_numpy(value) for name, value in self.model.get_metrics_result().items()}
            self._skipping.callback(setattr, self.model, "train_function", train)
            self.model.train_function = functools.partial(_skip, self.model.steps_per_execution, logs)

    def on_train_batch_begin(self, batch, logs=None):
        self._position[1] = batch
        if self._pending:
            if self._position >= self._pending["position"]:
                self._restore()
                self._go_on()
        elif self._signal or time.monotonic() - self._time >= self.every:
            self._save()

    def on_train_batch_end(self, batch, logs=None):
        self._position[1] = batch + 1

    def on_epoch_end(self, epoch, logs=None):
        """Leaves the rest of the epoch to the next call of `fit` if a callback has stopped the run after a batch."""
        if self.model.stop_training and not self._stopped:
            self._stopped = True
            if not self._pending:
                self._save()

    def on_test_begin(self, logs=None):
        self.on_epoch_end(None)  # before validation resets the metrics

    def on_train_end(self, logs=None):
        if self._position is None:  # no epoch was left
            if self._pending:
                if replicas.is_chief():
                    print(f"{self.folder} holds a finished run, so nothing was trained. Give more epochs to go on.")
                self._restore()
        elif not self._stopped:
            self._position = [self._position[0] + 1, 0]
            self._save(ended=True)

    def _save(self, ended=False):
        """Writes a checkpoint of the state before the batch at the position. Ends the run if there was a signal.

        At the end of `fit`, the state is that before the other callbacks end, and before a next epoch begins. Of
        several processes, the first one writes, and all read.
        """
        self._time = time.monotonic()
        said = self._written(ended, [replicas.value_of(v) for v in variables_of(self.model)])
        if self._signal:
            print(f"\nStopped by {signal.Signals(self._signal).name}. {said}", file=sys.stderr)
            raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

    @replicas.by_chief
    def _written(self, ended, values):
        """Writes a checkpoint, and returns what there is to say about it."""
        states = {}
        for name, callback in self._callbacks.items():
            if (state := _state_of(callback)) is not None:
                with contextlib.suppress(AttributeError, TypeError, ValueError):  # `fit` says so when it goes on
                    json.dumps(state, default=_dtype)
                    states[name] = state
        state = {
            "position": self._position,
            "earlier_epochs": self._earlier_epochs,
            "ended": ended,
            "variables": values,
            "callbacks": states,
            "history": [self.model.history.epoch, self.model.history.history],
            "random": [random.getstate(), np.random.get_state(), devices.random_state()],  # noqa: NPY002
        }
        path = self.folder / "{:06}-{:08}.npz".format(*self._position)
        try:
            _checks.require(all(np.all(np.isfinite(value)) for value in values), "Values are NaN or infinite")
            _write(path, state)
            for old in self._paths()[: -self.keep]:
                old.unlink()
            return f"`fit` with the same checkpoint folder goes on from {path}."
        except (OSError, ValueError) as error:
            said = f"No checkpoint was written. {str(error).rstrip('.')}. The ones before it are in {self.folder}."
            warnings.warn(said, stacklevel=3)
            return said

    def _restore(self):
        """Puts the pending checkpoint into the model and the callbacks."""
        state = self._pending
        for v, value in zip(variables_of(self.model), state["variables"]):
            v.assign(value)
        for name, found in state["callbacks"].items():
            callback = self._callbacks.get(name)
            if hasattr(callback, "set_state"):
                callback.set_state(found)
            elif callback:  # no other attributes, as the file may be of a stranger
                vars(callback).update({key: found[key] for key in STATE_OF_KERAS if key in found})
        self.model.history.epoch, self.model.history.history = state["history"]
        (version, numbers, gauss), of_numpy, of_backend = state["random"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(of_numpy)  # noqa: NPY002
        devices.set_random_state(of_backend)

    def _newest(self, model):
        """The state of the newest checkpoint that is whole, or `None`."""
        for path in reversed(self._paths()):
            try:
                state = _read(path)
            except ValueError as error:
                warnings.warn(f"{error}. It is set aside, and the one before it is taken.", stacklevel=2)
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".damaged"))
                continue
            fits = list(map(np.shape, state["variables"])) == [tuple(v.shape) for v in variables_of(model)]
            _checks.require(fits, f"{path} is a checkpoint of another model or optimizer, or of another version")
            return state
        return None

    def _paths(self):
        return sorted(self.folder.glob(f"{'[0-9]' * 6}-{'[0-9]' * 8}.npz"))

    def _go_on(self):
        """Ends the skipping of batches."""
        self._pending = None
        self._skipping.close()

    def _on_signal(self, number, frame):
        self._signal = number
        self._handlers.close()


def variables_of(model: keras.Model) -> list:
    """All variables that training changes: of the `model`, its optimizer and its metrics."""
    return [*model.variables, *getattr(model.optimizer, "variables", []), *model.metrics_variables]


def _skip(num_steps, logs, *args):
    """Takes the place of Keras' `train_function`: reads the data, and changes nothing."""
    *state, data = args
    if hasattr(data, "__next__"):  # on PyTorch the data themselves
        for _ in range(num_steps):
            next(data)
    return (dict(logs), *state) if state else dict(logs)


def _rewind(logger, epoch):
    """Removes the rows of the epochs that will be run again, and lets the logger append to the others."""
    logger.append = True
    path = pathlib.Path(logger.filename)
    if path.exists():
        header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
        kept = [row for row in rows if int(b"0" + row.split(logger.sep.encode())[0]) < epoch]
        path.write_bytes(header + b"".join(kept))


# States of callbacks. They have a name that stays when callbacks change places.


def _named(callbacks):
    """The callbacks by the name of their class and their number among those of this class."""
    names = [type(callback).__name__ for callback in callbacks]
    return {f"{name} {names[:i].count(name)}": callback for i, (name, callback) in enumerate(zip(names, callbacks))}


def _state_of(callback):
    """The state of a callback, or `None` if it has attributes and does not say which are its state."""
    if hasattr(callback, "get_state"):
        return callback.get_state()
    attributes, base = vars(callback), keras.callbacks.Callback
    known = any(kind.__module__.startswith(("keras.", "keras_ddpm.")) for kind in set(type(callback).__mro__) - {base})
    if known or attributes.keys() <= vars(base()).keys():
        return {name: attributes[name] for name in STATE_OF_KERAS if name in attributes}
    return None


# Files. A checkpoint is an .npz file. In the state, a dict refers to an array by the array's name in the file.

ARRAY = "array of this checksum and dtype"  # older files name arrays by their checksum


def _dtype(array):
    """The name of the dtype, if it is one of Keras. Objects and parts with names are none."""
    return keras.backend.standardize_dtype(array.dtype.name)


def _write(path, state):
    arrays = []

    def store(value):
        array = np.asarray(value, order="C")
        # Files lack bfloat16.
        arrays.append(array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array)
        return {ARRAY: [f"arr_{len(arrays) - 1}", _dtype(value)]}

    text = np.frombuffer(json.dumps(state, default=store).encode(), "uint8")
    with _files.replacing(path, path.with_name("unfinished.npz")) as temporary:
        np.savez(temporary, *arrays, state=text)


def _read(path):
    def fetch(entry):
        if ARRAY not in entry:
            return entry
        name, dtype = entry[ARRAY]
        return arrays[name].view(keras.backend.standardize_dtype(dtype))[()]

    try:
        arrays = _files.arrays(path, ratio=1, floor=0)
        (text,) = [array.tobytes() for name, array in arrays.items() if name.startswith("state")]
        return json.loads(text, object_hook=fetch)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"The checkpoint {path} is damaged ({type(error).__name__})") from error
