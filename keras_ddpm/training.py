"""Training: turns a batch of clean data into a regression problem for the training step of Keras."""

import contextlib
import copy
import functools
import inspect
import itertools
import types
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import _devices
from keras_ddpm import _replicas
from keras_ddpm import saving
from keras_ddpm.callbacks import Checkpoint
from keras_ddpm.callbacks import EMAWeights
from keras_ddpm.callbacks import LossWatch
from keras_ddpm.callbacks import Turns

# Functions to times in [0, 1]. They get a number u in [0, 1) and an index 0..n − 1 for each of n examples.
TIMESTEP_SAMPLINGS = {
    "uniform": lambda u, index, n: u,
    "batch": lambda u, index, n: ops.broadcast_to(u[:1], ops.shape(u)),
    "stratified": lambda u, index, n: (index / n + u[:1]) % 1.0,  # Kingma et al., 2021, appendix I.1
    "half_at_T": lambda u, index, n: ops.minimum(2 * ((index / n + u[:1]) % 1.0), 1.0),
}

ONE_BY_ONE = "Several arrays at once are several inputs to Keras. Give them one by one: `fit(x_0, labels)`"

# Keras' callbacks that write files. Of several processes, one has them.
WRITERS = (keras.callbacks.CSVLogger, keras.callbacks.ModelCheckpoint, keras.callbacks.TensorBoard)


def _arguments(function, *args, **kwargs):
    """The arguments of a call as a dict by name, without `self`."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    return {**arguments.pop("kwargs", {}), **{name: value for name, value in arguments.items() if name != "self"}}


def _labels_for(x, y=None, weight=None):
    """The labels `y` of arrays. Keras drops weights of examples without labels, so these get some that nobody reads."""
    x_0, _ = _parts(x)
    return np.zeros(len(x_0)) if y is None and weight is not None and hasattr(x_0, "shape") else y


def _parts(x):
    """The x_0 and the noise of a batch `{"x_0": x_0, "noise": noise}`, or x_0 and `None`."""
    if not isinstance(x, dict):
        return x, None
    valid = set(x) == {"x_0", "noise"}
    _checks.require(valid, "A batch that is a dict has the entries 'x_0' and 'noise'", entries=sorted(x))
    return x["x_0"], x["noise"]


def _layers(model):
    """The layers of a model and of the models in it."""
    for layer in model.layers:
        yield from _layers(layer) if isinstance(layer, keras.Model) else [layer]


def _each_loss(loss, zeros):
    """The values of a loss before Keras takes their mean."""
    loss = keras.losses.get(loss)
    return ops.convert_to_tensor((loss.call if isinstance(loss, keras.losses.Loss) else loss)(zeros, zeros))


def _in_tuple(function, *args):
    return (function(*args),)


class NoisyRegression(saving.StoredModel):
    """The part of `DiffusionModel` that trains and evaluates on clean data.

    A subclass must have the attributes `network`, `condition`, `diffusion`, `average`, `loss_weight`,
    `timestep_sampling`, `label_dropout`, `data_shape` and `turn`.
    """

    _checked_validation_data = None
    evaluates_average = False

    @_replicas.in_scope
    def compile(self, *args, **kwargs) -> None:
        """`keras.Model.compile`. `jit_compile="auto"` selects what is fastest for this package on each backend.

        With a network in mixed float16, the optimizer becomes a `LossScaleOptimizer` unless `auto_scale_loss=False`.
        """
        given = self._compiled_with = _arguments(keras.Model.compile, self, *args, **kwargs)
        self._test_functions = {}
        super().compile(**given)
        if given.get("jit_compile", "auto") == "auto" and not self.run_eagerly:
            self.jit_compile = _devices.jit_compile()
        # The policy of the network itself is in no file, but those of its layers are.
        half = any(layer.dtype_policy.name == "mixed_float16" for layer in _layers(self.network))
        scales = given.get("auto_scale_loss", True) and half
        if scales and self.optimizer and not isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        # Build everything here. Otherwise `fit` calls the model on clean data to do it, and TensorFlow traces a step
        # twice if the step creates variables.
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)
            arrange(self.optimizer.variables)
        zeros = ops.zeros((1, *self.data_shape))
        self.compute_loss(y=zeros, y_pred=zeros)
        losses = [loss for loss in keras.tree.flatten(self.loss) if loss is not None]
        self._loss_rank = len(_each_loss(losses[0], zeros).shape) if losses else len(self.data_shape)
        self.compute_metrics(None, zeros, zeros)
        self.reset_metrics()

    @_replicas.in_scope
    def fit(self, *args, **kwargs) -> keras.callbacks.History:
        """`keras.Model.fit` on clean data. It checks the data first.

        Arrays are checked completely. Of other sources, the first batch is checked. Labels in the data are ignored if
        the network takes none. Weights of examples and of classes multiply the loss.

        In place of x_0, the data can hold a dict `{"x_0": x_0, "noise": noise}`, as those of `distillation.pairs` do.
        Then x_0 is mixed with this noise.

        Raises:
            ValueError: if the data do not have the shape of the network's input, lie outside `clip_range`, contain NaN,
                or lack the condition of the network; or if the loss is not finite.
        """
        given = _arguments(keras.Model.fit, self, *args, **kwargs)
        _checks.require(self.compiled, "Call `compile` before `fit`")
        _checks.require(not isinstance(given.get("x"), (list, tuple)), ONE_BY_ONE)
        given["x"], first, weight = self._checked(given.get("x"), given.get("y"))
        given["y"] = _labels_for(given["x"], given.get("y"), given.get("sample_weight"))
        weights = (weight, given.get("sample_weight"), given.get("class_weight"))
        watch = LossWatch(first, weighted=any(entry is not None for entry in weights))
        if len(self.data_shape) == 3 and self.diffusion.clip_range == (-1, 1) and 0 <= first.min() < first.max():
            warnings.warn("The images lie in [0, 1]. Expected [-1, 1]: scale them with 2 * x - 1", stacklevel=2)
        if given.get("validation_data") is not None:
            validation, _, weight = self._checked(given["validation_data"])
            if isinstance(validation, (list, tuple)):
                validation = (validation[0], _labels_for(*validation), weight)
            given["validation_data"] = validation
        if self.condition:
            self.condition = self.condition.named(getattr(given["x"], "class_names", None))
        callbacks = given.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.Callback):
            callbacks = [callbacks]
        checkpoints = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        _checks.require(len(checkpoints) <= 1, "There can be one `Checkpoint`", number=len(checkpoints))
        others = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        # `LossWatch` raises before another callback stores weights that are not finite. `Checkpoint` stores the state
        # before the others end, as they may put other weights into the model.
        turns = Turns(self.turn)
        if not _replicas.is_chief():
            given["verbose"] = 0
        silent = () if _replicas.is_chief() else WRITERS
        writers = [callback for callback in others if not isinstance(callback, silent)]
        given["callbacks"] = [turns, watch, *checkpoints, *writers]
        self._checked_validation_data = given.get("validation_data")
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_checked_validation_data", None)
            stack.enter_context(turns.running())
            data, initial_epoch = given["x"], given.get("initial_epoch", 0)
            own_order = getattr(data, "shuffles_itself", False)  # as that of `datasets.Batches`
            earlier_epochs = data.epoch if own_order and not initial_epoch else 0
            for checkpoint in checkpoints:
                running = checkpoint.running(self, others, initial_epoch, earlier_epochs)
                given["initial_epoch"], earlier_epochs = stack.enter_context(running)
            if own_order:
                given["shuffle"] = False
                tell = lambda epoch, logs: setattr(data, "epoch", earlier_epochs + epoch)  # noqa: E731
                given["callbacks"].append(keras.callbacks.LambdaCallback(on_epoch_begin=tell))
            return super().fit(**given)

    @_replicas.in_scope
    def evaluate(self, *args, **kwargs) -> Any:
        """`keras.Model.evaluate` on clean data as of `fit`, with the same t and noise at each call."""
        given = _arguments(keras.Model.evaluate, self, *args, **kwargs)
        known = self._checked_validation_data  # `fit` has checked it, and a generator can be read only once
        x = given.get("x")
        _checks.require(not isinstance(x, (list, tuple)), ONE_BY_ONE)
        if known is None or x is not (known[0] if isinstance(known, (list, tuple)) else known):
            given["x"], _, _ = self._checked(x, given.get("y"))
        given["y"] = _labels_for(given["x"], given.get("y"), given.get("sample_weight"))
        if not _replicas.is_chief():
            given["verbose"] = 0
        callbacks = given.get("callbacks") or []
        if not isinstance(callbacks, keras.callbacks.CallbackList):  # `fit` gives one
            callbacks = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            given["callbacks"] = callbacks = [Turns(self.turn), *callbacks]
        every = getattr(callbacks, "callbacks", callbacks)
        self.evaluates_average = any(isinstance(callback, EMAWeights) for callback in every)
        self.test_function = self._test_functions.get(self.evaluates_average)  # each is compiled once
        self.test_step = functools.partial(type(self).test_step, self)  # JAX compiles equal methods only once
        self._test_random.state.assign([0, 0])
        try:
            with every[0].running():
                return super().evaluate(**given)
        finally:
            self._test_functions[self.evaluates_average] = self.test_function
            self.evaluates_average = False
            del self.test_step

    def _maybe_symbolic_build(self, *args, **kwargs):
        """Does nothing: `compile` has built everything, and Keras fails here with several processes of TensorFlow."""

    compile.__signature__ = inspect.signature(keras.Model.compile)
    fit.__signature__ = inspect.signature(keras.Model.fit)
    evaluate.__signature__ = inspect.signature(keras.Model.evaluate)

    def train_step(self, *args):
        """Trains on noisy data, then updates the average. The arguments are `data`, on JAX `state` and `data`."""
        if len(args) == 1:
            data = self._corrupt(*args, self._fit_random, self.label_dropout)
            before = ops.copy(self.optimizer.iterations)
            logs = super().train_step(data)
            self.average.update(before, self.optimizer.iterations, _replicas.mean(logs["loss"]))
            return _replicas.joined(logs)
        state, data = args
        weights = self.trainable_variables, self.non_trainable_variables
        variables = (*weights, self.optimizer.variables, self.metrics_variables)
        with _Stateless(variables, state) as scope:
            data = self._corrupt(data, self._fit_random, self.label_dropout)
            before = ops.copy(self.optimizer.iterations)
        logs, state = super().train_step(scope.state(), data)
        with _Stateless(variables, state) as scope:
            self.average.update(before, self.optimizer.iterations, logs["loss"])
        return logs, scope.state()

    def test_step(self, *args):
        """Evaluates on noisy data. The arguments are `data`, on JAX `state` and `data`."""
        if len(args) == 1:
            return _replicas.joined(super().test_step(self._corrupt(*args, self._test_random)))
        state, data = args
        variables = (self.trainable_variables, self.non_trainable_variables, self.metrics_variables)
        with _Stateless(variables, state) as scope:
            data = self._corrupt(data, self._test_random)
        return super().test_step(scope.state(), data)

    def _corrupt(self, data, generator, label_dropout=0.0):
        """Turns clean data into Keras' `(x, y, sample_weight)`: inputs and target of the network, and loss weights."""
        x_0, condition, given_weight = keras.utils.unpack_x_y_sample_weight(data)
        x_0, noise = _parts(x_0)
        x_0 = self._poisoned(ops.cast(x_0, "float32"), condition)
        shape = ops.shape(x_0)
        t = self._draw_timesteps(shape[0], generator)
        noise = self.draw_noise(x_0, generator) if noise is None else ops.cast(noise, "float32")
        inputs = (self.diffusion.q_sample(x_0, t, noise), t)
        if self.condition:
            kept = keras.random.uniform((shape[0],), seed=generator) >= label_dropout
            inputs = (*inputs, self.condition.drop(condition, kept))
        weight = self.weight_of(t)
        if given_weight is not None:  # of `fit`, or of examples that fill up a batch
            given_weight = self._aligned(ops.cast(given_weight, "float32"))
            weight = given_weight if weight is None else weight * given_weight
        return inputs, self.diffusion.target(x_0, t, noise), weight

    def draw_noise(self, x_0, generator):
        """Draws the noise that is mixed with `x_0`. A subclass may choose it to suit the data."""
        return keras.random.normal(ops.shape(x_0), seed=generator)

    def _poisoned(self, x_0, condition):
        """Replaces data that `_checked` would refuse by NaN, as a compiled step cannot raise an error.

        `fit` checks only the first batch of a stream. `LossWatch` raises an error if the loss is NaN.
        """
        valid = True
        if self.diffusion.clip_range is not None:
            low, high = self.diffusion.clip_range
            valid = ops.logical_and(x_0 >= low - _checks.ROUNDING, x_0 <= high + _checks.ROUNDING)
        if self.condition and self.condition.num_classes:
            known = ops.logical_and(condition >= 0, condition < self.condition.num_classes)
            valid = ops.logical_and(valid, ops.reshape(known, (-1,) + (1,) * len(self.data_shape)))
        return x_0 if valid is True else ops.where(valid, x_0, np.nan)

    def _draw_timesteps(self, batch_size, generator):
        """Draws t in 1..T, `(batch,)`."""
        u = keras.random.uniform((batch_size,), seed=generator)
        index, number = ops.cast(ops.arange(batch_size), "float32"), ops.cast(batch_size, "float32")
        steps = self.diffusion.timesteps
        time = TIMESTEP_SAMPLINGS[self.timestep_sampling](u, index, number)
        return ops.minimum(1 + ops.cast(time * steps, "int32"), steps)  # in float32, time may be rounded to 1

    def weight_of(self, t: Any) -> Any:
        """The loss weights at times t, `(batch, 1, ...)`, with the rank of the loss; `None` if all are 1."""
        if self.loss_weight is None:
            return None
        return self._aligned(ops.take(ops.convert_to_tensor(self.loss_weight, "float32"), t))

    def _aligned(self, weight):
        """Weights `(batch,)` with the rank of the loss, since Keras multiplies both from their last axis on."""
        _checks.require(self._loss_rank, "A loss that is one number for the batch has no weights", loss=self.loss)
        return ops.reshape(weight, (-1,) + (1,) * (self._loss_rank - 1))

    def _checked(self, data, labels=None):
        """Checks data. Returns them, and the x_0 that were checked with their weights or `None`.

        A generator gets its first batch back.
        """
        if isinstance(data, types.GeneratorType):
            first = next(data, None)
            batches = itertools.chain([first], data)
            # Keras needs tuples.
            data = (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in batches)
        elif data is None:
            first = None
        elif isinstance(data, keras.utils.PyDataset):
            first = data[0]
        elif isinstance(data, (list, tuple, dict)) or hasattr(data, "shape"):
            first = data if labels is None else (data, labels)
        else:
            first = next(iter(data), None)
            if hasattr(data, "collate_fn") and (hasattr(first, "shape") or isinstance(first, dict)):
                # Keras takes a tensor or dict of PyTorch's `DataLoader` apart on other backends.
                data = copy.copy(data)
                data.collate_fn = functools.partial(_in_tuple, data.collate_fn)
        _checks.require(first is not None, "The data hold no batch", data=data)
        x_0, condition, weight = keras.utils.unpack_x_y_sample_weight(first)
        process = getattr(data, "diffusion", None)  # of `distillation.Pairs`
        fits = process is None or process.schedule.is_close(self.diffusion.schedule)
        _checks.require(fits, "These are pairs of another schedule than that of the model", diffusion=process)
        x_0, noise = _parts(x_0)
        x_0 = _checks.data(ops.convert_to_numpy(x_0), self.data_shape, self.diffusion.clip_range)
        if noise is not None:
            noise = _checks.data(ops.convert_to_numpy(noise), self.data_shape, name="noise")
            _checks.require(len(noise) == len(x_0), f"Expected noise of {len(x_0)} examples", shape=noise.shape)
        if self.condition:
            _checks.require(
                condition is not None,
                "The network has a condition: call `fit(x_0, labels)`, or give `(x_0, label)` batches",
            )
            whole = getattr(data, "shuffles_itself", False)  # `datasets.Batches` has the labels of all batches
            condition = data.labels if whole else ops.convert_to_numpy(condition)
            _checks.require(condition.dtype.kind in "biuf", "Labels in data are integers", labels=condition[:3])
            self.condition.array(condition, len(condition))
        return data, x_0, weight


class _Stateless(keras.StatelessScope):
    """A scope in which variables have the values of a JAX state. Both come in lists of lists."""

    def __init__(self, variables, values):
        super().__init__(zip(itertools.chain(*variables), itertools.chain(*values)))
        self.variables = variables

    def state(self):
        return tuple([self.get_current_value(v) for v in group] for group in self.variables)


@_devices.fast_on_torch
def arrange(variables: list) -> None:
    """Arranges variables in memory as the backend reads them fastest. Only PyTorch needs it."""


def checked_weight(loss_weight: Any, timesteps: int) -> np.ndarray | None:
    """The weights as a float64 array `(T + 1,)`; `None` stays `None`.

    Raises:
        ValueError: if the weights have another shape, or one is not positive at some t in 1..T.
    """
    if loss_weight is None:
        return None
    needed = f"`loss_weight` must be an array of {timesteps + 1} numbers, for t = 0..{timesteps}"
    try:
        weight = np.asarray(loss_weight, "float64")
    except (TypeError, ValueError):
        weight = np.empty(0)
    _checks.require(weight.shape == (timesteps + 1,), needed, loss_weight=loss_weight)
    wrong = np.flatnonzero(~((weight[1:] > 0) & np.isfinite(weight[1:]))) + 1
    message = f"`loss_weight` must be positive at t = 1..{timesteps}, or the network is never trained there"
    _checks.require(not wrong.size, message, **{f"loss_weight[{t}]": float(weight[t]) for t in wrong[-1:]})
    return weight
