"""Which runs there are: rates swept where a task has a validation part, then seeds on test."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from comparison import costs
from comparison.calibration import cell_of
from comparison.cell import Cell, Run, Trained
from comparison.code import code_hash, program_hash
from comparison.rows import DESCENDANTS, FULL, PROBE, RANKS, ROWS, Row
from comparison.sharing import SharedResults
from comparison.significance import gap
from comparison.sizes import SIZES
from comparison.tasks import TASKS, Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
      rows: The methods; the probe, which others are compared with, comes first.
      tasks: Their names, and which methods have a row there (`None` for all).
      steps: Optimizer steps of a run.
      seeds: The first one is swept with.
      sweep: Whether rates are swept; without, each family's centre is taken.
      repeats: Timed calls of each kind.
    """

    rows: tuple[Row, ...]
    tasks: Mapping[str, tuple[str, ...] | None]
    steps: int = 150
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: bool = True
    repeats: int = 5

    def length(self, row: Row) -> int:
        """Optimizer steps of a run of this row."""
        return self.steps * row.longer

    def cells(self) -> list[tuple[str, Row]]:
        """The task and the method of each cell, in the order in which they are run."""
        return [
            (task, row)
            for task, names in self.tasks.items()
            for row in self.rows
            if names is None or row.name in names
        ]

    def row(self, name: str) -> Row:
        """The method of this name.

        Raises:
          ValueError: There is none; names those there are.
        """
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise ValueError(
                f"There is no method '{name}' in the table; it has {', '.join(found)}."
            )
        return found[name]


#: A parity row: few points lie between the probe and the rest there, and nothing is contested.
PARITY = {"banking77": ("probe", "lora")}
_FOUNDING = tuple(row.name for row in ROWS)
_BY_SIZE = dict.fromkeys(SIZES, ("probe", "full", "bitfit", "lora"))
WHOLE = Plan(
    tuple(ROWS + DESCENDANTS + RANKS),
    {"snips": None, "e2e": None, "trec": _FOUNDING} | PARITY | _BY_SIZE,
)
_FEW = ("probe", "full", "lora", "houlsby", "prompt", "p-tuning v2")
SHORT = Plan(
    tuple(row for row in ROWS if row.name in _FEW),
    {"snips": None, "e2e": None},
    steps=20,
    seeds=(0,),
    sweep=False,
    repeats=2,
)
#: Tasks without a validation part take the rates of one with the same model.
RATE_FROM = dict.fromkeys(("trec", "banking77", *SIZES), "snips")


def unfit(task: str, row: Row) -> str | None:
    """Why a method has no row on a task."""
    return row.decoder if task == "e2e" else None


class Protocol:
    """The runs of a plan, each of which is done once for a state of the code.

    Args:
      plan: How much is run.
      results: The finished runs, read and added to.
      say: What is told of progress goes here.
    """

    def __init__(self, plan: Plan, results: SharedResults, say: Callable[[str], None] = print):
        self.plan, self.results, self.say = plan, results, say
        for row in plan.rows:
            code_hash(row)  # of the code that runs: files may be edited in the meantime

    def run(self, methods: Sequence[str] | None = None) -> None:
        """All that is missing and that no other process is at, or what of it is of these methods.

        Raises:
          ValueError: There is no such method; names those there are.
        """
        chosen = self.plan.rows if methods is None else [self.plan.row(name) for name in methods]
        cells = [
            (task, row)
            for task, row in self.plan.cells()
            if row in chosen and unfit(task, row) is None
        ]
        later = []  # those that rest on what another process is at
        for task, row in cells:
            if any(self._elsewhere(*other) for other in self._rests_on(task, row)):
                later.append((task, row))
            else:
                self._unless_elsewhere(task, row)
        for task, row in later:
            self._unless_elsewhere(task, row)

    def _unless_elsewhere(self, task: str, row: Row) -> None:
        with self.results.claim(task, row.name, wait=False) as mine:
            if mine:
                self.cell(task, row)

    def _elsewhere(self, task: str, row: Row) -> bool:
        """Whether another process is at a cell."""
        with self.results.claim(task, row.name, wait=False) as mine:
            return not mine

    def _rests_on(self, task: str, row: Row) -> Iterator[tuple[str, Row]]:
        """The cells whose runs those of another one need."""
        if row != PROBE:
            yield task, PROBE
        if task in RATE_FROM:
            yield RATE_FROM[task], row
        if row.rate_of is not None:
            yield task, self.plan.row(row.rate_of)

    def cell(self, task: str, row: Row) -> None:
        """What is missing of a cell: its sweep, then a run of each seed on test."""
        work = _Work(self, task, row)
        rate = work.rate()
        for seed in self.plan.seeds:
            work.line("test", rate, seed)

    def redo(self, task: str, method: str) -> None:
        """A cell, whether or not it is there.

        Raises:
          ValueError: There is no such cell; says why.
        """
        row = self.plan.row(method)
        if task not in self.plan.tasks:
            raise ValueError(f"There is no task '{task}'; there are {', '.join(self.plan.tasks)}.")
        if why := unfit(task, row):
            raise ValueError(f"There is no row of '{method}' on '{task}': {why}.")
        with self.results.claim(task, method, wait=True):
            # Those of earlier code too, or they would be taken over.
            self.results.forget(task=task, method=method, steps=self.plan.length(row))
            self.cell(task, row)

    def lines(self, row: Row, **fields: Any) -> list[dict[str, Any]]:
        """A row's finished runs of this plan's length, of the code as it is."""
        wanted = {"method": row.name, "code": code_hash(row), "steps": self.plan.length(row)}
        return self.results.of(**wanted, **fields)

    def task(self, name: str) -> Task:
        """A task; the first time, says how many sentences were dropped."""
        fresh = name not in _loaded
        task = _task(name)
        if fresh:
            self.say(f"{name}: {task.dropped} sentences of train stand in test too: dropped")
        return task


_loaded: set[str] = set()


@functools.cache
def _task(name: str) -> Task:
    _loaded.add(name)
    return (TASKS | SIZES)[name]()


@functools.lru_cache(maxsize=1)
def _full(task: str, steps: int) -> Cell:
    """Full fine-tuning, whose step is what others are timed against."""
    return Cell(_task(task), FULL, steps)


class _Work:
    """A cell in progress. Data, programs and measurements are made where a line is missing."""

    def __init__(self, protocol: Protocol, task: str, row: Row):
        self.protocol, self.name, self.row = protocol, task, row
        self.trained: dict[tuple[float, int], Trained] = {}
        self.renewed = False

    def rate(self) -> float:
        """The best rate of the sweep, or the one that another task has found."""
        rates = self.row.rates
        if not self.protocol.plan.sweep and rates:
            return rates[1]
        if self.row.rate_of is not None:
            return _Work(self.protocol, self.name, self.protocol.plan.row(self.row.rate_of)).rate()
        if source := RATE_FROM.get(self.name):
            return _Work(self.protocol, source, self.row).rate() if rates else 0.0
        if rates and self.name not in self.row.swept:
            return rates[1]
        found = {rate: self.line("validation", rate)["score"] for rate in rates or (0.0,)}
        best = max(found, key=found.__getitem__)
        if best in (beyond := {min(found): best / 3, max(found): best * 3}) and best:
            found[beyond[best]] = self.line("validation", beyond[best])["score"]
        return max(found, key=found.__getitem__)

    def line(self, part: str, rate: float, seed: int | None = None) -> dict[str, Any]:
        """A finished run: the one that is there, or a new one."""
        self._renew()
        seed = self.protocol.plan.seeds[0] if seed is None else seed
        where = dict(task=self.name, part=part, rate=rate, seed=seed)
        found = self.protocol.lines(self.row, **where)
        if not found:
            with self.protocol.results.claim(self.name, self.row.name, wait=True):
                # Another process may have had the cell until now.
                found = self.protocol.lines(self.row, **where)
                found = found or [self._finish(part, rate, seed)]
        return found[0]

    def _renew(self) -> None:
        """Once, takes over the runs of earlier code whose programs are the same."""
        if self.renewed:
            return
        self.renewed, code = True, code_hash(self.row)
        steps = self.protocol.plan.length(self.row)
        wanted = dict(method=self.row.name, task=self.name, steps=steps)
        runs: dict[tuple, list[dict[str, Any]]] = {}
        for line in self.protocol.results.of(**wanted):
            runs.setdefault((line["part"], line["rate"], line["seed"]), []).append(line)
        for lines in runs.values():
            if not any(line["code"] == code for line in lines):
                same = [line for line in lines if line["program"] == self.program]
                for line in same[-1:]:
                    self.protocol.results.add(line | {"code": code})

    def _finish(self, part: str, rate: float, seed: int) -> dict[str, Any]:
        """Trains, unless it has been trained for the other part, and writes the line."""
        task = self.protocol.task(self.name)
        if (rate, seed) not in self.trained:
            self.trained[rate, seed] = self.cell.train(rate, seed)
        run = Run(self.cell, self.trained[rate, seed])
        questions = task.questions[part]
        outcomes = task.outcomes(run, questions.answers)
        difference, error = self._gap(task, part, seed, outcomes)
        line = {
            "method": self.row.name,
            "task": self.name,
            "part": part,
            "rate": rate,
            "seed": seed,
            "steps": self.protocol.plan.length(self.row),
            "code": code_hash(self.row),
            "program": self.program,
            "device": jax.devices()[0].device_kind,
            "metric": task.metric,
            "score": float(task.score(outcomes.sum(axis=0))),
            # On all of the part; a sweep has no use for it.
            "loss": run.predict(questions.split)[1] if part == "test" else None,
            "probe_gap": difference,
            "probe_gap_error": error,
            **self.costs,
            "forgetting": costs.forgetting(run),
            "forgetting_of_base": costs.unforgotten(task),
            "dropped_from_train": task.dropped,
            "outcomes": None,
        }
        self.protocol.say(
            f"{self.name:<10} {self.row.name:<12} {part:<11} rate {rate:<8.2g} seed {seed}: "
            f"{task.metric} {line['score']:.2f}, {difference:+.2f} on the probe"
        )
        # A sweep's are compared with the probe's here and never again.
        kept = part == "test" or self.row == PROBE
        return self.protocol.results.add(line, outcomes if kept else None)

    def _gap(self, task: Task, part: str, seed: int, outcomes: np.ndarray) -> tuple[float, float]:
        if self.row == PROBE:
            return 0.0, 0.0
        probe = _Work(self.protocol, self.name, PROBE).line(part, 0.0, seed)
        return gap(outcomes, self.protocol.results.outcomes(probe), task.score)

    @functools.cached_property
    def cell(self) -> Cell:
        task, steps = self.protocol.task(self.name), self.protocol.plan.length(self.row)
        if self.row == FULL:
            return _full(self.name, steps)
        return cell_of(task, self.row, steps)

    @functools.cached_property
    def program(self) -> str:
        """The hash of what the cell computes."""
        return program_hash(self.cell)

    @functools.cached_property
    def costs(self) -> dict[str, Any]:
        """What does not differ between the runs of a cell: measured once."""
        lines = self.protocol.lines(self.row, task=self.name)
        if lines:
            return {name: lines[0][name] for name in costs.FIELDS}
        plan = self.protocol.plan
        return costs.measure(self.cell, _full(self.name, plan.steps), plan.repeats)
