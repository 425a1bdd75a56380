"""Devices: sharding constraints, and `shard_map`, where every field needs a spec of its own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import compat
from jaxpeft.axes import Digit
from jaxpeft.rules.registry import rule
from jaxpeft.weight import IN, OUT, View, chain_of, is_view


def _spec_by_axis(view: View, spec: Any) -> dict[int, Any] | None:
    """Mesh axes per axis of a refined view, or `None` where a shard would not be contiguous."""
    by_axis: dict[int, Any] = {}
    for dim, names in zip(view.dims, spec, strict=False):
        if names is None or names == ():
            continue
        lead = [d for d in dim if d.size > 1]
        if not lead:
            return None
        role = view.axes[lead[0].axis].role
        group = [i for i in view.indices(role) if view.axes[i].size > 1]
        if role in (IN, OUT) and group[0] != lead[0].axis:
            return None  # a minor axis of a merged side: shards interleave
        by_axis[lead[0].axis] = names
    return by_axis


def field_specs(view: View, spec: Any) -> list[PartitionSpec] | None:
    """Per leaf of a refined view's weight, its spec when the array it stands for has `spec`."""
    by_axis = _spec_by_axis(view, spec)
    if by_axis is None:
        return None
    return [
        PartitionSpec(*(next((by_axis[i] for i in run if i in by_axis), None) for run in runs))
        for runs in view.field_axes()
    ]


def constrain(x: Any, sharding: Any) -> Any:
    """x under a sharding constraint, if there is one; a view's fields each get their part."""
    if not isinstance(sharding, NamedSharding):
        return x
    if not is_view(x):
        return lax.with_sharding_constraint(x, sharding)
    view = x.refined()
    specs = field_specs(view, sharding.spec)
    if specs is None:
        return x  # a hint that no field can follow
    leaves, treedef = jax.tree.flatten(view.weight)
    placed = [
        lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return dataclasses.replace(view, weight=jax.tree.unflatten(treedef, placed))


@rule(p.sharding_constraint_p)
def sharding_constraint(run: Any, eqn: Any, view: View) -> list:
    return [constrain(view, eqn.params["sharding"])]


def _entering(
    run: Any, eqn: Any, x: Any, spec: PartitionSpec, mesh: Any
) -> tuple[list, list[PartitionSpec], Callable[[list], Any]]:
    """An operand of a shard_map as leaves, their specs, and the local view of them."""
    if not is_view(x):
        return [x], [spec], lambda leaves: leaves[0]
    view = x.refined()
    specs, by_axis = field_specs(view, spec), _spec_by_axis(view, spec)
    roles = {view.axes[axis].role for axis in by_axis or ()}
    local = all(
        (IN not in roles or w.local_in) and (OUT not in roles or w.local_out)
        for w in chain_of(view.weight)
    )
    if specs is None or by_axis is None or not local:
        why = " with a sharding that the weight cannot follow"
        return [run.dense(x, eqn, why)], [spec], lambda leaves: leaves[0]
    leaves, treedef = jax.tree.flatten(view.weight)

    def shards(names: Any) -> int:
        names = (names,) if isinstance(names, str) else names
        return math.prod(mesh.shape[name] for name in names)

    def size(axis: int) -> int:
        whole = view.axes[axis].size
        return whole // shards(by_axis[axis]) if axis in by_axis else whole

    axes = tuple(dataclasses.replace(a, size=size(i)) for i, a in enumerate(view.axes))
    dims = tuple(tuple(Digit(d.of, d.axis, 1, size(d.axis)) for d in dim) for dim in view.dims)

    def local_view(leaves: list) -> View:
        weight = jax.tree.unflatten(treedef, leaves)
        return dataclasses.replace(view, weight=weight, axes=axes, dims=dims)

    return leaves, specs, local_view


@rule(compat.shard_map_p)
def shard_map(run: Any, eqn: Any, *args: Any) -> list:
    params = eqn.params
    entering = [
        _entering(run, eqn, x, spec, params["mesh"])
        for x, spec in zip(args, params["in_specs"], strict=True)
    ]

    def body(*groups: list) -> tuple:
        inner = run.inner()
        locals_ = [view(list(group)) for (_, _, view), group in zip(entering, groups, strict=True)]
        outs = [inner.dense(x, eqn, " out of it") for x in inner.run(params["jaxpr"], locals_)]
        inner.closed("a shard_map")
        return tuple(outs)

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs for _, specs, _ in entering),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params.get("newly_manual_axes", params.get("manual_axes", ()))),
    )
    return list(mapped(*(leaves for leaves, _, _ in entering)))
