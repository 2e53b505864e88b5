"""Files that are replaced at once, and folders of one run."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from keras_ddpm import _checks


@contextlib.contextmanager
def replacing(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context that writes the file `temporary`, which then takes the place of `path`.

    A kill leaves the file `path` as it was, or replaces it by the whole new one, which has reached the disk.
    """
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
def locked(folder: pathlib.Path) -> Iterator[None]:
    """A context in which a folder, made if it is missing, belongs to one run. A kill ends it, too.

    Windows and some network disks have no such locks.

    Raises:
        ValueError: if it belongs to another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl:
            number = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, number)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                _checks.require(not isinstance(error, BlockingIOError), f"Another run uses the folder {folder}")
        yield
