"""The command line of a comparison: runs what is missing, or a part, or writes the table."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxpeft
from comparison import report
from comparison.code import code_hash
from comparison.files import ROOT
from comparison.protocol import Plan, Protocol
from comparison.records import Results
from comparison.rows import Row
from comparison.sharing import SharedResults, spread

RESULTS = ROOT / "benchmarks" / "results"


def main(
    name: str,
    whole: Plan,
    short: Plan,
    *,
    also: Mapping[str, Sequence[Row]] | None = None,
    more: Callable[[list[dict[str, Any]], Plan], str] = lambda lines, plan: "",
    arguments: Sequence[str] | None = None,
) -> int:
    """Does what the arguments say, and returns the exit code.

    Args:
      name: Of the files in results/.
      whole, short: What is run.
      also: Other comparisons, whose runs of the same methods count here too, and their rows. Those
        of earlier code count as such where the row is this plan's own.
      more: From the finished runs and the plan to what stands at the end of the table.
      arguments: Those of the command line; `None` takes the process's own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--short", action="store_true", help="some minutes, a file of its own")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "TASK"), help="do one again")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="run these alone")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="share the work")
    parser.add_argument("--table", action="store_true", help="write table and figures, run nothing")
    options = parser.parse_args(arguments)

    library = Path(jaxpeft.__file__).resolve().parent
    if library != ROOT / "jaxpeft":
        parser.error(
            f"jaxpeft is imported from {library}, and results would be said to be of {ROOT}: set "
            f"PYTHONPATH={ROOT}, or install jaxpeft from there (pip install -e {ROOT})"
        )
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: one or more are needed")
    if options.workers > 1 and not (options.cell or options.table):
        chosen = ["--methods", *options.methods] if options.methods else []
        if code := spread(options.workers, ["--short"] * options.short + chosen):
            return code

    plan, ending = (short, ".short") if options.short else (whole, "")
    name += ending
    codes = {code_hash(row) for row in plan.rows}
    others = []
    for other, rows in (also or {}).items():
        shared = {row.name for row in rows if row in plan.rows}
        others.append(Results(RESULTS / f"{other}{ending}.jsonl"))
        others[-1].lines = [
            line for line in others[-1].lines if line["code"] in codes or line["method"] in shared
        ]
    results = SharedResults(RESULTS / f"{name}.jsonl", others)
    try:
        if options.cell:
            method, task = options.cell
            Protocol(plan, results, _say).redo(task, method)
        elif not options.table:
            Protocol(plan, results, _say).run(options.methods)
        lines = report.latest(results, plan)
        found = report.summary(lines, plan)
        if options.table and not lines:
            raise ValueError(f"'{results.path}' has no finished runs to make a table of.")
        if options.table:
            report.figure(found, RESULTS / f"{name}.png")
            text = report.table(found, plan) + more(lines, plan)
            text += f"\n![Quality, and what it costs]({name}.png)\n"
            (RESULTS / f"{name}.md").write_text(text)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)
