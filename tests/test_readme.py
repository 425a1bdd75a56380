"""The README's example runs, and its table names what the package exports."""

import re
from pathlib import Path

import jaxpeft as jp
from jaxpeft import _methods as methods
from jaxpeft import train

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_trains_as_many_numbers_as_it_says():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(code, names)
    assert sum(x.size for x in names["adapter"].values()) == 152
    assert set(names["dense"]) == set(names["params"])
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_table_has_every_method_and_no_other():
    table = README.split("## Methods")[1].split("##")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name.split("(")[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    helpers = {"check_ids", "check_prefix", "check_prompt", "fold", "template", "virtual_ids"}
    helpers |= {"with_prefixes", "with_virtual", "without_virtual"}
    helpers |= {"Moments", "as_lora", "input_moments", "mean_gradients"}
    helpers |= {"orthogonality", "ranks", "shrunk"}
    helpers |= {"density", "for_task", "keep", "magnitude", "obs", "saliency"}
    helpers |= {"bank", "for_shares", "open_gates", "openness"}
    helpers |= {"compensate", "cut", "keep_units", "unit_scores", "units"}
    optimizers = {name for name in named if name.startswith("train.")}
    assert named - optimizers == set(methods.__all__) - helpers | {"quantize", "loftq"}
    assert all(hasattr(jp, name) for name in named - optimizers)
    assert optimizers == {"optim.scheduled_pruning", "optim.rigl"}
    assert all(hasattr(train, name.removeprefix("train.")) for name in optimizers)
