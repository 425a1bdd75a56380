"""Primitives that rearrange a weight without computing: only the view changes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._rules.composites import repeated
from jaxpeft._rules.registry import cut_dims, rule
from jaxpeft._view import Axis, View, is_view
from jaxpeft._weight import IN, OUT, STACK, chain_of


def _one(view: View | None) -> list | None:
    return None if view is None else [view]


@rule(p.transpose_p)
def transpose(run: Any, eqn: Any, view: View) -> list | None:
    """The dimensions in another order."""
    return _one(view.redim([view.dims[i] for i in eqn.params["permutation"]]))


@rule(p.reshape_p)
def reshape(run: Any, eqn: Any, view: View) -> list | None:
    """Dimensions cut and joined, where no axis is cut unevenly."""
    return _one(view.redim(digits.reshape(view.dims, view.shape, eqn.outvars[0].aval.shape)))


@rule(p.squeeze_p)
def squeeze(run: Any, eqn: Any, view: View) -> list | None:
    """Dimensions of size 1 go."""
    gone = eqn.params["dimensions"]
    return _one(view.redim([dim for i, dim in enumerate(view.dims) if i not in gone]))


@rule(p.broadcast_in_dim_p)
def expand_dims(run: Any, eqn: Any, view: View) -> list | None:
    """Dimensions of size 1 come; a broadcast that repeats entries makes a composite."""
    shape = eqn.params["shape"]
    if math.prod(shape) != math.prod(view.shape):
        return repeated(eqn, view)
    dims: list = [()] * len(shape)
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        dims[j] = view.dims[i]
    return _one(view.redim(dims))


@rule(p.convert_element_type_p)
def astype(run: Any, eqn: Any, view: View) -> list | None:
    """What products are taken in, and no copy, where that does not show a rounding."""
    return _one(view.cast(eqn.params["new_dtype"]))


@rule(p.reduce_precision_p)
def reduce_precision(run: Any, eqn: Any, view: View) -> list | None:
    """Nothing, where as many bits are kept as the dtype has."""
    bits, params = jnp.finfo(view.dtype), eqn.params
    whole = params["exponent_bits"] >= bits.nexp and params["mantissa_bits"] >= bits.nmant
    return [view] if whole else None


@rule(p.copy_p, p.name_p)
def keep(run: Any, eqn: Any, view: View) -> list:
    """What copies or names a value leaves it as it is."""
    return [view]


@rule(p.stop_gradient_p)
def stop_gradient(run: Any, eqn: Any, view: View) -> list:
    """On every field."""
    return [lax.stop_gradient(view)]


@rule(compat.optimization_barrier_p)
def optimization_barrier(run: Any, eqn: Any, *values: Any) -> list:
    """On every field."""
    return list(lax.optimization_barrier(values))


def _sliceable(view: View, axis: int) -> bool:
    """Whether a part of an axis of a weight is a weight of the same kind."""
    role = view.axes[axis].role
    flag = {IN: "local_in", OUT: "local_out"}.get(role)
    return flag is None or all(getattr(w, flag) for w in chain_of(view.weight))


def _cut(view: View, dim: int, start: int, stop: int) -> View | None:
    """The view of `start:stop` along a dimension that is one axis, or led by one."""
    view = view.refined()
    lead = [d for d in view.dims[dim] if d.size > 1]
    if not lead:
        return None
    unit = math.prod(d.size for d in lead[1:])
    if start % unit or stop % unit or not _sliceable(view, lead[0].axis):
        return None
    first, last = start // unit, stop // unit
    return view.cut(lead[0].axis, first, last)


def _pick(view: View, dim: int, index: Any) -> View | None:
    """The view of one index along a dimension that is a stack axis; the dimension has size 1."""
    view = view.refined()
    stack = [d for d in view.dims[dim] if view.axes[d.axis].role == STACK]
    if len(stack) != 1 or len(view.dims[dim]) != 1:
        return None
    axis = stack[0].axis
    leaves, treedef = jax.tree.flatten(view.weight)
    picked = [
        x if at is None else lax.dynamic_index_in_dim(x, index, at, keepdims=False)
        for x, at in zip(leaves, view.stack_positions(axis), strict=True)
    ]
    if isinstance(index, jax.core.Tracer):
        # Each device of a shard_map may choose another: parts of one array they are no more.
        view = dataclasses.replace(view, axes=tuple(Axis(a.size, a.role) for a in view.axes))
    return view.without(axis, jax.tree.unflatten(treedef, picked), view.dims)


@rule(p.slice_p)
def static_slice(run: Any, eqn: Any, view: View) -> list | None:
    """One of a stack, or a run along a side where a part of the weight is one."""
    if eqn.params["strides"] is not None and any(s != 1 for s in eqn.params["strides"]):
        return None
    for dim in cut_dims(eqn):
        start, stop = eqn.params["start_indices"][dim], eqn.params["limit_indices"][dim]
        picked = _pick(view, dim, start) if stop - start == 1 else None
        cut = picked if picked is not None else _cut(view, dim, start, stop)
        if cut is None:
            return None
        view = cut
    return [view]


@rule(compat.split_p)
def split(run: Any, eqn: Any, view: View) -> list | None:
    """Runs along a side, each a part of the weight."""
    axis, start, parts = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        parts.append(_cut(view, axis, start, start + size))
        start += size
    return None if any(part is None for part in parts) else parts


@rule(p.dynamic_slice_p)
def dynamic_slice(run: Any, eqn: Any, view: Any, *starts: Any) -> list | None:
    """One of a stack, at an index known at run time."""
    if not is_view(view):
        return None
    cut = cut_dims(eqn)
    if len(cut) != 1 or eqn.outvars[0].aval.shape[cut[0]] != 1:
        return None
    return _one(_pick(view, cut[0], starts[cut[0]]))


@rule(compat.pcast_p)
def pcast(run: Any, eqn: Any, view: View) -> list:
    """Every field varies over these mesh axes from here on."""
    names = eqn.params["axes"]

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(n for n in names if n not in compat.varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return [jax.tree.map(cast, view)]
