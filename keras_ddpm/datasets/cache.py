"""Images that are decoded once, in parallel: into memory, or into a file that is mapped into memory.

The file is a plain `.npy`. Behind the images stand, in JSON, what they were made of, the labels and what was skipped,
and last a checksum of all this. The file gets its name when it is whole.
"""

import concurrent.futures
import contextlib
import itertools
import json
import mmap
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from keras_ddpm import _checks, _files
from keras_ddpm._backend import replicas

__all__ = ["decoded", "forget"]

BLOCK = 256  # images that are decoded at once
AT_ONCE = 2**24  # bytes that are checked at once
PATIENCE = 600.0  # seconds for which another process waits for more images


def decoded(
    items: Iterable, load: Callable, num: int, key: Any, cache: str | pathlib.Path | None = None
) -> tuple[np.ndarray, list, list]:
    """Decodes items in their order.

    Args:
        items: the items.
        load: function from an item to a uint8 image and a label, or to a text that says why it is skipped. Several
            threads call it.
        num: number of items.
        key: what determines the images, as JSON stores it.
        cache: name of a file in which the images are kept, or `None` for an array in memory. With several
            processes, the first one writes the file, and the others wait for it. Every call reads the whole file to
            check it, half a second for a gigabyte that the system has in its cache.

    Returns:
        uint8 array `(images, height, width, channels)`, mapped from the file if there is one; the labels; and why items
        were skipped.

    Raises:
        ValueError: if the images differ in size, the file was made of other data, or it is damaged.
        TimeoutError: if the first process decodes nothing for ten minutes.
    """
    told: dict[str, Any] = {"key": key, "labels": [], "skipped": []}
    blocks = _blocks(items, load, told)
    if cache is None:
        return np.concatenate(list(blocks) or [np.empty(0, "uint8")]), told["labels"], told["skipped"]
    path = pathlib.Path(cache)
    _checks.require(path.suffix == ".npy", "The name of a cache must end in .npy", cache=cache)
    temporary = path.with_suffix(".npy.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        with contextlib.suppress(FileExistsError):  # another run writes it
            if replicas.is_chief():
                _write(path, temporary, blocks, num, told)
        if not _awaited(path, temporary):
            if not replicas.is_chief():
                raise TimeoutError(f"The first process has added nothing to {temporary} for {PATIENCE:.0f} seconds.")
            temporary.unlink(missing_ok=True)  # of a run that was killed
    return _opened(path, key)


def _blocks(items, load, told):
    """Yields the images of one block of items after another, and adds what is told of them."""
    iterator, shapes = iter(items), set()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while block := list(itertools.islice(iterator, BLOCK)):
            results = list(pool.map(load, block))
            told["skipped"] += [result for result in results if isinstance(result, str)]
            pairs = [result for result in results if not isinstance(result, str)]
            told["labels"] += [label for _, label in pairs]
            shapes |= {image.shape for image, _ in pairs}
            _checks.require(len(shapes) <= 1, "The images differ in size: give `image_size`")
            if pairs:
                yield np.stack([image for image, _ in pairs])


def _write(path, temporary, blocks, num, told):
    """Writes the file. Raises FileExistsError if another run does."""
    temporary.touch(exist_ok=False)
    print(f"Decoding {num} images into {path}.")
    progress, checksum = keras.utils.Progbar(num, unit_name="image"), 0
    with _files.replacing(path, temporary), temporary.open("wb") as file:
        first = next(blocks, np.empty(0, "uint8"))
        _write_header(file, num, first.shape[1:])
        for images in itertools.chain([first], blocks):
            file.write(images)
            checksum = zlib.crc32(images, checksum)
            progress.update(len(told["labels"]) + len(told["skipped"]))
        text = json.dumps(told).encode()
        file.write(text + b"%08x" % zlib.crc32(text, checksum))
        file.seek(0)
        _write_header(file, len(told["labels"]), first.shape[1:])


def _write_header(file, num, shape):
    """Writes the header of a `.npy` file. It has the same length for every number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _awaited(path, temporary):
    """Whether the file is there, after a wait for another process while that adds images."""
    size, last = None, time.monotonic()
    while not path.exists() and time.monotonic() - last <= PATIENCE:
        time.sleep(1)
        before = size
        with contextlib.suppress(FileNotFoundError):
            size = temporary.stat().st_size
        last = time.monotonic() if size != before else last
    return path.exists()


def _opened(path, key):
    """The images, the labels and what was skipped, from a file."""
    hint = f"Delete {path} to decode the images again"
    try:
        x = np.lib.format.open_memmap(path, mode="r")
        rest, checksum = np.memmap(path, mode="r", offset=x.offset), 0
        for start in range(0, len(rest) - 8, AT_ONCE):
            checksum = zlib.crc32(rest[start : min(start + AT_ONCE, len(rest) - 8)].data, checksum)
            forget(rest)
        told = json.loads(rest[x.nbytes : -8].tobytes())
        whole = checksum == int(rest[-8:].tobytes(), 16) and x.dtype == "uint8" and len(x) == len(told["labels"])
        _checks.require(whole, "The checksum is another")
    except Exception as error:  # a damaged file may raise anything
        reason = f"is damaged, or was not made by this version ({type(error).__name__})"
        raise ValueError(f"{path} {reason}. {hint}.") from error
    _checks.require(told["key"] == key, f"{path} was made of other data or with other settings. {hint}")
    return x, told["labels"], told["skipped"]


def map_of(x: np.ndarray) -> mmap.mmap | None:
    """The memory map that an array lies in, if it cannot be written to."""
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) and not x.flags.writeable else None


def forget(x: np.ndarray) -> None:
    """Takes the pages of a memory map out of the memory of the process. The system may keep them in its cache.

    Reading an image can map megabytes around it, so this is called for each batch.
    """
    pages = map_of(x)
    if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
