"""Reads of a table: rows by id in every mode of a gather, and ranges of rows."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxpeft import _compat as compat
from jaxpeft._axes import Digit, Dim
from jaxpeft._dimensions import cut_dims, gather_sources, row_dims
from jaxpeft._operand import computing, permute, refold
from jaxpeft._rules.contractions import bound, site_of
from jaxpeft._rules.registry import ArrayOrView, RuleContext, rule
from jaxpeft._rules.views import one_of_stack
from jaxpeft._view import Axis, View, is_view
from jaxpeft._weight import IN, OUT, STACK, Weight


def _is_rows_dim(view: View, dim: int) -> bool:
    """Whether a dimension of a refined view is the whole `in` axis, and `out` is the rest."""
    if len(view.indices(IN)) != 1 or [d.axis for d in view.dims[dim]] != view.indices(IN):
        return False
    rest = {d.axis for i, other in enumerate(view.dims) if i != dim for d in other if d.size > 1}
    return rest == {i for i in view.indices(OUT) + view.indices(STACK) if view.axes[i].size > 1}


def _lookup(
    ctx: RuleContext,
    eqn: JaxprEqn,
    table: View,
    ids: jax.Array,
    mode: str,
    fill: ArrayLike | None,
) -> jax.Array | None:
    """Rows (*stack, *ids, out) of the table, where ids beyond it meet the gather's own mode.

    A table that the program has rounded gives rounded rows. `None` where its dtype has no sums.
    """
    view = table.exact
    if computing(view.dtype) != view.dtype:
        return None
    site = site_of(ctx, view, eqn)
    site.rows = view.size(IN)
    extra = view.weight.extra_rows if isinstance(view.weight, Weight) else 0
    count = view.size(IN) + extra

    def lookup(w: Any, ids: jax.Array) -> jax.Array:
        y = bound(view, w, site)[jnp.clip(ids, 0, count - 1)]
        # Where the model promises ids within its table, an id beyond all virtual tokens must not
        # read the last of them.
        if mode == "FILL_OR_DROP" or (extra and mode == "PROMISE_IN_BOUNDS"):
            valid = (ids >= 0) & (ids < count)
            y = jnp.where(valid[..., None], y, jnp.nan if fill is None else fill)
        return y

    return table.rounded(view.over_stack(lookup, ids))


def _as_dims(view: View, y: jax.Array, lead: int, keep: list[int]) -> jax.Array:
    """y (*lead, out) with `out` cut and ordered like the program's dimensions `keep`."""
    parts = [d for i in keep for d in view.dims[i] if view.axes[d.axis].role == OUT]
    order = sorted(range(len(parts)), key=lambda i: parts[i].axis)
    y = refold(y, (*y.shape[:lead], *(parts[i].size for i in order)))
    y = permute(y, [*range(lead), *(lead + order.index(i) for i in range(len(parts)))])
    return refold(y, (*y.shape[:lead], *(view.shape[i] for i in keep)))


@rule(p.gather_p, computes=True)
def gather(
    ctx: RuleContext, eqn: JaxprEqn, table: ArrayOrView, indices: ArrayOrView
) -> list[jax.Array] | list[View] | None:
    """Whole rows by id, in any mode, batched over a stack; or weights of a stack by id."""
    numbers = eqn.params["dimension_numbers"]
    selected = row_dims(eqn)
    if not is_view(table) or is_view(indices) or len(selected) != 1:
        return None
    view = table.refined()
    if any(view.axes[d.axis].role == STACK for d in view.dims[selected[0]]):
        return weights_of_stack(eqn, view, indices, selected[0])
    rows, batch = selected[0], list(numbers.operand_batching_dims)
    keep = [i for i in range(view.ndim) if i != rows and i not in batch]
    sizes = eqn.params["slice_sizes"]
    if sizes[rows] != 1 or any(sizes[i] != view.shape[i] for i in keep):
        return None
    stack = [d.axis for i in batch for d in view.dims[i]]
    if not _is_rows_dim(view, rows) or sorted(stack) != view.indices(STACK):
        return None
    if len(stack) != len(batch):
        return None
    # The ids lead with the stack, in the order that it has in the weight.
    index_batch = [numbers.start_indices_batching_dims[batch.index(i)] for i in batch]
    front = [index_batch[stack.index(axis)] for axis in sorted(stack)]
    ids = indices[..., numbers.start_index_map.index(rows)]
    order = [*front, *(i for i in range(ids.ndim) if i not in front)]
    mode, fill = eqn.params["mode"].name, eqn.params["fill_value"]
    y = _lookup(ctx, eqn, view, permute(ids, order), mode, fill)
    if y is None:
        return None
    y = _as_dims(view, y, ids.ndim, keep)
    y = permute(y, [*(order.index(i) for i in range(ids.ndim)), *range(ids.ndim, y.ndim)])
    # y is (*ids, *kept dimensions of the table), which may have the rows' dimension of length 1.
    sources = gather_sources(eqn)
    of_table = sorted(source.dim for source in sources if source.operand == "table")
    if rows in of_table:
        y = jnp.expand_dims(y, ids.ndim + of_table.index(rows))
    place = [s.dim if s.operand == "ids" else ids.ndim + of_table.index(s.dim) for s in sources]
    return [permute(y, place)]


@rule(p.dynamic_slice_p)
def dynamic_slice(
    ctx: RuleContext, eqn: JaxprEqn, table: ArrayOrView, *starts: jax.Array
) -> list[jax.Array] | list[View] | None:
    """One weight of a stack, or a range of rows of a table."""
    if not is_view(table):
        return None
    selected = one_of_stack(eqn, table, starts)
    if selected is not None:
        return [selected]
    view, cut = table.refined(), cut_dims(eqn)
    if len(cut) != 1 or not _is_rows_dim(view, cut[0]) or view.indices(STACK):
        return None
    aval = compat.aval(eqn.outvars[0])
    count, rows = aval.shape[cut[0]], view.size(IN)
    start = starts[cut[0]]
    # An index below zero counts from the end, then the range is clamped into the table.
    start = jnp.clip(jnp.where(start < 0, start + rows, start), 0, rows - count)
    y = _lookup(ctx, eqn, view, start + jnp.arange(count), "CLIP", None)
    if y is None:
        return None
    keep = [i for i in range(view.ndim) if i != cut[0]]
    y = jnp.moveaxis(_as_dims(view, y, 1, keep), 0, cut[0])
    assert math.prod(y.shape) == math.prod(aval.shape)
    return [y]


def weights_of_stack(eqn: JaxprEqn, view: View, indices: jax.Array, dim: int) -> list[View] | None:
    """One weight of a stack for each id: every field gives the slices that the program takes.

    The weight stays factored; of a quantized one only these slices are ever dequantized.
    """
    params = eqn.params
    numbers, sizes, shape = params["dimension_numbers"], params["slice_sizes"], view.shape
    whole = all(n == shape[i] for i, n in enumerate(sizes) if i != dim)
    if not whole or sizes[dim] != 1 or len(view.dims[dim]) != 1 or numbers.operand_batching_dims:
        return None
    mode, fill = params["mode"].name, params["fill_value"]
    if mode == "FILL_OR_DROP" and not (fill is None or fill != fill):
        return None  # an id out of range selects a matrix of another number than NaN
    axis = view.dims[dim][0].axis
    ids = indices[..., numbers.start_index_map.index(dim)]

    def selected(x: jax.Array, at: int | None) -> jax.Array:
        if at is None:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return _keys(jnp.moveaxis(x, at, 0), ids, at)
        filled = mode == "FILL_OR_DROP" and jnp.issubdtype(x.dtype, jnp.inexact)
        if filled:
            return jnp.take(x, ids, axis=at, mode="fill", fill_value=jnp.nan)
        return jnp.take(x, ids, axis=at, mode="clip")

    leaves, treedef = jax.tree.flatten(view.weight)
    positions = view.stack_positions(axis)
    fields = [selected(x, at) for x, at in zip(leaves, positions, strict=True)]
    # The stack axis gives way to one axis for each dimension of the ids.
    axes = (*view.axes[:axis], *(Axis(n, STACK) for n in ids.shape), *view.axes[axis + 1 :])
    moved = ids.ndim - 1
    dims: list[Dim] = []
    for source in gather_sources(eqn):
        if source.operand == "ids":
            of = view.dims[dim][0].of
            dims.append((Digit(of, axis + source.dim, 1, ids.shape[source.dim]),))
        elif source.dim == dim:
            dims.append(())
        else:
            old = view.dims[source.dim]
            dims.append(tuple(d._replace(axis=d.axis + moved * (d.axis > axis)) for d in old))
    weight = jax.tree.unflatten(treedef, fields)
    return [dataclasses.replace(view, weight=weight, axes=axes, dims=tuple(dims))]


def _keys(keys: jax.Array, ids: jax.Array, at: int) -> jax.Array:
    """A key for each id, from that of the slice that it selects: ids may share a slice."""
    own = keys[jnp.clip(ids, 0, len(keys) - 1)]
    numbers = jnp.arange(ids.size).reshape(ids.shape + (1,) * (own.ndim - ids.ndim))
    own = jax.vmap(jax.random.fold_in)(own.ravel(), jnp.broadcast_to(numbers, own.shape).ravel())
    return jnp.moveaxis(
        own.reshape(ids.shape + keys.shape[1:]), range(ids.ndim), range(at, at + ids.ndim)
    )
