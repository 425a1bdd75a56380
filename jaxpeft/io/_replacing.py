"""Files that replace others completely or not at all, while other processes read and write."""

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

#: The prefix of files that are being written. Those of a killed process stay behind.
DRAFT = ".writing-"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Locks a folder, after waiting until no other process or thread writes to it.

    Yields whether the folder is locked: some file systems have no locks. The system releases the
    lock when a process ends, however it ends.
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
    """Yields the path of a file in the folder that `write` has written and that is on the disk.

    The file has the permissions of any new file, whichever `write` has set, and is removed
    afterwards unless it was moved.
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
    """Waits until a file, or the list of names in a folder, would survive a power failure."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it still exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
