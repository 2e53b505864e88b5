"""The data sets that the package draws."""

import colorsys

import numpy as np
import pytest

from keras_ddpm import images, toys

pytestmark = pytest.mark.host

# Kinds and pixels of the first eight flowers of 4x4 pixels of seed 5, as version 0.1 drew them.
KINDS = [3, 0, 3, 4, 3, 2, 0, 1]
PIXELS = """
446a4d727a416c7f4b42674b3a5b429e712cac943d2e48353959417c783aae9f442438293f624835533c2032251a281e
274e1a2a541c2e5c1f356a24254a19a37082a27081336622405d31a06f7aa16f79496e372b561d416032436333366c25
4c5e34888f3e9da24847633b8e913cc87d29b896334f572b676c32b49b35ab9e3b3b533125341f525b2e2d3f26364c2d
845b42a95158875445505820bb5262704e2dad48545d4d2d7e4a41b24b589b4c51494221363b15313613383e1625290f
3539193f441e3e421e3f441f3d421e9287428974357772393f431e90813ca064237a7736484e23676b31958e437d7c3d
1545252c522a1e61331d5f322b4f298070295b5a241a552d28462479642479692819512b12391e3c5027274a2519502b
48672457684f3d4d3144612256713e846d8573617b4a6a254b6c256f6c87696c7854792a486824527529577d2b5e872f
495e337c6d6a846c7274855859624697528d9f4d85916a834a613497588eab52a3956b87526a3959614559624557713d
"""


def test_moons():
    """Points lie on both half circles at uniform random angles, and the noise moves them off by its deviation."""
    num = 10_000
    for noise in (0.0, 0.05):
        x, labels = toys.moons(num, seed=1, noise=noise)
        assert x.shape == (num, 2) and x.dtype == "float32" and labels.dtype == "int32"
        assert set(labels.tolist()) == {0, 1} and abs(np.mean(labels) - 0.5) < 3 * 0.5 / np.sqrt(num)
        assert -1 <= x.min() < -0.7 and 0.7 < x.max() <= 1
        out = x * (1.5 + 5 * noise) + [0.5, 0.25] - np.stack([labels, labels / 2], axis=1)
        radius = np.linalg.norm(out, axis=1)
        np.testing.assert_allclose(radius, 1, atol=5 * noise + 1e-6)
        assert abs(radius.std() - noise) < 0.001
    x, labels = toys.moons(num, seed=1, noise=0.0)
    x = x * 1.5 + [0.5, 0.25] - np.stack([labels, labels / 2], axis=1)
    for label, sign in [(0, 1), (1, -1)]:
        angle = np.sort(np.arctan2(*(sign * x[labels == label]).T[::-1])) / np.pi
        assert np.abs(angle - (np.arange(len(angle)) + 0.5) / len(angle)).max() < 2 / np.sqrt(len(angle))
        gaps = np.diff(angle) * len(angle)  # exponentially distributed for independent points
        assert abs(np.std(gaps) - 1) < 0.1
    again, _ = toys.moons(num, seed=1, noise=0.0)
    other, _ = toys.moons(num, seed=2, noise=0.0)
    assert np.array_equal(again, toys.moons(num, seed=1, noise=0.0)[0]) and not np.array_equal(again, other)


def test_procedural_flowers():
    x, labels = toys.procedural_flowers(60, 24, seed=1)
    assert x.shape == (60, 24, 24, 3) and x.dtype == "float32" and -1 <= x.min() < -0.5 < 0.5 < x.max() <= 1
    assert np.array_equal(images.from_uint8(images.to_uint8(x)), x)
    assert set(labels.tolist()) == set(range(len(toys.FLOWER_KINDS)))
    again, _ = toys.procedural_flowers(3, 24, seed=1)
    assert np.array_equal(again, x[:3])
    assert len(np.unique(x.reshape(60, -1), axis=0)) == 60
    # The flower in the middle differs from the green around it.
    green = x[..., 1] - x[..., 0]
    assert np.mean(green[:, :2]) > 0 > np.mean(green[:, 10:14, 10:14])


def test_flowers_stay_the_same_from_version_to_version():
    x, labels = toys.procedural_flowers(8, 4, seed=5)
    expected = np.frombuffer(bytes.fromhex(PIXELS), "uint8").reshape(x.shape)
    assert labels.tolist() == KINDS and set(KINDS) == set(range(len(toys.FLOWER_KINDS)))
    np.testing.assert_allclose(images.to_uint8(x).astype(int), expected, atol=1)


def test_colors():
    """Colors equal the standard library's for a hue modulo 1, and saturation and value clipped to [0, 1]."""
    hue, saturation, value = np.random.default_rng(0).uniform(-1, 2, (3, 200))
    hue[:5], saturation[:5], value[:5] = (0, 1, -1e-20, 1.05, -0.03), 1, 1
    clipped = zip(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1))
    expected = [colorsys.hsv_to_rgb(*color) for color in clipped]
    np.testing.assert_allclose(toys._rgb(hue, saturation, value), expected, atol=1e-12)
    assert toys._rgb(0.1, 0.5, value.reshape(10, 20)).shape == (10, 20, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toys.procedural_flowers(0), "num_images=0"),
        (lambda: toys.procedural_flowers(1, 0), "image_size=0"),
        (lambda: toys.moons(0), "num=0"),
        (lambda: toys.moons(9, noise=-0.1), "noise=-0.1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
