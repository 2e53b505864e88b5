"""The model: a network and a process, trained with `fit` and sampled with `sample`."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks
from keras_ddpm import _replicas
from keras_ddpm import guidance
from keras_ddpm import samplers
from keras_ddpm import sampling
from keras_ddpm import training
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.ema import Average


@keras.saving.register_keras_serializable(package="keras_ddpm")
class DiffusionModel(training.NoisyRegression):
    """A denoising diffusion probabilistic model.

    `fit` and `evaluate` take batches of clean data x_0, `(batch, ...)`, or tuples `(x_0, label)`. A network without a
    condition ignores the label. Sample weights and class weights multiply the loss. Each step draws t and noise and
    passes the regression problem (x_t, t) -> target to the training step of Keras. `compile` thus takes any loss,
    metric and optimizer of Keras. `evaluate` draws the same t and noise at each call.

    The model keeps an exponential moving average of the network's weights (`ema.Average`). `sample` uses the average.
    `save` stores the weights and the average. The attribute `condition` is the network's `guidance.Condition`, or
    `None`.

    Example:

    >>> model = DiffusionModel(networks.unet((64, 64, 3)))
    >>> model.compile(loss="mse", optimizer="adam")
    >>> model.fit(images, epochs=10)  # images: (num, 64, 64, 3) in [-1, 1]
    >>> samples = model.sample(16, seed=0)

    Args:
        network: a functional `keras.Model` from `[x_t, t]` or `[x_t, t, condition]` to a tensor shaped like `x_t`;
            see `networks`.
        diffusion: a `GaussianDiffusion`; `None` for one with its default arguments.
        ema_decay: the largest decay of the average, in [0, 1).
        loss_weight: array `(T + 1,)` of weights of the loss at t = 0..T, as `diffusion.min_snr_weight()` and
            `diffusion.p2_weight()` return; `None` for 1.
        timestep_sampling: how t is drawn from 1..T. "uniform" draws one t for each example, "batch" one t for each
            batch. "stratified" spreads the times evenly in each batch, so that the loss varies less from batch to
            batch. In these three, each t is uniformly distributed. "half_at_T" gives half of the examples t = T, and
            spreads the others; it is for `distillation`.
        label_dropout: the share of training examples that lose their condition, in [0, 1). Guidance needs a network
            that was also trained without its condition. A network without a condition ignores this argument.
        seed: integer seed of the t and the noise drawn in training. A saved model continues its random sequence.
        class_names: the name of each label, with which `sample` can be asked for it. With `None`, the model takes them
            from the first data with names that `fit` gets, such as `datasets.Batches.class_names`.
        sampler: the default sampler of `sample`, which is saved with the model; `None` for `DPMSolver(10, eta=1.0)`.

    Raises:
        ValueError: if the network's output is not shaped like its input, `diffusion` is not a `GaussianDiffusion`, a
            decay or share is outside [0, 1), the seed is not an integer of 32 bits, `sampler` is no sampler, a weight
            is not positive at some t in 1..T, `timestep_sampling` is unknown, or `dtype` is not float32.

    Reference: Ho et al., 2020, algorithm 1.
    """

    def __init__(
        self,
        network: keras.Model,
        diffusion: GaussianDiffusion | None = None,
        ema_decay: float = 0.999,
        loss_weight: Any = None,
        timestep_sampling: str = "stratified",
        label_dropout: float = 0.1,
        *,
        seed: int | None = None,
        class_names: Sequence[str] | None = None,
        sampler: samplers.Sampler | None = None,
        **kwargs,
    ):
        dtype = kwargs.pop("dtype", "float32")
        is_float32 = keras.dtype_policies.get(dtype).name == "float32"
        _checks.require(is_float32, "Only the network has a dtype policy: `keras.config.set_dtype_policy`", dtype=dtype)
        super().__init__(**kwargs, dtype="float32")
        shapes = [tuple(tensor.shape) for tensor in getattr(network, "inputs", None) or []]
        valid = len(shapes) in (2, 3) and network.output.shape == shapes[0] and None not in shapes[0][1:]
        needed = (
            "`network` must be a functional model of [x_t, t] or [x_t, t, condition], with an output shaped like x_t"
        )
        _checks.require(valid, needed, inputs=shapes)
        valid = isinstance(diffusion, (GaussianDiffusion, type(None)))
        _checks.require(valid, "`diffusion` must be a `GaussianDiffusion`", diffusion=diffusion)
        for name, share in {"ema_decay": ema_decay, "label_dropout": label_dropout}.items():
            valid = _checks.is_between(share, 0, 1) and share < 1
            _checks.require(valid, f"`{name}` must be in [0, 1)", **{name: share})
        kinds = list(training.TIMESTEP_SAMPLINGS)
        valid, needed = timestep_sampling in kinds, f"`timestep_sampling` must be one of {kinds}"
        _checks.require(valid, needed, timestep_sampling=timestep_sampling)
        self.network = network
        self.condition = guidance.Condition.of(network, class_names)
        self.diffusion = diffusion or GaussianDiffusion()
        self.ema_decay = ema_decay
        self.loss_weight = training.checked_weight(loss_weight, self.diffusion.timesteps)
        self.timestep_sampling = timestep_sampling
        self.label_dropout = label_dropout
        self.seed = seed if seed is None else _checks.seed(seed)
        valid = isinstance(sampler, (samplers.Sampler, type(None)))
        _checks.require(valid, "`sampler` must be a sampler, such as `samplers.DDIM(50)`", sampler=sampler)
        self.sampler = sampler
        self.average = Average(network, ema_decay, self.add_weight)
        training.arrange([*network.weights, *self.average.weights])
        self._fit_random = _replicas.Seeds(self.seed)
        self._test_random = _replicas.Seeds(0)
        self._loop = sampling.Loop(self.diffusion, self.data_shape, [*network.variables, *self.average.weights])
        self._predictors = functools.lru_cache(maxsize=8)(self._predictor)
        self._test_functions = {}
        self.turn = threading.RLock()  # held by a thread that trains, evaluates or samples
        self.built = True

    @property
    def data_shape(self) -> tuple:
        """The shape of one example."""
        return tuple(self.network.output.shape[1:])

    @property
    def ema_weights(self) -> list:
        """The variables of the average, in the order of `network.weights`."""
        return self.average.weights

    def call(self, inputs, training=None):
        """The network's output for `(x_t, t)` or `(x_t, t, condition)`.

        Raises:
            ValueError: if the inputs are something else.
        """
        valid = isinstance(inputs, (list, tuple)) and len(inputs) == len(self.network.inputs)
        _checks.require(valid, "Generate data with `model.sample(num)`, and clean x_t with `model.denoise(x_t, t)`")
        if self.evaluates_average and not training:
            return self.average.predict(*inputs)
        return self.network(list(inputs), training=training)

    def summary(self, *args, **kwargs) -> None:
        """Prints Keras' summary of the network, without the average and the optimizer's variables."""
        self.network.summary(*args, **kwargs)

    # Sampling.

    @property
    def default_sampler(self) -> samplers.Sampler:
        """`sampler`, or else `DPMSolver(10, eta=1.0)`, with fewer steps if the schedule has fewer."""
        return self.sampler or samplers.DPMSolver(min(10, self.diffusion.timesteps), eta=1.0)

    def sample(
        self,
        num_samples: int,
        sampler: samplers.Sampler | None = None,
        seed: int | None = None,
        *,
        first: int = 0,
        return_trajectory: int | None = None,
        **options,
    ) -> Any:
        """Generates data.

        A sample depends on the seed and its index alone, up to rounding: `num_samples` and `batch_size` do not change
        it. The noise is the same on every backend.

        The compiled program is kept for further calls. All deterministic samplers share one program, and all stochastic
        samplers share another. A new batch size or new kinds of options compile a new program.

        Args:
            num_samples: number of samples.
            sampler: a `samplers.Sampler`; `None` for `default_sampler`.
            seed: non-negative integer; `None` draws one from Python's `random`.
            first: index of the first sample: `sample(10, first=20)` makes the last ten samples of `sample(30)`.
            return_trajectory: number k of states to return, at the ends of evenly spaced steps. The last state is the
                samples.
            **options: `use_ema` (by default `True`; `False` for the raw weights); `batch_size` (by default at most
                256; the last batch is filled up); `verbose` (1 for a progress bar); and what to sample, as in
                `guidance.Guidance`: `labels`, `guidance_scale`, `guidance_rescale`, `guidance_interval`,
                `dynamic_threshold` and `guide`.

        Returns:
            float32 array `(num_samples, ...)` in the data's range. With `return_trajectory`, a tuple of this array and
            two arrays `(k, num_samples, ...)`: x_t and the predicted x_0.

        Raises:
            ValueError: if an argument or option is invalid, or the sampler has more steps than the schedule.
        """
        _checks.counts(num_samples=num_samples)
        unknown = {"steps", "start", "num", "num_steps"} & set(options)
        _checks.require(not unknown, "Choose the number of steps by `sampler=samplers.DPMSolver(20)`", **options)
        sampler = sampler or self.default_sampler
        valid = isinstance(sampler, samplers.Sampler)
        _checks.require(valid, "`sampler` must be a sampler, such as `samplers.DPMSolver(20)`", sampler=sampler)
        steps = sampler.steps(self.diffusion.schedule)
        if return_trajectory is not None:
            valid = _checks.is_count(return_trajectory) and return_trajectory <= len(steps)
            needed = f"`return_trajectory` must be in 1..{len(steps)}, the number of steps"
            _checks.require(valid, needed, return_trajectory=return_trajectory)
        seed = _checks.seed(seed)
        _checks.counts(low=0, first=first)
        start = lambda indices: sampling.prior(self.diffusion, self.data_shape, seed, first + indices)  # noqa: E731
        states = self.run(steps, start, num_samples, seed, num_states=return_trajectory, first=first, **options)
        return (states[0][-1], *states) if return_trajectory else states

    def denoise(self, x_t: Any, t: int, clip: bool = True, **options) -> np.ndarray:
        """Predicts x_0 as samplers see it.

        Args:
            x_t: noisy data, `(batch, ...)`.
            t: time of `x_t`, an integer in 1..T.
            clip: whether to clip the result to the `clip_range` of the diffusion.
            **options: `use_ema`, `batch_size`, `verbose` and guidance, as in `sample`.

        Returns:
            float32 array `(batch, ...)`.

        Raises:
            ValueError: if `x_t` has a wrong shape, or `t` or an option is invalid.
        """
        x_t = _checks.data(x_t, self.data_shape, name="x_t")
        valid = _checks.is_count(t) and t <= self.diffusion.timesteps
        _checks.require(valid, f"`t` must be an integer in 1..{self.diffusion.timesteps}", t=t)
        steps = [samplers.row([t], from_x_0=1.0)]
        return self.run(steps, lambda indices: x_t[indices], len(x_t), clip=clip, **options)

    @_replicas.in_scope
    def run(
        self, steps: list, start: Callable, num: int, seed: int = 0, use_ema: bool = True, clip: bool = True, **options
    ) -> Any:
        """Runs any rows from any start. `sample`, `denoise` and `editing` call it.

        Args:
            steps: list of rows, as `Sampler.steps` returns.
            start: function from indices of examples to the x at the start of the steps.
            num: number of examples.
            seed: seed of the noise of the steps.
            use_ema: whether to use the averaged weights instead of the raw weights.
            clip: whether to clip the predicted x_0.
            **options: `first`, `known`, `num_states`, `batch_size` and `verbose`, as in `sampling.Loop.run`; and what
                to sample, as in `guidance.Guidance`.

        Returns:
            As `sampling.Loop.run`.

        Raises:
            ValueError: if an option is invalid.
        """
        _checks.require(isinstance(use_ema, bool), "`use_ema` must be True or False", use_ema=use_ema)
        names = [field.name for field in dataclasses.fields(guidance.Guidance)]
        asked = guidance.Guidance(**{name: options.pop(name) for name in names if name in options})
        guidance.check_guide(asked.guide, self)
        inputs, columns, guided_calls = asked.resolve(self.condition, num, np.concatenate(steps)["t"])
        threshold = asked.dynamic_threshold
        valid = threshold is None or (clip and self.diffusion.clip_range is not None)
        _checks.require(valid, "Nothing is clipped, so there is no threshold", dynamic_threshold=threshold)
        options |= {"inputs": inputs, "columns": columns, "dynamic_threshold": threshold, "clip": clip}
        guide = None if guided_calls == "none" else asked.guide
        with contextlib.ExitStack() as stack:
            # In one order, as two models may guide each other in two threads.
            for model in sorted([self] if guide is None else [self, guide], key=id):
                stack.enter_context(model.turn)
                # In a callback after a step, Keras on JAX holds the weights elsewhere.
                getattr(model, "jax_state_sync", lambda: None)()
            return self._loop.run(self._predictors(use_ema, guided_calls, guide), steps, start, num, seed, **options)

    def _predictor(self, use_ema, guided_calls, guide):
        """Returns the function that predicts with these weights and this kind of guidance."""
        predict = self.average.predict if use_ema else lambda *inputs: self.network(list(inputs), training=False)
        if guided_calls == "none":
            return predict
        return guidance.guided_by(guide, self.condition, predict, sometimes=guided_calls == "some")

    # Saving.

    def get_config(self):
        return {
            "name": self.name,
            "network": keras.saving.serialize_keras_object(self.network),
            "diffusion": keras.saving.serialize_keras_object(self.diffusion),
            "ema_decay": self.ema_decay,
            "loss_weight": None if self.loss_weight is None else self.loss_weight.tolist(),
            "timestep_sampling": self.timestep_sampling,
            "label_dropout": self.label_dropout,
            "seed": self.seed,
            "class_names": self.condition and self.condition.class_names,
            "sampler": keras.saving.serialize_keras_object(self.sampler),
        }

    @classmethod
    def from_config(cls, config):
        # `from_model` may give objects in place of their configurations, and files of version 0.1 have no sampler.
        stored = {name: config.get(name) for name in ("network", "diffusion", "sampler")}
        made = {name: keras.saving.deserialize_keras_object(of) for name, of in stored.items() if isinstance(of, dict)}
        return cls(**config | made)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # Keras saves no random states. A resumed run would repeat its noise and its dropout.
        store["fit_random"] = self._fit_random.state
        for index, state in enumerate(self._states_of_dropout()):
            store[f"random_{index}"] = state

    def load_own_variables(self, store):
        states = {f"random_{index}": state for index, state in enumerate(self._states_of_dropout())}
        states["fit_random"] = self._fit_random.state
        for key, state in states.items():
            if key in store.keys():  # files of version 0.1 have no states of dropout
                state.assign(store[key])
        super().load_own_variables({key: store[key] for key in store.keys() if key not in states})

    def _states_of_dropout(self):
        """The random states of the network's layers."""
        weights = {id(v) for v in self.network.weights}
        return [v for v in self.network.variables if id(v) not in weights]
