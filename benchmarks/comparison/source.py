"""Sources as the interpreter reads them: without comments, docstrings and formatting."""

import ast
import functools
from collections.abc import Iterable
from pathlib import Path


def programs(files: Iterable[Path], root: Path) -> str:
    """The program of each file, after its path in `root`."""
    return "\n".join(f"{path.relative_to(root)}: {_program_of(path)}" for path in files)


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
