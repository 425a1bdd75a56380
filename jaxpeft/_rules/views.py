"""Primitives that rearrange a weight without computing: only the view changes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft._dimensions import after_layout, cut_dims
from jaxpeft._rules.composites import repeated
from jaxpeft._rules.registry import ArrayOrView, RuleContext, rule
from jaxpeft._view import Axis, View
from jaxpeft._weight import IN, OUT, STACK, chain_of


def _one(view: View | None) -> list[View] | None:
    return None if view is None else [view]


@rule(p.transpose_p, p.reshape_p, p.squeeze_p)
def rearrange(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """The weight stays as it is, unless an axis is cut unevenly."""
    return _one(view.redim(after_layout(eqn, view.dims)))


@rule(p.broadcast_in_dim_p)
def broadcast(ctx: RuleContext, eqn: JaxprEqn, view: View) -> Sequence | None:
    """New dimensions of length 1; a broadcast that repeats entries makes a composite."""
    if math.prod(eqn.params["shape"]) != math.prod(view.shape):
        return repeated(eqn, view)
    return rearrange(ctx, eqn, view)


@rule(p.convert_element_type_p)
def astype(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """Another dtype for products, without a copy, where that does not show a rounding."""
    return _one(view.cast(eqn.params["new_dtype"]))


@rule(p.reduce_precision_p)
def reduce_precision(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """Nothing, where as many bits are kept as the dtype has."""
    bits, params = jnp.finfo(view.dtype), eqn.params
    whole = params["exponent_bits"] >= bits.nexp and params["mantissa_bits"] >= bits.nmant
    return [view] if whole else None


@rule(p.copy_p, p.name_p)
def identity(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View]:
    """A copy or a name changes nothing."""
    return [view]


@rule(p.stop_gradient_p)
def stop_gradient(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View]:
    """No field gets a gradient."""
    return [lax.stop_gradient(view)]


@rule(compat.optimization_barrier_p)
def optimization_barrier(
    ctx: RuleContext, eqn: JaxprEqn, *values: ArrayOrView
) -> list[ArrayOrView]:
    """Every field passes the barrier."""
    return list(lax.optimization_barrier(values))


def _can_be_cut(view: View, axis: int) -> bool:
    """Whether a part of an axis of a weight is a weight of the same kind."""
    role = view.axes[axis].role
    flag = {IN: "local_in", OUT: "local_out"}.get(role)
    return flag is None or all(getattr(w, flag) for w in chain_of(view.weight))


def _cut(view: View, dim: int, start: int, stop: int) -> View | None:
    """The view of `start:stop` along a dimension that is one axis, or is led by one."""
    view = view.refined()
    lead = [d for d in view.dims[dim] if d.size > 1]
    if not lead:
        return None
    unit = math.prod(d.size for d in lead[1:])
    if start % unit or stop % unit or not _can_be_cut(view, lead[0].axis):
        return None
    first, last = start // unit, stop // unit
    return view.cut(lead[0].axis, first, last)


def _select(view: View, dim: int, index: int | jax.Array) -> View | None:
    """The view of one index along a dimension that is a stack axis; the dimension has length 1."""
    view = view.refined()
    stack = [d for d in view.dims[dim] if view.axes[d.axis].role == STACK]
    if len(stack) != 1 or len(view.dims[dim]) != 1:
        return None
    axis = stack[0].axis
    leaves, treedef = jax.tree.flatten(view.weight)
    selected = [
        x if at is None else lax.dynamic_index_in_dim(x, index, at, keepdims=False)
        for x, at in zip(leaves, view.stack_positions(axis), strict=True)
    ]
    if isinstance(index, jax.core.Tracer):
        # Each device of a shard_map may select another one, so these are not shards of one array.
        view = dataclasses.replace(view, axes=tuple(Axis(a.size, a.role) for a in view.axes))
    return view.without(axis, jax.tree.unflatten(treedef, selected), view.dims)


@rule(p.slice_p)
def static_slice(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """One weight of a stack, or a range along a side where a part of the weight is a weight."""
    if eqn.params["strides"] is not None and any(s != 1 for s in eqn.params["strides"]):
        return None
    for dim in cut_dims(eqn):
        start, stop = eqn.params["start_indices"][dim], eqn.params["limit_indices"][dim]
        selected = _select(view, dim, start) if stop - start == 1 else None
        part = selected if selected is not None else _cut(view, dim, start, stop)
        if part is None:
            return None
        view = part
    return [view]


@rule(compat.split_p)
def split(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """Ranges along a side, each of which is a weight."""
    start, parts = 0, []
    for size in eqn.params["sizes"]:
        part = _cut(view, eqn.params["axis"], start, start + size)
        if part is None:
            return None
        parts.append(part)
        start += size
    return parts


def one_of_stack(eqn: JaxprEqn, view: View, starts: Sequence[jax.Array]) -> View | None:
    """What a `dynamic_slice` takes of a stack: one weight, at an index known at run time."""
    cut = cut_dims(eqn)
    if len(cut) != 1 or compat.aval(eqn.outvars[0]).shape[cut[0]] != 1:
        return None
    return _select(view, cut[0], starts[cut[0]])


@rule(compat.pcast_p)
def pcast(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View]:
    """From here on every field varies over these mesh axes."""
    names = eqn.params["axes"]

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(n for n in names if n not in compat.varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return [jax.tree.map(cast, view)]
