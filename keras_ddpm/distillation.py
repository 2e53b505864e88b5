"""A trained model is tuned to sample in one or two network calls."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ddpm import _checks
from keras_ddpm import samplers
from keras_ddpm.model import DiffusionModel


@keras.saving.register_keras_serializable(package="keras_ddpm")
class ConsistencyModel(DiffusionModel):
    """A model that predicts where the path of the probability-flow equation through x_t ends, in one call.

    It starts as a trained `DiffusionModel`, whose predictions are means over many ends. At x_t, it is trained to
    predict what it predicts itself at an earlier x_s with the same noise. At s = 0 this is the data. In the first
    stage, s is far from t. Each further stage divides the distance of their noise scales sigma/alpha by 4. `evaluate`
    uses the last stage, so that its losses can be compared.

    Images of one or two calls are not good yet: measured on Fashion-MNIST, they were much farther from photographs than
    those of ten calls of the trained model.

    `sample` and `editing.variations` take `samplers.Consistency`. Other samplers solve the equation whose solution the
    model predicts already, so they do not suit it.

    Example:

    >>> fast = ConsistencyModel.from_model(model, updates_per_stage=2000)
    >>> fast.compile(loss="mse", optimizer=keras.optimizers.Adam(1e-4))
    >>> fast.fit(images, epochs=20)
    >>> fast.sample(16)  # one network call; `samplers.Consistency(2)` makes two

    Args:
        *args: arguments of `DiffusionModel`.
        updates_per_stage: number of updates of the weights in each stage but the last.
        num_stages: number of stages.
        **kwargs: arguments of `DiffusionModel`.

    Raises:
        ValueError: if a number is not a positive integer, or `DiffusionModel` raises it.

    Reference: Geng et al., 2024 ("Consistency Models Made Easy"), with its mapping from t to s.
    """

    def __init__(self, *args, updates_per_stage: int = 1000, num_stages: int = 3, **kwargs):
        super().__init__(*args, **kwargs)
        _checks.counts(updates_per_stage=updates_per_stage, num_stages=num_stages)
        self.updates_per_stage = updates_per_stage
        self.num_stages = num_stages
        tables = [earlier_times(self.diffusion.schedule, stage) for stage in range(num_stages)]
        self._earlier = np.stack(tables).astype("int32")
        self._in_last_stage = False
        # Those of the squared error of v, which is that of x_0 by sigma^2: all times depend on those with little noise.
        # The paper's weights are 1 / (r_t - r_s), which left these untrained on points. An error of the noise is
        # unbounded as one of v, so there is a limit.
        variance = np.maximum(self.diffusion.schedule.sigma, 1e-12) ** 2
        self._weights = np.minimum(self.diffusion.x0_weight() / variance, 100.0).astype("float32")

    @property
    def default_sampler(self) -> samplers.Sampler:
        """`sampler`, or else `Consistency(1)`."""
        return self.sampler or samplers.Consistency(1)

    @classmethod
    def from_model(cls, model: DiffusionModel, **kwargs: Any) -> "ConsistencyModel":
        """Makes a consistency model that starts as the average of a trained model.

        Args:
            model: a `DiffusionModel`. It is not changed.
            **kwargs: arguments of this class. The others are those of `model`, without `loss_weight` and `sampler`.

        Raises:
            ValueError: if an argument is invalid.
        """
        return super().from_model(model, **{"loss_weight": None, "sampler": None, **kwargs})

    def test_step(self, *args):
        self._in_last_stage = True  # while the step is traced
        try:
            return super().test_step(*args)
        finally:
            self._in_last_stage = False

    def target(self, x_0, noise, x_t, t, condition=None):
        """What the network should predict at `x_t`, so that it predicts the same x_0 as at an earlier time."""
        s = ops.take(ops.convert_to_tensor(self._earlier), self._stage(), axis=0)
        s = ops.take(s, t)
        x_s = self.diffusion.q_sample(x_0, s, noise)
        y = self.call([x_s, s] if condition is None else [x_s, s, condition], training=False)
        # At s = 0, x_s is the data, and so is its prediction, whatever y is.
        end = ops.stop_gradient(self.diffusion.predict_x0(x_s, s, y))
        return self.diffusion.target(end, t, self.diffusion.predict_noise(x_t, t, end))

    def weight_of(self, t):
        weights = ops.take(ops.convert_to_tensor(self._weights), t)
        weights = ops.reshape(weights, (-1,) + (1,) * (len(self.data_shape) - 1))
        given = super().weight_of(t)
        return weights if given is None else weights * given

    def _stage(self):
        """The number of the stage, a scalar tensor."""
        if self._in_last_stage:
            return ops.convert_to_tensor(self.num_stages - 1, "int32")
        return ops.minimum(ops.cast(self.optimizer.iterations, "int32") // self.updates_per_stage, self.num_stages - 1)

    def get_config(self):
        return super().get_config() | {"updates_per_stage": self.updates_per_stage, "num_stages": self.num_stages}


def earlier_times(schedule: Any, stage: int) -> np.ndarray:
    """The earlier time s of each t, `(T + 1,)` integers in 0..t − 1 (0 at t = 0).

    With the noise scale r = sigma / alpha, r_s is at most r_t − r_t (1 + 8 sigmoid(−r_t)) / 4^(stage + 1).

    Args:
        schedule: a `schedules.Schedule`.
        stage: number of the stage, from 0.

    Reference: Geng et al., 2024, Eq. 14 with q = 4, k = 8, b = 1.
    """
    with np.errstate(divide="ignore"):
        r = schedule.sigma / schedule.alpha
    r = np.where(np.isfinite(r), r, np.finfo("float64").max)
    n = 1 + 8 / (1 + np.exp(np.minimum(r, 700)))
    wanted = r * np.maximum(0, 1 - n / 4 ** (stage + 1))
    times = np.searchsorted(r, wanted, side="right") - 1
    return np.clip(times, 0, np.maximum(np.arange(len(r)) - 1, 0))
