"""Recorded figures say which code they were measured with, and whether it has changed since."""

import json
import re

import measured
import pytest
from comparison import source


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder and a library of one file, in place of the real ones."""
    for name in ("results", "jaxpeft", "benchmarks"):
        (tmp_path / name).mkdir()
    (tmp_path / "jaxpeft" / "a.py").write_text('"""What."""\nx = 1\n')
    (tmp_path / "benchmarks" / "loading.py").write_text("y = 2\n")
    (tmp_path / "results" / "loading.md").write_text("# Figures\n\n| 1 | 2 |\n")
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measured.code, "__defaults__", (tmp_path,))
    source._program_of.cache_clear()
    yield tmp_path / "results"
    source._program_of.cache_clear()


def changed(path, text):
    path.write_text(text)
    source._program_of.cache_clear()


def test_figures_are_of_earlier_code_once_the_library_or_their_script_has_changed(results):
    library, script = results.parent / "jaxpeft/a.py", results.parent / "benchmarks/loading.py"
    measured.stamp("loading")
    first = (results / "loading.md").read_text()
    assert re.fullmatch(
        r"# Figures\n\n\| 1 \| 2 \|\n\nMeasured with code `[0-9a-f]{12}`\.\n", first
    )
    changed(library, '"""Said otherwise."""\nx = (1)  # why\n')
    assert not measured.is_earlier("loading")
    changed(script, "y = 3\n")
    assert measured.is_earlier("loading")
    changed(script, "y = 2\n")
    changed(library, "x = 3\n")
    assert measured.main(["--mark"]) == 0
    second = (results / "loading.md").read_text()
    assert second == first.replace("`.", "`; the code has changed since.")
    measured.main(["--stamp", "loading"])
    assert (results / "loading.md").read_text().count("Measured with") == 1
    assert not measured.is_earlier("loading")


def test_figures_are_carried_like_runs(results):
    measured.stamp("loading")
    changed(results.parent / "jaxpeft/a.py", "renamed = 1\n")
    old = json.loads((results / "measured.json").read_text())["loading"]["code"]
    carried = [{"codes": {old: measured.code("loading")}}]
    (results / "carried.json").write_text(json.dumps(carried))
    assert not measured.is_earlier("loading")
    (results / "carried.json").unlink()
    assert measured.is_earlier("loading")


def test_every_file_of_results_says_what_it_was_measured_with():
    """Those of earlier code say that they are: `python benchmarks/measured.py --mark`."""
    recorded = json.loads((measured.RESULTS / "measured.json").read_text())
    assert set(recorded) == set(measured.SCRIPTS)
    own = {"measured", "carried"}
    for path in measured.RESULTS.iterdir():
        name = path.name.split(".")[0]
        if path.with_name(f"{name}.jsonl").exists():  # runs, each with a hash of its own
            if path.suffix == ".md":
                rows = [x for x in path.read_text().splitlines() if re.search(r"\| `\w{12}`", x)]
                assert rows, path
        elif name not in own:
            assert name in recorded, path
            if path.suffix == ".md":
                assert path.read_text().endswith(f"\n\n{measured.line(name)}\n"), path
    for name in recorded:
        assert list(measured.RESULTS.glob(f"{name}.*"))
        assert (measured.ROOT / measured.SCRIPTS[name]).exists()
