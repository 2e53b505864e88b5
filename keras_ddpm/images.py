"""Images in [-1, 1]: from and to 8 bits, grids, files."""

import pathlib

import numpy as np
from PIL import Image
from PIL import ImageOps


def from_uint8(x):
    """0..255 to [-1, 1], float32."""
    return np.asarray(x, "float32") / 127.5 - 1.0


def to_uint8(x):
    """[-1, 1] to 0..255, rounded; what lies outside is clipped."""
    return np.clip(np.round((np.asarray(x, "float32") + 1.0) * 127.5), 0, 255).astype("uint8")


def resize(image, size):
    """Centre crop to a square and antialiased resize.

    Args:
        image: a `PIL.Image.Image`, or a uint8 array `(height, width)` or `(height, width, channels)`.
        size: side of the result in pixels.

    Returns:
        uint8 array `(size, size, channels)`.
    """
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    image = np.asarray(image)
    return image[..., None] if image.ndim == 2 else image


def load(path, size, channels=3):
    """An image file as a square of 8 bits, upright as its EXIF orientation says.

    Transparent pixels are put on white; grey images of 16 bits keep their upper 8 bits.

    Args:
        path: any format that Pillow reads.
        size: side of the result in pixels.
        channels: 3 for colour, 1 for grey.

    Returns:
        uint8 array `(size, size, channels)`.

    Raises:
        OSError: if the file cannot be read as an image.
        ValueError: if its pixels are no integers of at most 16 bits.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # more than 8 bits, which `convert` would clip to 255
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(f"pixels of mode {image.mode} are no integers of at most 16 bits")
            eight_bits = image.mode == "I" and pixels.max() <= 255
            image = Image.fromarray((pixels if eight_bits else pixels >> 8).astype("uint8"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return resize(image.convert({1: "L", 3: "RGB"}[channels]), size)


def grid(x, columns=None, padding=2):
    """Images side by side on white.

    Args:
        x: `(num, height, width, channels)` in [-1, 1].
        columns: how many a row; by default as many as make the grid about square.
        padding: pixels between images and around them.

    Returns:
        float32 array `(rows (height + padding) + padding, columns (width + padding) + padding, channels)`.
    """
    x = np.asarray(x, "float32")
    num, height, width, channels = x.shape
    columns = columns or int(np.ceil(np.sqrt(num)))
    rows = -(-num // columns)
    cells = np.ones((rows * columns, height + padding, width + padding, channels), "float32")
    cells[:num, padding:, padding:] = x
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    cells = cells.reshape(rows * (height + padding), columns * (width + padding), channels)
    return np.pad(cells, ((0, padding), (0, padding), (0, 0)), constant_values=1.0)


def save(path, x, scale=1):
    """Writes one image or a grid of several; folders are made.

    Args:
        path: file name; its ending gives the format.
        x: `(height, width, channels)` or `(num, height, width, channels)` in [-1, 1].
        scale: whole number by which every pixel is enlarged.
    """
    _to_pil(x, scale).save(_made(path))


def save_gif(path, frames, scale=1, milliseconds=100):
    """Writes an animation that loops and rests on its last frame.

    Args:
        path: file name.
        frames: each `(height, width, channels)` or `(num, height, width, channels)` (a grid) in [-1, 1].
        scale: whole number by which every pixel is enlarged.
        milliseconds: how long a frame is shown.
    """
    first, *rest = [_to_pil(frame, scale) for frame in frames]
    durations = [milliseconds] * len(rest) + [2000]
    first.save(_made(path), save_all=True, append_images=rest, duration=durations, loop=0)


def _to_pil(x, scale):
    x = np.asarray(x)
    x = to_uint8(grid(x) if x.ndim == 4 else x).repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)


def _made(path):
    """The path, once its folder exists."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
