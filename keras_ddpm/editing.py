"""Editing images with a trained model, by running its sampler from another start, to another end, or on known pixels.

All functions take float images `(batch, height, width, channels)` in the data's range (or data of any other shape
that the model was made for) and return float32 arrays. `num_steps` is the number of steps of the default sampler, at
most T; `**options` are those of `DiffusionModel.sample`: `labels` (one for all or one for each image),
`guidance_scale` and its companions, `use_ema`, `batch_size` and `verbose`. A `seed` is a non-negative integer; `None`
draws one.
"""

import dataclasses
import itertools

import numpy as np

from keras_ddpm import _checks
from keras_ddpm import samplers
from keras_ddpm import sampling

# There and back. With steps even in t the error on images is twice this with the cosine schedule, two thirds of it with
# the linear one.
INVERTIBLE = samplers.DDIM(100, spacing="logsnr")


def inpaint(model, images, masks, seed=None, *, sampler=None, num_steps=None, num_resamples=10, **options):
    """Fills the unknown part of images.

    Every step of the sampler but the last is made `num_resamples` times, with noise added in between that leads back
    to where it started, so that the unknown part comes to fit the known one.

    With `DDPM(variance="large")` the result tends to a sample of the conditional distribution as the number of steps
    and of resamplings grows; with "small" its variance stays too low (with T = 1000 and 100 resamplings, for two
    pixels of correlation 0.8 by a tenth where their deviation is 1, by a quarter where it is 0.2). With few steps
    "large" leaves more noise than that loses, so that the default is "small". Deterministic samplers fill less well,
    and multi-step ones are of first order where steps are resampled.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`; what they hold where they are unknown does not matter.
        masks: `(batch, height, width, 1)`, 1 where the image is known and 0 where it is to be filled.
        seed: see above.
        sampler: a `samplers.Sampler`; by default `DDPM(50)`.
        num_steps: see above.
        num_resamples: how often each step is made.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`, equal to `images` where they are known.

    Raises:
        ValueError: for images or masks of another shape or range, or invalid options.

    Reference: Lugmayr et al., 2022 ("RePaint"), algorithm 1.
    """
    images, masks = _checks.array(images, "images"), np.asarray(masks)
    if masks.shape == (*images.shape[:-1], 1):
        images = np.where(masks == 0, np.float32(0), images)
    images = _images(model, images, "images")
    if masks.shape != (*images.shape[:-1], 1):
        raise ValueError(f"`masks` must have the shape {(*images.shape[:-1], 1)}. Received: {masks.shape}")
    if not np.all((masks == 0) | (masks == 1)):
        raise ValueError("`masks` must hold nothing but 0 and 1.")
    if not _checks.is_count(num_resamples):
        raise ValueError(f"`num_resamples` must be a positive integer. Received: num_resamples={num_resamples!r}")
    seed = sampling.checked_seed(seed)
    schedule = model.diffusion.schedule
    steps = _sampler(model, sampler, num_steps, samplers.DDPM(50)).steps(schedule)
    if num_resamples > 1:
        for rows in steps:
            # What resampling does to x_0 is no slope in time: no extrapolation from the step before.
            rows[0, 2:4] = rows[0, 2] + rows[0, 3], 0.0
    resampled = []
    for rows, after in itertools.pairwise(steps):
        again = rows.copy()
        again[-1] = samplers.renoised(rows[-1], schedule, int(after[0, 0]), int(rows[0, 0]))
        resampled += [again] * (num_resamples - 1) + [rows]
    resampled.append(steps[-1])
    mask = masks.astype(bool)

    def start(indices):
        noise = sampling.noise(model, seed, indices)
        known = schedule.alpha[-1] * images[indices] + schedule.sigma[-1] * noise
        return np.where(mask[indices], known, sampling.prior(model, seed, indices)).astype("float32")

    return _run(model, resampled, start, images, seed, options, known=(images, masks))


def variations(model, images, strength, seed=None, *, sampler=None, num_steps=None, **options):
    """Other images like these: noise is added up to a time, and taken away again.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`.
        strength: the time as a share of T, in [0, 1]: 0 returns the images, 1 forgets them and returns what
            `model.sample` does.
        seed: see above.
        sampler: a `samplers.Sampler`; by default that of `model.sample`. Of its steps the share `strength` is made.
        num_steps: see above.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`.

    Raises:
        ValueError: for images of another shape or range, a strength outside [0, 1] or invalid options.

    Reference: Meng et al., 2022 ("SDEdit"), algorithm 1.
    """
    images = _images(model, images, "images")
    if not _checks.is_between(strength, 0, 1):
        raise ValueError(f"`strength` must be in [0, 1]. Received: strength={strength!r}")
    seed = sampling.checked_seed(seed)
    sampler = _sampler(model, sampler, num_steps, model.default_sampler)
    schedule = model.diffusion.schedule
    t = round(strength * schedule.timesteps)
    if t == schedule.timesteps:
        return _run(model, sampler.steps(schedule), lambda i: sampling.prior(model, seed, i), images, seed, options)
    if t == 0:
        steps = [np.array([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])]  # leaves x as it is, after all checks
    else:
        steps = sampler.shortened(strength, schedule.timesteps).steps(schedule.until(t))

    def start(indices):
        noise = sampling.noise(model, seed, indices)
        return (schedule.alpha[t] * images[indices] + schedule.sigma[t] * noise).astype("float32")

    return _run(model, steps, start, images, seed, options)


def encode(model, images, *, num_steps=None, **options):
    """The noise from which DDIM makes these images: its steps, made backwards and without clipping.

    `decode(encode(images))` is an image again, with an error that falls with `num_steps`: of 0.07 (root of the mean
    square, pixels in [-1, 1]) with 100 on the flowers in the README, by `python examples/edit.py reconstruct`.

    Args:
        model: a `DiffusionModel`.
        images: `(batch, height, width, channels)`.
        num_steps: see above; by default 100.
        **options: see above.

    Returns:
        x_T, `(batch, height, width, channels)`.

    Raises:
        ValueError: for images of another shape or range, or invalid options.

    Reference: Song et al., 2021 ("DDIM"), section 4.3; Dhariwal and Nichol, 2021, appendix F.
    """
    images = _images(model, images, "images")
    schedule = model.diffusion.schedule
    times = _sampler(model, None, num_steps, INVERTIBLE).timesteps(schedule)[::-1]
    s, t = times[:-1], times[1:]
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    ratio = alpha_t / schedule.alpha[s]
    # x_t = ratio x_s + from_noise ε, with the ε predicted at the later time, ε = (x_s − alpha_t x_0) / sigma_t.
    from_noise = sigma_t - ratio * schedule.sigma[s]
    zeros = np.zeros(len(t))
    rows = np.stack([t, ratio + from_noise / sigma_t, -from_noise * alpha_t / sigma_t, zeros, zeros, zeros], axis=1)
    return _run(model, list(rows[:, None]), lambda indices: images[indices], images, 0, options, clip=False)


def decode(model, noise, *, num_steps=None, **options):
    """The images that DDIM makes from noise x_T, without clipping.

    Args:
        model: a `DiffusionModel`.
        noise: x_T, `(batch, height, width, channels)`, as `encode` returns it.
        num_steps: see above.
        **options: see above.

    Returns:
        `(batch, height, width, channels)`.

    Raises:
        ValueError: for noise of another shape, or invalid options.

    Reference: Song et al., 2021 ("DDIM"), Eq. 12 with σ = 0.
    """
    noise = _checks.data(noise, model.data_shape, name="noise")
    steps = _sampler(model, None, num_steps, INVERTIBLE).steps(model.diffusion.schedule)
    return _run(model, steps, lambda indices: noise[indices], noise, 0, options, clip=False)


def interpolate(model, images_a, images_b, num, seed=None, *, num_steps=None, **options):
    """Images between pairs of images: their noises are mixed on a sphere and decoded.

    Args:
        model: a `DiffusionModel`.
        images_a: `(batch, height, width, channels)`.
        images_b: of the same shape.
        num: how many, the two ends among them.
        seed: makes no difference, as nothing is drawn.
        num_steps: see above; of `encode` and of `decode`.
        **options: see above.

    Returns:
        `(num, batch, height, width, channels)`, from `images_a` itself to `images_b` itself.

    Raises:
        ValueError: for images of different shapes or another range, fewer than 2, or invalid options.

    Reference: Song et al., 2021 ("DDIM"), appendix D.5.
    """
    if not _checks.is_count(num, low=2):
        raise ValueError(f"`num` must be an integer of at least 2. Received: num={num!r}")
    a, b = _images(model, images_a, "images_a"), _images(model, images_b, "images_b")
    if a.shape != b.shape:
        raise ValueError(f"Expected as many images on both sides. Received: shapes {a.shape} and {b.shape}")
    noises = [encode(model, images, num_steps=num_steps, **options) for images in (a, b)]
    between = [
        decode(model, _slerp(*noises, fraction), num_steps=num_steps, **options)
        for fraction in np.linspace(0, 1, num)[1:-1]
    ]
    return np.stack([a, *between, b])


def _slerp(a, b, fraction):
    """Spherical interpolation of each example. [Shoemake, 1985]"""
    axes = tuple(range(1, a.ndim))

    def dot(x, y):
        return np.sum(x * y, axis=axes, keepdims=True, dtype="float64")

    lengths = np.sqrt(dot(a, a) * dot(b, b))
    angle = np.arccos(np.clip(dot(a, b) / np.maximum(lengths, 1e-30), -1, 1))
    near = (np.sin(angle) < 1e-6) | (lengths == 0)  # the sphere is flat there, or there is no one shortest way
    sine = np.where(near, 1, np.sin(angle))
    from_a = np.where(near, 1 - fraction, np.sin((1 - fraction) * angle) / sine)
    from_b = np.where(near, fraction, np.sin(fraction * angle) / sine)
    return (from_a * a + from_b * b).astype("float32")


def _images(model, x, name):
    return _checks.data(x, model.data_shape, model.diffusion.clip_range, name)


def _sampler(model, sampler, num_steps, default):
    if sampler is None:
        num_steps = min(default.num_steps, model.diffusion.timesteps) if num_steps is None else num_steps
        return dataclasses.replace(default, num_steps=num_steps)
    if num_steps is not None or not isinstance(sampler, samplers.Sampler):
        raise ValueError(
            "`sampler` must be one of `keras_ddpm.samplers`, which brings `num_steps`. "
            f"Received: sampler={sampler!r}, num_steps={num_steps}"
        )
    return sampler


def _run(model, steps, start, images, seed, options, *, clip=True, known=None):
    return sampling.run(model, steps, start, len(images), seed, clip=clip, known=known, **options)
