"""The page of public names lists the exports; `python -m tests.test_public_names` writes it."""

import importlib
import inspect
from pathlib import Path

import pytest

import jaxpeft

PAGE = Path(__file__).parent.parent / "docs" / "public_names.md"
NAMESPACES = jaxpeft._NAMESPACES

INTRODUCTION = """# Public names

`import jaxpeft as jp` gives the verbs and types of the core and every function that returns a
`Method`. Everything else is in the namespace of its subject, which is loaded when it is first used.
What is listed here is public and follows the deprecation policy; a path in which a part starts with
an underscore is private and may change in any release.
"""


def summary(value):
    """The first sentence of the docstring."""
    text = inspect.getdoc(value) or ""
    if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)):
        return ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def names_of(module):
    """{name: value} of what a module exports."""
    return {name: getattr(module, name) for name in module.__all__ if not name.startswith("_")}


def table(prefix, names):
    rows = [f"| `{prefix}{name}` | {summary(value)} |" for name, value in sorted(names.items())]
    return "\n".join(["| name | |", "|---|---|", *rows])


def page():
    from jaxpeft._method import FACTORIES

    top = names_of(jaxpeft)
    methods = {name: value for name, value in top.items() if name in FACTORIES}
    types = {n: v for n, v in top.items() if inspect.isclass(v)}
    verbs = {n: v for n, v in top.items() if n not in methods and n not in types}
    parts = [INTRODUCTION]
    for title, group in (("Verbs", verbs), ("Types", types), ("Methods", methods)):
        parts += [f"## {title}\n", table("jp.", group) + "\n"]
    for namespace in NAMESPACES:
        module = importlib.import_module(f"jaxpeft.{namespace}")
        parts += [f"## `jp.{namespace}`\n", summary(module) + "\n"]
        inner = names_of(module)
        modules = {n: v for n, v in inner.items() if inspect.ismodule(v)}
        parts += [
            table(f"jp.{namespace}.", {n: v for n, v in inner.items() if n not in modules}) + "\n"
        ]
        for name, module in sorted(modules.items()):
            prefix = f"jp.{namespace}.{name}"
            parts += [f"### `{prefix}`\n", summary(module) + "\n"]
            parts += [table(f"{prefix}.", names_of(module)) + "\n"]
    return "\n".join(parts)


def test_the_page_lists_what_the_package_exports():
    pytest.importorskip("tokenizers", reason="the namespaces of training need their extras")
    assert PAGE.read_text() == page(), "run `python -m tests.test_public_names`"


if __name__ == "__main__":
    PAGE.write_text(page())
