"""The README's example runs, and its table of methods names what the package exports."""

import operator
import re
from pathlib import Path

import jaxpeft as jp
from jaxpeft._method import FACTORIES

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_has_as_many_trainable_parameters_as_it_says():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(code, names)
    said = int(re.search(r"# (\d+) trainable parameters", code).group(1))
    assert sum(x.size for x in names["adapter"].values()) == said
    assert set(names["dense"]) == set(names["params"])
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_table_has_every_method_and_no_other():
    table = README.split("## Methods")[1].split("##")[0]
    assert {row.count("|") for row in table.splitlines() if row.startswith("|")} == {5}
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name.split("(")[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    elsewhere = {name for name in named if "." in name}
    methods = {name for name, f in FACTORIES.items() if f.__module__.startswith("jaxpeft.")}
    assert named - elsewhere == methods - {"chain"}
    assert elsewhere == {"optim.scheduled_pruning", "optim.rigl"}
    assert all(operator.attrgetter(name)(jp) for name in elsewhere)
