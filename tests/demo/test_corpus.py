"""The demo's texts: what is held out is in no training text, and what ships is as it should be."""

import ast
import functools
import json

import pytest

from tests.demo import DEMO, corpus

# Functions of fewer statements, and shorter runs of lines, look alike in any two programs:
# `def __enter__(self): return self`.
STATEMENTS = 4
LINES = 5


def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "data" / name).read_text().splitlines()]


@functools.cache
def documentation() -> list[str]:
    return corpus.documentation()


def without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node, statement in corpus._docstrings(tree):
        node.body = [s for s in node.body if s is not statement] or [ast.Pass()]
    return ast.dump(tree)


def functions(source: str) -> set[str]:
    """Functions of some length, their names, docstrings and layout left out."""
    found = set()
    for node in ast.walk(ast.parse(corpus.strip(source))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = [n for n in ast.walk(node) if isinstance(n, ast.stmt)]
            if len(statements) > STATEMENTS:
                found.add("\n".join(ast.dump(statement) for statement in node.body))
    return found


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of LINES lines that hold a word, without blanks."""
    lines = ["".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if any(map(str.isalnum, line))]
    return set(zip(*(lines[i:] for i in range(LINES)), strict=False))


def test_the_lists_are_disjoint_sorted_and_of_modules_that_exist():
    assert not set(corpus.HELD_OUT) & set(corpus.ADAPTATION)
    assert not (set(corpus.HELD_OUT) | set(corpus.ADAPTATION)) & corpus.SKIP
    found = {module for module, _ in corpus.sources()}
    for names in (corpus.HELD_OUT, corpus.ADAPTATION):
        assert list(names) == sorted(set(names))
        assert set(names) <= found


def test_shipped_records_are_of_the_listed_modules():
    assert {r["module"] for r in records("train.jsonl")} == set(corpus.ADAPTATION)
    assert {r["module"] for r in records("heldout.jsonl")} == set(corpus.HELD_OUT)


def test_no_function_of_a_held_out_module_is_in_a_training_module():
    held_out = {f: m for m, s in corpus.sources(corpus.HELD_OUT) for f in functions(s)}
    assert len(held_out) > 100
    for module, source in corpus.sources(corpus.ADAPTATION):
        for function in functions(source) & held_out.keys():
            pytest.fail(f"{module} repeats a function of {held_out[function]}: {function[:200]}")


@pytest.mark.parametrize("text", ["code", "documentation"])
def test_no_lines_of_a_held_out_module_are_in_a_training_text(text):
    """Whole files, docstrings and comments too: also against the shipped records."""
    held_out = set()
    for _, source in corpus.sources(corpus.HELD_OUT):
        held_out |= runs(source) | runs(corpus.strip(source))
    for record in records("heldout.jsonl"):
        held_out |= runs(record["text"])
    assert len(held_out) > 2000
    if text == "documentation":
        trained = documentation()
    else:
        trained = [r["text"] for r in records("train.jsonl")]
        trained += [corpus.strip(source) for _, source in corpus.sources(corpus.ADAPTATION)]
    for part in trained:
        assert not runs(part) & held_out


def test_held_out_documentation_is_in_no_training_text():
    trained = set(documentation())
    held_out = corpus.held_out_documentation()
    assert sum(map(len, held_out)) > 30_000
    assert not trained & set(held_out)
    kept_back = set().union(*map(runs, held_out))
    assert len(kept_back) > 500
    assert not [text for text in trained if runs(text) & kept_back]


def test_stripping_changes_nothing_but_docstrings_and_comments():
    for module, source in corpus.sources(corpus.ADAPTATION + corpus.HELD_OUT):
        stripped = corpus.strip(source)
        assert ast.dump(ast.parse(stripped)) == without_docstrings(source), module


def test_stripping_leaves_no_docstring_and_no_comment():
    source = (
        '#!/usr/bin/python\n"""Module."""\nx = "# kept"  # gone\n\n\ndef f():\n    """Doc."""\n'
    )
    assert corpus.strip(source) == 'x = "# kept"\n\n\ndef f():\n    pass\n'
    source = 'class A:\n    """Doc\n\n    ü"""\n\n    # gone\n    y = 1\n'
    assert corpus.strip(source) == "class A:\n\n    y = 1\n"


def test_pieces_give_back_the_text_and_keep_to_the_limit():
    text = corpus.strip(next(s for m, s in corpus.sources(["heapq"])))
    pieces = list(corpus.pieces(text, 200))
    assert max(map(len, pieces)) <= 200
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_shipped_records_are_well_formed():
    for name in ("train.jsonl", "heldout.jsonl"):
        texts = [record["text"] for record in records(name)]
        assert all(set(record) == {"module", "text"} for record in records(name))
        assert all(text.strip() and len(text) <= corpus.RECORD for text in texts)


def test_the_shipped_text_is_at_most_a_megabyte_with_its_licence():
    files = list((DEMO / "data").iterdir())
    assert sum(file.stat().st_size for file in files) <= 1_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DEMO / "data/LICENSE-PSF.txt").read_text()
    assert "corpus.py" in (DEMO / "data/PROVENANCE.md").read_text()
