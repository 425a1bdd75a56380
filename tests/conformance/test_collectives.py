"""Between devices a lifted model moves what the dense one moves, and gradients of its adapter."""

import collections
import re

import jax
import pytest

from .methods import METHODS
from .rows import ROWS
from .subject import frozen_call, lifted_call, on_mesh, real, scores, subject

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(f, variables) -> list[tuple[str, set[str]]]:
    """(primitive, shapes of its results) of every collective in the compiled program."""
    text = jax.jit(f).lower(variables).compile().as_text()
    return [
        (name, set(re.findall(r"\[([\d,]*)\]", result)))
        for result, name in COLLECTIVE.findall(text)
    ]


def more_than(lifted, dense) -> collections.Counter:
    """How many more of each primitive."""
    count = lambda found: collections.Counter(name for name, _ in found)  # noqa: E731
    return count(lifted) - count(dense)


def on_mesh_rows():
    rows = [r for r in ROWS if "mesh" in r.name or r.name.startswith("shard_map")]
    slow = [pytest.mark.conformance]
    rows = [r for r in rows if not r.materializes and not r.gaps]
    return [pytest.param(r, id=r.name, marks=[] if r.everyday else slow) for r in rows]


@pytest.mark.parametrize("row", on_mesh_rows())
def test_a_forward_pass_has_the_collectives_of_the_dense_program(row):
    s = subject(row, METHODS[0])
    (fn, args), *_ = s.programs
    adapter = on_mesh(s.adapter, s.case.mesh)
    lifted = collectives(
        lambda v: real(lifted_call(s)(fn, v, args)), dict(adapter=adapter, others=s.others)
    )
    dense = collectives(lambda v: real(frozen_call(s)(fn, v, args)), dict(others=s.others))
    assert not more_than(lifted, dense)


@pytest.mark.parametrize("row", on_mesh_rows())
def test_a_step_adds_no_collective_but_of_the_adapters_gradients(row):
    s = subject(row, METHODS[0])
    (fn, args), *_ = s.programs
    f, variables = scores(s, fn, args, lifted_call(s))
    variables["adapter"] = on_mesh(s.adapter, s.case.mesh)
    lifted = collectives(jax.value_and_grad(f), variables)
    f, variables = scores(s, fn, args, frozen_call(s))
    del variables["adapter"]
    dense = collectives(jax.value_and_grad(f), variables)

    shapes = {",".join(map(str, v.shape)) for v in s.adapter.values()}
    shapes |= {",".join(map(str, v.shape[1:])) for v in s.adapter.values()}  # one layer of a stack
    for name, extra in more_than(lifted, dense).items():
        of_gradients = [found for primitive, found in lifted if primitive == name]
        assert sum(found <= shapes for found in of_gradients) >= extra, (name, lifted)
