"""Summary, table and figures, from the finished runs alone."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from comparison.code import code_hash
from comparison.protocol import PARITY, Plan, unfit
from comparison.records import Results
from comparison.rows import FAMILIES, Row
from comparison.significance import gap
from comparison.tasks import METRICS


def latest(results: Results, plan: Plan) -> list[dict[str, Any]]:
    """The finished runs of a plan; of each cell, those of the code that ran last.

    Their `outcomes` are arrays (N, S) here, or `None` where they were not kept.
    """
    lengths = {row.name: plan.length(row) for row in plan.rows}
    lines = [line for line in results.of() if line["steps"] == lengths.get(line["method"])]
    newest = {(line["task"], line["method"]): line["code"] for line in lines}
    lines = [line for line in lines if line["code"] == newest[line["task"], line["method"]]]
    kept = lambda line: None if line["outcomes"] is None else results.outcomes(line)  # noqa: E731
    return [line | {"outcomes": kept(line)} for line in lines]


def summary(lines: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """Each method on each task, over its seeds, and the rows that were not run.

    A gap's error has two parts, added as squares: that of the test examples (the same ones drawn
    for both methods and all seeds), and that of the mean over seeds.
    """
    tasks: dict[str, Any] = {}
    missing = []
    earlier = []
    for task, row in plan.cells():
        method = row.name
        if why := unfit(task, row):
            missing.append({"task": task, "method": method, "why": why})
            continue
        mine = on_test(lines, task, method)
        if not mine:
            missing.append({"task": task, "method": method, "why": "not finished"})
            continue
        cell = _cell(mine, on_test(lines, task, "probe"))
        cell["of_earlier_code"] = mine[-1]["code"] != code_hash(row)
        tasks.setdefault(task, {})[method] = cell
        if cell["of_earlier_code"]:
            earlier.append(f"{method} on {task}")
        if len(mine) < len(plan.seeds):
            found = f"{len(mine)} of {len(plan.seeds)} seeds"
            missing.append({"task": task, "method": method, "why": found})
    return {
        "steps": plan.steps,
        "seeds": len(plan.seeds),
        "tasks": tasks,
        "not_run": missing,
        "of_earlier_code": earlier,
        "below_probe": [
            f"{method} on {task}"
            for task, cells in tasks.items()
            for method, cell in cells.items()
            if task not in PARITY and (cell["probe_gap"] or 0) < 0
        ],
    }


def on_test(lines: list[dict[str, Any]], task: str, method: str) -> list[dict[str, Any]]:
    """The runs on test, by seed; of the rate that was run last, should there be several."""
    found = [
        line
        for line in lines
        if (line["task"], line["method"], line["part"]) == (task, method, "test")
    ]
    found = [line for line in found if line["rate"] == found[-1]["rate"]]
    return sorted(found, key=lambda line: line["seed"])


def _cell(mine: list[dict[str, Any]], probe: list[dict[str, Any]]) -> dict[str, Any]:
    last = mine[-1]
    kept = ("metric", "rate", "trainable", "trainable_with_head", "peak_bytes")
    kept += ("step_time_vs_full", "latency_vs_base", "flops_vs_base", "context_used")
    kept += ("forgetting_of_base", "dropped_from_train", "device")
    scores = [line["score"] for line in mine]
    difference, error = between(mine, probe)
    return {
        "score": statistics.fmean(scores),
        "score_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "seeds": [line["seed"] for line in mine],
        "probe_gap": difference,
        "probe_gap_error": error,
        "loss": statistics.fmean(line["loss"] for line in mine),
        "forgetting": statistics.fmean(line["forgetting"] for line in mine),
        "code": last.get("measured", last["code"]),
        **{name: last[name] for name in kept},
    }


def between(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> tuple[float | None, float | None]:
    """The gap between two methods' runs over the seeds that both have, and its error."""
    others = {line["seed"]: line for line in theirs}
    both = [(line, others[line["seed"]]) for line in mine if line["seed"] in others]
    if not both:
        return None, None
    score = METRICS[mine[0]["metric"]]
    difference, error = gap(
        *(np.stack([pair[i]["outcomes"] for pair in both]) for i in (0, 1)), score
    )
    if len(both) > 1:
        gaps = [line["score"] - other["score"] for line, other in both]
        error = math.hypot(error, statistics.stdev(gaps) / len(gaps) ** 0.5)
    return difference, error


# Table -------------------------------------------------------------------------------------------

_COLUMNS = ("method", "trainable", "score", "gap to the probe", "loss", "rate", "peak", "step")
_COLUMNS += ("1 x 16", "32 x 128", "FLOPs", "context", "forgetting", "code")


def table(found: dict[str, Any], plan: Plan) -> str:
    """The summary in Markdown."""
    seeds = f"{found['seeds']} seed" + "s" * (found["seeds"] > 1)
    cells = [cell for cells in found["tasks"].values() for cell in cells.values()]
    count = len(cells)
    devices = " and ".join(sorted({cell["device"] for cell in cells}))
    parts = [
        "# Side by side",
        f"{found['steps']} optimizer steps in float32 on {devices}, means over {seeds}. Written "
        "with `--table` from the finished runs.",
        "Score: accuracy, span F1 or BLEU on test. Gap: difference to the head alone on the same "
        "examples, with its standard error (examples and seeds). Loss: on all of test. Trainable: "
        "without the head. Peak: of the compiled step. Step: its time over that of full "
        "fine-tuning. 1 x 16 and 32 x 128: time of a call over the base's, unmerged / merged "
        "(prompts and prefixes with a network: folded). Context: virtual positions. Forgetting: "
        "MiniLM, mean cosine to the base's embeddings of Banking77; stories260k, loss on the "
        "base's own stories (the base's in brackets). Rates in brackets are an end of what was "
        "swept. Code: the hash of all that a row depends on, when it ran (comparison/code.py); "
        '"earlier" where that has changed since, other than by what carried.json lists.',
    ]
    for task, cells in found["tasks"].items():
        first = next(iter(cells.values()))
        title = f"## {task}: {first['metric']}"
        note = f"{first['dropped_from_train']} sentences of train, which stand in test, dropped."
        if task in PARITY:
            note += " A parity row: few points lie between the probe and the rest here."
        lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
        lines += [_table_row(plan.row(method), cell) for method, cell in cells.items()]
        parts += [title, note, "\n".join(lines)]
    if found["not_run"]:
        rows = [f"- {x['method']} on {x['task']}: {x['why']}" for x in found["not_run"]]
        parts += ["## Not run", "\n".join(rows)]
    if earlier := found["of_earlier_code"]:
        what = (
            f"The code that {len(earlier)} of {count} rows depend on has changed since they "
            "ran, and they have not run again; gaps to the others are of two states of it."
        )
        rows = [f"- {name}" for name in earlier]
        parts += ["## Of earlier code", what, "\n".join(rows)]
    rows = [f"| {name} | {f.centre:g} | {f.source} |" for name, f in FAMILIES.items() if f.centre]
    sources = "\n".join(["| family | centre | source |", "|---|---|---|", *rows])
    parts += ["## Rates", "Three a factor of three apart, one more beyond an edge.", sources]
    return "\n\n".join(parts) + "\n"


def _table_row(row: Row, cell: dict[str, Any]) -> str:
    rates = row.rates
    # One beyond has been tried wherever the best of them was an end: only it can be an end itself.
    edge = rates and not min(rates) <= cell["rate"] <= max(rates)
    rate = "" if not rates else f"({cell['rate']:.2g})" if edge else f"{cell['rate']:.2g}"
    spread = cell["score_deviation"]
    error = cell["probe_gap_error"]
    story = f" ({cell['forgetting_of_base']:.3f})" if cell["metric"] == "BLEU" else ""
    values = (
        f"{row.name} ({row.paper})",
        f"{cell['trainable']:,}",
        f"{cell['score']:.1f}" + (f" ± {spread:.1f}" if spread is not None else ""),
        "" if row.name == "probe" or error is None else f"{cell['probe_gap']:+.1f} ± {error:.1f}",
        f"{cell['loss']:.3f}",
        rate,
        f"{cell['peak_bytes'] / 2**20:,.0f} MiB",
        f"{cell['step_time_vs_full']:.2f}",
        *(_both(cell["latency_vs_base"][shape]) for shape in ("1x16", "32x128")),
        f"{cell['flops_vs_base']:.3f}",
        str(cell["context_used"]),
        f"{cell['forgetting']:.3f}{story}",
        f"`{cell['code']}`" + " earlier" * cell["of_earlier_code"],
    )
    return "| " + " | ".join(values) + " |"


def _both(ratios: dict[str, float | None]) -> str:
    merged = ratios["merged"]
    return f"{ratios['unmerged']:.2f} / " + ("-" if merged is None else f"{merged:.2f}")


# Figures -----------------------------------------------------------------------------------------


def figure(found: dict[str, Any], path: Path) -> None:
    """Quality and what it costs: a line for each method, the best on top, a panel for each cost."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("The figures need matplotlib: pip install 'jaxpeft[figure]'.") from None
    cells_of = found["tasks"]
    tasks = {task: cells for task, cells in cells_of.items() if task not in PARITY} or cells_of
    costs = {
        "trainable, without the head": lambda cell: cell["trainable"],
        "peak MiB of a step": lambda cell: cell["peak_bytes"] / 2**20,
        "step over full fine-tuning's": lambda cell: cell["step_time_vs_full"],
    }
    lines = [len(cells) + 4 for cells in tasks.values()]  # four for the labels below
    canvas = Figure(figsize=(13, 0.19 * sum(lines)), layout="constrained")
    panels = canvas.subplots(
        len(tasks), 1 + len(costs), squeeze=False, sharey="row", height_ratios=lines
    )
    for row, (task, cells) in zip(panels, tasks.items(), strict=True):
        ranked = dict(sorted(cells.items(), key=lambda item: item[1]["score"]))
        scores = [cell["score"] for cell in ranked.values()]
        errors = [cell["score_deviation"] or 0.0 for cell in ranked.values()]
        quality, *rest = row
        quality.errorbar(scores, list(ranked), xerr=errors, fmt="o", markersize=4)
        quality.set_xlabel(f"{task}: {next(iter(cells.values()))['metric']}")
        for axes, (label, cost) in zip(rest, costs.items(), strict=True):
            values = [cost(cell) for cell in ranked.values()]
            axes.plot(values, list(ranked), "o", color="tab:gray", markersize=4)
            axes.set_xlabel(label)
            if "trainable" in label:
                axes.set_xscale("symlog", linthresh=100)  # the probe has none
        for axes in row:
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
            axes.margins(y=1 / len(cells))
    canvas.savefig(path, dpi=120)
