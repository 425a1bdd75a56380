"""What each primitive does with a parameter, and what is known of its results.

Each function here is called with the walk, the equation, and what is known of its operands.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft import _dimensions as dimensions
from jaxpeft._axes import Digit, Dim
from jaxpeft._tracing import ancestry, flow
from jaxpeft._tracing.values import ACTIVE, Ancestor, Value, unknown

if TYPE_CHECKING:
    from jax.core import ShapedArray


class WalkContext(Protocol):
    """What a function here may ask of the walk that calls it; see `walk.Walk`."""

    shapes: dict[str, tuple[int, ...]]
    stacks: flow.Stacks
    consumed: set[str]
    products: dict[str, list[frozenset[Digit]]]

    def run(self, closed: Jaxpr | ClosedJaxpr, args: Sequence[Value]) -> list[Value]: ...

    def note(self, value: Value, kind: str, eqn: JaxprEqn | None, **what: Any) -> None: ...

    def ancestors(self, value: Value, aval: "ShapedArray") -> tuple[Ancestor, ...]: ...

    def settled(self, eqn: JaxprEqn | None, value: Value) -> Value: ...

    def elementwise(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]: ...

    def scale(self, eqn: JaxprEqn, param: Value, other: Value, **where: Any) -> Value: ...


def _product(
    walk: WalkContext,
    eqn: JaxprEqn,
    pair: list[Value],
    contracted: dimensions.Pair,
    batch: dimensions.Pair,
    groups: Sequence[int] = (),
) -> list[Value]:
    """A product; `groups` are dimensions of the second operand of which each row selects one."""
    # A group dimension is not a dimension of the result, so it counts as contracted.
    gone = (contracted[0], [*contracted[1], *groups])
    positions = dimensions.product_positions(gone, batch, (len(pair[0].dims), len(pair[1].dims)))
    free = [[i for i in positions[side] if i not in batch[side]] for side in (0, 1)]
    dims: list[Dim | None] = [None] * (len(positions[0]) + len(free[1]))
    for value, where in zip(pair, positions, strict=True):
        for i, k in where.items():
            dims[k] = dims[k] or value.dims[i]
    for side, value in enumerate(pair):
        other, sides = pair[1 - side], [*contracted[side], *free[side]]
        if value.param and not other.param and batch[side] and not sides and not value.stack:
            # `einsum("be,e->be")` multiplies entry by entry.
            scaled = walk.scale(eqn, value, other, cols=value.digits(batch[side]))
            made = flow.merged(eqn, [v.flow for v in pair])
            return [dataclasses.replace(scaled, dims=tuple(dims), flow=made)]
    after: list[str] = []
    for side, value in enumerate(pair):
        if value.param is None:
            continue
        other = pair[1 - side]
        selecting = [*batch[side], *(groups if side else ())]
        rows, cols = value.digits(contracted[side]), value.digits(free[side])
        stack = value.digits(selecting) | value.stack
        shape = compat.shape_of(eqn.invars[1 - side])
        use: dict[str, Any] = {"rows": rows, "cols": cols, "stack": stack}
        use["free"] = tuple(shape[i] for i in free[1 - side])
        walk.note(value, "other" if other.param else "linear", eqn, **use)
        if stack:
            walk.note(value, "expert", eqn, stack=stack)
        if other.one_hot:
            walk.note(value, "one-hot", eqn, **use)
        after.append(value.param)
        walk.products[value.param].append(rows)
        walk.consumed |= {w for w, lookup in other.flow.made if not lookup}
    _experts(walk, pair, contracted, batch)
    made = flow.of_product([v.flow for v in pair], after)
    mixture = None
    for value, other in (pair, pair[::-1]):
        if value.param and len(after) == 1 and (other.one_hot or other.flow.softmax_dim):
            mixture = value.param, value.digits(contracted[pair.index(value)])
    return [Value(tuple(dims), after=tuple(after), mixture=mixture, flow=made)]


def _experts(
    walk: WalkContext, pair: list[Value], contracted: dimensions.Pair, batch: dimensions.Pair
) -> None:
    """What a product reveals about experts: see `flow.Stacks`."""
    batched, summed = list(zip(*batch, strict=True)), list(zip(*contracted, strict=True))
    params = [v for v in pair if v.param]
    if len(params) == 1:
        other = 1 if pair[0].param else 0
        for ij in batched:
            walk.stacks.note(pair[other].dims[ij[other]])
        for i, j in [*batched, *summed]:
            walk.stacks.align(pair[0].dims[i], pair[1].dims[j])
    elif not params:
        for side, pairs in enumerate(([*batched, *summed], [ji[::-1] for ji in batched + summed])):
            for dim in flow.weighted(pair[side], pair[1 - side], pairs):
                walk.stacks.note(dim)
                walk.stacks.align(dim, pair[1 - side].flow.softmax_dim)


def _dot_general(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    return _product(walk, eqn, values, contracted, batch)


def _ragged_dot(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    return _product(walk, eqn, values[:2], contracted, batch, numbers.rhs_group_dimensions)


def _convolution(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    x, kernel = values
    numbers = eqn.params["dimension_numbers"]
    out, *rows = numbers.rhs_spec
    walk.note(kernel, "conv", eqn, rows=kernel.digits(rows), cols=kernel.digits([out]))
    for value in values[:1]:
        walk.note(value, "other", eqn)
    dims: list[Dim | None] = [None] * len(x.dims)
    dims[numbers.out_spec[0]] = x.dims[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = kernel.dims[out]
    after = (kernel.param,) if kernel.param else ()
    if after:
        walk.products[after[0]].append(kernel.digits(rows))
        walk.consumed |= {w for w, lookup in x.flow.made if not lookup}
    return [Value(tuple(dims), after=after, flow=flow.of_product([x.flow, kernel.flow], after))]


def _gather(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    table, ids = values
    sizes, shape = eqn.params["slice_sizes"], compat.shape_of(eqn.invars[0])
    rows, batch = dimensions.row_dims(eqn), eqn.params["dimension_numbers"].operand_batching_dims
    keep = [i for i in range(len(table.dims)) if i not in rows and i not in batch]
    whole = all(sizes[i] == shape[i] for i in keep)
    lookup = len(rows) == 1 and sizes[rows[0]] == 1 and whole
    free = compat.shape_of(eqn.invars[1])[:-1]
    where: dict[str, Any] = {"free": free, "by_id": ids.flow.ids}
    if lookup:
        cols, stack = table.digits(keep), table.digits(batch)
        if batch or not free:
            walk.note(
                table, "embedding", eqn, rows=table.digits(rows), cols=cols, stack=stack, **where
            )
            lookup = False
    else:
        walk.note(table, "other", eqn)
    dims: list[Dim | None] = []
    for operand, i in dimensions.gather_sources(eqn):
        if operand == "ids":
            dims.append(ids.dims[i])
        else:
            dims.append(table.dims[i] if sizes[i] == shape[i] else None)
    if lookup and table.param:  # rows of a table or matrices of a stack: the next use decides
        selected = table.digits(rows)
        dims = [() if any(d in selected for d in dim or ()) else dim for dim in dims]
        what: dict[str, Any] = {"selected": selected, "ids": free, "by_id": ids.flow.ids}
        what["depends"] = ACTIVE
        made = flow.of_rows(dataclasses.replace(ids.flow, live=True), table.param)
        return [Value(tuple(dims), table.param, flow=made, **what)]
    if not table.param:
        return [Value(tuple(dims))]
    return [Value(tuple(dims), after=(table.param,), flow=flow.of_rows(ids.flow, table.param))]


def _layout(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    value = values[0]
    if eqn.primitive is p.reshape_p and value.param and not value.ids and None in value.dims:
        # Entries are repeated: a dimension of copies and of the parameter's own is known in part.
        dims = ancestry.reshaped(walk.ancestors(value, compat.aval(eqn.invars[0]))[0], eqn)
    else:
        dims = dimensions.after_layout(eqn, value.dims)
    return [dataclasses.replace(value, dims=dims)]


def _reverse(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """An activation in another order is still the product of its weight."""
    if values[0].param is not None:
        return walk.elementwise(eqn, values)
    reversed_ = eqn.params["dimensions"]
    dims = tuple(None if i in reversed_ else dim for i, dim in enumerate(values[0].dims))
    return [dataclasses.replace(values[0], dims=dims)]


def _slice(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """One slice of a stack, a part of a side, or a range of rows of a table."""
    value, cut = values[0], dimensions.cut_dims(eqn)
    shape, old = compat.shape_of(eqn.outvars[0]), compat.shape_of(eqn.invars[0])
    dims = tuple(None if i in cut else dim for i, dim in enumerate(value.dims))
    if value.param is None or not cut:
        return [dataclasses.replace(value, dims=dims)]
    rest = [i for i, n in enumerate(shape) if n > 1 and i not in cut]
    one = [i for i in cut if shape[i] == 1]
    if len(cut) == len(one) == 1 and len(rest) >= 2:
        walk.note(value, "slice", eqn, stack=value.digits(one))
        kept = tuple(() if i in one else dim for i, dim in enumerate(value.dims))
        return [dataclasses.replace(value, dims=kept)]
    if len(cut) == len(one) == len(rest) == 1:
        kept = tuple(() if i in one else dim for i, dim in enumerate(value.dims))
        what: dict[str, Any] = {
            "static_index": eqn.primitive is p.slice_p,
            "by_id": any(v.flow.ids for v in values[1:]),
        }
        return [dataclasses.replace(value, dims=kept, selected=value.digits(one), **what)]
    if eqn.primitive is p.dynamic_slice_p and len(cut) == 1 and len(rest) == 1:
        where: dict[str, Any] = {"rows": value.digits(cut), "cols": value.digits(rest)}
        by_id = any(v.flow.ids for v in values[1:])
        walk.note(value, "embedding", eqn, free=(shape[cut[0]],), by_id=by_id, **where)
        rows = flow.of_rows(dataclasses.replace(value.flow, live=True), value.param)
        return [value.as_activation(dims=dims, after=(value.param,), flow=rows)]
    return [_resized(value, old, shape)]


def _resized(value: Value, old: Sequence[int], new: Sequence[int]) -> Value:
    """A value of which a part is left, or of which parts are put together: the same labels."""
    return dataclasses.replace(value, dims=dimensions.resized_dims(value.dims, old, new))


def _split(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    old = compat.shape_of(eqn.invars[0])
    return [_resized(values[0], old, compat.shape_of(out)) for out in eqn.outvars]


def _scan(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    body, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    n_const, n_carry, _ = compat.scan_counts(eqn)
    consts, carry = values[:n_const], values[n_const : n_const + n_carry]
    xs = values[n_const + n_carry :]
    slices = []
    for x in xs:
        walk.note(x, "stack", eqn, stack=frozenset(x.dims[0] or ()))
        for a in x.ancestors:
            lead = ancestry.digits_of(a.param, walk.shapes[a.param], frozenset(a.dims[0]))
            if lead:
                walk.note(Value((), a.param), "stack", eqn, stack=lead)
        rest = tuple(a.moved(a.dims[1:]) for a in x.ancestors)
        slices.append(dataclasses.replace(x, dims=x.dims[1:], ancestors=rest))
    passed = {i: j for i, v in enumerate(body.outvars) for j, w in enumerate(body.invars) if v is w}
    start = []
    for i, value in enumerate(carry):
        if passed.get(i) == n_const + i:
            start.append(value)
        else:
            walk.note(value, "other", eqn)
            made = walk.ancestors(value, compat.aval(eqn.invars[n_const + i]))
            start.append(value.as_activation(after=(), ancestors=made))
    outs = [walk.settled(eqn, v) for v in walk.run(body, [*consts, *start, *slices])]
    stacked = []
    for i in range(n_carry, len(outs)):
        source = passed.get(i, -1) - n_const - n_carry
        known = xs[source] if source >= 0 else None
        if known:
            stacked.append(known)
            continue
        made = walk.ancestors(outs[i], compat.aval(body.outvars[i]))
        shape = compat.shape_of(eqn.outvars[i])
        made = tuple(a.moved(dimensions.stacked(a.dims, 0)).resized(shape) for a in made)
        dims = (None, *outs[i].dims)
        stacked.append(outs[i].as_activation(dims=dims, after=(), ancestors=made))
    return [*outs[:n_carry], *stacked]


def _while(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    params = eqn.params
    body, _ = compat.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    consts, carry = values[n_cond : n_cond + n_body], []
    for i, value in enumerate(values[n_cond + n_body :]):
        fixed = body.outvars[i] is body.invars[n_body + i]
        carry.append(value if fixed else value.as_activation(after=()))
    walk.run(params["cond_jaxpr"], [*values[:n_cond], *carry])
    return walk.run(body, [*consts, *carry])


def _cond(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    outs = [walk.run(branch, values[1:]) for branch in eqn.params["branches"]]
    results = []
    for each, v in zip(zip(*outs, strict=True), eqn.outvars, strict=True):
        bare = [dataclasses.replace(x, flow=None) for x in each]
        result = bare[0]
        if any(x != result for x in bare):
            for value in each:
                walk.note(value, "other", eqn)
            depends, made = ancestry.either(each, compat.aval(v), walk.shapes)
            result = dataclasses.replace(unknown(v), depends=depends, ancestors=made)
        results.append(dataclasses.replace(result, flow=flow.together(x.flow for x in each)))
    return results


def _shard_map(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Inside, a dimension that is split over devices keeps its label and is shorter."""
    body, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    local = [
        _resized(value, compat.shape_of(outer), compat.shape_of(inner))
        for value, outer, inner in zip(values, eqn.invars, body.invars, strict=True)
    ]
    return [out.as_activation() for out in walk.run(body, local)]


def _all_gather(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """A dimension that is split over devices is as long as before the split."""
    old, new = compat.shape_of(eqn.invars[0]), compat.shape_of(eqn.outvars[0])
    if not eqn.params["tiled"]:
        return walk.elementwise(eqn, values)
    return [_resized(values[0], old, new)]


def _reduce(walk: WalkContext, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    walk.note(values[0], "other", eqn)
    gone = eqn.params["axes"]
    dims = dimensions.without(values[0].dims, gone)
    made = flow.merged(eqn, [values[0].flow])
    if eqn.primitive is p.reduce_sum_p and values[0].flow.is_exp and len(gone) == 1:
        made = dataclasses.replace(made, exp_sum_dim=values[0].dims[gone[0]] or ())
    return [Value(dims, normed=values[0].normed, flow=made)]


Step = Callable[[WalkContext, JaxprEqn, list[Value]], list[Value]]

#: By primitive; all others only compute, see `Walk.elementwise`.
STEPS: dict[Primitive, Step] = {
    p.dot_general_p: _dot_general,
    compat.ragged_dot_p: _ragged_dot,
    p.conv_general_dilated_p: _convolution,
    p.gather_p: _gather,
    **dict.fromkeys(dimensions.LAYOUT, _layout),
    p.rev_p: _reverse,
    p.slice_p: _slice,
    p.dynamic_slice_p: _slice,
    compat.split_p: _split,
    p.scan_p: _scan,
    p.while_p: _while,
    p.cond_p: _cond,
    compat.shard_map_p: _shard_map,
    p.all_gather_p: _all_gather,
    p.reduce_sum_p: _reduce,
    p.reduce_max_p: _reduce,
    p.reduce_min_p: _reduce,
}
