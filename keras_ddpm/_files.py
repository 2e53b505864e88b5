"""Files: replaced at once, locked by one run, and read within bounds."""

import contextlib
import functools
import io
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator

import numpy as np

from keras_ddpm import _checks

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context that writes the file `temporary`, which then replaces `path`. If `path` is a link, it stays one.

    A kill leaves the file `path` as it was, or replaces it by the whole new one, which has reached the disk.
    """
    path = path.resolve()
    temporary = path.with_name(temporary.name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        if sys.platform != "win32":  # the new name, too, must reach the disk
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path, waits: bool = False) -> Iterator[None]:
    """A context in which a folder, made if it is missing, belongs to one run. A kill ends it, too.

    Windows and some network disks have no such locks.

    Args:
        folder: the folder.
        waits: whether to wait until it belongs to no other run.

    Raises:
        ValueError: if it belongs to another run, unless `waits`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl:
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            try:
                fcntl.flock(number, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                _checks.require(not isinstance(error, BlockingIOError), f"Another run uses the folder {folder}")
        yield


def regular(path: str | pathlib.Path) -> None:
    """Raises ValueError if `path` is a folder, a pipe or a device. Opening a pipe waits for the other end."""
    _checks.require(not os.path.exists(path) or os.path.isfile(path), f"{path} is not a regular file")


def bounded(archive: zipfile.ZipFile, ratio: int, floor: int) -> None:
    """Raises ValueError if a part of a zip file has more than `floor` bytes, and `ratio` times its size in the file."""
    for entry in archive.infolist():
        most = max(floor, ratio * entry.compress_size)
        _checks.require(entry.file_size <= most, f"{entry.filename} unpacks to too much", bytes=entry.file_size)


def arrays(path: str | pathlib.Path, ratio: int = 100, floor: int = 2**32) -> dict[str, np.ndarray]:
    """Reads an `.npz` file: its arrays by name. The array of an `.npy` file is mapped into memory, and called "x".

    Args:
        path: the file.
        ratio, floor: as in `bounded`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, unpacks to too much, or holds objects.
    """
    regular(path)
    with open(path, "rb") as stream:
        try:
            if stream.peek(2)[:2] != b"PK":  # which a zip file begins with
                return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
            with zipfile.ZipFile(stream) as archive:
                bounded(archive, ratio, floor)
                read = functools.partial(np.lib.format.read_array, allow_pickle=False)
                # `np.load` would not look at the checksum of a part that is longer than its array.
                return {name.removesuffix(".npy"): read(io.BytesIO(archive.read(name))) for name in archive.namelist()}
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path} cannot be read as arrays. {_checks.reason(error)}") from error
