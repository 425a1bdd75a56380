"""Devices: sharding constraints, and `shard_map`, where every field needs a spec of its own."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import _compat as compat
from jaxpeft._axes import Dim
from jaxpeft._composite import is_composite
from jaxpeft._rules.registry import rule
from jaxpeft._view import Axis, View, is_view
from jaxpeft._weight import IN, OUT, chain_of


@dataclasses.dataclass(frozen=True)
class Shards(Axis):
    """An axis inside `shard_map` of which each device has a part: `size` of it.

    Fields that run over the axis are divided likewise, and all others are the same on every
    device: what an `all_gather` may rely on.
    """

    names: tuple[str, ...]  # the mesh axes that divide it, as in a PartitionSpec


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


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


def _parts(mesh: Any, names: Any) -> int:
    """In how many parts an axis lies that is divided over these mesh axes."""
    known = _names(names) if isinstance(names, (str, tuple)) else ()  # else: left to the compiler
    return math.prod(mesh.shape[name] for name in known)


def _divides(view: View, by_axis: dict[int, Any], mesh: Any) -> bool:
    """Whether every field can be cut where the devices cut the array it stands for."""
    return all(view.divides(axis, _parts(mesh, names)) for axis, names in by_axis.items())


def field_specs(view: View, spec: Any) -> list[PartitionSpec] | None:
    """Per leaf of a refined view's weight, its spec when the array it stands for has `spec`."""
    by_axis = _spec_by_axis(view, spec)
    if by_axis is None:
        return None
    return [
        PartitionSpec(*(next((by_axis[i] for i in run if i in by_axis), None) for run in runs))
        for runs in view.field_axes()
    ]


def followed(view: View, sharding: NamedSharding) -> list[PartitionSpec]:
    """Per leaf of a view's weight, a spec that divides it as the array it stands for is divided.

    For where fields lie, not for `shard_map`: shards may end inside a block, since the compiler
    moves what a device lacks. A dimension that does not divide evenly is whole; one of the
    weight's own, such as the pairs of a flat layout, is divided by whatever is left.
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
            # Where a side of several axes is cut into these again, the first has to divide, too.
            first = next((view.axes[i].size for i in run if view.axes[i].size > 1), size)
            spec.append(dividing(names, size, first))
        for at in (at for at, run in enumerate(runs) if not run):
            left = tuple(name for name in every if name not in sum(spec, ()))
            spec[at] = dividing(left, leaf.shape[at])
        specs.append(PartitionSpec(*(names or None for names in spec)))
    return specs


def parts_of(mesh: Any, spec: PartitionSpec) -> int:
    """In how many parts an array lies on a mesh."""
    return math.prod(_parts(mesh, names) for names in spec if names is not None)


def constrain(x: Any, sharding: Any) -> Any:
    """x under a sharding constraint, if there is one; a view's fields each get their part."""
    if not isinstance(sharding, NamedSharding) or is_composite(x):
        return x
    if not is_view(x):
        return lax.with_sharding_constraint(x, sharding)
    view = x.refined()
    specs, by_axis = field_specs(view, sharding.spec), _spec_by_axis(view, sharding.spec)
    if specs is None or by_axis is None or not _divides(view, by_axis, sharding.mesh):
        return x  # a hint that no field can follow
    leaves, treedef = jax.tree.flatten(view.weight)
    placed = [
        lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return dataclasses.replace(view, weight=jax.tree.unflatten(treedef, placed))


@rule(p.sharding_constraint_p)
def sharding_constraint(run: Any, eqn: Any, view: View) -> list:
    """Each field gets its part of the sharding; one that none can follow is dropped."""
    return [constrain(view, eqn.params["sharding"])]


_UNFIT = " with a sharding that the weight cannot follow"


def acts_on_parts(view: View, roles: Iterable[str]) -> bool:
    """Whether the weight is right on a device's part of the sides with these roles."""
    return all(
        (IN not in roles or w.local_in) and (OUT not in roles or w.local_out)
        for w in chain_of(view.weight)
    )


def refuse_parts(run: Any, view: View, eqn: Any) -> None:
    """Raises where a weight that needs its whole sides meets an activation with parts of them."""
    if not acts_on_parts(view, {a.role for a in view.axes if isinstance(a, Shards)}):
        run.dense(view, eqn, _UNFIT)


def _resized(dims: tuple[Dim, ...], axis: int, size: int) -> tuple[Dim, ...]:
    """The dimensions of a refined view after an axis has become shorter or longer."""
    return tuple(tuple(d._replace(size=size) if d.axis == axis else d for d in dim) for dim in dims)


def _entering(
    run: Any, eqn: Any, x: Any, spec: PartitionSpec, mesh: Any
) -> tuple[list, list[PartitionSpec], Callable[[list], Any]]:
    """An operand of a shard_map as leaves, their specs, and the local view of them."""
    if not is_view(x):
        return [x], [spec], lambda leaves: leaves[0]
    view = x.refined()
    specs, by_axis = field_specs(view, spec), _spec_by_axis(view, spec)
    if by_axis is not None and not _divides(view, by_axis, mesh):
        # Codes that the devices would cut inside a block: what is put on them still divides.
        view = run.decoded(view, eqn, _UNFIT)
        specs = field_specs(view, spec)
    roles = {view.axes[axis].role for axis in by_axis or ()}
    # What is no matrix may be gathered before its use: `refuse_parts` asks again there.
    fits = acts_on_parts(view, roles) or not view.is_mergeable
    if specs is None or by_axis is None or not fits or not _divides(view, by_axis, mesh):
        return [run.dense(x, eqn, _UNFIT)], [spec], lambda leaves: leaves[0]
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
        dims = _resized(dims, axis, axes[axis].size)

    def local_view(leaves: list) -> View:
        weight = jax.tree.unflatten(treedef, leaves)
        return dataclasses.replace(view, weight=weight, axes=axes, dims=dims)

    return leaves, specs, local_view


@rule(compat.shard_map_p)
def shard_map(run: Any, eqn: Any, *args: Any) -> list:
    """Each field enters with a spec of its own, and the body sees views of the parts."""
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


@rule(p.all_gather_p)
def all_gather(run: Any, eqn: Any, view: View) -> list | None:
    """Fields that run over the divided axis are gathered along it; the others are whole."""
    params, view = eqn.params, view.refined()
    names, dim = _names(params["axis_name"]), params["all_gather_dimension"]
    if not params["tiled"] or params["axis_index_groups"] is not None or not view.dims[dim]:
        return None
    axis = view.dims[dim][0].axis
    part = view.axes[axis]
    if not isinstance(part, Shards) or part.names[-len(names) :] != names:
        return None  # copies of one array, end to end
    leaves, treedef = jax.tree.flatten(view.weight)
    for i, runs in enumerate(view.field_axes()):
        # A divided axis is the first of its side, so parts of a field lie end to end.
        for at in (at for at, axes in enumerate(runs) if axis in axes):
            leaves[i] = lax.all_gather(leaves[i], names, axis=at, tiled=True)
    size, left = part.size * params["axis_size"], part.names[: -len(names)]
    whole = Shards(size, part.role, left) if left else Axis(size, part.role)
    return [
        dataclasses.replace(
            view,
            weight=jax.tree.unflatten(treedef, leaves),
            axes=(*view.axes[:axis], whole, *view.axes[axis + 1 :]),
            dims=_resized(view.dims, axis, size),
        )
    ]
