"""Which recorded figures are older than the code that they measure: python benchmarks/measured.py

Figures that no comparison of methods records line by line: each has the hash of the library and of
its script in results/measured.json, and its .md file says so in the last line. Comments, docstrings
and formatting do not count.

    --mark       writes these lines anew, so that figures of earlier code say that they are
    --stamp N    notes that results/N.* were measured with the code as it is

A script that writes its figures itself stamps them, too. Runs of methods have hashes of their own
(comparison/code.py), and both are carried over a renaming by carry.py.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison.records import Carried
from comparison.source import programs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: The script behind the files of a name, results/NAME.*
SCRIPTS = {
    "clients": "tests/clients/harness.py",
    "loading": "benchmarks/loading.py",
    "longlora": "benchmarks/longlora.py",
    "overhead": "benchmarks/overhead.py",
    "quantization": "benchmarks/quantization.py",
    "quantization_tpu": "benchmarks/quantization_tpu.py",
    "tpu_check": "benchmarks/tpu_check.py",
}
_LINE = "Measured with code `"


def code(name: str, root: Path = ROOT) -> str:
    """The hash of the library and of the script behind a name, in a state of the code."""
    files = [*sorted((root / "jaxpeft").rglob("*.py")), root / SCRIPTS[name]]
    return hashlib.sha256(programs(files, root).encode()).hexdigest()[:12]


def stamp(name: str) -> None:
    """Notes that the figures of a name were measured with the code as it is."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(git, capture_output=True, text=True)
    known = _recorded()
    known[name] = {"code": code(name), "commit": found.stdout.strip() or None}
    _path().write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    mark(name)


def mark(name: str) -> None:
    """Says in the .md file of a name, should there be one, what its figures were measured with."""
    path = RESULTS / f"{name}.md"
    if path.exists():
        text = path.read_text().split(f"\n{_LINE}")[0].rstrip("\n")
        path.write_text(f"{text}\n\n{line(name)}\n")


def line(name: str) -> str:
    """That line."""
    found = _recorded()[name]
    at = f" at commit {found['commit']}" if found["commit"] else ""
    rest = "; the code has changed since" if is_earlier(name) else ""
    return f"{_LINE}{found['code']}`{at}{rest}."


def is_earlier(name: str) -> bool:
    """Whether the code has changed since a name's figures were measured."""
    carried = Carried(RESULTS / "carried.json")
    return carried(_recorded()[name]["code"]) != code(name)


def table() -> Iterator[str]:
    """A line for each name."""
    for name, found in _recorded().items():
        state = "earlier" if is_earlier(name) else "current"
        yield f"{name:<18}{found['code']}  {found['commit'] or '-':<18}{state}"


def _path() -> Path:
    return RESULTS / "measured.json"


def _recorded() -> dict[str, Any]:
    return json.loads(_path().read_text()) if _path().exists() else {}


def main(arguments: list[str] | None = None) -> int:
    """Does what the arguments say, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mark", action="store_true")
    parser.add_argument("--stamp", nargs="+", default=[], choices=SCRIPTS, metavar="N")
    options = parser.parse_args(arguments)
    for name in options.stamp:
        stamp(name)
    if options.mark:
        for name in _recorded():
            mark(name)
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
