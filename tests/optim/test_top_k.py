"""The k largest by counting, against a stable sort of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.optim._top_k import top_k_of_rows, top_k_within_budget

#: Few, so that there are many equal ones; with what a float may also be.
VALUES = [-np.inf, -2.5, -1.0, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 3.0, np.inf, np.nan]
A, B = (2, 3, 4), (5, 6)
of_rows = jax.jit(top_k_of_rows)
within = jax.jit(lambda scores, budget: top_k_within_budget(scores, {"a": 1, "b": 4}, budget))


def drawn(shape):
    size = int(np.prod(shape))
    values = st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)
    return values.map(lambda x: np.array(x, np.float32).reshape(shape))


def falling(x):
    """Places from the largest on; equal ones, and NaN at the end, in the order they stand in."""
    return np.argsort(np.where(np.isnan(x), np.inf, -x), axis=-1, kind="stable")


@settings(max_examples=100, deadline=None)
@given(drawn(B), st.lists(st.integers(0, B[1]), min_size=B[0], max_size=B[0]))
def test_of_each_row_the_largest(x, counts):
    want = np.zeros(B, bool)
    for row, order, count in zip(want, falling(x), counts, strict=True):
        row[order[:count]] = True
    np.testing.assert_array_equal(of_rows(x, np.array(counts)[:, None]), want)


@settings(max_examples=100, deadline=None)
@given(drawn(A), drawn(B), st.integers(0, 150))
def test_of_several_arrays_what_fits(a, b, budget):
    order = falling(np.concatenate([a.ravel(), b.ravel()]))
    size = np.repeat([1, 4], [a.size, b.size])[order]
    want = np.zeros(a.size + b.size, bool)
    want[order[np.cumsum(size) <= budget]] = True
    found = within({"a": a, "b": b}, budget)
    np.testing.assert_array_equal(np.ravel(found["a"]), want[: a.size])
    np.testing.assert_array_equal(np.ravel(found["b"]), want[a.size :])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_float_has_its_order(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 500)).astype(dtype)
    want = np.zeros(x.shape, bool)
    for row, order in zip(want, falling(np.asarray(x, np.float64)), strict=True):
        row[order[:77]] = True
    np.testing.assert_array_equal(top_k_of_rows(x, 77), want)


def test_nothing_is_sorted_and_no_array_of_all_is_made():
    scores = {name: jnp.zeros((1000, 1000)) for name in "ab"}
    text = jax.jit(lambda x: top_k_within_budget(x, {"a": 1, "b": 1}, 7)).lower(scores).as_text()
    assert "sort" not in text and "concatenate" not in text
