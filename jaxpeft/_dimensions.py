"""What each primitive does to the dimensions of an array: stated once, for `sites` and for `lift`.

`sites` follows the labels of parameters and of what is computed from them, `lift` those of views
and of repeated weights. All four are tuples of digits per dimension (see `_axes`), with `None` for
a dimension of which nothing is known, so that they share the functions here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Dim

#: The dimensions of one value.
Dims = Sequence[Dim | None]
#: From the position and the length of a dimension that is new, or that repeats entries, to what
#: it is made of.
NewDim = Callable[[int, int], Dim | None]

#: Primitives that return their operands entry by entry, up to rounding and placement.
IDENTITIES = frozenset(
    {
        p.convert_element_type_p,
        p.copy_p,
        p.name_p,
        p.stop_gradient_p,
        p.sharding_constraint_p,
        p.reduce_precision_p,
        p.device_put_p,
        compat.optimization_barrier_p,
        compat.pcast_p,
    }
)
#: Primitives that keep every entry, but arrange or repeat them differently.
LAYOUT = frozenset({p.transpose_p, p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p})
#: Primitives that keep a contiguous part of some dimensions.
SLICES = frozenset({p.slice_p, p.dynamic_slice_p, compat.split_p})
#: Primitives that combine the entries along the dimensions `axes`, which the result lacks.
REDUCTIONS = frozenset(
    {
        p.reduce_sum_p,
        p.reduce_max_p,
        p.reduce_min_p,
        p.reduce_prod_p,
        p.reduce_and_p,
        p.reduce_or_p,
        p.argmax_p,
        p.argmin_p,
    }
)


def unknown_unless_one(position: int, size: int) -> Dim | None:
    """A new dimension of length 1 has no digits; of a longer one nothing is known."""
    del position
    return () if size == 1 else None


# --- Layout ------------------------------------------------------------------------------------


def after_layout(
    eqn: jex.JaxprEqn, dims: Dims, new_dim: NewDim = unknown_unless_one
) -> tuple[Dim | None, ...]:
    """Dimensions of the result of a primitive of `LAYOUT`.

    Args:
      eqn: The equation.
      dims: Dimensions of its operand.
      new_dim: What a dimension is made of that a broadcast adds or in which it repeats entries.
    """
    primitive, params = eqn.primitive, eqn.params
    if primitive is p.transpose_p:
        return tuple([dims[i] for i in params["permutation"]])
    if primitive is p.squeeze_p:
        return without(dims, params["dimensions"])
    old, new = compat.aval(eqn.invars[0]).shape, compat.aval(eqn.outvars[0]).shape
    if primitive is p.reshape_p:
        return digits.reshape(dims, old, new)
    assert primitive is p.broadcast_in_dim_p, primitive
    out = [new_dim(j, size) for j, size in enumerate(new)]
    for i, j in enumerate(params["broadcast_dimensions"]):
        if old[i] == new[j]:
            out[j] = dims[i]
    return tuple(out)


def without(dims: Dims, removed: Iterable[int]) -> tuple[Dim | None, ...]:
    """The dimensions but for those at some positions, as a squeeze or a reduction removes them."""
    return tuple([dim for i, dim in enumerate(dims) if i not in removed])


def stacked(dims: Sequence[Dim], axis: int) -> tuple[Dim, ...]:
    """Dimensions of one piece of a stack along a new dimension `axis`, where it has length 1."""
    axis %= len(dims) + 1
    return (*dims[:axis], (), *dims[axis:])


# --- Parts -------------------------------------------------------------------------------------


def resized(dim: Dim, old: int, new: int) -> Dim | None:
    """A dimension of length `old` of which a part of length `new` is left, or the other way round.

    Its leading digit becomes shorter or longer. `None` where the new length is not a multiple of
    what that digit counts.
    """
    if old == new:
        return dim
    lead = next((i for i, d in enumerate(dim) if d.size > 1), 0)
    if not dim or not old or dim[lead].size * new % old:
        return None
    return (*dim[:lead], dim[lead]._replace(size=dim[lead].size * new // old), *dim[lead + 1 :])


def resized_dims(dims: Dims, old: Sequence[int], new: Sequence[int]) -> tuple[Dim | None, ...]:
    """Each dimension as `resized` gives it; of one without digits nothing becomes known."""
    return tuple(
        [
            resized(dim, a, b) if dim and a != b else dim
            for dim, a, b in zip(dims, old, new, strict=True)
        ]
    )


def cut_dims(eqn: jex.JaxprEqn) -> list[int]:
    """The dimensions that a slice of an array shortens."""
    old, new = compat.aval(eqn.invars[0]).shape, compat.aval(eqn.outvars[0]).shape
    return [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


# --- Gathers -----------------------------------------------------------------------------------


def row_dims(eqn: jex.JaxprEqn) -> list[int]:
    """The dimensions in which a gather selects: those that it does not take whole.

    In a mode that clips, the start of a slice as long as its dimension is zero.
    """
    sizes, shape = eqn.params["slice_sizes"], compat.aval(eqn.invars[0]).shape
    chosen = list(eqn.params["dimension_numbers"].start_index_map)
    if len(chosen) > 1 and eqn.params["mode"].name != "FILL_OR_DROP":
        chosen = [i for i in chosen if sizes[i] != shape[i]]
    return chosen


class Source(NamedTuple):
    """Where a dimension of a gather's result comes from: a dimension of one of its operands."""

    operand: Literal["table", "ids"]
    dim: int


def gather_sources(eqn: jex.JaxprEqn) -> list[Source]:
    """Per dimension of a gather's result, where it comes from."""
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    of_slice = (i for i in range(compat.aval(eqn.invars[0]).ndim) if i not in gone)
    of_ids = iter(range(compat.aval(eqn.invars[1]).ndim - 1))
    return [
        Source("table", next(of_slice)) if i in numbers.offset_dims else Source("ids", next(of_ids))
        for i in range(compat.aval(eqn.outvars[0]).ndim)
    ]


# --- Products ----------------------------------------------------------------------------------


#: (contracted, batch) dimensions of both operands of a product, as `lax.dot_general` takes them.
Pair = tuple[Sequence[int], Sequence[int]]


def free_dims(ndim: int, *used: Iterable[int]) -> list[int]:
    """The dimensions of an operand of a product that are neither contracted nor batched over."""
    taken = {i for some in used for i in some}
    return [i for i in range(ndim) if i not in taken]


def product_positions(
    contracted: Pair, batch: Pair, ndims: tuple[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Per operand of a product: {dimension: its position in the result}, of those that remain.

    The result leads with the batch, which both operands have, then the free dimensions of the
    first operand, then those of the second.
    """
    first, second = ({i: k for k, i in enumerate(some)} for some in batch)
    for where, ndim, used in zip((first, second), ndims, contracted, strict=True):
        start = len(first) if where is first else ndims[0] - len(contracted[0])
        free = free_dims(ndim, used, list(where))
        where.update({i: start + k for k, i in enumerate(free)})
    return first, second
