"""Devices: sharding constraints, and `shard_map`, where every field needs a spec of its own."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxpeft import _compat as compat
from jaxpeft._axes import with_axis_size
from jaxpeft._composite import is_composite
from jaxpeft._rules.registry import ArrayOrView, RuleContext, Value, rule
from jaxpeft._view import Axis, View, is_view
from jaxpeft._weight import IN, OUT, chain_of

AnyMesh = Mesh | AbstractMesh
#: The mesh axes that divide a dimension, as an entry of a PartitionSpec.
AxisNames = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Shards(Axis):
    """An axis inside `shard_map` of which each device has a shard of length `size`.

    Fields that run over the axis are divided likewise, and all others are the same on every
    device; `all_gather` relies on that.
    """

    names: tuple[str, ...]  # the mesh axes that divide it, as in a PartitionSpec


def _names(names: AxisNames) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _spec_by_axis(view: View, spec: PartitionSpec) -> dict[int, AxisNames] | None:
    """Mesh axes per axis of a refined view, or `None` where a shard would not be contiguous."""
    by_axis: dict[int, AxisNames] = {}
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


def _parts(mesh: AnyMesh, names: Any) -> int:
    """The number of shards of an axis that is divided over these mesh axes."""
    known = _names(names) if isinstance(names, (str, tuple)) else ()  # else: left to the compiler
    return math.prod(mesh.shape[name] for name in known)


def _divides(view: View, by_axis: dict[int, AxisNames], mesh: AnyMesh) -> bool:
    """Whether every field can be cut where the devices cut the array that the view stands for."""
    return all(view.divides(axis, _parts(mesh, names)) for axis, names in by_axis.items())


def field_specs(view: View, spec: PartitionSpec) -> list[PartitionSpec] | None:
    """Per leaf of a refined view's weight, its spec where the replaced array has `spec`."""
    by_axis = _spec_by_axis(view, spec)
    if by_axis is None:
        return None
    return [
        PartitionSpec(*(next((by_axis[i] for i in run if i in by_axis), None) for run in runs))
        for runs in view.field_axes()
    ]


def followed(view: View, sharding: NamedSharding) -> list[PartitionSpec]:
    """Per leaf of a view's weight, a spec that divides it as the array it stands for is divided.

    This is for the placement of fields, not for `shard_map`: shards may end inside a block, since
    the compiler moves what a device lacks. A dimension that does not divide evenly is replicated;
    an axis of the weight's own, such as the blocks of a flat layout, is divided over the mesh axes
    that are left.
    """
    view = view.refined()
    divided: dict[int, tuple[str, ...]] = {}
    for dim, names in zip(view.dims, sharding.spec, strict=False):
        lead = next((d.axis for d in dim if d.size > 1), None)
        if lead is not None and isinstance(names, (str, tuple)):
            divided[lead] = _names(names)
    every = tuple(name for names in divided.values() for name in names)

    def dividing(names: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
        while any(size % _parts(sharding.mesh, names) for size in sizes):
            names = names[:-1]
        return names

    specs = []
    for leaf, runs in zip(jax.tree.leaves(view.weight), view.field_axes(), strict=True):
        spec: list[tuple[str, ...]] = []
        for size, run in zip(leaf.shape, runs, strict=True):
            names = tuple(name for axis in run for name in divided.get(axis, ()))
            # A side of several axes may be cut into these again, so the first has to divide, too.
            first = next((view.axes[i].size for i in run if view.axes[i].size > 1), size)
            spec.append(dividing(names, size, first))
        for at in (at for at, run in enumerate(runs) if not run):
            left = tuple(name for name in every if name not in sum(spec, ()))
            spec[at] = dividing(left, leaf.shape[at])
        specs.append(PartitionSpec(*(names or None for names in spec)))
    return specs


def parts_of(mesh: AnyMesh, spec: PartitionSpec) -> int:
    """The number of shards of an array with this spec on a mesh."""
    return math.prod(_parts(mesh, names) for names in spec if names is not None)


def constrain(x: Value, sharding: Any) -> Value:
    """x under a sharding constraint, if there is one; each field of a view gets its own."""
    if not isinstance(sharding, NamedSharding) or is_composite(x):
        return x
    if not is_view(x):
        return lax.with_sharding_constraint(x, sharding)
    view = x.refined()
    specs, by_axis = field_specs(view, sharding.spec), _spec_by_axis(view, sharding.spec)
    if specs is None or by_axis is None or not _divides(view, by_axis, sharding.mesh):
        return x  # the constraint is a hint, and some field cannot follow it
    leaves, treedef = jax.tree.flatten(view.weight)
    placed = [
        lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return dataclasses.replace(view, weight=jax.tree.unflatten(treedef, placed))


@rule(p.sharding_constraint_p)
def sharding_constraint(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[Value]:
    """Each field gets its own constraint; one that some field cannot follow is dropped."""
    return [constrain(view, eqn.params["sharding"])]


_UNFIT = " with a sharding that the weight cannot follow"


def acts_on_parts(view: View, roles: Iterable[str]) -> bool:
    """Whether the weight is exact on a device's shard of the sides with these roles."""
    return all(
        (IN not in roles or w.local_in) and (OUT not in roles or w.local_out)
        for w in chain_of(view.weight)
    )


def refuse_parts(ctx: RuleContext, view: View, eqn: JaxprEqn) -> None:
    """Raises where a weight that needs its whole sides meets an activation with shards of them."""
    if not acts_on_parts(view, {a.role for a in view.axes if isinstance(a, Shards)}):
        ctx.dense(view, eqn, _UNFIT)


def _entering(
    ctx: RuleContext, eqn: JaxprEqn, x: ArrayOrView, spec: PartitionSpec, mesh: AnyMesh
) -> tuple[list, list[PartitionSpec], Callable[[list], Any]]:
    """An operand of a shard_map as leaves, their specs, and the view of their shards."""
    if not is_view(x):
        return [x], [spec], lambda leaves: leaves[0]
    view = x.refined()
    specs, by_axis = field_specs(view, spec), _spec_by_axis(view, spec)
    if by_axis is not None and not _divides(view, by_axis, mesh):
        # The devices would cut quantized values inside a block; an adapter's fields still divide.
        view = ctx.dequantized(view, eqn, _UNFIT)
        specs = field_specs(view, spec)
    roles = {view.axes[axis].role for axis in by_axis or ()}
    # A weight that is not mergeable may be gathered before its use: `refuse_parts` asks again.
    fits = acts_on_parts(view, roles) or not view.is_mergeable
    if specs is None or by_axis is None or not fits or not _divides(view, by_axis, mesh):
        return [ctx.dense(x, eqn, _UNFIT)], [spec], lambda leaves: leaves[0]
    leaves, treedef = jax.tree.flatten(view.weight)

    def part(axis: int) -> Axis:
        whole = view.axes[axis]
        if axis not in by_axis:
            return whole
        names = _names(by_axis[axis])
        return Shards(whole.size // _parts(mesh, names), whole.role, names)

    axes = tuple(map(part, range(len(view.axes))))
    dims = view.dims
    for axis in by_axis:
        dims = with_axis_size(dims, axis, axes[axis].size)

    def local_view(leaves: list) -> View:
        weight = jax.tree.unflatten(treedef, leaves)
        return dataclasses.replace(view, weight=weight, axes=axes, dims=dims)

    return leaves, specs, local_view


@rule(compat.shard_map_p)
def shard_map(ctx: RuleContext, eqn: JaxprEqn, *args: ArrayOrView) -> list[jax.Array]:
    """Each field enters with a spec of its own, and the body sees views of the shards."""
    params = eqn.params
    entering = [
        _entering(ctx, eqn, x, spec, params["mesh"])
        for x, spec in zip(args, params["in_specs"], strict=True)
    ]

    def body(*groups: list) -> tuple:
        inner = ctx.new_scope()
        locals_ = [view(list(group)) for (_, _, view), group in zip(entering, groups, strict=True)]
        outs = [inner.dense(x, eqn, " out of it") for x in inner.run(params["jaxpr"], locals_)]
        inner.close_scope("a shard_map")
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


@rule(p.all_gather_p)
def all_gather(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View] | None:
    """Fields that run over the divided axis are gathered along it; the others are replicated."""
    params, view = eqn.params, view.refined()
    names, dim = _names(params["axis_name"]), params["all_gather_dimension"]
    if not params["tiled"] or params["axis_index_groups"] is not None or not view.dims[dim]:
        return None
    axis = view.dims[dim][0].axis
    part = view.axes[axis]
    if not isinstance(part, Shards) or part.names[-len(names) :] != names:
        return None  # a concatenation of copies of one array
    leaves, treedef = jax.tree.flatten(view.weight)
    for i, runs in enumerate(view.field_axes()):
        # A divided axis is the first of its side, so the shards of a field are contiguous.
        for at in (at for at, axes in enumerate(runs) if axis in axes):
            leaves[i] = lax.all_gather(leaves[i], names, axis=at, tiled=True)
    size, left = part.size * params["axis_size"], part.names[: -len(names)]
    whole = Shards(size, part.role, left) if left else Axis(size, part.role)
    return [
        dataclasses.replace(
            view,
            weight=jax.tree.unflatten(treedef, leaves),
            axes=(*view.axes[:axis], whole, *view.axes[axis + 1 :]),
            dims=with_axis_size(view.dims, axis, size),
        )
    ]
