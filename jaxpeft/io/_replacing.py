"""Files that take the place of others, whole or not at all, while others read and write."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Of files that are being written. Those of a writer that was killed stay behind.
DRAFT = ".writing-"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Waits until no other process or thread writes to a folder; whether that could be had.

    The system lets go when a process ends, however it ends. Some file systems have no locks.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


@contextlib.contextmanager
def draft(folder: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """A file in the folder that `write` has written and that is on the disk.

    It has the permissions that any new file has, whatever `write` does about them, and is gone
    afterwards where it was not moved.
    """
    path = folder / f"{DRAFT}{uuid.uuid4().hex}"
    try:
        path.touch()
        mode = path.stat().st_mode
        write(path)
        os.chmod(path, mode)
        on_disk(path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Returns when a file, or the names in a folder, would outlast a power failure."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file or a folder, where it is still there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
