"""Editing images with a trained model.

All functions take float images `(batch, height, width, channels)` in the data's range, or data of any other shape for
which the model was made. They return float32 arrays. Arguments of several functions:

    num_steps: number of steps of the default sampler, at most T. `None` for the sampler's own number.
    seed: a non-negative integer. `None` draws one.
    **options: options of `DiffusionModel.sample`: `labels` (one for all images or one for each, or a dict by name),
        `guidance_scale`, `guidance`, `image_noise`, `use_ema`, `batch_size` and `verbose`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_ddpm import _checks, samplers
from keras_ddpm.conditions import seen
from keras_ddpm.model import DiffusionModel
from keras_ddpm.samplers import loop
from keras_ddpm.schedules import Schedule

__all__ = ["cascade", "decode", "encode", "inpaint", "interpolate", "resampled", "upscale", "variations"]

# For `encode` and `decode`. With the cosine schedule, the error on images is half of the error with "uniform" spacing.
# With the linear schedule, it is 1.5 times as large.
INVERTIBLE = samplers.DDIM(100, spacing="logsnr")


def inpaint(
    model: DiffusionModel,
    images: Any,
    masks: Any,
    seed: int | None = None,
    *,
    sampler: samplers.Sampler | None = None,
    num_steps: int | None = None,
    num_resamples: int = 10,
    **options,
) -> np.ndarray:
    """Fills the unknown part of images.

    Every step of the sampler but the last is made `num_resamples` times. In between, added noise leads back to the
    start of the step. This makes the unknown part fit the known part.

    With `DDPM(variance="large")` the result tends to a sample of the conditional distribution as the numbers of steps
    and of resamplings grow. With "small", the variance of the result stays too low. For two pixels of correlation 0.8
    and T = 1000, 100 resamplings leave it a tenth too low if the pixels' standard deviation is 1, and a quarter too low
    if it is 0.2. With few steps, "large" leaves visible noise, so the default is "small". Deterministic samplers fill
    the unknown part less well. Resampled steps of multistep samplers are of first order.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`; unknown pixels may hold anything.
        masks: `(batch, height, width, 1)`, or `(height, width, 1)` for all images: 1 for known pixels and 0 for pixels
            to fill.
        seed: see above.
        sampler: a `samplers.Sampler`; `None` for `DDPM(50)`.
        num_steps: see above.
        num_resamples: how often each step is made; 1 for no resampling.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`, equal to `images` in the known pixels.

    Raises:
        ValueError: if images or masks have a wrong shape or are out of range, or an option is invalid.

    Reference: as in `resampled`.
    """
    images, masks = _checks.array(images, "images"), np.asarray(masks)
    if masks.shape == (*images.shape[1:-1], 1):
        masks = np.repeat(masks[None], len(images), axis=0)
    if masks.shape == (*images.shape[:-1], 1):
        images = np.where(masks == 0, np.float32(0), images)
    images = _images(model, images, "images")
    shape = (*images.shape[:-1], 1)
    _checks.require(masks.shape == shape, f"`masks` must have the shape {shape}", shape=masks.shape)
    _checks.require(np.all((masks == 0) | (masks == 1)), "`masks` must hold nothing but 0 and 1")
    _checks.counts(num_resamples=num_resamples)
    seed = _checks.seed(seed)
    schedule = model.diffusion.schedule
    steps = _sampler(model, sampler, num_steps, samplers.DDPM(50)).steps(schedule)
    resampled_steps = resampled(steps, schedule, num_resamples)

    def start(indices):
        known = _noisy(model, images, schedule.timesteps, seed, indices)
        return np.where(masks[indices], known, loop.prior(model.diffusion, model.data_shape, seed, indices))

    return model.run(loop.Job(resampled_steps, start, len(images), seed, known=(images, masks)), **options)


def resampled(steps: list, schedule: Schedule, num_resamples: int) -> list:
    """The steps of a sampler, with each but the last made several times. Noise is added in between.

    Args:
        steps: list of rows, as `Sampler.steps` returns.
        schedule: a `schedules.Schedule`.
        num_resamples: how often each step is made.

    Returns:
        A list of rows.

    Reference: Lugmayr et al., 2022 ("RePaint"), algorithm 1.
    """
    if num_resamples == 1:
        return steps
    result = []
    for rows, after in zip(steps, [*steps[1:], None]):
        # A change by resampling is not a slope in time. So this call stands for the earlier ones.
        rows = rows.copy()
        for name in ("x_0", "x"):
            rows[f"from_{name}"][0] += rows["from_previous"][0].sum() * rows[f"remember_{name}"][0]
        rows["from_previous"][0] = 0.0
        if after is not None:
            again = rows.copy()
            again[-1] = samplers.add_noise_back(rows[-1], schedule, int(after["t"][0]), int(rows["t"][0]))
            result += [again] * (num_resamples - 1)
        result.append(rows)
    return result


def variations(
    model: DiffusionModel,
    images: Any,
    strength: float,
    seed: int | None = None,
    *,
    sampler: samplers.Sampler | None = None,
    num_steps: int | None = None,
    **options,
) -> np.ndarray:
    """Makes variations of images: adds noise up to a time and removes it again.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`.
        strength: the time as a share of T, in [0, 1]. 0 returns the images. 1 ignores them and returns what
            `model.sample` returns.
        seed: see above.
        sampler: a `samplers.Sampler`; `None` for the default of `model.sample`. It makes only the share `strength` of
            its steps.
        num_steps: see above.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`.

    Raises:
        ValueError: if images have a wrong shape or are out of range, `strength` is outside [0, 1], or an option is
            invalid.

    Reference: Meng et al., 2022 ("SDEdit"), algorithm 1.
    """
    images = _images(model, images, "images")
    _checks.require(_checks.is_between(strength, 0, 1), "`strength` must be in [0, 1]", strength=strength)
    seed = _checks.seed(seed)
    sampler = _sampler(model, sampler, num_steps, model.default_sampler)
    schedule = model.diffusion.schedule
    t = round(strength * schedule.timesteps)

    def start(indices):
        if t == schedule.timesteps:
            return loop.prior(model.diffusion, model.data_shape, seed, indices)
        return _noisy(model, images, t, seed, indices)

    steps = [samplers.row([1], from_x=1.0)]  # returns x itself; `model.run` still checks the options
    if t > 0:
        steps = sampler.shortened(strength, schedule.timesteps).steps(schedule.until(t))
    return model.run(loop.Job(steps, start, len(images), seed), **options)


def upscale(
    model: DiffusionModel, images: Any, seed: int | None = None, *, strength: float = 1.0, **options
) -> np.ndarray:
    """Enlarges images with a model that was trained on pairs of large images and small ones.

    Args:
        model: a `DiffusionModel` whose network has images as condition, with as many channels as it makes.
        images: small images `(batch, height, width, channels)`.
        seed: see above.
        strength: 1 starts from noise. Less starts from the images enlarged by interpolation, with as much noise as
            there is at this share of T. This makes only this share of the steps.
        **options: see above, and `sampler` and `num_steps` as in `variations`. Use some `image_noise` for images that
            another model has made, if the model was trained with it.

    Returns:
        `(batch, height, width, channels)` of the model's size.

    Raises:
        ValueError: if the model has no such condition, the images have a wrong shape or are out of range, or an option
            is invalid.

    Reference: Ho et al., 2022 ("Cascaded diffusion models").
    """
    shape, known = model.data_shape, model.condition
    if known is None or "image" not in known or known["image"].shape != shape:
        raise ValueError(f"The model is not an upscaler, which needs condition images of its own shape, {shape}.")
    _checks.require(np.ndim(images) == 4, "Expected (batch, height, width, channels)", shape=np.shape(images))
    given = known.by_name(options.pop("labels", None), known.encoded(images, len(images), "image"), complete=False)
    large = np.clip(ops.convert_to_numpy(seen(given["image"], None, None, shape)), -1, 1)
    return variations(model, large, strength, seed, labels=given, **options)


def cascade(models: Sequence[DiffusionModel], num_samples: int, seed: int | None = None, **options) -> np.ndarray:
    """Generates images with a model, and enlarges them with others, one after the other.

    Args:
        models: a `DiffusionModel` of small images, and the upscalers, in order.
        num_samples: number of images.
        seed: seed of the first model; `None` draws one. The next models use the next seeds.
        **options: options of `DiffusionModel.sample`, such as `labels`, for every model that takes them. `image_noise`
            is for the upscalers. Call the models one by one to give each its own.

    Returns:
        `(num_samples, height, width, channels)` of the last model's size.

    Raises:
        ValueError: if there is no model, an option is invalid, or as in `upscale`.

    Reference: Ho et al., 2022 ("Cascaded diffusion models").
    """
    _checks.require(models, "`models` must be a model of small images, and upscalers", models=models)
    seed, noise = _checks.seed(seed), options.pop("image_noise", 0.0)
    images = models[0].sample(num_samples, seed=seed, **options)
    for number, model in enumerate(models[1:], 1):
        labeled = model.condition and model.condition.given[0] != "image"
        of_model = options if labeled else {name: value for name, value in options.items() if name != "labels"}
        images = upscale(model, images, seed + number, image_noise=noise, **of_model)
    return images


def encode(model: DiffusionModel, images: Any, *, num_steps: int | None = None, **options) -> np.ndarray:
    """Finds the noise from which DDIM makes these images. Runs its steps in reverse order, without clipping.

    `decode(encode(images))` returns the images with an error that falls with `num_steps`. For the README's flowers and
    100 steps, the root mean squared error of pixels in [-1, 1] is 0.078. `python examples/edit.py reconstruct` prints
    it.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`.
        num_steps: see above; `None` for 100.
        **options: see above.

    Returns:
        x_T, `(batch, height, width, channels)`.

    Raises:
        ValueError: if images have a wrong shape or are out of range, or an option is invalid.

    Reference: Song et al., 2021 ("DDIM"), section 4.3; Dhariwal and Nichol, 2021, appendix F.
    """
    images = _images(model, images, "images")
    schedule = model.diffusion.schedule
    times = _sampler(model, None, num_steps, INVERTIBLE).timesteps(schedule)[::-1]
    s, t = times[:-1], times[1:]
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    ratio = alpha_t / schedule.alpha[s]
    # x_t = ratio x_s + from_noise ε, with ε = (x_s − alpha_t x_0) / sigma_t. The network is called with x_s and t.
    from_noise = sigma_t - ratio * schedule.sigma[s]
    rows = samplers.row(t, from_x=ratio + from_noise / sigma_t, from_x_0=-from_noise * alpha_t / sigma_t)
    job = loop.Job(np.split(rows, len(rows)), lambda indices: images[indices], len(images), clip=False)
    return model.run(job, **options)


def decode(model: DiffusionModel, noise: Any, *, num_steps: int | None = None, **options) -> np.ndarray:
    """Makes images from noise x_T with DDIM, without clipping.

    Args:
        model: a `DiffusionModel`.
        noise: x_T, `(batch, height, width, channels)`, as `encode` returns it.
        num_steps: see above; `None` for 100.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`.

    Raises:
        ValueError: if the noise has a wrong shape, or an option is invalid.

    Reference: Song et al., 2021 ("DDIM"), Eq. 12 with σ = 0.
    """
    noise = _checks.data(noise, model.data_shape, name="noise")
    steps = _sampler(model, None, num_steps, INVERTIBLE).steps(model.diffusion.schedule)
    return model.run(loop.Job(steps, lambda indices: noise[indices], len(noise), clip=False), **options)


def interpolate(model: DiffusionModel, images_a: Any, images_b: Any, num: int, **options) -> np.ndarray:
    """Interpolates between pairs of images: encodes both, mixes the noise on a sphere and decodes it.

    Args:
        model: a `DiffusionModel`.
        images_a: `(batch, height, width, channels)`.
        images_b: images of the same shape.
        num: number of images for each pair, including both ends.
        **options: see above, and `num_steps`, the number of steps of `encode` and of `decode`; `None` for 100.

    Returns:
        `(num, batch, height, width, channels)`, from `images_a` itself to `images_b` itself.

    Raises:
        ValueError: if images have a wrong shape or are out of range, `num` is below 2, or an option is invalid.

    Reference: Song et al., 2021 ("DDIM"), appendix D.5.
    """
    _checks.counts(low=2, num=num)
    a, b = _images(model, images_a, "images_a"), _images(model, images_b, "images_b")
    _checks.require(a.shape == b.shape, "Expected images of the same shape", shapes=(a.shape, b.shape))
    start, end = (encode(model, images, **options) for images in (a, b))
    mixed = (_slerp(start, end, fraction) for fraction in np.linspace(0, 1, num)[1:-1])
    return np.stack([a, *(decode(model, noise, **options) for noise in mixed), b])


def _slerp(a, b, fraction):
    """Spherical interpolation of each example. [Shoemake, 1985]"""
    axes = tuple(range(1, a.ndim))

    def dot(x, y):
        return np.sum(x * y, axis=axes, keepdims=True, dtype="float64")

    lengths = np.sqrt(dot(a, a) * dot(b, b))
    angle = np.arccos(np.clip(dot(a, b) / np.maximum(lengths, 1e-30), -1, 1))
    angle[(np.sin(angle) < 1e-6) | (lengths == 0)] = 0  # a straight line, as the shortest arc is not unique
    # sin(p angle) / sin(angle), or its limit p if the angle is 0.
    from_a, from_b = (p * np.sinc(p * angle / np.pi) / np.sinc(angle / np.pi) for p in (1 - fraction, fraction))
    return (from_a * a + from_b * b).astype("float32")


def _images(model, x, name):
    return _checks.data(x, model.data_shape, model.diffusion.clip_range, name)


def _sampler(model, sampler, num_steps, default):
    """The sampler that is given, or the default with `num_steps` steps."""
    if sampler is None:
        most = model.diffusion.timesteps
        if num_steps is None and (default.num_steps or 0) <= most:
            return default
        return dataclasses.replace(default, num_steps=most if num_steps is None else num_steps)
    valid = num_steps is None and isinstance(sampler, samplers.Sampler)
    _checks.require(valid, "Expected either `num_steps` or one of `samplers`", sampler=sampler, num_steps=num_steps)
    return sampler


def _noisy(model, images, t, seed, indices):
    """Adds noise to images up to time t. Each sample has its own noise."""
    schedule = model.diffusion.schedule
    noise = loop.noise(model.data_shape, seed, indices)
    return (schedule.alpha[t] * images[indices] + schedule.sigma[t] * noise).astype("float32")
