"""Finished runs: a file of JSON lines."""

import base64
import fcntl
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np


class Results:
    """The lines of a results file. A later line of the same run takes the place of an earlier."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            # A line that was cut off when the process was killed is no finished run.
            whole = path.read_text().rpartition("\n")[0]
            self.lines = [json.loads(line) for line in whole.splitlines()]

    def of(self, **fields: Any) -> list[dict[str, Any]]:
        """The lines with these fields, one for each run."""
        found = {}
        for line in self.lines:
            if _has(line, fields):
                run = ("method", "task", "part", "rate", "seed", "steps", "code")
                found[tuple(line[name] for name in run)] = line
        return list(found.values())

    def forget(self, **fields: Any) -> None:
        """Leaves lines out, so that their runs are done again; the file keeps them till then."""
        self.lines = [line for line in self.lines if not _has(line, fields)]

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Appends a finished run; other processes may be adding to the same file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole, _, cut_off = file.read().rpartition("\n")
            if cut_off:
                file.truncate(len((whole + "\n" * bool(whole)).encode()))
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def _has(line: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(line[name] == value for name, value in fields.items())


def pack(outcomes: np.ndarray) -> str:
    """Small numbers (N, S) as text, so that a line holds what each example came to."""
    array = np.asarray(outcomes, np.int16)
    code = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return f"{array.shape[0]}x{array.shape[1]}:{code}"


def unpack(text: str) -> np.ndarray:
    """The numbers (N, S) of `pack`."""
    shape, code = text.split(":", 1)
    flat = np.frombuffer(zlib.decompress(base64.b64decode(code)), np.int16)
    return flat.reshape([int(n) for n in shape.split("x")]).astype(np.int64)


def gap(mine: np.ndarray, theirs: np.ndarray, score: Any, draws: int = 400) -> tuple[float, float]:
    """Difference of two scores on the same examples, and its standard error.

    The error is the deviation over draws of N examples with replacement, the same for both.

    Args:
      mine, theirs: Outcomes (N, S), or (seeds, N, S) whose scores are averaged.
      score: From sums (..., S) to scores (...).
      draws: How often.
    """
    mine, theirs = (x if x.ndim == 3 else x[None] for x in (mine, theirs))
    count = mine.shape[1]
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [np.ones((1, count), int), rng.multinomial(count, np.full(count, 1 / count), draws)]
    )

    def scores(outcomes: np.ndarray) -> np.ndarray:
        return score(np.einsum("dn,ens->eds", weights, outcomes)).mean(axis=0)

    difference = scores(mine) - scores(theirs)
    return float(difference[0]), float(np.std(difference[1:], ddof=1))
