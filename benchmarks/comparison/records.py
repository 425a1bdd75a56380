"""Finished runs: a file of JSON lines, and beside it what each example of a run came to."""

import fcntl
import hashlib
import json
import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np


class Outcomes:
    """What the examples of runs came to: arrays (N, S) of small integers, each under its hash.

    Gaps between two methods need them, for their standard errors; nothing else does. They lie in
    one compressed file of JSON lines, `methods.outcomes.xz` beside `methods.jsonl`, where a run
    takes some 400 bytes.

    Args:
      path: The file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, list[list[int]]] = {}

    def add(self, outcomes: np.ndarray) -> str:
        """Adds an array to the file and returns its hash. The caller keeps other writers out."""
        array = np.asarray(outcomes, np.int16)
        digest = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:12]
        self._read()
        if digest not in self._known:
            self._known[digest] = array.tolist()
            self._write()
        return digest

    def __contains__(self, digest: str) -> bool:
        if digest not in self._known:
            self._read()
        return digest in self._known

    def __getitem__(self, digest: str) -> np.ndarray:
        if digest not in self:
            raise ValueError(
                f"'{self.path}' has no outcomes {digest}, which '{self.path.stem}' runs refer to. "
                "The two files belong together: take both from one state of the repository, or "
                "do the cell again with --cell."
            )
        return np.array(self._known[digest], np.int64)

    def _read(self) -> None:
        if self.path.exists():
            for line in lzma.decompress(self.path.read_bytes()).splitlines():
                digest, rows = json.loads(line)
                self._known[digest] = rows

    def _write(self) -> None:
        """In place of the old file at once, so that a killed process leaves a whole one."""
        text = "".join(
            json.dumps(pair, separators=(",", ":")) + "\n" for pair in self._known.items()
        )
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        draft.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
        draft.replace(self.path)


class Carried:
    """Hashes of code that stand for the same runs, though the code has been written anew.

    `carried.json` beside the results holds a list of {"reason", "since", "checked", "codes"}, where
    `codes` maps hashes to those that took their place; `benchmarks/carry.py` writes it. Recorded
    lines keep the hash that they were measured with.

    Args:
      path: The file; it need not exist.
    """

    def __init__(self, path: Path):
        entries = json.loads(path.read_text()) if path.exists() else []
        self._next: dict[str, str] = {}
        for entry in entries:
            self._next |= entry["codes"]

    def __call__(self, code: str) -> str:
        """The hash of today's code that a recorded one stands for: itself, if none was carried."""
        seen = {code}
        while (later := self._next.get(code)) is not None and later not in seen:
            seen.add(code := later)
        return code


class Results:
    """The lines of a results file. A later line of the same run takes the place of an earlier."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.own_outcomes = Outcomes(path.with_suffix(".outcomes.xz"))
        self._carried = Carried(path.with_name("carried.json"))
        if path.exists():
            # A line that was cut off when the process was killed is no finished run.
            self.lines = self._parsed(path.read_text().rpartition("\n")[0])

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        """Lines of the file. `code` is the hash that counts today, `measured` that of the file."""
        lines = [json.loads(line) for line in text.splitlines()]
        return [
            {"measured": line["code"]} | line | {"code": self._carried(line["code"])}
            if "code" in line
            else line
            for line in lines
        ]

    def outcomes(self, line: dict[str, Any]) -> np.ndarray:
        """What each example of a run came to, (N, S).

        Raises:
          ValueError: They were not kept, as those of sweeps are not, or are missing.
        """
        if line["outcomes"] is None:
            where = f"{line['method']} on {line['task']} ({line['part']})"
            raise ValueError(f"The outcomes of {where} were not kept: gaps are taken on test.")
        return self.own_outcomes[line["outcomes"]]

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

    def add(self, line: dict[str, Any], outcomes: np.ndarray | None = None) -> dict[str, Any]:
        """Appends a finished run; other processes may be adding to the same file.

        Args:
          line: The run; with `outcomes`, their hash takes its place there.
          outcomes: (N, S), for gaps to other runs; `None` leaves `line` as it is.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole, _, cut_off = file.read().rpartition("\n")
            if cut_off:
                file.truncate(len((whole + "\n" * bool(whole)).encode()))
            if outcomes is not None:  # before the line that refers to them
                line = line | {"outcomes": self.own_outcomes.add(outcomes)}
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def _has(line: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(line[name] == value for name, value in fields.items())
