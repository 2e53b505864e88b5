"""Files that are replaced at once."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator


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
