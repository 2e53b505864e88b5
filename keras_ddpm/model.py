"""The model: a network and a process, trained with `fit` and sampled with `sample`."""

import functools
import itertools
import types
import warnings

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import hardware
from keras_ddpm import recording
from keras_ddpm import samplers
from keras_ddpm import sampling
from keras_ddpm.diffusion import GaussianDiffusion

# From numbers u in [0, 1), one an example, and their indices 0..n − 1 in the batch to times in [0, 1).
TIMESTEP_SAMPLINGS = {
    "uniform": lambda u, index, n: u,
    "batch": lambda u, index, n: ops.broadcast_to(u[:1], ops.shape(u)),
    "stratified": lambda u, index, n: (index / n + u[:1]) % 1.0,  # Kingma et al., 2021, appendix I.1
}


@keras.saving.register_keras_serializable(package="keras_ddpm")
class DiffusionModel(keras.Model):
    """A denoising diffusion probabilistic model.

    `fit` and `evaluate` take batches of clean data x_0, `(batch, ...)`, or `(x_0, label)` tuples, of which a network
    without condition ignores the label (sample and class weights are ignored too). Each step draws t and noise and
    hands the regression problem (x_t, t) -> target to Keras' own step, so that `compile` takes any Keras loss, metric
    and optimizer. `evaluate` draws the same t and noise at each call.

    The model keeps an exponential moving average (EMA) of the network's weights, updated after every optimizer
    update n = 0, 1, ... with decay min(ema_decay, 1 − (1 + n)^(−3/4)): the first update of an optimizer copies.
    `sample` reads the average; `save` stores both sets.

    Example:

    >>> model = DiffusionModel(networks.unet((64, 64, 3)))
    >>> model.compile(loss="mse", optimizer="adam")
    >>> model.fit(images, epochs=10)  # images: (num, 64, 64, 3) in [-1, 1]
    >>> samples = model.sample(16, seed=0)

    Args:
        network: a functional `keras.Model` from `[x_t, t]` or `[x_t, t, condition]` to a tensor shaped like `x_t`;
            see `networks`.
        diffusion: a `GaussianDiffusion`; by default one with its own defaults.
        ema_decay: the largest decay of the average, in [0, 1).
        loss_weight: array `(T + 1,)` of weights of the loss at t = 0..T, as `diffusion.min_snr_weight()` and
            `diffusion.p2_weight()` return; `None` for 1.
        timestep_sampling: how t is drawn, always uniform in 1..T: "uniform" for each example by itself, "batch" for
            one t a batch, or "stratified" for times that are spread evenly over 1..T in each batch, so that the
            loss varies less from batch to batch.
        label_dropout: the share of training examples whose condition is dropped, in [0, 1), so that the network
            learns to do without, as guidance needs it; ignored by a network without condition.
        seed: integer, of the t and the noise drawn in training. A saved model goes on from where it stopped.

    Raises:
        ValueError: for a decay or a share outside [0, 1), a network whose output is not shaped like its input,
            weights that are not positive at some t in 1..T or an unknown way to draw t.

    Reference: Ho et al., 2020, algorithm 1.
    """

    def __init__(
        self,
        network,
        diffusion=None,
        ema_decay=0.999,
        loss_weight=None,
        timestep_sampling="stratified",
        label_dropout=0.1,
        *,
        seed=None,
        **kwargs,
    ):
        # Under mixed precision only the network computes in bfloat16: x_t, target and loss stay float32.
        super().__init__(**{**kwargs, "dtype": "float32"})
        if not 0 <= ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1). Received: ema_decay={ema_decay}")
        inputs = getattr(network, "inputs", None) or []
        shapes = [tuple(tensor.shape) for tensor in inputs]
        if len(shapes) not in (2, 3) or network.output.shape != shapes[0] or None in shapes[0][1:]:
            raise ValueError(
                "`network` must be a functional model of [x_t, t] or [x_t, t, condition], of a fixed shape, whose "
                f"output is shaped like x_t. Received: network={network} with inputs {shapes}"
            )
        if not _checks.is_between(label_dropout, 0, 1) or label_dropout == 1:
            raise ValueError(f"`label_dropout` must be in [0, 1). Received: label_dropout={label_dropout!r}")
        self.label_dropout = label_dropout
        self.conditional = len(shapes) == 3
        self.num_classes = None
        if self.conditional and "int" in inputs[2].dtype:
            embeddings = [layer for layer in network.layers if layer.name == "label_embedding"]
            if not embeddings:
                raise ValueError(
                    "A network of labels embeds them in a layer of the name 'label_embedding'; see `networks`."
                )
            self.num_classes = embeddings[0].input_dim - 1
        self.network = network
        if not isinstance(diffusion, (GaussianDiffusion, type(None))):
            raise ValueError(f"`diffusion` must be a `GaussianDiffusion`. Received: diffusion={diffusion!r}")
        self.diffusion = diffusion or GaussianDiffusion()
        self.ema_decay = ema_decay
        self.loss_weight = None if loss_weight is None else _checked_weight(loss_weight, self.diffusion.timesteps)
        if timestep_sampling not in list(TIMESTEP_SAMPLINGS):
            raise ValueError(
                f"`timestep_sampling` must be one of {list(TIMESTEP_SAMPLINGS)}. Received: {timestep_sampling!r}"
            )
        self.timestep_sampling = timestep_sampling
        self.seed = seed
        self.ema_weights = [
            self.add_weight(v.shape, dtype=v.dtype, trainable=False, name=f"ema_{index}")
            for index, v in enumerate(network.weights)
        ]
        for average, v in zip(self.ema_weights, network.weights):
            average.assign(ops.copy(v))
        hardware.arrange([*network.weights, *self.ema_weights])
        self._network_in_training = recording.Recording(
            lambda *inputs: network(list(inputs), training=True), has_effects=self._has_effects
        )
        self._fit_random = keras.random.SeedGenerator(seed)
        self._test_random = keras.random.SeedGenerator(0)
        self.programs = functools.lru_cache(maxsize=8)(functools.partial(sampling.Program, self))
        self.built = True

    @property
    def data_shape(self):
        """The shape of one example."""
        return tuple(self.network.output.shape[1:])

    @property
    def null(self):
        """What stands for no condition: the label K, or zeros."""
        return self.num_classes or 0

    def call(self, inputs, training=None):
        """The network's output for `(x_t, t)` or `(x_t, t, condition)`."""
        if training and not self.run_eagerly:
            return self._network_in_training(*inputs)
        return self.network(list(inputs), training=training)

    def _has_effects(self):
        """Whether a training step changes more of the network than its weights, or adds to the loss."""
        return bool(self.network.non_trainable_variables or self.network.losses)

    # Training.

    def compile(self, *args, jit_compile="auto", **kwargs):
        """Keras' own, on data of this model's shape."""
        super().compile(*args, jit_compile=jit_compile, **kwargs)
        self._auto_jit_compile = jit_compile == "auto"
        if self._auto_jit_compile and not self.run_eagerly:
            self.jit_compile = hardware.jit_compile()
        # Build everything here: `fit` would do it by calling the model on clean data, and TensorFlow traces a step
        # twice that creates variables.
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)
            hardware.arrange(self.optimizer.variables)
            hardware.fuse(self.optimizer)
        zeros = ops.zeros((1, *self.data_shape))
        self.compute_loss(y=zeros, y_pred=zeros)
        self.compute_metrics(None, zeros, zeros)
        self.reset_metrics()

    def get_compile_config(self):
        # Keras would store what "auto" came to here, for another backend or machine.
        config = super().get_compile_config()
        return {**config, "jit_compile": "auto"} if config and self._auto_jit_compile else config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))

    def fit(self, x=None, y=None, *args, callbacks=None, validation_data=None, **kwargs):
        """Keras' own, on clean data, after a look at the data.

        Raises:
            ValueError: if the data (arrays whole, streams on their first batch) have another shape than the
                network's input, lie outside `clip_range` or hold NaN, or if the network is conditioned and they hold
                no such condition; if the loss of an epoch is not finite.
        """
        x, first = self._checked(x, y)
        if validation_data is not None:
            validation_data, _ = self._checked(validation_data)
        if callbacks is None:
            callbacks = []
        elif isinstance(callbacks, keras.callbacks.Callback):
            callbacks = [callbacks]
        # First, so that a checkpoint at the end of an epoch does not keep weights that are lost.
        callbacks = [_Watch(first), *callbacks]
        return super().fit(x, y, *args, callbacks=callbacks, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """Keras' own, with the same t and noise at each call."""
        self._test_random.state.assign([0, 0])
        if not kwargs.get("_use_cached_eval_dataset"):  # Keras' flag for the validation data that `fit` has checked
            x, _ = self._checked(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def train_step(self, *args):
        """Keras' own on noisy data, then the moving average. Takes `(data)`, on JAX `(state, data)`."""
        if len(args) == 1:
            data = self._corrupt(*args, self._fit_random, self.label_dropout)
            updates = ops.copy(self.optimizer.iterations)
            logs = super().train_step(data)
            self._update_average(updates)
            return logs
        state, data = args
        variables = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        with _Stateless(variables, state) as scope:
            data = self._corrupt(data, self._fit_random, self.label_dropout)
            updates = ops.copy(self.optimizer.iterations)
        logs, state = super().train_step(scope.state(), data)
        with _Stateless(variables, state) as scope:
            self._update_average(updates)
        return logs, scope.state()

    def test_step(self, *args):
        """Keras' own on noisy data. Takes `(data)`, on JAX `(state, data)`."""
        if len(args) == 1:
            return super().test_step(self._corrupt(*args, self._test_random))
        state, data = args
        variables = (self.trainable_variables, self.non_trainable_variables, self.metrics_variables)
        with _Stateless(variables, state) as scope:
            data = self._corrupt(data, self._test_random)
        return super().test_step(scope.state(), data)

    def _corrupt(self, data, generator, label_dropout=0.0):
        """Clean data to Keras' `(x, y, sample_weight)`: the network's inputs, its target, and weights of the loss."""
        x_0, condition, _ = keras.utils.unpack_x_y_sample_weight(data)
        x_0 = ops.cast(x_0, "float32")
        shape = ops.shape(x_0)
        t = self._draw_timesteps(shape[0], generator)
        noise = keras.random.normal(shape, seed=generator)
        inputs = (self.diffusion.q_sample(x_0, t, noise), t)
        if self.conditional:
            condition = ops.cast(condition, "int32" if self.num_classes else "float32")
            kept = keras.random.uniform((shape[0],), seed=generator) >= label_dropout
            kept = ops.reshape(kept, (-1,) + (1,) * (len(condition.shape) - 1))
            inputs = (*inputs, ops.where(kept, condition, ops.full_like(condition, self.null)))
        return inputs, self.diffusion.target(x_0, t, noise), self._weight(t)

    def _draw_timesteps(self, batch_size, generator):
        """t in 1..T, `(batch,)`."""
        u = keras.random.uniform((batch_size,), seed=generator)
        index, number = ops.cast(ops.arange(batch_size), "float32"), ops.cast(batch_size, "float32")
        steps = self.diffusion.timesteps
        time = TIMESTEP_SAMPLINGS[self.timestep_sampling](u, index, number)
        return ops.minimum(1 + ops.cast(time * steps, "int32"), steps)  # in float32, time may be rounded to 1

    def _weight(self, t):
        """The weights at t, shaped like the loss of each example, `(batch, 1, ..., 1)`; `None` for 1."""
        if self.loss_weight is None:
            return None
        weight = ops.take(ops.convert_to_tensor(self.loss_weight, "float32"), t)
        return ops.reshape(weight, (-1,) + (1,) * (len(self.data_shape) - 1))

    def _update_average(self, updates):
        """One step of the moving average, if the optimizer has made one since it had made `updates`."""
        decay = ops.minimum(self.ema_decay, 1.0 - (1.0 + ops.cast(updates, "float32")) ** -0.75)
        # With gradient accumulation most batches update nothing.
        decay = ops.where(self.optimizer.iterations > updates, decay, 1.0)
        hardware.update_averages(self.ema_weights, self.network.weights, decay)

    def _checked(self, data, labels=None):
        """The data unchanged (a generator is rebuilt around its first batch), and the part that was looked at."""
        if isinstance(data, types.GeneratorType):
            first = next(data, None)
            batches = itertools.chain([first], data)
            # Keras wants tuples.
            data = (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in batches)
        elif data is None:
            first = None
        elif isinstance(data, keras.utils.PyDataset):
            first = data[0]
        elif isinstance(data, (list, tuple)) or hasattr(data, "shape"):
            first = data if labels is None else (data, labels)
        else:
            first = next(iter(data), None)
        if first is None:
            raise ValueError(f"The data hold no batch. Received: {data}")
        x_0, condition, _ = keras.utils.unpack_x_y_sample_weight(first)
        x_0 = _checks.data(ops.convert_to_numpy(x_0), self.data_shape, self.diffusion.clip_range)
        if self.conditional:
            if condition is None:
                raise ValueError("The network is conditioned: it needs `(x_0, label)` batches. Received: x_0 alone.")
            every = getattr(data, "labels", None)  # of `datasets.Batches`, where a batch does not show all
            condition = ops.convert_to_numpy(condition) if every is None else every
            self.conditions(condition, len(condition))
        return data, x_0

    def conditions(self, labels, num):
        """Labels, or vectors, as the network takes them.

        Args:
            labels: one label or vector for all, or `num` of them; `None` for no condition.
            num: how many examples.

        Returns:
            int32 array `(num,)` or float32 array `(num, context_dim)`; `None` for a network without condition.

        Raises:
            ValueError: if there are labels and no condition, or they have another shape or range.
        """
        if not self.conditional:
            if labels is not None:
                raise ValueError(f"The network is not conditioned and takes no labels. Received: labels={labels!r}")
            return None
        shape = (num, *self.network.inputs[2].shape[1:])
        if labels is None:
            return np.full(shape, self.null, "int32" if self.num_classes else "float32")
        labels = np.asarray(labels)
        if self.num_classes and not (
            np.issubdtype(labels.dtype, np.integer) and np.all((labels >= 0) & (labels < self.num_classes))
        ):
            shown = np.array2string(labels, threshold=8)
            raise ValueError(f"Labels must be integers in 0..{self.num_classes - 1}. Received: labels={shown}")
        if labels.shape not in (shape, shape[1:]) or not np.all(np.isfinite(labels)):
            raise ValueError(
                f"Expected finite conditions of shape {shape}, or one of shape {shape[1:]} for all. "
                f"Received: shape {labels.shape}"
            )
        return np.broadcast_to(labels, shape).astype("int32" if self.num_classes else "float32")

    # Sampling.

    @property
    def default_sampler(self):
        """The sampler of `sample`: `DPMSolver(20)`, or fewer steps where the schedule has fewer."""
        return samplers.DPMSolver(min(20, self.diffusion.timesteps))

    def sample(
        self,
        num_samples,
        sampler=None,
        seed=None,
        *,
        labels=None,
        guidance_scale=1.0,
        guidance_rescale=0.0,
        guidance_interval=None,
        dynamic_threshold=None,
        use_ema=True,
        batch_size=None,
        return_trajectory=None,
        verbose=0,
    ):
        """Generates data, with a compiled program that is kept for further calls.

        The starting noise depends on the seed and the index of a sample alone. So do the samples of a
        deterministic sampler, whatever `num_samples` and `batch_size` (up to rounding, as the network computes
        batches of other sizes in another order); those of a stochastic one do for the same `batch_size`, given
        explicitly. The program serves all samplers; it is compiled again for another size of the batch.

        Args:
            num_samples: how many.
            sampler: a `samplers.Sampler`; by default `default_sampler`.
            seed: non-negative integer; `None` draws one (from Python's `random`).
            labels: what a conditioned network is to make: a label or vector for all, or `num_samples` of them;
                `None` for no condition.
            guidance_scale: w of classifier-free guidance: the network's output is (1 − w) that without condition
                plus w that with it. 0 and 1 are these two, and call the network once; any other w calls it on a
                doubled batch. (w is 1 more than that of Ho and Salimans, 2022.)
            guidance_rescale: in [0, 1], how far the deviation of the guided output is brought back to that of the
                conditional one. [Lin et al., 2024, Eq. 15-16, φ]
            guidance_interval: `(low, high)`, the t at which there is guidance; elsewhere w is 1. [Kynkäänniemi et
                al., 2024]
            dynamic_threshold: p of dynamic thresholding, in (0, 1), as in `GaussianDiffusion.predict_x0`.
            use_ema: whether to use the averaged weights rather than the raw ones.
            batch_size: how many at a time, the last batch filled up; `None` for at most 256.
            return_trajectory: number k of intermediate states to return, at the ends of steps that are evenly
                spaced, the last being the samples.
            verbose: 1 for a progress bar.

        Returns:
            float32 array `(num_samples, ...)` in the data's range; with `return_trajectory` a tuple of it and two
            arrays `(k, num_samples, ...)`, of x_t and of the predicted x_0.

        Raises:
            ValueError: for an invalid number, seed or label, or more steps than the schedule has.
        """
        if not _checks.is_count(num_samples):
            raise ValueError(f"`num_samples` must be a positive integer. Received: num_samples={num_samples!r}")
        sampler = sampler or self.default_sampler
        if not isinstance(sampler, samplers.Sampler):
            raise ValueError(f"`sampler` must be one of `keras_ddpm.samplers`. Received: sampler={sampler!r}")
        steps = sampler.steps(self.diffusion.schedule)
        if return_trajectory is not None and not _checks.is_count(return_trajectory):
            raise ValueError(
                f"`return_trajectory` must be a positive integer. Received: return_trajectory={return_trajectory!r}"
            )
        if (return_trajectory or 1) > len(steps):
            raise ValueError(f"{sampler} has {len(steps)} steps. Received: return_trajectory={return_trajectory}")
        seed = sampling.checked_seed(seed)
        states = sampling.run(
            self,
            steps,
            lambda indices: sampling.prior(self, seed, indices),
            num_samples,
            seed,
            labels=labels,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            dynamic_threshold=dynamic_threshold,
            use_ema=use_ema,
            batch_size=batch_size,
            verbose=verbose,
            parts=return_trajectory,
        )
        return (states[0][-1], *states) if return_trajectory else states

    def denoise(self, x_t, t, clip=True, **options):
        """The prediction of x_0 that samplers see, with the compiled program of `sample`.

        Args:
            x_t: noisy data, `(batch, ...)`.
            t: their time, in 1..T, one for all.
            clip: whether to clip it to the `clip_range` of the diffusion.
            **options: of `sample`: `labels`, `guidance_scale`, `guidance_rescale`, `guidance_interval`,
                `dynamic_threshold`, `use_ema`, `batch_size` and `verbose`.

        Returns:
            float32 array `(batch, ...)`.

        Raises:
            ValueError: for data of another shape, a time outside 1..T or an invalid option.
        """
        x_t = _checks.data(x_t, self.data_shape, name="x_t")
        if not _checks.is_count(t) or t > self.diffusion.timesteps:
            raise ValueError(f"`t` must be an integer in 1..{self.diffusion.timesteps}. Received: t={t!r}")
        row = np.array([[t, 0.0, 1.0, 0.0, 0.0, 0.0]])
        return sampling.run(self, [row], lambda indices: x_t[indices], len(x_t), 0, clip=clip, **options)

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
        }

    @classmethod
    def from_config(cls, config):
        objects = {name: keras.saving.deserialize_keras_object(config[name]) for name in ("network", "diffusion")}
        return cls(**{**config, **objects})

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["fit_random"] = self._fit_random.state  # Keras does not save it, and a resumed run would repeat itself.

    def load_own_variables(self, store):
        self._fit_random.state.assign(store["fit_random"])
        super().load_own_variables({key: store[key] for key in store.keys() if key != "fit_random"})


class _Stateless(keras.StatelessScope):
    """The scope in which JAX' state, lists of values, stands for lists of variables."""

    def __init__(self, variables, values):
        super().__init__(zip(itertools.chain(*variables), itertools.chain(*values)))
        self.variables = variables

    def state(self):
        return tuple([self.get_current_value(v) for v in group] for group in self.variables)


class _Watch(keras.callbacks.Callback):
    """Says in words what a loss means that is not finite, or that does not fall.

    Args:
        x_0: clean data, some hundreds of which are looked at.
    """

    patience = 300  # optimizer updates

    def __init__(self, x_0):
        super().__init__()
        self.x_0 = x_0[:256]

    def on_train_begin(self, logs=None):
        """Computes the loss of a network that always predicts zero."""
        diffusion = self.model.diffusion
        t = np.linspace(1, diffusion.timesteps, len(self.x_0)).round().astype("int32")
        noise = np.random.default_rng(0).standard_normal(self.x_0.shape)
        target = diffusion.target(self.x_0, t, noise)
        weight = self.model._weight(t)
        self.trivial = float(self.model.compute_loss(y=target, y_pred=ops.zeros_like(target), sample_weight=weight))
        self.start = int(self.model.optimizer.iterations)

    def on_epoch_end(self, epoch, logs=None):
        loss = (logs or {}).get("loss", 0.0)
        if not np.isfinite(loss):
            raise ValueError(
                f"The loss of epoch {epoch + 1} is {loss}: the data hold NaN or infinite values, or the learning "
                "rate is too high."
            )
        if loss > 0.9 * self.trivial and int(self.model.optimizer.iterations) - self.start >= self.patience:
            warnings.warn(
                f"After epoch {epoch + 1} the loss is {loss:.3f}; always predicting zero gives {self.trivial:.3f}. "
                "The network has learned next to nothing: check the learning rate and the data.",
                stacklevel=2,
            )


def _checked_weight(loss_weight, timesteps):
    """The weights as a float64 array `(T + 1,)`."""
    try:
        weight = np.asarray(loss_weight, "float64")
    except (TypeError, ValueError):
        weight = np.empty(0)
    if weight.shape != (timesteps + 1,):
        raise ValueError(
            f"`loss_weight` must be an array of {timesteps + 1} numbers, for t = 0..{timesteps}. "
            f"Received: loss_weight={loss_weight!r}"
        )
    wrong = np.flatnonzero(~((weight > 0) & np.isfinite(weight)))
    if wrong[wrong > 0].size:
        t = wrong[-1]
        reason = " There the step that sampling starts from would never be trained." if weight[t] == 0 else ""
        raise ValueError(
            f"`loss_weight` must be positive at t = 1..{timesteps}. Received: {weight[t]} at t = {t}.{reason}"
        )
    return weight
