"""The axes of an array in another layout: the algebra behind views.

A `Digit` is one digit of the index along one axis of one array: the digit `i`,
0 <= i < size, contributes `stride * i` to that index. A dimension of the array in
another layout is a tuple of digits, most significant first. A transpose permutes
dimensions; a reshape cuts and joins digits, which tuples of axis names could not
express. `None` stands for a dimension of which nothing is known.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from jaxpeft._export import exportable


@exportable
class Digit(NamedTuple):
    """Part of the index along `axis` of the array called `of`."""

    of: Hashable
    axis: int
    stride: int
    size: int


Dim = tuple[Digit, ...]


def whole(of: Hashable, shape: Sequence[int]) -> tuple[Dim, ...]:
    """The dimensions of an array in its own layout."""
    return tuple((Digit(of, axis, 1, size),) for axis, size in enumerate(shape))


def significant(digits: Iterable[Digit]) -> list[Digit]:
    """The digits that can be anything but zero."""
    return [d for d in digits if d.size > 1]


def join(digits: Iterable[Digit]) -> Dim:
    """Joins neighbours that are consecutive digits of one axis."""
    out: list[Digit] = []
    for digit in digits:
        last = out[-1] if out else None
        if (
            last is not None
            and (last.of, last.axis) == (digit.of, digit.axis)
            and last.stride == digit.stride * digit.size
        ):
            out[-1] = digit._replace(size=digit.size * last.size)
        else:
            out.append(digit)
    return tuple(out)


def reshape(
    dims: Sequence[Dim | None], old: Sequence[int], new: Sequence[int]
) -> tuple[Dim | None, ...]:
    """Dimensions after a row-major reshape from shape `old` to shape `new`.

    A new dimension that mixes known with unknown digits is `None`; where a digit
    would be cut unevenly, every dimension is. An old dimension whose digits do not
    make up its length counts as unknown.
    """
    if math.prod(new) == 0:
        return (None,) * len(new)
    unknown = object()
    todo = significant(
        digit
        for axis, (dim, size) in enumerate(zip(dims, old, strict=True))
        for digit in _filled(dim, Digit(unknown, axis, 1, size))
    )
    todo.reverse()  # popped from the end, most significant first
    out: list[Dim | None] = []
    for size in new:
        dim, have = [], 1
        while have < size:
            digit = todo.pop()
            need = size // have
            if size % have or (digit.size > need and digit.size % need):
                return (None,) * len(new)
            if digit.size > need:
                low = digit.size // need
                todo.append(digit._replace(size=low))
                digit = digit._replace(size=need, stride=digit.stride * low)
            dim.append(digit)
            have *= digit.size
        if have != size:
            return (None,) * len(new)
        out.append(None if any(d.of is unknown for d in dim) else join(dim))
    return tuple(out)


def _filled(dim: Dim | None, unknown: Digit) -> Dim:
    """The dimension, or the unknown digit where its digits do not make up the whole length."""
    known = dim is not None and math.prod(d.size for d in dim) == unknown.size
    return dim if dim is not None and known else (unknown,)


def with_axis_size(dims: Iterable[Dim], axis: int, size: int) -> tuple[Dim, ...]:
    """The dimensions of an array in which one axis, a single digit, has got another size."""
    return tuple(
        [tuple([d._replace(size=size) if d.axis == axis else d for d in dim]) for dim in dims]
    )


def cuts(dims: Iterable[Dim], axis: int, size: int) -> list[Digit]:
    """The digits into which `dims` cut an axis, most significant first.

    The product of their sizes is smaller than that of the axis where `dims` hold only a part
    of it. Digits of size 1 are left out beside others, since a squeeze may remove them.
    """
    found = [d for dim in dims for d in dim if d.axis == axis]
    found.sort(key=lambda d: (-d.stride, -d.size))
    if len(found) > 1:
        found = [d for d in found if d.size > 1] or found[:1]
    return found or [Digit(None, axis, 1, size)]
