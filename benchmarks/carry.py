"""Carries recorded runs over a rewriting of the code: benchmarks/carry.py COMMIT --reason TEXT

A recorded run counts as long as the code that it depends on has the hash that it had then. Renames,
moved modules and new messages change that hash and nothing that a run computes. This command says
so, and why: it pairs the hash of every row at COMMIT with that of today, and adds the pairs to
results/carried.json. The lines of recorded runs keep the hash that they were measured with.

    COMMIT             the last state at which the recorded runs were of the code as it was
    --reason TEXT      what has changed since, and why no result depends on it
    --check M T ...    methods and tasks, in pairs, or "all" cells: trains each of these for three
                       steps at COMMIT and today, and compares what is trained and then predicted.
                       A method with a cell that differs is not carried, and the exit code is 1
    --unchecked        carries methods of which no cell is checked, too, and figures of measured.py
    --tolerance X      by how much of its norm an array may differ (default 0: by no bit)
    --dry              prints what would be added, and adds nothing

A cell takes some ten seconds on two cores. A row that was of earlier code at COMMIT stays so. Give
results/carried.json into one commit with the change that it is about.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import numpy as np
from comparison.records import Carried, Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: Runs in either state of the code, so it asks for little: plans, hashes, and cells that train.
SCRIPT = """
import json, sys
from pathlib import Path
import jax
import numpy as np
import methods, named, prompts
from comparison import calibration, protocol
from comparison.code import code_hash

plans = {"methods": protocol.WHOLE, "named": named.PLAN, "prompts": prompts.PLAN}
out, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
codes = {n: {row.name: code_hash(row) for row in plan.rows} for n, plan in plans.items()}
(out / "codes.json").write_text(json.dumps(codes))

calibration.PROBE_STEPS = 3
found = {}
for plan in plans.values():
    for task, row in plan.cells():
        skipped = protocol.unfit(task, row) is not None or (task, row.name) in found
        if skipped or wanted != "all" and [row.name, task] not in wanted:
            continue
        cell = calibration.cell_of(protocol._task(task), row, 3)
        trained = cell.train(row.rates[1] if row.rates else 0.0, 0)
        few = cell.task.questions["test"].split.rows(np.arange(2))
        said = cell.predictor(*trained, few)
        # By their order: an array may have a new name.
        arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves((trained.adapter, said))]
        found[task, row.name] = len(found)
        np.savez(out / f"{len(found) - 1}.npz", *arrays)
        print(f"{task}: {row.name}", file=sys.stderr, flush=True)
listed = [[task, method, number] for (task, method), number in found.items()]
(out / "cells.json").write_text(json.dumps(listed))
"""


def state(root: Path, out: Path, cells: Any) -> dict[str, Any]:
    """The hashes of a state of the code, and what its cells come to.

    Args:
      root: The folder of that state.
      out: Where to put what is found.
      cells: [method, task] of each cell to train, or "all".
    """
    out.mkdir()
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    }
    environment.setdefault("JAXPEFT_DATA", str(ROOT.parent / "shared" / "data"))
    command = [sys.executable, "-c", SCRIPT, str(out), json.dumps(cells)]
    subprocess.run(command, check=True, cwd=root, env=environment)
    listed = json.loads((out / "cells.json").read_text())
    arrays = {}
    for task, method, number in listed:
        with np.load(out / f"{number}.npz") as file:
            arrays[task, method] = [file[name] for name in file.files]
    codes = json.loads((out / "codes.json").read_text())
    # Of what no cell checks: figures of other benchmarks, see measured.py.
    scripts = {name: path for name, path in measured.SCRIPTS.items() if (root / path).exists()}
    codes["figures"] = {name: measured.code(name, root) for name in scripts}
    return {"codes": codes, "cells": arrays}


def farthest(mine: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of two arrays, as a part of their norm; infinite for other shapes."""
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        return float("inf")
    pairs = zip(mine, theirs, strict=True)
    gaps = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs]
    return float(max(gaps, default=0.0))


def entry(
    before: dict[str, Any],
    now: dict[str, Any],
    recorded: dict[str, set[str]],
    *,
    reason: str,
    since: str,
    tolerance: float = 0.0,
    unchecked: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[str]]:
    """What is to be added to carried.json, and the methods that differ.

    Args:
      before, now: Both states, as `state` gives them.
      recorded: Hashes of the lines of each results file.
      reason, since: As given.
      tolerance, unchecked: As given.
      say: What is told of each checked cell goes here.
    """
    differ: set[str] = set()
    for (task, method), arrays in now["cells"].items():
        gap = farthest(arrays, before["cells"][task, method])
        say(f"{task}: {method} differs by {gap:.1e} of its norm")
        if gap > tolerance:
            differ.add(method)
    same = {method for _, method in now["cells"]} - differ
    codes = {}
    for name, rows in before["codes"].items():
        for method, old in rows.items():
            new = now["codes"][name].get(method)
            known = method in same or unchecked and method not in differ
            if known and new not in (None, old) and old in recorded[name]:
                codes[old] = new
    checked = [f"{method} on {task}" for task, method in now["cells"] if method in same]
    found = {"reason": reason, "since": since, "checked": checked, "codes": codes}
    return found, sorted(differ)


def main(arguments: list[str] | None = None) -> int:
    """Does what the arguments say, and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--reason", required=True)
    parser.add_argument("--check", nargs="+", default=[], metavar="METHOD TASK")
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    given = options.check
    if not given and not options.unchecked:
        parser.error("give cells to --check, or --unchecked to carry every method as it is")
    if given != ["all"] and len(given) % 2:
        parser.error(f"--check {' '.join(given)}: a method and a task each are needed, or 'all'")
    pairs = [[method, task] for method, task in zip(given[::2], given[1::2], strict=False)]
    cells: Any = "all" if given == ["all"] else pairs
    git = ["git", "-C", str(ROOT)]
    since = subprocess.run(
        [*git, "rev-parse", "--short", options.commit], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        old.mkdir()
        archive = subprocess.run([*git, "archive", since], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", str(old)], input=archive, check=True)
        before = state(old, Path(folder, "before"), cells)
        now = state(ROOT, Path(folder, "now"), cells)
    recorded = {
        name: {line["code"] for line in Results(RESULTS / f"{name}.jsonl").lines}
        for name in before["codes"]
        if name != "figures"
    }
    carried = Carried(RESULTS / "carried.json")
    figures = json.loads((RESULTS / "measured.json").read_text())
    recorded["figures"] = {carried(figure["code"]) for figure in figures.values()}
    found, differ = entry(
        before,
        now,
        recorded,
        reason=options.reason,
        since=since,
        tolerance=options.tolerance,
        unchecked=options.unchecked,
    )
    path = RESULTS / "carried.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    if options.dry:
        print(json.dumps(found, indent=1))
    else:
        path.write_text(json.dumps([*entries, found], indent=1) + "\n")
    print(f"{len(found['codes'])} hashes carried since {since}; different: {differ or 'none'}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
