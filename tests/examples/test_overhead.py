"""What lifting costs, at a size for every day; benchmarks/overhead.py has the real one."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "overhead.py"
SPEC = importlib.util.spec_from_file_location("overhead", FILE)
overhead = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(overhead)

# No product of the rank with a side is as large as a weight.
SHAPES = {
    "float32": overhead.Shape(2, 48, 4, 2, 80, 96, 2, 8, "float32", False),
    "bfloat16 with remat": overhead.Shape(2, 48, 4, 2, 80, 96, 2, 8, "bfloat16", True),
}


@pytest.fixture(autouse=True)
def in_float32():
    with jax.enable_x64(False):
        yield


@pytest.mark.parametrize("name", SHAPES)
def test_a_lifted_step_compiles_to_the_work_and_memory_of_one_by_hand(name):
    hand, lifted, full = (overhead.measure(SHAPES[name], k) for k in ("hand", "lifted", "full"))
    assert lifted["flops"] <= 1.02 * hand["flops"]
    assert lifted["temp_bytes"] <= 1.02 * hand["temp_bytes"]
    assert full["flops"] != hand["flops"]
    assert overhead.materialized(SHAPES[name]) == []
    assert overhead.materialized(SHAPES[name], "dora", "lifted") == []


@pytest.mark.parametrize("name", SHAPES)
def test_the_hand_written_step_computes_what_the_lifted_one_does(name):
    shape = SHAPES[name]
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, shape.vocab)
    out = {}
    for kind in ("hand", "lifted"):
        objective, adapter, frozen = overhead.KINDS[kind](shape)
        leaves, treedef = jax.tree.flatten((adapter, frozen))
        # The base of both has its leaves in one order, and so have the factors.
        arrays = [
            0.1 * jax.random.normal(jax.random.key(i), x.shape, jnp.float32).astype(x.dtype)
            for i, x in enumerate(leaves)
        ]
        adapter, frozen = jax.tree.unflatten(treedef, arrays)
        out[kind] = jax.jit(jax.value_and_grad(objective))(adapter, frozen, tokens)
    (a, grads_a), (b, grads_b) = out["hand"], out["lifted"]
    assert abs(a - b) <= 1e-5 * abs(a) if shape.dtype == "float32" else abs(a - b) < 0.02 * abs(a)
    assert grads_a.keys() == grads_b.keys()
    for path in grads_a:
        far = jnp.max(jnp.abs(grads_a[path] - grads_b[path])) / jnp.max(jnp.abs(grads_a[path]))
        assert far < (1e-4 if shape.dtype == "float32" else 0.1), path


def test_the_closed_form_is_that_of_the_design():
    assert overhead.closed_form(overhead.SHAPES["135M"]) == pytest.approx(619e9, rel=0.005)
