"""Reading rows of a table: gathers by id in every mode, and runs of rows."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from jaxpeft._axes import Digit, Dim
from jaxpeft._operand import computing, permute, refold
from jaxpeft._rules.contractions import bound, site_of
from jaxpeft._rules.registry import cut_dims, row_dims, rule
from jaxpeft._rules.views import dynamic_slice as pick_from_stack
from jaxpeft._view import Axis, View, is_view
from jaxpeft._weight import IN, OUT, STACK, Weight


def _rows_dim(view: View, dim: int) -> bool:
    """Whether a dimension of a refined view is the whole `in` axis, and `out` is the rest."""
    if len(view.indices(IN)) != 1 or [d.axis for d in view.dims[dim]] != view.indices(IN):
        return False
    rest = {d.axis for i, other in enumerate(view.dims) if i != dim for d in other if d.size > 1}
    return rest == {i for i in view.indices(OUT) + view.indices(STACK) if view.axes[i].size > 1}


def _rows(
    run: Any, eqn: Any, given: View, ids: jax.Array, mode: str, fill: Any
) -> jax.Array | None:
    """Rows (*stack, *ids, out) of the table, where ids beyond it meet the gather's own mode.

    A table that the program has rounded gives rounded rows. `None` where its dtype has no sums.
    """
    view = given.exact
    if computing(view.dtype) != view.dtype:
        return None
    site = site_of(run, view, eqn)
    site.rows = view.size(IN)
    extra = view.weight.extra_rows if isinstance(view.weight, Weight) else 0
    count = view.size(IN) + extra

    def lookup(w: Any, ids: jax.Array) -> jax.Array:
        y = bound(view, w, site)[jnp.clip(ids, 0, count - 1)]
        # Where the model promises ids within its table, an id without a prompt must not pass
        # for the last one.
        if mode == "FILL_OR_DROP" or (extra and mode == "PROMISE_IN_BOUNDS"):
            valid = (ids >= 0) & (ids < count)
            y = jnp.where(valid[..., None], y, jnp.nan if fill is None else fill)
        return y

    return given.rounded(view.over_stack(lookup, ids))


def _as_dims(view: View, y: jax.Array, lead: int, keep: list[int]) -> jax.Array:
    """y (*lead, out) with `out` cut and ordered like the program's dimensions `keep`."""
    parts = [d for i in keep for d in view.dims[i] if view.axes[d.axis].role == OUT]
    order = sorted(range(len(parts)), key=lambda i: parts[i].axis)
    y = refold(y, (*y.shape[:lead], *(parts[i].size for i in order)))
    y = permute(y, [*range(lead), *(lead + order.index(i) for i in range(len(parts)))])
    return refold(y, (*y.shape[:lead], *(view.shape[i] for i in keep)))


@rule(p.gather_p, computes=True)
def gather(run: Any, eqn: Any, view: Any, indices: Any) -> list | None:
    """Whole rows by id, each mode as it says, batched over a stack; or matrices of a stack."""
    numbers = eqn.params["dimension_numbers"]
    looked_up = row_dims(eqn)
    if is_view(indices) or len(looked_up) != 1:
        return None
    view = view.refined()
    if any(view.axes[d.axis].role == STACK for d in view.dims[looked_up[0]]):
        return matrices(eqn, view, indices, looked_up[0])
    rows, batch = looked_up[0], list(numbers.operand_batching_dims)
    keep = [i for i in range(view.ndim) if i != rows and i not in batch]
    sizes = eqn.params["slice_sizes"]
    if sizes[rows] != 1 or any(sizes[i] != view.shape[i] for i in keep):
        return None
    stack = [d.axis for i in batch for d in view.dims[i]]
    if not _rows_dim(view, rows) or sorted(stack) != view.indices(STACK):
        return None
    if len(stack) != len(batch):
        return None
    # ids with the stack first, in the order of the weight
    index_batch = [numbers.start_indices_batching_dims[batch.index(i)] for i in batch]
    front = [index_batch[stack.index(axis)] for axis in sorted(stack)]
    ids = indices[..., numbers.start_index_map.index(rows)]
    others = [i for i in range(ids.ndim) if i not in front]
    y = _rows(
        run,
        eqn,
        view,
        permute(ids, [*front, *others]),
        eqn.params["mode"].name,
        eqn.params["fill_value"],
    )
    if y is None:
        return None
    y = _as_dims(view, y, ids.ndim, keep)
    y = permute(
        y, [*((front + others).index(i) for i in range(ids.ndim)), *range(ids.ndim, y.ndim)]
    )
    # Where the gather keeps the row's own dimension of size 1, `offset_dims` has a place for it.
    offset = [i for i in range(view.ndim) if i not in batch]
    if rows in numbers.collapsed_slice_dims:
        offset.remove(rows)
    else:
        y = jnp.expand_dims(y, ids.ndim + offset.index(rows))
    aval = eqn.outvars[0].aval
    place = [i for i in range(aval.ndim) if i not in numbers.offset_dims]
    place += list(numbers.offset_dims)
    y = permute(y, [place.index(i) for i in range(aval.ndim)])
    return [y]


@rule(p.dynamic_slice_p)
def dynamic_slice(run: Any, eqn: Any, view: Any, *starts: Any) -> list | None:
    """A run of rows of a table; one slice of a stack is another rule's."""
    picked = pick_from_stack(run, eqn, view, *starts)
    if picked is not None or not is_view(view):
        return picked
    view, cut = view.refined(), cut_dims(eqn)
    if len(cut) != 1 or not _rows_dim(view, cut[0]) or view.indices(STACK):
        return None
    aval = eqn.outvars[0].aval
    count, rows = aval.shape[cut[0]], view.size(IN)
    start = starts[cut[0]]
    # An index below zero counts from the end, then the run is clamped into the table.
    start = jnp.clip(jnp.where(start < 0, start + rows, start), 0, rows - count)
    y = _rows(run, eqn, view, start + jnp.arange(count), "CLIP", None)
    if y is None:
        return None
    keep = [i for i in range(view.ndim) if i != cut[0]]
    y = jnp.moveaxis(_as_dims(view, y, 1, keep), 0, cut[0])
    assert math.prod(y.shape) == math.prod(aval.shape)
    return [y]


def matrices(eqn: Any, view: View, indices: jax.Array, dim: int) -> list | None:
    """A matrix of a stack for each id: every field gives the slices that the program takes.

    The weight stays factored; of a quantized one only these slices are ever dequantized.
    """
    params = eqn.params
    numbers, sizes, shape = params["dimension_numbers"], params["slice_sizes"], view.shape
    whole = all(n == shape[i] for i, n in enumerate(sizes) if i != dim)
    if not whole or sizes[dim] != 1 or len(view.dims[dim]) != 1 or numbers.operand_batching_dims:
        return None
    mode, fill = params["mode"].name, params["fill_value"]
    if mode == "FILL_OR_DROP" and not (fill is None or fill != fill):
        return None  # an id out of range stands for a matrix of other numbers, not of NaN
    axis = view.dims[dim][0].axis
    ids = indices[..., numbers.start_index_map.index(dim)]
    extra = ids.ndim - 1

    def chosen(x: jax.Array, at: int | None) -> jax.Array:
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
    picked = [chosen(x, at) for x, at in zip(leaves, positions, strict=True)]
    of_ids = tuple(Axis(n, STACK) for n in ids.shape)
    axes = view.axes[:axis] + of_ids + view.axes[axis + 1 :]
    of = view.dims[dim][0].of
    index = iter([(Digit(of, axis + i, 1, n),) for i, n in enumerate(ids.shape)])
    kept = iter(i for i in range(view.ndim) if i not in numbers.collapsed_slice_dims)
    dims: list[Dim] = []
    for i in range(eqn.outvars[0].aval.ndim):
        if i not in numbers.offset_dims:
            dims.append(next(index))
            continue
        source = next(kept)
        moved = [d._replace(axis=d.axis + extra * (d.axis > axis)) for d in view.dims[source]]
        dims.append(() if source == dim else tuple(moved))
    weight = jax.tree.unflatten(treedef, picked)
    return [dataclasses.replace(view, weight=weight, axes=axes, dims=tuple(dims))]


def _keys(keys: jax.Array, ids: jax.Array, at: int) -> jax.Array:
    """Keys of the chosen slices, one of its own for each id: ids may share a slice."""
    own = keys[jnp.clip(ids, 0, len(keys) - 1)]
    numbers = jnp.arange(ids.size).reshape(ids.shape + (1,) * (own.ndim - ids.ndim))
    own = jax.vmap(jax.random.fold_in)(own.ravel(), jnp.broadcast_to(numbers, own.shape).ravel())
    return jnp.moveaxis(
        own.reshape(ids.shape + keys.shape[1:]), range(ids.ndim), range(at, at + ids.ndim)
    )
