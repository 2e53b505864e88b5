"""Images that are decoded once, in parallel: into memory, or into a file that is mapped into memory.

The file is a plain `.npy`. Next to it, an index in JSON holds what the images were made of, how many items have been
read, the labels, and what was skipped. Decoding goes on from the index if it was interrupted.
"""

import concurrent.futures
import itertools
import json
import math
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
SECONDS = 5.0  # from one index to the next
PATIENCE = 600.0  # seconds for which another process waits for the next index


def decoded(
    items: Callable[[int], Iterable], load: Callable, num: int, key: Any, cache: str | pathlib.Path | None = None
) -> tuple[np.ndarray, list, list]:
    """Decodes items in the order in which they come.

    Args:
        items: function from a number n to the items from number n on.
        load: function from an item to a uint8 image and a label, or to a text that says why it is skipped. Several
            threads call it.
        num: number of items.
        key: what determines the images, as JSON stores it.
        cache: name of a file in which the images are kept, or `None` for an array in memory. Of several processes, the
            first one writes the file, and the others wait for it.

    Returns:
        uint8 array `(images, height, width, channels)`, mapped from the file if there is one; the labels; and why items
        were skipped.

    Raises:
        ValueError: if the images differ in size, the file was made of other data, or it is damaged.
        TimeoutError: if the first process decodes nothing for ten minutes.
    """
    index: dict[str, Any] = {"key": key, "read": 0, "start": 0, "shape": None}
    index |= {"labels": [], "skipped": [], "checksum": 0}
    kept: list = []
    if cache is None:
        for images, _ in _blocks(items(0), load, index):
            kept += images
        return np.stack(kept) if kept else np.empty(0, "uint8"), index["labels"], index["skipped"]
    path = pathlib.Path(cache)
    _checks.require(path.suffix == ".npy", "The name of a cache must end in .npy", cache=cache)
    index = _opened(path, index)
    if not replicas.is_chief():
        index = _awaited(path, index, num)
    if index["read"] < num:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(path, items, load, num, index)
    x = np.load(path, mmap_mode="r") if index["labels"] else np.empty(0, "uint8")
    _checks.require(len(x) == len(index["labels"]), f"{path} does not fit its index", images=len(x))
    return x, index["labels"], index["skipped"]


def _awaited(path, index, num):
    """The index after the first process has read all items."""
    last = time.monotonic()
    while index["read"] < num:
        time.sleep(1)
        before, index = index["read"], _opened(path, index)
        last = time.monotonic() if index["read"] > before else last
        if time.monotonic() - last > PATIENCE:
            raise TimeoutError(f"The first process has added nothing to {path} for {PATIENCE:.0f} seconds.")
    return index


def _blocks(items, load, index):
    """Yields the images of one block of items after another, and an index that tells of them."""
    iterator = iter(items)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while block := list(itertools.islice(iterator, BLOCK)):
            results = list(pool.map(load, block))
            images = [result[0] for result in results if not isinstance(result, str)]
            index["shape"] = index["shape"] or (list(images[0].shape) if images else None)
            same = all(list(image.shape) == index["shape"] for image in images)
            _checks.require(same, "The images differ in size: give `image_size`")
            index["labels"] += [result[1] for result in results if not isinstance(result, str)]
            index["skipped"] += [result for result in results if isinstance(result, str)]
            index["read"] += len(block)
            yield images, index


def _fill(path, items, load, num, index):
    """Writes the images that the file lacks."""
    print(f"Decoding {num} images into {path}, from number {index['read']} on.")
    progress = keras.utils.Progbar(num, unit_name="image")
    progress.update(index["read"])
    written = time.monotonic()
    _write_index(path, index)
    with open(path, "r+b" if index["labels"] else "w+b") as file:
        file.truncate(_end(index))
        file.seek(0, os.SEEK_END)
        for images, index in _blocks(items(index["read"]), load, index):  # noqa: B020
            if images and file.tell() == 0:
                _write_header(file, index["shape"], num)
                index["start"] = file.tell()
            for image in images:
                file.write(image.tobytes())
                index["checksum"] = zlib.crc32(image.tobytes())
            progress.update(index["read"])
            # An index that tells of all items comes after the header.
            if index["read"] < num and time.monotonic() - written > SECONDS:
                written = time.monotonic()
                _write_index(path, index, file)
        _checks.require(index["read"] == num, f"Expected {num} items", found=index["read"])
        if index["labels"]:
            file.seek(0)
            _write_header(file, index["shape"], len(index["labels"]))
        _write_index(path, index, file)


def _write_header(file, shape, num):
    """Writes the header of a `.npy` file. It has the same length for every number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_index(path, index, file=None):
    """Writes the index, after the images that it tells of have reached the disk."""
    if file:
        file.flush()
        os.fsync(file.fileno())
    path = path.with_suffix(".json")
    with _files.replacing(path, path.with_suffix(".json.tmp")) as temporary:
        temporary.write_text(json.dumps(index))


def _opened(path, empty):
    """The index of a file that was begun, or `empty`."""
    name = path.with_suffix(".json")
    if not name.exists():
        _checks.require(not path.exists(), f"{path} is no cache: there is no index {name}")
        return empty
    hint = f"Delete {path} and {name} to decode the images again"
    try:
        index = json.loads(name.read_text())
        same = index["key"] == empty["key"]
        whole = not index["labels"] or zlib.crc32(_last(path, index)) == index["checksum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} or its index is damaged: {error}. {hint}.") from error
    _checks.require(same, f"{path} was made of other data or with other settings. {hint}")
    _checks.require(whole, f"{path} is damaged. {hint}")
    return index


def _end(index):
    """The number of bytes of the file that the index tells of."""
    return index["start"] + len(index["labels"]) * math.prod(index["shape"]) if index["labels"] else 0


def _last(path, index):
    """The bytes of the last image that the index tells of."""
    size = math.prod(index["shape"])
    with open(path, "rb") as file:
        file.seek(_end(index) - size)
        return file.read(size)


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
