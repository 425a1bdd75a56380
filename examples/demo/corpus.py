"""The demo's texts, taken from the standard library of the Python that runs this file.

    python examples/demo/corpus.py        # writes examples/demo/data/ (seconds)

Two kinds of text. *Documentation* is English: the language reference that `help()` shows, the
docstrings of the library with their signatures, and its longer comments. The base is pretrained
on it (pretrain.py). *Code* is the library's source with docstrings and comments cut out. The
base is adapted to that (run.py).

Whole modules are held out, by the list of names below: neither their source nor their docstrings
nor their comments are in any training text. What the demo trains and evaluates on ships in data/,
since the library differs between Python versions.
"""

import ast
import importlib
import inspect
import io
import json
import re
import shutil
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Modules whose code the models are evaluated on. No module has a near twin in the library, as
# `wave` has in `sunau`; test_corpus.py compares them line by line with everything trained on.
HELD_OUT = (
    "cmd", "configparser", "fnmatch", "fractions", "graphlib", "heapq", "netrc", "sched", "shlex",
    "textwrap",
)  # fmt: skip

# Modules whose code the base is adapted to: programs rather than tables, and in Python 3.14 still.
ADAPTATION = (
    "bdb", "code", "codecs", "collections", "compileall", "contextlib", "copy", "filecmp",
    "fileinput", "ftplib", "functools", "getopt", "gettext", "glob", "gzip", "hmac", "json",
    "linecache", "mimetypes", "modulefinder", "os", "pathlib", "pdb", "pkgutil", "plistlib",
    "poplib", "posixpath", "pstats", "queue", "random", "reprlib", "runpy", "selectors", "shelve",
    "shutil", "smtplib", "socketserver", "subprocess", "tempfile", "threading", "trace", "types",
    "weakref", "zipapp",
)  # fmt: skip

# Topics of the language reference kept back, to see how well the base knows English. Others would
# not do: `with` stands in `compound` once more.
HELD_OUT_TOPICS = (
    "assert", "calls", "del", "import", "raise", "slicings", "strings", "typesmethods",
)  # fmt: skip

# No programs, no prose, or not the library's own.
SKIP = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "site-packages", "turtledemo",
    "pydoc_data", "lib-dynload", "this", "antigravity",
}  # fmt: skip

# Documented in C. None of them implements a held-out module, as `_heapq` does.
COMPILED = (
    "_asyncio", "_codecs", "_datetime", "_decimal", "_functools", "_io", "_operator", "_socket",
    "_thread", "_tracemalloc", "array", "atexit", "binascii", "builtins", "cmath", "errno",
    "faulthandler", "gc", "itertools", "marshal", "math", "posix", "select", "sys", "time",
    "unicodedata", "zlib",
)  # fmt: skip

# Characters of one record of code. A byte-level tokenizer needs at most a token per character of
# ASCII; at this size every record has under 256 tokens of ours (a test), the demo's context.
RECORD = 440


def sources(names: Iterable[str] | None = None) -> Iterator[tuple[str, str]]:
    """(module, source) of every file of the library, of the named top-level modules only if given.

    A package counts as one module: `json` stands for all files of json/.
    """
    wanted = None if names is None else set(names)
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        module = parts[0]
        if SKIP.isdisjoint(parts) and "-" not in module and not module.startswith("_sysconfig"):
            if wanted is None or module in wanted:
                yield module, path.read_text(encoding="utf-8")


# --- code: the source without its English


def strip(source: str) -> str:
    """The source without docstrings and comments; everything else keeps its form.

    Where a docstring is the whole body, `pass` takes its place.
    """
    lines = [line.encode() for line in source.splitlines()]  # ast counts columns in bytes
    for node, statement in reversed(list(_docstrings(ast.parse(source)))):
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before, after = (
            lines[first][: statement.col_offset],
            lines[last][statement.end_col_offset :],
        )
        alone = not before.strip() and not after.split(b"#")[0].strip()
        lines[first : last + 1] = [] if alone and len(node.body) > 1 else [before + b"pass" + after]
    lines = [line.decode() for line in lines]

    readline = io.StringIO("\n".join(lines) + "\n").readline
    for token in tokenize.generate_tokens(readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            # A line that was all comment goes; NUL marks it, since indices must not move yet.
            lines[row - 1] = lines[row - 1][:column].rstrip() or "\0"
    text = "\n".join(line for line in lines if line != "\0")
    return re.sub(r"\n\s*\n\n+", "\n\n\n", text).strip("\n") + "\n"


def _docstrings(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """(owner, statement) of every docstring, in the order of the source."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        n for n in ast.walk(tree) if isinstance(n, owners) and ast.get_docstring(n) is not None
    ]
    return iter(sorted(((n, n.body[0]) for n in found), key=lambda pair: pair[1].lineno))


def pieces(text: str, limit: int = RECORD) -> Iterator[str]:
    """The text cut into pieces of at most `limit` characters, at blank lines where possible."""
    piece = ""
    for block in re.split(r"\n(?=\n)", text.strip("\n")):
        lines = [block] if len(block) <= limit else block.splitlines(keepends=True)
        for i, line in enumerate(lines):
            joint = "\n" if piece and i == 0 and not piece.endswith("\n\n") else ""
            if len(piece) + len(joint) + len(line) > limit and piece.strip():
                yield piece.strip("\n")
                piece, joint = "", ""
            piece += joint + line
    if piece.strip():
        yield piece.strip("\n")


def code(names: Iterable[str]) -> list[dict[str, str]]:
    """Records `{"module", "text"}` of the named modules' code, in the order of the library."""
    return [
        {"module": module, "text": piece}
        for module, source in sources(names)
        for piece in pieces(strip(source))
        if len(piece) <= RECORD  # drops a single line that is longer than that
    ]


# --- documentation: English, with the signatures and examples that stand in it


def reference(held_out: bool) -> list[str]:
    """The topics of the language reference, either the held-out ones or all others."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [text for name, text in topics.items() if (name in HELD_OUT_TOPICS) == held_out]


def described(source: str) -> Iterator[str]:
    """Every docstring of a module, functions and classes under their signatures."""
    for node, _ in _docstrings(ast.parse(source)):
        text = inspect.cleandoc(ast.get_docstring(node) or "")
        if len(text) >= 20:
            yield f"{_signature(node)}\n\n{text}" if _signature(node) else text


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)})"
    return ""


def commented(source: str) -> Iterator[str]:
    """Comments of two lines and more that read like prose rather than like code put aside."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.lstrip().startswith("#"):
            block.append(line.lstrip().lstrip("#!").removeprefix(" ").rstrip())
            continue
        text = textwrap.dedent("\n".join(block)).strip("\n -=*")
        letters = sum(c.isalpha() or c.isspace() for c in text)
        if len(block) > 1 and len(text) >= 80 and letters > 0.85 * len(text):
            yield text
        block = []


def compiled() -> Iterator[str]:
    """Docstrings of modules written in C, of their functions, classes and methods."""
    for name in COMPILED:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not on this platform
            continue
        for owner in [module, *(v for v in vars(module).values() if inspect.isclass(v))]:
            for member in [owner, *vars(owner).values()]:
                text = inspect.cleandoc(getattr(member, "__doc__", None) or "")
                if (callable(member) or member is module) and len(text) >= 40:
                    yield f"{getattr(member, '__name__', '')}\n\n{text}"


def documentation() -> list[str]:
    """All training text of the base, without repetitions, in a fixed order."""
    texts = reference(held_out=False) + list(compiled())
    for module, source in sources():
        if module not in HELD_OUT:
            texts += [*described(source), *commented(source)]
    return list(dict.fromkeys(texts))


def held_out_documentation() -> list[str]:
    """English that the base has not seen: topics kept back and docstrings of held-out modules."""
    texts = reference(held_out=True)
    for _, source in sources(HELD_OUT):
        texts += described(source)
    # Inherited docstrings are repeated word for word in many modules.
    seen = set(documentation())
    return [text for text in dict.fromkeys(texts) if text not in seen]


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(records)} records, {path.stat().st_size:,} bytes")


def main() -> None:
    DATA.mkdir(exist_ok=True)
    write_records(DATA / "train.jsonl", code(ADAPTATION))
    write_records(DATA / "heldout.jsonl", code(HELD_OUT))
    shutil.copyfile(LIBRARY / "LICENSE.txt", DATA / "LICENSE-PSF.txt")
    (DATA / "PROVENANCE.md").write_text(
        f"""# Where this text is from

`train.jsonl` and `heldout.jsonl` hold source code of the standard library of Python
{sys.version.split()[0]}, docstrings and comments cut out, in records of at most {RECORD}
characters. `python examples/demo/corpus.py` writes them; the lists of modules stand in that file.
The code is copyright of the Python Software Foundation and its contributors, and under the licence
beside this note (`LICENSE-PSF.txt`). It was changed only by leaving text out.
"""
    )


if __name__ == "__main__":
    main()
