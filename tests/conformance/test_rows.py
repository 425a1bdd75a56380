"""The rows themselves: they run, their gradients are finite, and their sizes tell weights apart."""

import jax
import jax.numpy as jnp
import pytest

from .rows import ROWS
from .rows.row import all_rows, matrices, paths
from .walk import parameter_footprint


def test_row_names_are_unique():
    names = [r.name for r in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", all_rows())
def test_a_row_runs_and_its_gradient_is_finite(row):
    case = row.build()
    assert {w.dtype for w in jax.tree.leaves(case.params)} == {jnp.dtype("float64")}
    for fn, args in ((case.fn, case.args), *case.also):
        real = [y for y in jax.tree.leaves(fn(case.params, *args)) if is_real(y)]
        assert real and all(bool(jnp.isfinite(y).all()) and bool(jnp.any(y != 0)) for y in real)

        def total(p, fn=fn, args=args):
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(p, *args)) if is_real(y))

        direction = jax.tree.map(jnp.ones_like, case.params)
        if row.reverse:
            slopes = jax.tree.leaves(jax.jit(jax.grad(total))(case.params))
        else:
            slopes = jax.tree.leaves(jax.jvp(total, (case.params,), (direction,)))
        assert all(bool(jnp.isfinite(s).all()) for s in slopes)
        assert any(bool(jnp.any(s != 0)) for s in slopes)


@pytest.mark.parametrize("row", all_rows())
def test_no_activation_of_a_row_has_the_size_of_a_weight(row):
    case = row.build()
    for fn, args in ((case.fn, case.args), *case.also):
        seen = parameter_footprint(fn, case.params, args, matrices(row, case))
        sizes = set().union(*seen.weights.values())
        assert sizes and min(sizes) > 1
        clashes = [r for r in seen.activations if size(r.shape) in sizes]
        if not row.materializes:
            assert not clashes, f"{sizes}: " + "\n".join(map(str, clashes))


@pytest.mark.parametrize("row", all_rows())
def test_every_matrix_of_a_row_is_named(row):
    """A row that forgets a matrix would never have it tried."""
    case = row.build()
    named = set(matrices(row, case))
    wide = {n for n, w in paths(case.params).items() if w.ndim >= 2 and is_matrix(n)}
    assert wide == named


def is_matrix(name):
    parts = name.removesuffix("/value").split("/")
    vectors = ("bias", "scale", "positions")
    return not parts[-1].endswith(vectors) and parts[-1] not in ("bq", "bk", "bv")


def is_real(y):
    return jnp.issubdtype(y.dtype, jnp.floating)


def size(shape):
    return int(jnp.prod(jnp.array(shape))) if shape else 1
