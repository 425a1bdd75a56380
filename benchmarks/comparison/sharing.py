"""Several processes at the runs of one file: each cell is done by one of them."""

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comparison.records import Results


class SharedResults(Results):
    """Results that other processes may be adding to.

    Args:
      path: The file.
      also: Results whose finished runs are not done again.
    """

    def __init__(self, path: Path, also: Sequence[Results] = ()):
        super().__init__(path)
        self._also = also
        self.lines = [line for other in also for line in other.lines]
        self._read = 0  # bytes of the file
        self._refresh()
        self._held: set[tuple[str, str]] = set()
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        self._locks = Path(tempfile.gettempdir()) / f"jaxpeft-{os.getuid()}-{name}"

    @contextlib.contextmanager
    def claim(self, task: str, method: str, *, wait: bool) -> Iterator[bool]:
        """Yields whether the cell is this process's to do; it is then nobody else's meanwhile.

        What others have added is known from then on. A process that ends, whatever the way, has no
        claims left.

        Args:
          task, method: The cell.
          wait: Until the process that has it is done with it, if one has.
        """
        if (task, method) in self._held:
            yield True
            return
        self._locks.mkdir(exist_ok=True)
        with open(self._locks / f"{task}.{method}".replace("/", "-"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            self._held.add((task, method))
            try:
                self._refresh()
                yield True
            finally:
                self._held.remove((task, method))

    def add(self, line: dict[str, Any], outcomes: np.ndarray | None = None) -> dict[str, Any]:
        line = super().add(line, outcomes)
        self.lines.pop()  # it comes back from the file, behind what others have added before it
        self._refresh()
        return line

    def outcomes(self, line: dict[str, Any]) -> np.ndarray:
        for other in self._also:
            if line["outcomes"] is not None and line["outcomes"] in other.own_outcomes:
                return other.outcomes(line)
        return super().outcomes(line)

    def _refresh(self) -> None:
        """Takes in what has been added to the file."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self.lines += self._parsed(whole.decode())
            self._read += len(whole) + 1


def spread(workers: int, arguments: Sequence[str]) -> int:
    """Runs the script in several processes, each on its part of the cores.

    Args:
      workers: How many.
      arguments: What each is given.

    Returns:
      The exit code: that of the first that failed, or 0.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, sys.argv[0], *arguments]
    processes = []
    for i in range(workers):
        if cores:  # a process starts on the cores of the one that starts it
            os.sched_setaffinity(0, cores[i % len(cores) :: workers])
        processes.append(subprocess.Popen(command))
    if cores:
        os.sched_setaffinity(0, cores)
    return next(filter(None, [process.wait() for process in processes]), 0)
