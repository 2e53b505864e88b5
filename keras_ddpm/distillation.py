"""A trained model is distilled into one that samples in one or two network calls.

A sampler that adds no noise turns each x_T into one sample x_0. `pairs` makes both with a trained model. At each x_t
between the two, a model that is trained on them predicts this sample, and not the mean of all data that could lie
behind x_t. So one call from x_T is enough, and a second call makes the sample sharper:

>>> data = distillation.pairs(model, 60_000)
>>> fast = DiffusionModel.from_model(model, sampler=samplers.DDIM(1), timestep_sampling="half_at_T")
>>> fast.compile(loss="mae", optimizer=optimizers.Adam(1e-3))
>>> fast.fit(data, epochs=10)
>>> fast.sample(16)  # one network call; `samplers.DDIM(2, spacing=(1000, 700))` makes two

The samples can be guided. The model that learns from them then needs no guidance. It suits samplers that add no noise.
Its prediction must be "x0", "v" or "flow". At T, "epsilon" says nearly nothing about x_0.

Reference: Luhman and Luhman, 2021 ("Knowledge Distillation in Iterative Generative Models"), for one call; Liu et al.,
2022 ("Flow Straight and Fast"), for all x_t.
"""

import dataclasses
from typing import Any

import numpy as np

from keras_ddpm import _checks, datasets, samplers
from keras_ddpm.diffusion import GaussianDiffusion
from keras_ddpm.model import DiffusionModel
from keras_ddpm.samplers import loop

__all__ = ["Pairs", "pairs"]


@dataclasses.dataclass(eq=False, repr=False)
class Pairs(datasets.Batches):
    """Batches of samples with the noise from which they were made, `{"x_0": x_0, "noise": noise}`.

    With it, x_T = alpha_T x_0 + sigma_T noise is where `sample` started. It is drawn again for each batch, so only the
    samples are in memory.

    Args:
        x: samples with the indices 0, 1, ..., `(num, ...)`: floats, or uint8 images.
        labels: array `(num,)` or `None`.
        diffusion: the process of the model that made them.
        noise_seed: the seed with which it made them.
        batch_size, shuffle, steps_per_epoch, seed, class_names, num_workers: as in `datasets.Batches`.
        flip: must be false, as the noise belongs to the samples as they are.

    Raises:
        ValueError: if `flip` is set, or `datasets.Batches` raises it.
    """

    diffusion: GaussianDiffusion = dataclasses.field(kw_only=True)
    noise_seed: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.require(not self.flip, "Samples with noise cannot be flipped", flip=self.flip)
        _checks.counts(low=0, noise_seed=self.noise_seed)

    def _examples(self, chosen, mirrored):
        x_0 = super()._examples(chosen, mirrored)
        x_t = loop.prior(self.diffusion, x_0.shape[1:], self.noise_seed, chosen)
        schedule = self.diffusion.schedule
        return {"x_0": x_0, "noise": ((x_t - schedule.alpha[-1] * x_0) / schedule.sigma[-1]).astype("float32")}


def pairs(
    model: DiffusionModel,
    num_pairs: int,
    sampler: samplers.Sampler | None = None,
    seed: int = 0,
    *,
    batch_size: int = 64,
    shuffle: bool = True,
    **options: Any,
) -> Pairs:
    """Makes samples of a trained model, with the noise from which it made them.

    Args:
        model: a `DiffusionModel`.
        num_pairs: number of samples.
        sampler: a sampler that adds no noise; `None` for `DPMSolver(20)`.
        seed: seed of the samples, and of their order in training.
        batch_size: number of pairs in a batch of training.
        shuffle: as in `datasets.Batches`.
        **options: what to sample, as in `DiffusionModel.sample`, such as `labels`, `guidance_scale` and `guidance`.

    Returns:
        `Pairs`, for `fit` of a `DiffusionModel` with the same process. `x` are the samples.

    Raises:
        ValueError: if the sampler adds noise, labels are missing, or `sample` or `Pairs` raises it.
    """
    refused = {"first", "return_trajectory", "image_noise"} & set(options)
    _checks.require(not refused, "Pairs are all of the samples, from index 0 on", **options)
    _checks.counts(num_pairs=num_pairs)
    _checks.counts(high=num_pairs, batch_size=batch_size)
    _checks.counts(low=0, seed=seed)
    sampler = sampler or samplers.DPMSolver(min(20, model.diffusion.timesteps))
    noisy = np.any(sampler.table(model.diffusion.schedule)["std"])
    _checks.require(not noisy, "The samples of a sampler with noise do not depend on x_T alone", sampler=sampler)
    condition, labels = model.condition, options.get("labels")
    valid = labels is not None or not (condition and condition.num_classes)
    _checks.require(valid, "The model has classes: choose `labels`", labels=labels)
    parts = {}
    if condition:
        given = condition.by_name(labels, options.get("images"))
        parts = {name: condition.encoded(values, num_pairs, name) for name, values in given.items()}
    x = model.sample(num_pairs, sampler, seed, **options)
    labels = parts if len(parts) > 1 else next(iter(parts.values()), None)
    return Pairs(x, labels, batch_size, shuffle, seed=seed, diffusion=model.diffusion, noise_seed=seed)
