"""Dimensions follow each primitive: held against the arrays that JAX computes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpeft import _axes as axes
from jaxpeft import _dimensions as dimensions

from .test_axes import value_of

SHAPE = (2, 3, 1, 5)
LAYOUTS = {
    "transpose": lambda x: x.transpose(2, 0, 3, 1),
    "reshape": lambda x: x.reshape(6, 5),
    "squeeze": lambda x: lax.squeeze(x, [2]),
    "broadcast with a new dimension of length 1": lambda x: lax.expand_dims(x, [1]),
}


def equation(fn, *args):
    """The only equation of a function."""
    (eqn,) = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    return eqn


@pytest.mark.parametrize("name", LAYOUTS)
def test_digits_follow_every_primitive_of_layout(name):
    x = jnp.arange(math.prod(SHAPE)).reshape(SHAPE)
    eqn = equation(LAYOUTS[name], x)
    assert eqn.primitive in dimensions.LAYOUT
    dims, y = dimensions.after_layout(eqn, axes.whole("w", SHAPE)), LAYOUTS[name](x)
    for index in np.ndindex(y.shape):
        assert value_of(dims, SHAPE, index) == y[index]


def test_a_broadcast_keeps_what_it_does_not_repeat():
    eqn = equation(lambda x: lax.broadcast_in_dim(x, (7, 2, 1, 4), (1, 2)), jnp.ones((2, 1)))
    two, one = axes.whole("w", (2, 1))
    assert dimensions.after_layout(eqn, (two, one)) == (None, two, one, None)
    copies = dimensions.after_layout(eqn, (two, one), lambda i, n: ("copies", i, n))
    assert copies == (("copies", 0, 7), two, one, ("copies", 3, 4))
    wide = equation(lambda x: lax.broadcast_in_dim(x, (2, 9), (0, 1)), jnp.ones((2, 1)))
    assert dimensions.after_layout(wide, (two, one)) == (two, None)


def test_a_part_of_a_dimension_has_a_shorter_leading_digit():
    whole = (axes.Digit("w", 0, 4, 6), axes.Digit("w", 1, 1, 5))
    part = (axes.Digit("w", 0, 4, 2), axes.Digit("w", 1, 1, 5))
    assert dimensions.resized(whole, 30, 10) == part
    assert dimensions.resized(part, 10, 30) == whole
    assert dimensions.resized(whole, 30, 30) is whole
    assert dimensions.resized(whole, 30, 8) is None  # cuts through the digit of length 5
    assert dimensions.resized((), 1, 3) is None
    assert dimensions.resized_dims((whole, None, ()), (30, 4, 1), (10, 2, 1)) == (part, None, ())


GATHERS = {
    "rows": lambda w, i: w[i],
    "rows of a column": lambda w, i: jnp.take(w, i, axis=1),
    "slices of length 1 that stay": lambda w, i: lax.gather(
        w,
        i[..., None],
        lax.GatherDimensionNumbers((1, 2, 4), (), (1,)),
        (3, 1, 7),
        mode="clip",
    ),
    "batched": lambda w, i: jax.vmap(lambda w, i: w[i])(w, i[:, :, 0]),
}


@pytest.mark.parametrize("name", GATHERS)
def test_each_dimension_of_a_gather_has_a_source(name):
    """An index into the result is one into the ids and, but for the rows, into the table."""
    shape, ids = (3, 5, 7), jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, 4, 2)))
    fn, w = GATHERS[name], jnp.arange(105).reshape(shape)
    eqns = jax.make_jaxpr(fn)(w, ids).jaxpr.eqns
    inner = [e for outer in eqns for e in getattr(outer.params.get("jaxpr"), "eqns", [outer])]
    (eqn,) = [e for e in inner if e.primitive.name == "gather"]
    sources, y = dimensions.gather_sources(eqn), fn(w, ids)
    (rows,) = dimensions.row_dims(eqn)
    sizes = eqn.params["slice_sizes"]
    of_ids = [s.dim for s in sources if s.operand == "ids"]
    assert of_ids == list(range(eqn.invars[1].aval.ndim - 1))
    for source, n in zip(sources, y.shape, strict=True):
        if source.operand == "table":
            assert n == sizes[source.dim]
        else:
            assert n == eqn.invars[1].aval.shape[source.dim]
    for index in np.ndindex(y.shape):
        at = [None] * 3
        picked = [0] * len(of_ids)
        for source, i in zip(sources, index, strict=True):
            if source.operand == "table":
                at[source.dim] = i
            else:
                picked[source.dim] = i
        if name == "batched":
            at[0] = picked[0]
        at[rows] = int(ids[(*picked, *[0] * (3 - len(picked)))])
        assert y[index] == w[tuple(at)]


@pytest.mark.parametrize(
    "spec", ["abc,dbae->cde", "bc,cd->bd", "abc,acd->abd", "ab,cd->abcd", "abcd,bd->ac"]
)
def test_each_dimension_of_a_product_has_its_position_in_the_result(spec):
    first, second = spec.split("->")[0].split(",")
    sizes = dict(zip("abcde", (2, 3, 5, 7, 11), strict=True))
    shapes = [tuple(sizes[c] for c in side) for side in (first, second)]
    shared = set(first) & set(second)
    batch = sorted(shared & set(spec.split("->")[1]))
    contracted = sorted(shared - set(batch))
    numbers = [
        [[side.index(c) for c in some] for side in (first, second)] for some in (contracted, batch)
    ]
    y = lax.dot_general(*map(jnp.ones, shapes), numbers)
    ndims = len(first), len(second)
    for where, shape in zip(dimensions.product_positions(*numbers, ndims), shapes, strict=True):
        assert [y.shape[k] for k in where.values()] == [shape[i] for i in where]
    covered = {k for where in dimensions.product_positions(*numbers, ndims) for k in where.values()}
    assert covered == set(range(y.ndim))
