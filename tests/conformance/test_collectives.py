"""Between devices a lifted model moves what the dense one moves, and gradients of its adapter."""

import collections
import re

import jax
import pytest

from .methods import METHODS
from .rows import ROWS
from .rows.row import marks, paths
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


def shapes(arrays) -> set[str]:
    """As XLA prints them: of each array, and of one layer of it should it be a stack."""
    return {",".join(map(str, shape)) for v in arrays for shape in (v.shape, v.shape[1:])}


def parts(s) -> set[str]:
    """Shapes of the adapter's arrays on one device, whichever axis is divided."""
    count = s.case.mesh.size
    divided = [
        jax.ShapeDtypeStruct((*v.shape[:i], v.shape[i] // count, *v.shape[i + 1 :]), v.dtype)
        for v in s.adapter.values()
        for i in range(v.ndim)
    ]
    return shapes(divided)


def on_mesh_rows():
    rows = [r for r in ROWS if "mesh" in r.name or r.name.startswith("shard_map")]
    rows = [r for r in rows if not r.materializes]
    return [pytest.param(r, id=r.name, marks=marks(r.everyday)) for r in rows]


@pytest.mark.parametrize("row", on_mesh_rows())
def test_a_forward_pass_has_the_collectives_of_the_dense_program(row):
    s = subject(row, METHODS[0])
    (fn, args), *_ = s.programs
    adapter = on_mesh(s.adapter, s.case.mesh)
    lifted = collectives(
        lambda v: real(lifted_call(s)(fn, v, args)), dict(adapter=adapter, others=s.others)
    )
    dense = collectives(lambda v: real(frozen_call(s)(fn, v, args)), dict(others=s.others))
    extra, adapters = more_than(lifted, dense), shapes(s.adapter.values())
    weights = shapes(paths(s.case.params)[n] for n in s.covered)
    if any(name == "all-gather" and found <= weights for name, found in dense):
        # A model that gathers its weights before use gathers the adapter's arrays with them.
        extra["all-gather"] -= sum(found <= adapters for _, found in lifted)
    assert not +extra, lifted


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

    adapters = shapes(s.adapter.values()) | parts(s)
    for name, extra in more_than(lifted, dense).items():
        of_gradients = [found for primitive, found in lifted if primitive == name]
        assert sum(found <= adapters for found in of_gradients) >= extra, (name, lifted)
