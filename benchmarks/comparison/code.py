"""What a run depends on: the code that trains, scores and measures it, and what that amounts to.

The hash of the code takes no time. Comments, docstrings and formatting do not count in it, nor does
a method that another row has. The hash of the programs takes some seconds, and tells whether a
change of code has changed what is computed.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpeft as jp
from comparison.calibration import Calibration
from comparison.cell import Cell, Trained
from comparison.files import ROOT
from comparison.rows import Row
from jaxpeft import train

#: What every row depends on.
COMMON = (
    *(f"jaxpeft/{name}.py" for name in ("axes", "compat", "composite", "computed", "exporting")),
    *(f"jaxpeft/{name}.py" for name in ("lift", "method", "misuse", "schema", "sites", "tree")),
    "jaxpeft/weight.py",
    "jaxpeft/rules/*.py",
    "jaxpeft/tracing/*.py",
    "jaxpeft/methods/placing.py",
    "jaxpeft/methods/folding.py",
    "jaxpeft/methods/selection.py",
    "jaxpeft/methods/prefix.py",
    "jaxpeft/methods/prompt.py",
    "jaxpeft/models/layers.py",
    "jaxpeft/models/encoder.py",
    "jaxpeft/models/decoder.py",
    "jaxpeft/serve/generate.py",
    "jaxpeft/train/heads.py",
    "jaxpeft/train/loss.py",
    *(f"jaxpeft/train/{name}.py" for name in ("finite", "loss_scale", "step")),
    "benchmarks/comparison/files.py",
    "benchmarks/comparison/tasks.py",
    "benchmarks/comparison/places.py",
    "benchmarks/comparison/cell.py",
    "benchmarks/comparison/costs.py",
)


#: What rows that are trained in their own way depend on.
TUNED = (
    ROOT / "benchmarks/comparison/tuned.py",
    *(ROOT / f"jaxpeft/optim/_{name}.py" for name in ("masking", "rank_allocator")),
    *(ROOT / f"jaxpeft/optim/_{name}.py" for name in ("scheduled_pruning", "top_k")),
)
#: What rows depend on that are told of their task's batches.
CALIBRATION = ROOT / "benchmarks/comparison/calibration.py"

#: What no program shows: which data are read, and how outputs are scored.
SCORING = ("files", "tasks", "places", "cell", "costs", "records")


@functools.cache
def code_hash(row: Row) -> str:
    """Of what all rows depend on, the row as it is declared, and the files of its method."""
    parts = [_programs(_common())]
    parts += [repr((row.name, row.family, row.rates, row.length, row.virtual))]
    if row.make is not None:
        parts += [declared(row.make), _programs(method_files(row.make))]
    for more in filter(None, (row.wrap, row.penalty)):
        parts += [declared(more), _programs([*method_files(more), *TUNED])]
    if row.needs is not None:
        told = getattr(Calibration, row.needs)
        parts += [declared(told), _programs([*method_files(told), CALIBRATION])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def program_hash(cell: Cell) -> str:
    """Of a cell's step and questions as they are lowered, what they start with, and the scoring."""
    state, frozen = cell.start(0)
    found = hashlib.sha256(
        _programs(ROOT / f"benchmarks/comparison/{x}.py" for x in SCORING).encode()
    )
    task, parts = cell.task, (frozen, state.adapter)
    few = task.questions["test"].split.rows(np.zeros(2, int))
    found.update(cell.lowered.as_text().encode())
    for call in (cell.predictor, cell.embedder):
        found.update(call.lower(*parts, few).as_text().encode())
    if task.metric == "BLEU":
        write = jax.jit(lambda tokens, mask: cell.writer(Trained(*parts), tokens, mask))
        found.update(write.lower(few.tokens[:, :8], few.mask[:, :8]).as_text().encode())
    for x in jax.tree.leaves((state, frozen)):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()[:12]


def declared(make: Callable) -> str:
    """A row's function as the interpreter reads it, with the constants and helpers it names."""
    node = _node(make)
    scope = inspect.getclosurevars(make)
    known = sorted({**scope.globals, **scope.nonlocals}.items())
    plain = {k: v for k, v in known if isinstance(v, int | float | str)}
    helpers = [v for _, v in known if inspect.isfunction(v) and v.__module__ == Row.__module__]
    return " ".join([program(node), str(plain), *map(declared, helpers)])


def method_files(make: Callable) -> list[Path]:
    """The files of the methods that a row's function calls, and what they import."""
    package = Path(jp.__file__).parent
    modules = {"jp": jp, "train": train}
    named = (
        getattr(modules[node.value.id], node.attr)
        for node in ast.walk(_node(make))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    )
    paths = (Path(inspect.getsourcefile(inspect.unwrap(what)) or "") for what in named)
    files = [path for path in paths if path not in TUNED]
    found: set[Path] = set()
    while files:
        file = files.pop()
        if file not in found:
            found.add(file)
            files += _imported(file, package)
    return sorted(found - set(_common()))


def _imported(file: Path, package: Path) -> Iterator[Path]:
    """The library's own modules that a file imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxpeft."):
            path = package.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
            if path.exists():
                yield path


def _node(make: Callable) -> ast.AST:
    """Where a function stands in its file."""
    first = make.__code__.co_firstlineno
    tree = ast.parse(Path(make.__code__.co_filename).read_text())
    kinds = (ast.Lambda, ast.FunctionDef)
    return next(n for n in ast.walk(tree) if isinstance(n, kinds) and n.lineno == first)


@functools.cache
def _common() -> tuple[Path, ...]:
    return tuple(path for pattern in COMMON for path in sorted(ROOT.glob(pattern)))


def _programs(files: Any) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}: {_program_of(path)}" for path in files)


@functools.cache
def _program_of(path: Path) -> str:
    return program(ast.parse(path.read_text()))


def program(tree: ast.AST) -> str:
    """What a source says to the interpreter, without its docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return ast.dump(tree)
