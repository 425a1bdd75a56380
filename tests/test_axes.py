"""The digit algebra says where every index went: held against numpy on random rearrangements."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft import _axes as axes

SHAPES = [(4, 6), (12,), (2, 3, 4), (6, 1, 4), (8, 9), (1, 12, 2)]


def value_of(dims, shape, index):
    """The flat index into the original array that a rearranged index stands for."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    flat = 0
    for dim, i in zip(dims, index, strict=True):
        for digit in reversed(dim):
            i, value = divmod(i, digit.size)
            flat += value * digit.stride * strides[digit.axis]
    return flat


def factorizations(n):
    return [
        s
        for s in [(n,), (2, n // 2), (n // 2, 2), (3, n // 3), (2, 2, n // 4), (n, 1)]
        if math.prod(s) == n
    ]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_digits_follow_transposes_and_reshapes(data):
    shape = data.draw(st.sampled_from(SHAPES))
    array = np.arange(math.prod(shape)).reshape(shape)
    dims, now = axes.whole("w", shape), array
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(now.ndim)))
            dims, now = tuple(dims[i] for i in order), now.transpose(order)
        else:
            new = data.draw(st.sampled_from(factorizations(now.size)))
            dims, now = axes.reshape(dims, now.shape, new), now.reshape(new)
            if any(dim is None for dim in dims):
                return  # cut unevenly: nothing is claimed
    for index in np.ndindex(now.shape):
        assert value_of(dims, shape, index) == now[index]


def test_a_reshape_that_merges_known_with_unknown_knows_nothing_of_the_result():
    dims = axes.reshape((axes.whole("w", (4,))[0], None), (4, 3), (12,))
    assert dims == (None,)
    kept = axes.reshape((axes.whole("w", (4,))[0], None), (4, 3), (2, 2, 3))
    assert kept == ((axes.Digit("w", 0, 2, 2),), (axes.Digit("w", 0, 1, 2),), None)


def test_an_uneven_cut_knows_nothing_at_all():
    assert axes.reshape(axes.whole("w", (4, 3)), (4, 3), (3, 4)) == (None, None)


def test_neighbouring_digits_of_one_axis_join():
    dims = axes.reshape(axes.whole("w", (12,)), (12,), (3, 4))
    assert axes.reshape(dims, (3, 4), (12,)) == axes.whole("w", (12,))
    swapped = axes.reshape(dims[::-1], (4, 3), (12,))
    assert swapped == ((axes.Digit("w", 0, 1, 4), axes.Digit("w", 0, 4, 3)),)


def test_cuts_are_the_digits_of_an_axis_most_significant_first():
    dims = axes.reshape(axes.whole(0, (12, 5)), (12, 5), (3, 4, 5))[::-1]
    assert [d.size for d in axes.cuts(dims, 0, 12)] == [3, 4]
    assert [d.size for d in axes.cuts(dims, 1, 5)] == [5]


def test_a_dimension_whose_digits_are_not_as_many_as_it_is_long_is_unknown():
    """As that of a broadcast: a label for one entry, where there are four."""
    (row,), (col,) = axes.whole("w", (1, 3))
    assert axes.reshape([(row,), (col,)], (4, 3), (2, 2, 3)) == (None, None, (col,))
    assert axes.reshape([(row,), (col,)], (4, 3), (12,)) == (None,)
    assert axes.reshape([(col,)], (2,), (2,)) == (None,)
