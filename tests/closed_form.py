"""A model without anything to learn: data whose best prediction is known in closed form.

The data are a mixture of Gaussians in one dimension, Σ w_k N(m_k, s²), so that x_t is Σ w_k N(alpha m_k, v) with
v = alpha² s² + sigma², and the mean of x_0 given x_t is Σ r_k (m_k + alpha s² / v (x_t − alpha m_k)) with the
responsibilities r_k of the components.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

import keras_ddpm as kd

erf = np.vectorize(math.erf)


@dataclasses.dataclass(frozen=True)
class Mixture:
    weights: tuple
    means: tuple
    std: float

    def cdf(self, x, alpha=1.0, sigma=0.0):
        """The distribution function of x_t at points `(n,)`."""
        scale = np.hypot(alpha * self.std, sigma)
        below = (1 + erf((x[:, None] - alpha * np.array(self.means)) / (np.sqrt(2) * scale))) / 2
        return below @ np.array(self.weights)

    def quantile(self, u):
        """The inverse of the distribution function of x_0, by bisection."""
        low, high = np.full_like(u, -9.0), np.full_like(u, 9.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low

    def denoise(self, x, alpha, sigma, label=None):
        """E[x_0 | x_t] in float64 at points of any shape: of a component, or of the whole mixture."""
        variance = alpha**2 * self.std**2 + sigma**2
        means = [mean + alpha * self.std**2 / variance * (x - alpha * mean) for mean in self.means]
        if label is not None:
            return means[label]
        weights = [w * np.exp(-((x - alpha * m) ** 2) / (2 * variance)) for w, m in zip(self.weights, self.means)]
        return sum(w * mean for w, mean in zip(weights, means)) / sum(weights)

    def model(self, schedule, conditional=False, size=1):
        """A `DiffusionModel` of `size` independent draws, of the mixture or, given a label, of its component."""
        inputs = [keras.Input((size,)), keras.Input((), dtype="int32")]
        if conditional:
            inputs.append(keras.Input((), dtype="int32"))
        network = keras.Model(inputs, _Denoiser(self, schedule, name="label_embedding")(*inputs))
        return kd.DiffusionModel(network, kd.GaussianDiffusion(schedule, "x0", clip_range=None))


class _Denoiser(keras.layers.Layer):
    def __init__(self, data, schedule, **kwargs):
        super().__init__(**kwargs)
        self.data = data
        self.schedule = schedule
        self.input_dim = len(data.weights) + 1  # of labels, as a model asks the layer "label_embedding"

    def call(self, x_t, t, label=None):
        tables = self.schedule.alpha, self.schedule.sigma
        alpha, sigma = (ops.take(ops.convert_to_tensor(table, "float32"), t)[:, None, None] for table in tables)
        means = ops.convert_to_tensor(self.data.means, "float32")  # the components are the last axis
        variance = alpha**2 * self.data.std**2 + sigma**2
        residual = x_t[..., None] - alpha * means
        logits = ops.log(ops.convert_to_tensor(self.data.weights, "float32")) - residual**2 / (2 * variance)
        if label is not None:
            components, label = ops.arange(len(self.data.weights)), label[:, None, None]
            chosen = ops.logical_or(components == label, label == len(self.data.weights))
            logits = ops.where(chosen, logits, -1e9)
        mean = means + alpha * self.data.std**2 / variance * residual
        responsibilities = ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))
        return ops.sum(responsibilities * mean, axis=-1)


GAUSSIAN = Mixture((1.0,), (0.3,), 0.2)
TWO = Mixture((0.4, 0.6), (-0.5, 0.5), 0.15)
