"""Layout: which axes of the replaced array each dimension of a weight's fields runs over.

A field lies as (*stack, *declared axes), a base in the program's layout as the array that was
replaced. From this follow which dimension of a field a stack axis is, and where a field is cut
when the program cuts the array.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

from jaxpeft import _axes as digits
from jaxpeft._axes import Digit, Dim
from jaxpeft._export import exportable
from jaxpeft._weight import IN, OUT, STACK, Weight, weight_fields


@exportable
@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the array that a view replaces.

    Attributes:
      size: Its length.
      role: "in" or "out" for the two sides of the matrix, "stack" for an axis along which
        matrices are stacked, such as the layers of a scan.
    """

    size: int
    role: str


def axes_with_role(axes: Sequence[Axis], role: str) -> list[int]:
    """The positions of the axes that have this role."""
    return [i for i, axis in enumerate(axes) if axis.role == role]


#: What a leaf of a weight belongs to: the base at the bottom, a field with stack axes, or a
#: field that the whole stack shares.
Owner = Literal["base", "field", "shared"]


class AxisRun(NamedTuple):
    """What one dimension of a leaf runs over.

    Attributes:
      axes: Positions of the axes of the replaced array, most significant first; empty for an
        axis of the method's own, such as a rank.
      granularity: As `Weight.granularity` gives it.
    """

    axes: tuple[int, ...]
    granularity: tuple[int, int] = (1, 1)


def _leaves(weight: Any) -> Iterator[tuple[int, Weight | None, dataclasses.Field | None]]:
    """(number of leaves, weight, field) of each field, in the order of the leaves.

    The base has neither a weight nor a field.
    """
    if not isinstance(weight, Weight):
        yield len(jax.tree.leaves(weight)), None, None
        return
    for field in weight_fields(weight):
        value = getattr(weight, field.name)
        if field.metadata.get("base"):
            yield from _leaves(value)
        elif not field.metadata.get("static"):
            yield len(jax.tree.leaves(value)), weight, field


def owners(weight: Any) -> list[Owner]:
    """What each leaf of a weight belongs to."""
    out: list[Owner] = []
    for count, _, field in _leaves(weight):
        own: Owner = "base"
        if field is not None:
            own = "shared" if field.metadata.get("shared") else "field"
        out.extend([own] * count)
    return out


def field_runs(weight: Any, axes: Sequence[Axis], natural: bool) -> list[list[AxisRun]]:
    """What each dimension of each leaf of a weight runs over.

    Args:
      weight: A weight, or an array.
      axes: Those of the array that it replaces.
      natural: Whether the base lies in the program's own layout.
    """
    stack = [AxisRun((i,)) for i in axes_with_role(axes, STACK)]
    sides = {role: tuple(axes_with_role(axes, role)) for role in (IN, OUT)}
    base = [AxisRun((i,)) for i in range(len(axes))]
    if not natural:
        base = [*stack, AxisRun(sides[IN]), AxisRun(sides[OUT])]
    out: list[list[AxisRun]] = []
    for count, owner, field in _leaves(weight):
        runs = base
        if owner is not None and field is not None:
            lead = [] if field.metadata.get("shared") else stack
            names = field.metadata.get("axes", ())
            own = [AxisRun(sides.get(n, ()), owner.granularity(field.name, n)) for n in names]
            runs = [*lead, *own]
        out.extend([runs] * count)
    return out


class Cut(NamedTuple):
    """How one leaf is cut along an axis of the replaced array.

    Attributes:
      dim: The dimension of the leaf that runs over the axis.
      before: Product of the more significant axes that lie merged in the same dimension.
      first, last: Which elements are kept of each of the `before` blocks.
    """

    dim: int
    before: int
    first: int
    last: int

    def of(self, leaf: jax.Array) -> jax.Array:
        """The part of the leaf that is kept."""
        if self.before == 1:
            return lax.slice_in_dim(leaf, self.first, self.last, axis=self.dim)
        lead, rest = leaf.shape[: self.dim], leaf.shape[self.dim + 1 :]
        blocks = leaf.reshape(*lead, self.before, -1, *rest)
        part = lax.slice_in_dim(blocks, self.first, self.last, axis=self.dim + 1)
        return part.reshape(*lead, -1, *rest)


def field_cuts(
    runs: Sequence[Sequence[AxisRun]], axes: Sequence[Axis], axis: int, start: int, stop: int
) -> list[Cut | None] | None:
    """How each leaf is cut to `start:stop` of an axis; `None` for a leaf that does not have it.

    Args:
      runs: From `field_runs`.
      axes: Those of the replaced array.
      axis: Which of them is cut.
      start, stop: In entries of that axis.

    Returns:
      `None` in the place of the list where a leaf cannot be cut there, such as inside a block
      of quantized values that share a scale.
    """
    out: list[Cut | None] = []
    for dims in runs:
        dim = next((i for i, run in enumerate(dims) if axis in run.axes), None)
        if dim is None:
            out.append(None)
            continue
        merged, (entries, elements) = dims[dim]
        before = math.prod(axes[i].size for i in merged[: merged.index(axis)])
        unit = math.prod(axes[i].size for i in merged[merged.index(axis) + 1 :])
        if entries == 0 or start * unit % entries or stop * unit % entries:
            return None
        if before > 1 and axes[axis].size * unit % entries:
            return None
        first, last = (n * unit // entries * elements for n in (start, stop))
        out.append(Cut(dim, before, first, last))
    return out


def refine(
    axes: Sequence[Axis], dims: Sequence[Dim]
) -> tuple[tuple[Axis, ...], tuple[Dim, ...]] | None:
    """Axes cut so finely that every digit of `dims` is a whole axis; `None` if they are so."""
    pieces = [digits.cuts(dims, i, axis.size) for i, axis in enumerate(axes)]
    if all(len(piece) == 1 for piece in pieces):
        return None
    position: dict[Digit, int] = {}
    fine: list[Axis] = []
    for axis, piece in zip(axes, pieces, strict=True):
        for digit in piece:
            position[digit] = len(fine)
            fine.append(Axis(digit.size, axis.role))
    return tuple(fine), tuple(
        tuple(Digit(0, position[d], 1, d.size) for d in dim if d in position) for dim in dims
    )
