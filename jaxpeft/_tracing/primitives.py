"""What each primitive does with a parameter, and what is known of its results.

Each is called with the walk under way, the equation, and what is known of its operands.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Dim
from jaxpeft._dimensions import cut_dims, row_dims
from jaxpeft._tracing import ancestry, flow
from jaxpeft._tracing.ancestry import ACTIVE
from jaxpeft._tracing.values import Value, unknown


def _product(
    walk: Any,
    eqn: Any,
    pair: list[Value],
    contracted: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    groups: Sequence[int] = (),
) -> list[Value]:
    after: list[str] = []
    free = []
    for side, value in enumerate(pair):
        mine = [*batch[side], *(groups if side else ())]
        free.append(
            [i for i in range(len(value.dims)) if i not in contracted[side] and i not in mine]
        )
    dims = [pair[0].dims[i] or pair[1].dims[j] for i, j in zip(*batch, strict=True)]
    dims += [pair[side].dims[i] for side in (0, 1) for i in free[side]]
    for side, value in enumerate(pair):
        other, sides = pair[1 - side], [*contracted[side], *free[side]]
        if value.param and not other.param and batch[side] and not sides and not value.stack:
            # `einsum("be,e->be")` multiplies entry by entry.
            scaled = walk.scale(eqn, value, other, cols=value.digits(batch[side]))
            made = flow.merged(eqn, [v.flow for v in pair])
            return [dataclasses.replace(scaled, dims=tuple(dims), flow=made)]
    for side, value in enumerate(pair):
        if value.param is None:
            continue
        other = pair[1 - side]
        mine = [*batch[side], *(groups if side else ())]
        rows, cols = value.digits(contracted[side]), value.digits(free[side])
        stack = value.digits(mine) | value.stack
        shape = eqn.invars[1 - side].aval.shape
        where: dict[str, Any] = {"rows": rows, "cols": cols, "stack": stack}
        where["free"] = tuple(shape[i] for i in free[1 - side])
        walk.note(value, "other" if other.param else "linear", eqn, **where)
        if stack:
            walk.note(value, "expert", eqn, stack=stack)
        if other.one_hot:
            walk.note(value, "one-hot", eqn, **where)
        after.append(value.param)
        walk.products[value.param].append(rows)
        walk.consumed |= {w for w, lookup in other.flow.made if not lookup}
    _experts(walk, pair, contracted, batch)
    made = flow.of_product([v.flow for v in pair], after)
    mixture = None
    for value, other in (pair, pair[::-1]):
        if value.param and len(after) == 1 and (other.one_hot or other.flow.shares):
            mixture = value.param, value.digits(contracted[pair.index(value)])
    return [Value(tuple(dims), after=tuple(after), mixture=mixture, flow=made)]


def _experts(walk: Any, pair: list[Value], contracted: Any, batch: Any) -> None:
    """What a product tells of experts: see `flow.Stacks`."""
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
                walk.stacks.align(dim, pair[1 - side].flow.shares)


def _dot_general(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    return _product(walk, eqn, values, contracted, batch)


def _ragged_dot(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    return _product(walk, eqn, values[:2], contracted, batch, numbers.rhs_group_dimensions)


def _convolution(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
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


def _gather(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    table, ids = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows, batch = row_dims(eqn), numbers.operand_batching_dims
    keep = [i for i in range(len(table.dims)) if i not in rows and i not in batch]
    shape = eqn.invars[0].aval.shape
    whole = all(sizes[i] == shape[i] for i in keep)
    lookup = len(rows) == 1 and sizes[rows[0]] == 1 and whole
    free = tuple(eqn.invars[1].aval.shape[:-1])
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
    # Dimensions of the slice keep what they were, the others come from the ids.
    offsets = iter(
        [
            i
            for i in range(len(table.dims))
            if i not in numbers.collapsed_slice_dims and i not in batch
        ]
    )
    index = iter(ids.dims)
    dims: list[Dim | None] = []
    for i in range(len(eqn.outvars[0].aval.shape)):
        if i in numbers.offset_dims:
            source = next(offsets)
            dims.append(table.dims[source] if sizes[source] == shape[source] else None)
        else:
            dims.append(next(index))
    if lookup and table.param:  # rows of a table, or matrices of a stack: the next use tells
        chosen = table.digits(rows)
        dims = [() if any(d in chosen for d in dim or ()) else dim for dim in dims]
        what: dict[str, Any] = {"chosen": chosen, "ids": free, "by_id": ids.flow.ids}
        what["depends"] = ACTIVE
        made = flow.of_rows(dataclasses.replace(ids.flow, live=True), table.param)
        return [Value(tuple(dims), table.param, flow=made, **what)]
    if not table.param:
        return [Value(tuple(dims))]
    return [Value(tuple(dims), after=(table.param,), flow=flow.of_rows(ids.flow, table.param))]


def _transpose(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    dims = tuple(values[0].dims[i] for i in eqn.params["permutation"])
    return [dataclasses.replace(values[0], dims=dims)]


def _reshape(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    value, old, new = values[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if value.param is None or value.ids or None not in value.dims:
        return [dataclasses.replace(value, dims=digits.reshape(value.dims, old, new))]
    # Entries are repeated: a dimension of copies and of the parameter's own is known in part.
    dims = ancestry.reshaped(walk.ancestors(value, eqn.invars[0].aval)[0], old, new)
    return [dataclasses.replace(value, dims=dims)]


def _squeeze(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    dims = tuple(dim for i, dim in enumerate(values[0].dims) if i not in gone)
    return [dataclasses.replace(values[0], dims=dims)]


def _broadcast(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    value, shape = values[0], eqn.params["shape"]
    dims: list[Dim | None] = [() if n == 1 else None for n in shape]
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[i] == shape[j]:
            dims[j] = value.dims[i]
    return [dataclasses.replace(value, dims=tuple(dims))]


def _reverse(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """An activation in another order is still the product of its weight."""
    if values[0].param is not None:
        return walk.elementwise(eqn, values)
    turned = eqn.params["dimensions"]
    dims = tuple(None if i in turned else dim for i, dim in enumerate(values[0].dims))
    return [dataclasses.replace(values[0], dims=dims)]


def _slice(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """One slice of a stack, a part of a side, or a run of rows of a table."""
    value, cut = values[0], cut_dims(eqn)
    shape, old = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
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
            "fixed": eqn.primitive is p.slice_p,
            "by_id": any(v.flow.ids for v in values[1:]),
        }
        return [dataclasses.replace(value, dims=kept, chosen=value.digits(one), **what)]
    if eqn.primitive is p.dynamic_slice_p and len(cut) == 1 and len(rest) == 1:
        where: dict[str, Any] = {"rows": value.digits(cut), "cols": value.digits(rest)}
        by_id = any(v.flow.ids for v in values[1:])
        walk.note(value, "embedding", eqn, free=(shape[cut[0]],), by_id=by_id, **where)
        rows = flow.of_rows(dataclasses.replace(value.flow, live=True), value.param)
        return [value.data(dims=dims, after=(value.param,), flow=rows)]
    return [dataclasses.replace(value, dims=_shortened(value, old, shape))]


def _shortened(value: Value, old: Sequence[int], new: Sequence[int]) -> tuple[Dim | None, ...]:
    """Dimensions of which a part is left: the same labels, shorter."""
    dims: list[Dim | None] = []
    for dim, before, after in zip(value.dims, old, new, strict=True):
        if dim and before != after:
            lead = next((i for i, d in enumerate(dim) if d.size > 1), 0)
            size = dim[lead].size * after // before
            short = dim[lead]._replace(size=size)
            whole = size * before == dim[lead].size * after
            dims.append((*dim[:lead], short, *dim[lead + 1 :]) if whole else None)
        else:
            dims.append(dim)
    return tuple(dims)


def _split(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    old = eqn.invars[0].aval.shape
    return [
        dataclasses.replace(values[0], dims=_shortened(values[0], old, out.aval.shape))
        for out in eqn.outvars
    ]


def _scan(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
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
            made = walk.ancestors(value, eqn.invars[n_const + i].aval)
            start.append(value.data(after=(), ancestors=made))
    outs = [walk.settled(eqn, v) for v in walk.run(body, [*consts, *start, *slices])]
    stacked = []
    for i in range(n_carry, len(outs)):
        source = passed.get(i, -1) - n_const - n_carry
        known = xs[source] if source >= 0 else None
        if known:
            stacked.append(known)
            continue
        made = walk.ancestors(outs[i], body.outvars[i].aval)
        made = tuple(a.moved(((), *a.dims)).resized(eqn.outvars[i].aval.shape) for a in made)
        dims = (None, *outs[i].dims)
        stacked.append(outs[i].data(dims=dims, after=(), ancestors=made))
    return [*outs[:n_carry], *stacked]


def _while(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    body, _ = compat.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    consts, carry = values[n_cond : n_cond + n_body], []
    for i, value in enumerate(values[n_cond + n_body :]):
        fixed = body.outvars[i] is body.invars[n_body + i]
        carry.append(value if fixed else value.data(after=()))
    walk.run(params["cond_jaxpr"], [*values[:n_cond], *carry])
    return walk.run(body, [*consts, *carry])


def _cond(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    outs = [walk.run(branch, values[1:]) for branch in eqn.params["branches"]]
    results = []
    for each, v in zip(zip(*outs, strict=True), eqn.outvars, strict=True):
        bare = [dataclasses.replace(x, flow=None) for x in each]
        result = bare[0]
        if any(x != result for x in bare):
            for value in each:
                walk.note(value, "other", eqn)
            depends, made = ancestry.either(each, v.aval, walk.shapes)
            result = dataclasses.replace(unknown(v.aval), depends=depends, ancestors=made)
        results.append(dataclasses.replace(result, flow=flow.together(x.flow for x in each)))
    return results


def _shard_map(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """Inside, a dimension that is split over devices keeps its label and is shorter."""
    body, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    local = [
        dataclasses.replace(value, dims=_shortened(value, outer.aval.shape, inner.aval.shape))
        for value, outer, inner in zip(values, eqn.invars, body.invars, strict=True)
    ]
    return [out.data() for out in walk.run(body, local)]


def _all_gather(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    """A dimension that is split over devices is as long as before the split."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not eqn.params["tiled"]:
        return walk.elementwise(eqn, values)
    return [dataclasses.replace(values[0], dims=_shortened(values[0], old, new))]


def _reduce(walk: Any, eqn: Any, values: list[Value]) -> list[Value]:
    walk.note(values[0], "other", eqn)
    gone = eqn.params["axes"]
    dims = tuple(dim for i, dim in enumerate(values[0].dims) if i not in gone)
    made = flow.merged(eqn, [values[0].flow])
    if eqn.primitive is p.reduce_sum_p and values[0].flow.powers and len(gone) == 1:
        made = dataclasses.replace(made, total=values[0].dims[gone[0]] or ())
    return [Value(dims, normed=values[0].normed, flow=made)]


#: By primitive; those that are not here only compute, see `Walk.elementwise`.
STEPS: dict[Any, Callable[[Any, Any, list[Value]], list[Value]]] = {
    p.dot_general_p: _dot_general,
    compat.ragged_dot_p: _ragged_dot,
    p.conv_general_dilated_p: _convolution,
    p.gather_p: _gather,
    p.transpose_p: _transpose,
    p.reshape_p: _reshape,
    p.squeeze_p: _squeeze,
    p.broadcast_in_dim_p: _broadcast,
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
