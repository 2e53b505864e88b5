"""Toy data, drawn by formulas: points on two moons, and flowers.

To add a drawing, write a function that returns data in [-1, 1] and their labels.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import hsv_to_rgb

from keras_ddpm import _checks, images

__all__ = ["FLOWER_KINDS", "moons", "procedural_flowers"]


def moons(num: int, seed: int | Sequence[int] = 0, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Draws points on two interleaving half circles, with Gaussian noise.

    The angles are independent and uniform. (The function of the same name in scikit-learn uses a fixed grid.) The
    half circles have radius 1 and centers (0, 0) and (1, 1/2). The points are then moved by (−1/2, −1/4), scaled by
    1 / (3/2 + 5 noise), and clipped to [-1, 1]². Only noise of more than five standard deviations is clipped.

    Args:
        num: number of points.
        seed: a non-negative integer or a sequence of them.
        noise: standard deviation of the noise, for half circles of radius 1.

    Returns:
        float32 points `(num, 2)` in [-1, 1], and int32 labels `(num,)`: 0 for the upper moon, 1 for the lower.

    Raises:
        ValueError: if `num` is not a positive integer or `noise` is negative.
    """
    _checks.counts(num=num)
    _checks.require(_checks.is_between(noise, 0, np.inf), "`noise` must be 0 or more", noise=noise)
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=num, dtype="int32")
    angle = random.uniform(0, np.pi, num) + np.pi * labels
    x = np.column_stack([np.cos(angle) + labels, np.sin(angle) + labels / 2])
    x += noise * random.standard_normal(x.shape)
    return np.clip((x - [0.5, 0.25]) / (1.5 + 5 * noise), -1, 1).astype("float32"), labels


FLOWER_KINDS = {
    # petals, sharpness of the petals, depth of the gaps, layers, size of the center, hues of petals and center
    "daisy": (13, 0.55, 0.75, 1, 0.26, (0.62, 0.98), (0.11, 0.15)),
    "geranium": (5, 0.45, 0.55, 1, 0.13, (0.75, 0.98), (0.10, 0.16)),
    "lily": (6, 1.10, 0.80, 1, 0.10, (0.00, 0.12), (0.06, 0.10)),
    "sunflower": (17, 0.80, 0.50, 2, 0.42, (0.11, 0.15), (0.04, 0.08)),
    "poppy": (4, 0.35, 0.25, 2, 0.20, (0.96, 1.05), (0.20, 0.30)),
}


def procedural_flowers(num_images: int, image_size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws flowers as rose curves in front of foliage. No two are alike.

    Args:
        num_images: number of images.
        image_size: side in pixels.
        seed: a non-negative integer. Image i of a seed is the same for any `num_images`.

    Returns:
        float32 images `(num_images, image_size, image_size, 3)` in [-1, 1] at 8-bit levels, and int32 labels
        `(num_images,)`. A label is the position of the flower's kind in `FLOWER_KINDS`.

    Raises:
        ValueError: if `num_images` or `image_size` is not positive.
    """
    _checks.counts(num_images=num_images, image_size=image_size)
    kinds = list(FLOWER_KINDS.values())
    randoms = [np.random.default_rng([seed, index]) for index in range(num_images)]
    labels = np.array([random.integers(len(kinds)) for random in randoms], "int32")
    x = [_draw_flower(image_size, random, *kinds[label]) for random, label in zip(randoms, labels)]
    return images.from_uint8(x), labels


def _draw_flower(image_size, random, petals, sharpness, gap, layers, center_size, hues, center_hues):
    uniform = random.uniform
    detail = 3  # pixels are averages of 3 x 3
    side = (np.arange(image_size * detail) + 0.5) / (image_size * detail) * 2 - 1
    y, x = side[:, None], side[None, :]

    # Foliage: a gradient of greens with soft patches of light and shadow.
    hue, light = uniform(0.18, 0.42), uniform(0.12, 0.45)
    value = light + 0.12 * uniform(-1, 1) * x + 0.12 * uniform(-1, 1) * y
    for _ in range(6):
        spread = uniform(0.15, 0.5)
        spot = np.exp(-((x - uniform(-1, 1)) ** 2 + (y - uniform(-1, 1)) ** 2) / spread**2)
        value = value + uniform(-0.18, 0.22) * spot
    canvas = _rgb(hue, uniform(0.35, 0.75), value)

    # The plane of the flower, seen at a slant.
    angle, tilt, radius = uniform(0, 2 * np.pi), uniform(0.72, 1.0), uniform(0.62, 0.88)
    u, v = x - uniform(-0.2, 0.2), y - uniform(-0.2, 0.2)
    u, v = np.cos(angle) * u + np.sin(angle) * v, (np.cos(angle) * v - np.sin(angle) * u) / tilt
    r, phi = np.hypot(u, v) / radius, np.arctan2(v, u) + uniform(0, 2 * np.pi)
    canvas = canvas * (1 - 0.55 * np.exp(-np.maximum(r - 0.75, 0) / 0.18))[..., None]  # its shadow

    hue, saturation, value = uniform(*hues), uniform(0.55, 0.95), uniform(0.8, 1.0)
    if petals == 13:  # some daisies are white
        saturation *= random.choice([0.08, 0.6])
    for layer in range(layers):
        scale = 1.0 - 0.28 * layer
        lobe = np.abs(np.cos(petals * phi / 2 + layer * np.pi / 2))
        edge = scale * (1 - gap + gap * lobe**sharpness)
        shade = (0.62 + 0.38 * lobe**0.7) * (0.70 + 0.30 * np.clip(r / scale, 0, 1)) + 0.06 * layer
        petal = _rgb(hue + 0.03 * (1 - r), saturation * (1.1 - 0.3 * r), value * shade)
        canvas = np.where((r < edge)[..., None], petal, canvas)

    # The center: a dome of dots.
    dots = 0.85 + 0.15 * np.sin(40 * r) * np.sin(9 * phi)
    dome = uniform(0.55, 0.95) * dots * (1.05 - 0.5 * (r / center_size) ** 2)
    canvas = np.where((r < center_size)[..., None], _rgb(uniform(*center_hues), 0.85, dome), canvas)

    canvas = (canvas * uniform(0.85, 1.1)).reshape(image_size, detail, image_size, detail, 3)
    return np.round(255 * np.clip(canvas.mean(axis=(1, 3)), 0, 1)).astype("uint8")


def _rgb(hue, saturation, value):
    """Converts a hue modulo 1, and saturation and value clipped to [0, 1], each broadcast against the others."""
    hsv = np.broadcast_arrays(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1))
    return hsv_to_rgb(np.stack(hsv, axis=-1))
