"""Running: the callbacks of a run and their order, several processes, and turns with other threads."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_ddpm import _checks
from keras_ddpm._backend import replicas
from keras_ddpm.callbacks.checkpoint import Checkpoint, variables_of
from keras_ddpm.training import feed

__all__ = ["evaluating", "training"]

# Keras' callbacks that write files. With several processes, the first one runs them.
WRITERS = (keras.callbacks.CSVLogger, keras.callbacks.ModelCheckpoint, keras.callbacks.TensorBoard)


@contextlib.contextmanager
def training(model: Any, watch: keras.callbacks.Callback, given: dict) -> Iterator[dict]:
    """A context in which Keras trains a model. It yields the arguments of `keras.Model.fit`.

    The watch comes first: it raises before another callback stores weights that are not finite. `Checkpoint` stores the
    state before the other callbacks end, as they may put other weights into the model.

    Args:
        model: the compiled model, with a lock `turn`.
        watch: callback that looks at the loss of each step.
        given: arguments of `keras.Model.fit`.
    """
    callbacks = _listed(given.get("callbacks"))
    checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
    _checks.require(len(checkpoints) <= 1, "There can be one `Checkpoint`", number=len(checkpoints))
    others = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    given = given | ({} if replicas.is_chief() else {"verbose": 0})
    writers = [callback for callback in others if replicas.is_chief() or not isinstance(callback, WRITERS)]
    turns = Turns(model.turn)
    given["callbacks"] = [turns, watch, *checkpoints, *writers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(turns.running())
        data, initial_epoch = given["x"], given.get("initial_epoch", 0)
        earlier_epochs = data.epoch if feed.orders_itself(data) and not initial_epoch else 0
        for checkpoint in checkpoints:
            running = checkpoint.running(model, others, (initial_epoch, earlier_epochs))
            given["initial_epoch"], earlier_epochs = stack.enter_context(running)
        if feed.orders_itself(data):
            given["shuffle"] = False

            def count(epoch, logs=None):
                data.epoch = earlier_epochs + epoch

            given["callbacks"].append(keras.callbacks.LambdaCallback(on_epoch_begin=count))
        yield given


@contextlib.contextmanager
def evaluating(model: Any, given: dict) -> Iterator[dict]:
    """A context in which Keras evaluates a model. It yields the arguments of `keras.Model.evaluate`."""
    turns = Turns(model.turn)
    given = given | ({} if replicas.is_chief() else {"verbose": 0})
    with turns.running():
        yield given | {"callbacks": [turns, *_listed(given.get("callbacks"))]}


def _listed(callbacks):
    """The callbacks as a list. Keras takes one, a list, a `CallbackList`, lists of these, or `None`."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    if isinstance(callbacks, (list, tuple, type(None))):
        return [callback for entry in callbacks or () for callback in _listed(entry)]
    valid = isinstance(callbacks, keras.callbacks.Callback)
    _checks.require(valid, "`callbacks` must be a list of callbacks", callbacks=callbacks)
    return [callbacks]


class Turns(keras.callbacks.Callback):
    """Holds a lock during each step of training and evaluation, so other threads sample between two steps.

    Args:
        lock: the lock that `DiffusionModel.run` takes, too.
    """

    def __init__(self, lock: Any):
        super().__init__()
        self.lock = lock
        self.held = False
        self._values: list = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context in which Keras trains or evaluates. If a step fails, the model has its values again.

        On JAX, Keras takes the values out of the variables before the first step of an epoch, and keeps them elsewhere
        until its end.
        """
        try:
            yield
        except BaseException:
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # the values after the last step
            for v, value in self._values:
                if not value.is_deleted():  # by a step that failed while it was computed
                    v.assign(value)
            raise
        finally:
            self._end()

    def _begin(self, batch, logs=None):
        if not self.held:
            self.held = self.lock.acquire()
        if batch == 0 and hasattr(self.model, "jax_state_sync"):
            self._values = [(v, v.value) for v in variables_of(self.model)]

    def _end(self, batch=None, logs=None):
        self._values = []
        if self.held:
            self.held = False
            self.lock.release()

    on_train_batch_begin = on_test_batch_begin = _begin
    on_train_batch_end = on_test_batch_end = _end
