"""Images in [-1, 1]: conversion from and to 8 bits, grids, and files."""

import pathlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from PIL import ImageOps


def from_uint8(x: ArrayLike) -> np.ndarray:
    """Maps 0..255 to [-1, 1], as float32."""
    return np.asarray(x, "float32") / 127.5 - 1.0


def to_uint8(x: ArrayLike) -> np.ndarray:
    """Maps [-1, 1] to 0..255, rounded. Values outside are clipped."""
    return np.clip(np.round((np.asarray(x, "float32") + 1.0) * 127.5), 0, 255).astype("uint8")


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


def load(path: str | pathlib.Path, size: int, channels: int = 3) -> np.ndarray:
    """Reads an image file as a square of 8 bits. The EXIF orientation is applied.

    Transparent images are drawn on white. Gray images of 16 bits keep their upper 8 bits.

    Args:
        path: file in any format that Pillow reads.
        size: side of the result in pixels.
        channels: 3 for color, 1 for gray.

    Returns:
        uint8 array `(size, size, channels)`.

    Raises:
        OSError: if the file cannot be read as an image.
        ValueError: if its pixels are not integers of at most 16 bits.
    """
    with Image.open(path) as file:
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
        x: `(num, height, width, channels)` in [-1, 1].
        columns: number of images in a row. By default, the grid has about as many rows as columns.
        padding: pixels between images and around them.

    Returns:
        float32 array `(rows (height + padding) + padding, columns (width + padding) + padding, channels)`.
    """
    x = np.asarray(x, "float32")
    columns = columns or int(np.ceil(np.sqrt(len(x))))
    x = np.pad(x, ((0, -len(x) % columns), (padding, 0), (padding, 0), (0, 0)), constant_values=1.0)
    rows = [np.hstack(x[start : start + columns]) for start in range(0, len(x), columns)]
    return np.pad(np.vstack(rows), ((0, padding), (0, padding), (0, 0)), constant_values=1.0)


def save(path: str | pathlib.Path, x: ArrayLike, scale: int = 1) -> None:
    """Writes one image, or a grid of several. Missing folders are created.

    Args:
        path: file name. Its extension selects the format.
        x: `(height, width, channels)` or `(num, height, width, channels)` in [-1, 1].
        scale: integer factor by which every pixel is enlarged.
    """
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    _to_pil(x, scale).save(path)


def save_gif(path: str | pathlib.Path, frames: Iterable[ArrayLike], scale: int = 1, milliseconds: int = 100) -> None:
    """Writes an animation that loops. The last frame is shown for two seconds.

    Args:
        path: file name.
        frames: each `(height, width, channels)` or `(num, height, width, channels)` (a grid) in [-1, 1].
        scale: integer factor by which every pixel is enlarged.
        milliseconds: duration of every other frame.
    """
    first, *rest = [_to_pil(frame, scale) for frame in frames]
    durations = [milliseconds] * len(rest) + [2000]
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _to_pil(x, scale):
    x = np.asarray(x)
    x = to_uint8(grid(x) if x.ndim == 4 else x).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
