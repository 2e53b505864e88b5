"""Images in [-1, 1]: conversion from and to 8 bits, grids, and files."""

import math
import pathlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps

from keras_ddpm import _checks, _files

__all__ = ["MAX_PIXELS", "from_uint8", "grid", "load", "resize", "save", "save_gif", "to_pil", "to_uint8"]

MAX_PIXELS = 50_000_000  # of a file; decoding and resizing more takes many seconds


def from_uint8(x: ArrayLike) -> np.ndarray:
    """Maps 0..255 to [-1, 1], as float32.

    Raises:
        ValueError: if `x` does not hold integers in 0..255.
    """
    x = np.asarray(x)
    valid = x.dtype == "uint8" or x.dtype.kind in "iu" and np.all((x >= 0) & (x <= 255))
    _checks.require(valid, "Expected integers in 0..255", dtype=x.dtype)
    return x.astype("float32") / 127.5 - 1.0


def to_uint8(x: ArrayLike) -> np.ndarray:
    """Maps [-1, 1] to 0..255, rounded. Values outside are clipped.

    Raises:
        ValueError: if `x` holds integers, NaN or infinite values, or values in 0..255.
    """
    return np.clip(np.round((_checks.images(x) + 1.0) * 127.5), 0, 255).astype("uint8")


def resize(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Crops the center square of an image and resizes it, with antialiasing.

    Args:
        image: a `PIL.Image.Image`, or a uint8 array `(height, width)` or `(height, width, channels)`.
        size: side of the result in pixels.

    Returns:
        uint8 array `(size, size, channels)`.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, -1)


def load(path: str | pathlib.Path, size: int, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file as a square of 8 bits. The EXIF orientation is applied.

    Transparent images are drawn on white. Gray images of 16 bits keep their upper 8 bits.

    Args:
        path: file in any format that Pillow reads without another program.
        size: side of the result in pixels.
        channels: 3 for color, 1 for gray.
        max_pixels: largest number of pixels of the file.

    Returns:
        uint8 array `(size, size, channels)`.

    Raises:
        OSError: if the file cannot be read as an image.
        ValueError: if its pixels are not integers of at most 16 bits, there are too many of them, or the file is
            damaged, not a regular file, a PostScript program, or holds several images.
    """
    _checks.counts(size=size, max_pixels=max_pixels)
    _checks.require(channels in (1, 3), "`channels` must be 1 or 3", channels=channels)
    _files.regular(path)
    try:
        # Pillow maps a file given by its name into memory, and scrambles an uncompressed TIFF that must be turned.
        with open(path, "rb") as stream, Image.open(stream) as file:
            return _loaded(file, size, channels, max_pixels)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(_checks.reason(error)) from error


def _loaded(file, size, channels, max_pixels):
    """Reads an image file that Pillow has opened, without its pixels so far."""
    count, pixels = getattr(file, "n_frames", 1), math.prod(file.size)
    _checks.require(file.format != "EPS", "The file is a program in PostScript")  # which Pillow would run
    _checks.require(count == 1, f"The file holds {count} images")
    fits = pixels <= max_pixels
    _checks.require(fits, f"The file has {pixels} pixels, more than `max_pixels`", max_pixels=max_pixels)
    image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # more than 8 bits, which `convert` would clip to 255
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"Pixels must be integers of at most 16 bits. Received: mode {image.mode}")
        eight_bits = image.mode == "I" and pixels.max() <= 255
        image = Image.fromarray((pixels if eight_bits else pixels >> 8).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return resize(image.convert({1: "L", 3: "RGB"}[channels]), size)


def grid(x: ArrayLike, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Arranges images in a grid on white.

    Args:
        x: `(num, height, width, channels)` in [-1, 1], or `(rows, columns, height, width, channels)`.
        columns: number of images in a row. By default, the grid has about as many rows as columns.
        padding: pixels between images and around them.

    Returns:
        float32 array `(rows (height + padding) + padding, columns (width + padding) + padding, channels)`.

    Raises:
        ValueError: if `x` is not an array of one or more images, or `columns` is not a positive integer.
    """
    x = _checks.array(x, "x")
    if x.ndim == 5:
        columns, x = columns or x.shape[1], x.reshape(-1, *x.shape[2:])
    _checks.require(x.ndim == 4 and len(x), "Expected images (num, height, width, channels)", shape=x.shape)
    _checks.counts(optional=True, columns=columns)
    _checks.counts(low=0, padding=padding)
    columns = columns or int(np.ceil(np.sqrt(len(x))))
    x = np.pad(x, ((0, -len(x) % columns), (padding, 0), (padding, 0), (0, 0)), constant_values=1.0)
    rows = [np.hstack([*x[start : start + columns]]) for start in range(0, len(x), columns)]
    return np.pad(np.vstack(rows), ((0, padding), (0, padding), (0, 0)), constant_values=1.0)


def save(path: str | pathlib.Path, x: ArrayLike, scale: int = 1) -> None:
    """Writes one image, or a grid of several. Missing folders are created.

    >>> save("grid.png", x)
    >>> save("flower-{:04d}.png", x)  # one file per image, numbered from 0

    Args:
        path: file name. Its extension selects the format. `{}`, or `{:04d}` and the like, stands for the number of the
            image.
        x: `(height, width, channels)` in [-1, 1], or several images as in `grid`.
        scale: integer factor by which every pixel is enlarged.

    Raises:
        ValueError: if `x` holds no images of 1 or 3 channels, integers, NaN or infinite values, or the extension is
            unknown.
    """
    number = re.compile(r"\{(:[^{}]*)?\}")
    for index, picture in enumerate(np.asarray(x) if number.search(str(path)) else [x]):

        def numbered(match: re.Match, index: int = index) -> str:
            return match[0].format(index)

        file = pathlib.Path(number.sub(numbered, str(path)))
        drawn = to_pil(picture, scale)
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(file)


def save_gif(path: str | pathlib.Path, frames: Iterable[ArrayLike], scale: int = 1, milliseconds: int = 100) -> None:
    """Writes an animation that loops. The last frame is shown for two seconds.

    Args:
        path: file name.
        frames: each `(height, width, channels)` or `(num, height, width, channels)` (a grid) in [-1, 1].
        scale: integer factor by which every pixel is enlarged.
        milliseconds: duration of every other frame.

    Raises:
        ValueError: if there is no frame, or as in `save`.
    """
    pictures = [to_pil(frame, scale) for frame in frames]
    _checks.require(pictures, "There is no frame")
    first, *rest = pictures
    durations = [milliseconds] * len(rest) + [2000]
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def to_pil(x: ArrayLike, scale: int = 1) -> Image.Image:
    """Returns one image, or a grid of several, as an image of Pillow. Notebooks display it.

    Args and errors: as in `save`.
    """
    x = _checks.images(x)
    valid = x.ndim in (3, 4, 5) and x.shape[-1] in (1, 3)
    _checks.require(valid, "Expected one or several images of 1 or 3 channels", shape=x.shape)
    _checks.counts(scale=scale)
    x = to_uint8(grid(x) if x.ndim > 3 else x).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
