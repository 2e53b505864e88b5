"""The model: a network and a process, trained with `fit` and sampled with `sample`."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import pathlib
import shutil
import tempfile
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks, _files, samplers, saving
from keras_ddpm._backend import devices, replicas
from keras_ddpm.callbacks.watch import LossWatch
from keras_ddpm.conditions import Condition
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.ema import Average
from keras_ddpm.guidance import Guidance, guided, in_one_call, unguided, without_condition
from keras_ddpm.losses import PerceptualLoss
from keras_ddpm.networks.embedding import with_num_classes
from keras_ddpm.samplers import loop
from keras_ddpm.saving import cards, compact
from keras_ddpm.training import feed, running
from keras_ddpm.training.corruption import Corruption, standard_normal

__all__ = ["DiffusionModel"]

# Arguments of the model that are objects in its configuration, and those that `Corruption` keeps.
OBJECTS = ("network", "diffusion", "sampler")
OF_CORRUPTION = ("timestep_sampling", "label_dropout", "image_dropout", "image_noise", "max_guidance_scale")


def _like(own):
    """Decorates a method that has the signature of `own`, and gets its arguments as a dict by name."""

    def decorate(method):
        @functools.wraps(method)
        def wrapped(self, *args: Any, **kwargs: Any) -> Any:
            given = dict(inspect.signature(own).bind(self, *args, **kwargs).arguments)
            del given["self"]
            return method(self, given.pop("kwargs", {}) | given)

        vars(wrapped)["__signature__"] = inspect.signature(own)  # which editors show
        return wrapped

    return decorate


@keras.saving.register_keras_serializable(package="keras_ddpm")
class DiffusionModel(keras.Model):
    """A denoising diffusion probabilistic model.

    `fit` and `evaluate` take batches of clean data x_0, `(batch, ...)`, or tuples `(x_0, condition)`. A condition is an
    array of labels, vectors or images, or a dict by the names of its parts, such as `{"label": labels, "image":
    images}`. Condition images may be smaller than x_0. A network without a condition ignores it. Sample
    weights and class weights multiply the loss. Each step draws t and noise and passes the regression problem
    (x_t, t) -> target to the training step of Keras. `compile` thus takes any loss, metric and optimizer of Keras.
    `evaluate` draws the same t and noise at each call.

    The model keeps an exponential moving average of the network's weights (`ema.Average`). `sample` and
    `evaluate` use the average. `save` stores both.

    Example:

    >>> model = DiffusionModel(networks.unet((64, 64, 3)))
    >>> model.compile(loss="mse", optimizer="adam")
    >>> model.fit(images, epochs=10)  # images: (num, 64, 64, 3) in [-1, 1]
    >>> samples = model.sample(16, seed=0)

    Args:
        network: a functional `keras.Model` from `[x_t, t, *conditions]` to a tensor shaped like `x_t`; see `networks`
            and `conditions.Condition.of`.
        diffusion: a `GaussianDiffusion`; `None` for one with its default arguments.
        ema_decay: the largest decay of the average, in [0, 1).
        loss_weight: array `(T + 1,)` of weights of the loss at t = 0..T, as `diffusion.min_snr_weight()` and
            `diffusion.p2_weight()` return; `None` for 1.
        timestep_sampling: how t is drawn from 1..T. "uniform" draws one t for each example, "batch" one t for each
            batch. "stratified" spreads the times evenly in each batch, so that the loss varies less from batch to
            batch. In these three, each t is uniformly distributed. "half_at_T" gives half of the examples t = T, and
            spreads the others; it is for `distillation`.
        label_dropout: the share of training examples that lose their label or vector, in [0, 1). Guidance needs a
            network that was also trained without its condition. A network without a condition ignores this argument.
        seed: integer seed of the t and the noise drawn in training. A saved model continues its random sequence.
        class_names: the name of each label, with which `sample` can be asked for it. With `None`, the model takes them
            from the first data with names that `fit` gets, such as `datasets.Batches.class_names`.
        image_dropout: the share of training examples that lose their condition image, in [0, 1). Guidance by the image
            needs it.
        image_noise: the largest level of the noise that condition images get in training, in [0, 1), as in
            `conditions.seen`. Models that enlarge the samples of others need some, or they repeat the faults of these.
        max_guidance_scale: the largest guidance scale that a network with the input `scale` learns, as
            `networks.with_guidance_scale` makes them. Each training step then costs one network call more, and guidance
            up to this scale costs one call instead of two.
        guidance_scale: the default guidance scale of `sample` for samples with a condition, saved with the model.
        sampler: the default sampler of `sample`, which is saved with the model; `None` for `DPMSolver(10, eta=1.0)`.

    Raises:
        ValueError: if the network's output is not shaped like its input, `diffusion` is not a `GaussianDiffusion`, a
            decay or share is outside [0, 1), the seed is not an integer of 32 bits, `sampler` is not a sampler, a
            weight is not positive at some t in 1..T, `timestep_sampling` is unknown, or `dtype` is not float32.

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
        image_dropout: float = 0.0,
        image_noise: float = 0.0,
        max_guidance_scale: float = 1.0,
        guidance_scale: float = 1.0,
        sampler: samplers.Sampler | None = None,
        **kwargs,
    ):
        super().__init__(**{"dtype": "float32"} | kwargs)
        hint = "Only the network has a dtype policy: `keras.config.set_dtype_policy`"
        _checks.require(self.dtype_policy.name == "float32", hint, dtype=self.dtype_policy.name)
        shapes = [tuple(tensor.shape) for tensor in getattr(network, "inputs", None) or []]
        valid = len(shapes) >= 2 and network.output.shape == shapes[0] and None not in shapes[0][1:]
        needed = "`network` must be a functional model of [x_t, t, *conditions], with an output shaped like x_t"
        _checks.require(valid, needed, inputs=shapes)
        valid = isinstance(diffusion, (GaussianDiffusion, type(None)))
        _checks.require(valid, "`diffusion` must be a `GaussianDiffusion`", diffusion=diffusion)
        _checks.share(ema_decay=ema_decay)
        valid = isinstance(sampler, (samplers.Sampler, type(None)))
        _checks.require(valid, "`sampler` must be a sampler, such as `samplers.DDIM(50)`", sampler=sampler)
        self.network = network
        self.diffusion = diffusion or GaussianDiffusion()
        condition = Condition.of(network, class_names)
        self.corruption = Corruption(
            self.diffusion,
            condition,
            loss_weight,
            timestep_sampling,
            label_dropout,
            image_dropout,
            image_noise,
            max_guidance_scale,
            self.draw_noise,
        )
        self.ema_decay = ema_decay
        self.seed = seed if seed is None else _checks.seed(seed)
        self.sampler = sampler
        Guidance().scales(guidance_scale, np.zeros(0))  # checks it
        self.guidance_scale = guidance_scale
        self.average = Average(network, ema_decay, self.add_weight)
        devices.arrange([*network.weights, *self.average.weights])
        self._fit_random = replicas.Seeds(self.seed)
        self._test_random = replicas.Seeds(0)
        self._loop = loop.Loop(self.diffusion, self.data_shape, [*network.variables, *self.average.weights])
        self._predictors = functools.lru_cache(maxsize=8)(self._predictor)
        self._compiled_with: dict = {}
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

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of each label, or `None`."""
        return self.condition.class_names if self.condition else None

    @property
    def condition(self) -> Condition | None:
        """The `conditions.Condition` of the network, or `None`."""
        return self.corruption.condition

    def call(self, inputs, training=None):
        """The network's output for `(x_t, t, *conditions)`. Outside of training, the average computes it.

        In training with a `max_guidance_scale` it is `guidance.unguided`, which the loss compares with the target.

        Raises:
            ValueError: if the inputs are something else.
        """
        valid = isinstance(inputs, (list, tuple)) and len(inputs) == len(self.network.inputs)
        _checks.require(valid, "Generate data with `model.sample(num)`, and clean x_t with `model.denoise(x_t, t)`")
        if training:
            y = self.network(list(inputs), training=True)
            known = self.condition
            if known is None or self.corruption.max_guidance_scale == 1:
                return y
            nulls = known.nulls((known.given[0], "scale"))
            return unguided(y, self.average.predict, inputs, nulls, known.names.index("scale"))
        return self.average.predict(*inputs, add_loss=self.add_loss)

    def summary(self, *args, **kwargs) -> None:
        """Prints Keras' summary of the network, without the average and the optimizer's variables."""
        self.network.summary(*args, **kwargs)

    # Training.

    @_like(keras.Model.compile)
    @replicas.in_scope
    def compile(self, given) -> None:
        """`keras.Model.compile`. `jit_compile="auto"` selects what is fastest for this package on each backend.

        With a network in mixed float16, the optimizer becomes a `LossScaleOptimizer` unless `auto_scale_loss=False`.
        """
        self._compiled_with = given
        super().compile(**given)
        if given.get("jit_compile", "auto") == "auto" and not self.run_eagerly:
            self.jit_compile = devices.jit_compile()
        # The policy of the network itself is in no file, but those of its layers are.
        half = any(layer.dtype_policy.name == "mixed_float16" for layer in _layers(self.network))
        scales = given.get("auto_scale_loss", True) and half
        optimizer: Any = self.optimizer  # type: ignore[has-type]
        if scales and optimizer and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self.optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        # Build everything here. Otherwise `fit` calls the model on clean data to do it, and TensorFlow traces a step
        # twice if the step creates variables.
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)
            devices.arrange(self.optimizer.variables)
        # What a subclass overrides may need data, so Keras' own methods are called.
        zeros = ops.zeros((1, *self.data_shape))
        losses = [loss for loss in keras.tree.flatten(self.loss) if loss is not None]
        if losses:
            super().compute_loss(y=zeros, y_pred=zeros)
        self._loss_rank = len(_each_loss(losses[0], zeros).shape) if losses else len(self.data_shape)
        super().compute_metrics(None, zeros, zeros)
        self.reset_metrics()

    @_like(keras.Model.fit)
    @replicas.in_scope
    def fit(self, given) -> keras.callbacks.History:
        """`keras.Model.fit` on clean data. It checks the data first.

        Arrays are checked completely, and the first batch of other sources. Labels in the data are ignored if the
        network takes none. Weights of examples and of classes multiply the loss.

        In place of x_0, the data can hold a dict `{"x_0": x_0, "noise": noise}`, as `distillation.pairs` makes them.
        Then x_0 is mixed with this noise.

        Raises:
            ValueError: if the data do not have the shape of the network's input, lie outside `clip_range`, contain NaN,
                or lack the condition of the network; or if the loss is not finite.
        """
        _checks.require(self.compiled, "Call `compile` before `fit`")
        if given.get("y") is not None and not (self.condition or given.get("class_weight")):
            warnings.warn("The network takes no labels: make it with `num_classes`, or call `fit(x_0)`", stacklevel=2)
        given["x"], given["y"], first, weight = self._opened(*map(given.get, ("x", "y", "sample_weight")))
        if given.get("validation_data") is not None:
            x, y, of_examples = keras.utils.unpack_x_y_sample_weight(given["validation_data"])
            x, y, *_ = self._opened(x, y, of_examples)
            given["validation_data"] = x if y is None else (x, y, of_examples)
        if self.condition:
            named = self.condition.named(getattr(given["x"], "class_names", None))
            self.corruption = dataclasses.replace(self.corruption, condition=named)
        weights = (weight, given.get("sample_weight"), given.get("class_weight"))
        counted = given.get("class_weight") is None or not (self.condition and len(self.condition.given) > 1)
        _checks.require(counted, "Keras weighs classes of labels alone. Give `sample_weight` beside images")
        comparable = self.loss is not None and not isinstance(self.loss, PerceptualLoss)
        plain = comparable and type(self).compute_loss is keras.Model.compute_loss
        watch = LossWatch(first, warns=plain and all(entry is None for entry in weights))
        with running.training(self, watch, given) as arranged:
            return super().fit(**arranged)

    @_like(keras.Model.evaluate)
    @replicas.in_scope
    def evaluate(self, given) -> Any:
        """`keras.Model.evaluate` of the average on clean data, as in `fit`. Every call uses the same t and noise."""
        self._test_random.state.assign([0, 0])
        if given.get("_use_cached_eval_dataset"):  # `fit` calls, which has checked the data
            return super().evaluate(**given)
        given["x"], given["y"], *_ = self._opened(*map(given.get, ("x", "y", "sample_weight")))
        with running.evaluating(self, given) as arranged:
            return super().evaluate(**arranged)

    def _maybe_symbolic_build(self, *args, **kwargs):
        """Does nothing: `compile` has built everything, and Keras fails here with several processes of TensorFlow."""

    def _opened(self, data, labels, of_examples):
        """Checks data. Returns x and y as Keras reads them, and the x_0 and the weights that were checked."""
        data, (x_0, condition, weight) = feed.opened(data, labels)
        process = getattr(data, "diffusion", None)  # of `distillation.Pairs`
        fits = process is None or process.schedule.is_close(self.diffusion.schedule)
        _checks.require(fits, "These are pairs of another schedule than that of the model", diffusion=process)
        labels = feed.with_labels(data, labels, of_examples)
        return data, labels, self.corruption.check(x_0, condition, self.data_shape), weight

    def train_step(self, *args):
        """Trains on noisy data, then updates the average. The arguments are `data`, on JAX `state` and `data`."""
        if len(args) == 1:
            data = self._corrupted(*args, self.corruption, self._fit_random)
            before = ops.copy(self.optimizer.iterations)
            logs = super().train_step(data)
            self.average.update(before, self.optimizer.iterations, replicas.mean(logs.get("loss", 0.0)))
            return replicas.joined(logs)
        state, data = args
        weights = self.trainable_variables, self.non_trainable_variables
        variables = (*weights, self.optimizer.variables, self.metrics_variables)
        with _Stateless(variables, state) as scope:
            data = self._corrupted(data, self.corruption, self._fit_random)
            before = ops.copy(self.optimizer.iterations)
        logs, state = super().train_step(scope.state(), data)
        with _Stateless(variables, state) as scope:
            self.average.update(before, self.optimizer.iterations, logs.get("loss", 0.0))
        return logs, scope.state()

    def test_step(self, *args):
        """Evaluates on noisy data, with all conditions. The arguments are `data`, on JAX `state` and `data`."""
        corruption = dataclasses.replace(self.corruption, label_dropout=0.0, image_dropout=0.0, max_guidance_scale=1.0)
        if len(args) == 1:
            return replicas.joined(super().test_step(self._corrupted(*args, corruption, self._test_random)))
        state, data = args
        variables = (self.trainable_variables, self.non_trainable_variables, self.metrics_variables)
        with _Stateless(variables, state) as scope:
            data = self._corrupted(data, corruption, self._test_random)
        return super().test_step(scope.state(), data)

    def _corrupted(self, data, corruption, generator):
        """Turns clean data into Keras' `(x, y, sample_weight)`: inputs and target of the network, and loss weights."""
        inputs, target, weight = corruption(*keras.utils.unpack_x_y_sample_weight(data), generator)
        return inputs, target, self.aligned(weight)

    def draw_noise(self, x_0: Any, generator: keras.random.SeedGenerator) -> Any:
        """Draws the noise that is mixed with `x_0`. A subclass may choose it to suit the data."""
        return standard_normal(x_0, generator)

    def aligned(self, weight: Any) -> Any:
        """Weights `(batch,)` with the rank of the loss, since Keras multiplies both from their last axis on.

        Raises:
            ValueError: if there are weights for a loss that is one number.
        """
        if weight is None:
            return None
        _checks.require(self._loss_rank, "A loss that is one number for the batch has no weights", loss=self.loss)
        return ops.reshape(weight, (-1,) + (1,) * (self._loss_rank - 1))

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
        labels: Any = None,
        images: Any = None,
        image_noise: float = 0.0,
        guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        use_ema: bool = True,
        batch_size: int | None = None,
        verbose: int | str = 0,
        first: int = 0,
        return_trajectory: int | None = None,
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
            labels: the condition of the samples: one label, class name or vector for all samples, or one for each, or a
                dict of conditions by name; `None` for no condition.
            images: condition images `(num_samples, height, width, channels)` in [-1, 1], or one for all. Smaller ones
                are enlarged.
            image_noise: level of the noise that `images` get, in [0, 1), as in `conditions.seen`.
            guidance_scale: w in [0, 1000], how strongly samples follow their condition; `None` for the model's own. 1
                is the condition as it was learned. Larger values cost two network calls a step, or one with a network
                that has learned the scale. [Ho and Salimans, 2022, Eq. 6]
            guidance: rare options, a `guidance.Guidance`.
            use_ema: whether to use the averaged weights instead of the raw weights.
            batch_size: number of samples that are made at once; `None` for at most 256. The last batch is filled up.
            verbose: 1 for a progress bar.
            first: index of the first sample: `sample(10, first=20)` makes the last ten samples of `sample(30)`.
            return_trajectory: number k of states to return, at the ends of evenly spaced steps. The last state is the
                samples.

        Returns:
            float32 array `(num_samples, ...)` in the data's range. With `return_trajectory`, a tuple of this array and
            two arrays `(k, num_samples, ...)`: x_t and the predicted x_0.

        Raises:
            ValueError: if an argument is invalid, or the sampler has more steps than the schedule.
        """
        _checks.counts(num_samples=num_samples)
        sampler = sampler or self.default_sampler
        valid = isinstance(sampler, samplers.Sampler)
        _checks.require(valid, "`sampler` must be a sampler, such as `samplers.DPMSolver(20)`", sampler=sampler)
        steps = sampler.steps(self.diffusion.schedule)
        _checks.counts(high=len(steps), optional=True, return_trajectory=return_trajectory)
        seed = _checks.seed(seed)
        _checks.counts(low=0, first=first)
        if guidance_scale is None:
            guidance_scale = 1.0 if labels is None and images is None else self.guidance_scale

        def start(indices):
            return loop.prior(self.diffusion, self.data_shape, seed, first + indices)

        job = loop.Job(steps, start, num_samples, seed, first, num_states=return_trajectory)
        options = (labels, images, image_noise, guidance_scale, guidance, use_ema, batch_size, verbose)
        states = self.run(job, *options)
        return (states[0][-1], *states) if return_trajectory else states

    def denoise(self, x_t: Any, t: int, clip: bool = True, **options) -> np.ndarray:
        """Predicts x_0 as samplers see it.

        Args:
            x_t: noisy data, `(batch, ...)`.
            t: time of `x_t`, an integer in 1..T.
            clip: whether to clip the result to the `clip_range` of the diffusion.
            **options: `labels`, `images`, `image_noise`, `guidance_scale`, `guidance`, `use_ema`, `batch_size` and
                `verbose`, as in `sample`.

        Returns:
            float32 array `(batch, ...)`.

        Raises:
            ValueError: if `x_t` has a wrong shape, or `t` or an option is invalid.
        """
        x_t = _checks.data(x_t, self.data_shape, name="x_t")
        _checks.counts(high=self.diffusion.timesteps, t=t)
        steps = [samplers.row([t], from_x_0=1.0)]
        return self.run(loop.Job(steps, lambda indices: x_t[indices], len(x_t), clip=clip), **options)

    def trajectories(self, num_samples: int = 64, seed: int = 0, **options) -> samplers.Trajectories:
        """Samples on their way from noise to data, in up to 60 steps of DDIM, for `samplers.optimized`.

        Args:
            num_samples: number of samples.
            seed: as in `sample`.
            **options: as in `sample`.
        """
        schedule = self.diffusion.schedule
        sampler = samplers.DDIM(min(60, schedule.timesteps), spacing="logsnr")
        _, x, x_0 = self.sample(num_samples, sampler, seed, return_trajectory=sampler.num_steps, **options)
        start = loop.prior(self.diffusion, self.data_shape, seed, np.arange(num_samples))
        return samplers.Trajectories(schedule, sampler.timesteps(schedule), np.concatenate([start[None], x]), x_0)

    @replicas.in_scope
    def run(
        self,
        job: loop.Job,
        labels: Any = None,
        images: Any = None,
        image_noise: float = 0.0,
        guidance_scale: float = 1.0,
        guidance: Guidance | None = None,
        use_ema: bool = True,
        batch_size: int | None = None,
        verbose: int | str = 0,
    ) -> Any:
        """Runs any rows from any start. `sample`, `denoise` and `editing` call it.

        Args:
            job: the rows and where they start.
            labels, images, image_noise, guidance_scale, guidance, use_ema, batch_size, verbose: as in `sample`.

        Returns:
            As `samplers.loop.Loop.run`.

        Raises:
            ValueError: if an option is invalid.
        """
        _checks.require(isinstance(use_ema, bool), "`use_ema` must be True or False", use_ema=use_ema)
        asked = Guidance() if guidance is None else guidance
        valid = isinstance(asked, Guidance)
        _checks.require(valid, "`guidance` must be a `guidance.Guidance`", guidance=guidance)
        self._check_guide(asked.guide)
        times, largest = np.concatenate(job.steps)["t"], self.corruption.max_guidance_scale
        condition, indices = self.condition, job.first + np.arange(job.num)
        fits = condition or (labels is None and images is None and not image_noise)
        _checks.require(fits, "The network has no condition: see `num_classes`", labels=labels, images=images)
        given, inputs = {}, ()
        if condition:
            given = condition.by_name(labels, images, complete=False)
            noise = functools.partial(loop.noise, seed=job.seed, indices=indices, stream=(1,))
            inputs = condition.network_inputs(given, job.num, image_noise, noise)
        plan = asked.plan(condition, given, inputs, guidance_scale, times, largest)
        dropped = [part.name for part, null in zip(_parts(self), plan.nulls) if null is not None]
        untrained = [name for name in dropped if name in given and not self.corruption.dropout(name)]
        if untrained:
            hint = "Guidance compares with the output without a condition that was never dropped in training"
            warnings.warn(f"{hint}. Give the model a `label_dropout` or `image_dropout`: {untrained}", stacklevel=3)
        threshold = asked.dynamic_threshold
        valid = threshold is None or (job.clip and self.diffusion.clip_range is not None)
        _checks.require(valid, "Nothing is clipped, so there is no threshold", dynamic_threshold=threshold)
        guide = None if plan.kind == "none" else asked.guide
        with contextlib.ExitStack() as stack:
            # In one order, as two models may guide each other in two threads.
            for model in sorted([self] if guide is None else [self, guide], key=id):
                stack.enter_context(model.turn)
                # In a callback after a step, Keras on JAX holds the weights elsewhere.
                getattr(model, "jax_state_sync", lambda: None)()
            return self._loop.run(
                self._predictors(use_ema, plan.kind, guide, plan.nulls),
                job,
                inputs=plan.inputs,
                columns=plan.columns,
                dynamic_threshold=threshold,
                batch_size=batch_size,
                verbose=verbose,
            )

    def _check_guide(self, guide):
        """Raises ValueError unless the guide predicts what the model does, with the same condition or without."""
        if guide is None:
            return
        _checks.require(isinstance(guide, DiffusionModel), "`guide` must be a `DiffusionModel`", guide=guide)
        kind, kind_of_guide = ((of.data_shape, of.diffusion.prediction) for of in (self, guide))
        same = kind == kind_of_guide and guide.diffusion.schedule.is_close(self.diffusion.schedule)
        _checks.require(same, "`guide` must have the data shape and the process of the model", guide=guide.diffusion)
        fits = {*_parts(guide)} <= {*_parts(self)}
        _checks.require(fits, "`guide` must take conditions of the model, or none", guide=guide.condition)

    def _predictor(self, use_ema, kind, guide, nulls):
        """Returns the function that predicts with these weights and this kind of guidance."""

        def predict(*inputs):
            return self.average.predict(*inputs) if use_ema else self.network(list(inputs), training=False)

        if kind == "none":
            return predict
        if kind == "one call":
            return in_one_call(predict, [part.name for part in _parts(self)].index("scale"))
        if guide is None:
            return guided(predict, without_condition(predict, nulls), kind == "some")

        def predict_both(x, t, *conditions):
            known = [conditions[_parts(self).index(part)] for part in _parts(guide)]
            return guide.average.predict(x, t, *known), predict(x, t, *conditions)

        function: Any = guided(predict, predict_both, kind == "some")
        function.variables = guide.variables  # which the sampling program reads, too
        return function

    # Files.

    presets = cards.Presets()
    """The models that come with the package: a dict from names to one-line descriptions."""

    @replicas.in_scope
    @replicas.by_chief
    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs) -> None:
        """`keras.Model.save` to a `.keras` file. A file of this name stays whole until the new one is.

        With several processes, the first one writes. If the name is a link, the file behind it is replaced.
        Keras writes to an address, such as "hf://USER/REPOSITORY".

        Raises:
            ValueError: if the file name has another ending.
        """
        path, is_address = pathlib.Path(filepath), "://" in str(filepath)
        _checks.require(is_address or path.suffix == ".keras", "The file name must end in .keras", filepath=filepath)
        # Keras asks, writes a folder, or writes to another machine.
        if not overwrite and path.exists() or zipped is False or is_address:
            return super().save(filepath, overwrite, zipped, **kwargs)
        with _files.replacing(path, path.with_name(f"{path.stem}.saving.keras")) as temporary:
            super().save(temporary, **kwargs)

    @replicas.in_scope
    @replicas.by_chief
    def save_weights(self, *args, **kwargs) -> None:
        """`keras.Model.save_weights`. With several processes, the first one writes."""
        return super().save_weights(*args, **kwargs)

    @replicas.in_scope
    @replicas.by_chief
    def save_compact(self, filepath: str | pathlib.Path) -> None:
        """Saves what sampling needs: the averaged weights in half precision, without the optimizer.

        The file is about an eighth as large as a file of `save` with Adam. It is a `.keras` file like others: the
        loaded model samples as this one up to rounding, and can be compiled and trained.

        Raises:
            ValueError: if the file name has another ending than .keras, or a weight is too large for half precision.
        """
        path = pathlib.Path(filepath)
        _checks.require(path.suffix == ".keras", "The file name must end in .keras", filepath=filepath)
        copy = type(self).from_model(self)
        with _files.replacing(path, path.with_name(f"{path.stem}.saving.keras")) as temporary:
            keras.Model.save(copy, temporary)
            compact.compress(temporary)

    def save_to_preset(self, folder: str | pathlib.Path) -> None:
        """Writes a folder to share: the parts of the file of `save_compact`, and the card README.md.

        The card has what the model knows, and places for the rest. A README.md that exists is kept. `from_preset` loads
        the folder, also after an upload to the Hugging Face Hub.

        Args:
            folder: where the files are written. It is made if it does not exist.

        Raises:
            ValueError: as in `save_compact`, or if `folder` is an address.
        """
        _checks.require("://" not in str(folder), "Expected a folder, which is then uploaded", folder=folder)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_compact(file := pathlib.Path(temporary, "model.keras"))
            if file.exists():  # the first of several processes writes it
                shutil.unpack_archive(file, folder, "zip")
                cards.write(self, pathlib.Path(folder, "README.md"))

    @classmethod
    def from_model(cls, model: Any, **kwargs: Any) -> Any:
        """Makes a model of this class whose raw and averaged weights are both the average of another one.

        To fine-tune a model on other classes, give their names. Labels of known names keep their embeddings. The others
        begin with those of old labels, which the network already tells apart.

        Args:
            model: a `DiffusionModel`. It is not changed.
            **kwargs: arguments of this class; the others are those of `model`. A `network` must have all weights of the
                model's. Those of another shape, and further ones, stay as they are.

        Raises:
            ValueError: if a weight of the model has no counterpart of its name in `network`, or names are not unique.

        >>> tuned = DiffusionModel.from_model(DiffusionModel.from_preset("flowers64"), class_names=["rose", "fern"])
        """
        values = [ops.convert_to_numpy(average) for average in model.ema_weights]
        paths = [v.path for v in model.network.weights]
        names, condition = kwargs.get("class_names"), model.condition
        if "network" not in kwargs and names is not None and condition and condition.num_classes:
            null = condition.num_classes
            known = {name: label for label, name in enumerate(condition.class_names or ())}
            others = itertools.cycle([label for name, label in known.items() if name not in names] or range(null))
            rows = [*(known[name] if _checks.text(name) in known else next(others) for name in names), null]
            if rows != [*range(null + 1)]:
                kwargs["network"] = with_num_classes(model.network, len(names))
                at = paths.index("label_embedding/embeddings")
                values[at] = values[at][rows]
        elif "network" in kwargs:
            found = [v.path for v in kwargs["network"].weights]
            unique = len({*paths}) == len(paths) and len({*found}) == len(found)
            missing = sorted({*paths} - {*found})
            _checks.require(unique and not missing, "`network` must have the weights of the model", missing=missing)
            known = dict(zip(paths, values))
            values = [known.get(path) for path in found]
        copy = cls.from_config({**model.get_config(), **kwargs})
        for v, of_average, value in zip(copy.network.weights, copy.ema_weights, values):
            if value is not None and value.shape == v.shape:
                v.assign(value)
                of_average.assign(value)
        return copy

    @classmethod
    def from_preset(cls, preset: str | pathlib.Path, **options: Any) -> Any:
        """Loads a trained model. A `DiffusionModel` in the file becomes one of this class.

        Args:
            preset: one of `presets`, which come with the package, or a file, a folder or an address, as in
                `saving.load_model`.
            **options: as in `saving.load_model`.

        Raises:
            FileNotFoundError: if there is no such preset or file.
            ValueError: as in `load_model`.
        """
        path = saving.PRESETS / f"{preset}.keras" if str(preset) in cls.presets else preset
        if "://" not in str(path) and not pathlib.Path(path).exists():
            known = ", ".join(cls.presets)
            raise FileNotFoundError(f"There is no model file {preset}. Presets of the package: {known}.")
        with keras.saving.custom_object_scope({"keras_ddpm>DiffusionModel": cls}):
            return saving.load_model(path, **options)

    def export(self, filepath: Any, *args, **kwargs) -> None:
        """`keras.Model.export` of the network with the averaged weights: a function of x_t, t and the condition.

        It computes in float32. `export.onnx` also writes what other programs need to sample with it.
        """
        network = keras.models.clone_model(self.network, clone_function=compact.in_float32, recursive=True)
        network.set_weights([keras.ops.convert_to_numpy(v) for v in self.ema_weights])
        inputs = [keras.ops.zeros((1, *v.shape[1:]), v.dtype) for v in network.inputs]
        network(inputs)  # Keras exports no model to ONNX that was never called
        with devices.plain():
            network.export(filepath, *args, **kwargs)

    def get_compile_config(self):
        if any(isinstance(loss, PerceptualLoss) for loss in keras.tree.flatten(self._compiled_with.get("loss"))):
            return None  # the network of the loss is in no file
        return compact.portable(self._compiled_with)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(compact.neutral(config)))

    def get_config(self):
        objects = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in OBJECTS}
        numbers = {name: getattr(self, name) for name in ("name", "ema_decay", "seed", "class_names", "guidance_scale")}
        weight = self.corruption.loss_weight
        drawn = {"loss_weight": None if weight is None else weight.tolist()}
        return objects | numbers | drawn | {name: getattr(self.corruption, name) for name in OF_CORRUPTION}

    @classmethod
    def from_config(cls, config):
        # `from_model` may give objects in place of their configurations.
        stored = {name: config.get(name) for name in OBJECTS}
        made = {name: keras.saving.deserialize_keras_object(of) for name, of in stored.items() if isinstance(of, dict)}
        return cls(**config | made)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for name, state in self._random_states().items():
            store[name] = state

    def load_own_variables(self, store):
        states = self._random_states()
        for name, state in states.items():
            state.assign(store[name])
        super().load_own_variables({name: store[name] for name in store.keys() if name not in states})

    def _random_states(self):
        """What Keras does not save, by name. A resumed run would repeat its noise and its dropout."""
        weights = {id(v) for v in self.network.weights}
        of_layers = [v for v in self.network.variables if id(v) not in weights]
        return {"fit_random": self._fit_random.state} | {f"random_{i}": state for i, state in enumerate(of_layers)}


def _parts(model):
    """The parts of the condition of a `DiffusionModel`."""
    return model.condition.parts if model.condition else ()


def _layers(model):
    """The layers of a model and of the models in it."""
    for layer in model.layers:
        yield from _layers(layer) if isinstance(layer, keras.Model) else [layer]


def _each_loss(loss, zeros):
    """The values of a loss before Keras takes their mean."""
    loss = keras.losses.get(loss)
    return ops.convert_to_tensor((loss.call if isinstance(loss, keras.losses.Loss) else loss)(zeros, zeros))


class _Stateless(keras.StatelessScope):
    """A scope in which variables have the values of a JAX state. Both come in lists of lists."""

    def __init__(self, variables, values):
        super().__init__(zip(itertools.chain(*variables), itertools.chain(*values)))
        self.variables = variables

    def state(self):
        return tuple([self.get_current_value(v) for v in group] for group in self.variables)
