"""What a run depends on: the code that trains, scores and measures it, and what that amounts to.

The hash of the code takes no time. Comments, docstrings and formatting do not count in it, nor does
a method that another row has. The hash of the programs takes some seconds, and tells whether a
change of code has changed what is computed.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpeft as jp
from comparison.calibration import Calibration
from comparison.cell import Cell, Trained
from comparison.files import ROOT
from comparison.rows import Row
from comparison.source import program, programs
from jaxpeft import optim

#: The core, in the order of its names.
_CORE = "axes compat composite computed dimensions errors export find_sites interpreter layout lift"
_CORE += " losses marks method misuse operand schema site sites tree view weight"

#: What every row depends on.
COMMON = (
    *(f"jaxpeft/_{name}.py" for name in _CORE.split()),
    "jaxpeft/_rules/*.py",
    "jaxpeft/_tracing/*.py",
    "jaxpeft/_methods/selection.py",
    "jaxpeft/_methods/prefix_tuning.py",
    "jaxpeft/_methods/prompt_tuning.py",
    "jaxpeft/prompts/_virtual.py",
    "jaxpeft/prompts/_tokens.py",
    "jaxpeft/extend/_apply.py",
    "jaxpeft/adapters/_reparameterization.py",
    *(f"jaxpeft/models/_{name}.py" for name in ("architecture", "config", "layers")),
    *(f"jaxpeft/models/_{name}_config.py" for name in ("encoder", "decoder")),
    *(f"jaxpeft/models/{name}.py" for name in ("encoder", "decoder", "heads")),
    "jaxpeft/serve/_generate.py",
    "jaxpeft/optim/_finite.py",
    *(f"jaxpeft/train/_{name}.py" for name in ("loss_scale", "step")),
    *(f"benchmarks/comparison/{x}.py" for x in ("files", "tasks", "places", "cell", "costs")),
)


#: What rows that are trained in their own way depend on.
TUNED = (
    ROOT / "benchmarks/comparison/tuned.py",
    *(ROOT / f"jaxpeft/optim/_{name}.py" for name in ("masking", "rank_allocator")),
    *(ROOT / f"jaxpeft/optim/_{name}.py" for name in ("scheduled_pruning", "top_k")),
)
#: What rows depend on that are told of their task's batches.
CALIBRATION = ROOT / "benchmarks/comparison/calibration.py"

#: What the core imports and no result depends on.
IDLE = (ROOT / "jaxpeft/_printing.py",)

#: What no program shows: which data are read, and how outputs are scored.
SCORING = ("files", "tasks", "places", "cell", "costs", "significance")


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
    paths = (Path(inspect.getsourcefile(inspect.unwrap(x)) or "") for x in _named(_node(make)))
    files = [path for path in paths if path not in TUNED]
    found: set[Path] = set()
    while files:
        file = files.pop()
        if file not in found:
            found.add(file)
            files += _imported(file, package)
    return sorted(found.difference(_common(), IDLE))


def _named(node: ast.AST) -> Iterator[Any]:
    """What of the library a function names: `jp.lora`, `jp.adapters.to_lora`, `optim.rigl`."""
    if isinstance(node, ast.Attribute) and (found := _value(node)) is not None:
        if not inspect.ismodule(found):
            yield found
        return
    for child in ast.iter_child_nodes(node):
        yield from _named(child)


def _value(node: ast.AST) -> Any:
    """The value of a dotted name that starts with a module of the library, else `None`."""
    if isinstance(node, ast.Name):
        return {"jp": jp, "optim": optim}.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := _value(node.value)):
        return getattr(module, node.attr)
    return None


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
    found = {pattern: sorted(ROOT.glob(pattern)) for pattern in COMMON}
    if gone := [pattern for pattern, paths in found.items() if not paths]:
        raise FileNotFoundError(f"Every result depends on {gone}, which are not there: see COMMON.")
    return tuple(path for paths in found.values() for path in paths)


def _programs(files: Iterable[Path]) -> str:
    return programs(files, ROOT)
