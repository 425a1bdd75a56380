"""Walks a jaxpr with labelled dimensions and notes every use of a parameter."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import ancestry, compat
from jaxpeft import axes as digits
from jaxpeft.ancestry import FIXED, GIVEN, Ancestor
from jaxpeft.axes import Digit, Dim
from jaxpeft.rules.registry import cut_dims, row_dims


@dataclasses.dataclass(frozen=True)
class Use:
    """One thing that a program does with a parameter.

    Attributes:
      kind: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", "added", "tied"
        (a table multiplied by its output side), "one-hot" (a table multiplied by something
        that is compared to ids), or "other".
      rows, cols, stack: Digits of the parameter that are summed over or looked up, that
        remain, and that select one slice.
      of: For a bias or a scale, the weights whose product it acts on.
      free: Shape of what the activation keeps, such as (batch, time).
      source: Where in the model.
    """

    kind: str
    rows: frozenset[Digit] = frozenset()
    cols: frozenset[Digit] = frozenset()
    stack: frozenset[Digit] = frozenset()
    of: tuple[str, ...] = ()
    free: tuple[int, ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value.

    Attributes:
      dims: Per dimension the digits it is made of, or `None`.
      param: The parameter that this is a rearrangement of.
      after: The weights whose product this is, to which no bias has been added yet.
      summed: Something else was added to that product.
      chosen: Digits of the parameter of which one index was chosen: a row of a table, or one
        slice of a stack of vectors. What it meets next tells which.
      fixed: The index was part of the program (`w[0]`), so it is no lookup.
      normed: Was divided by a standard deviation since the last product.
      one_hot: Comes from a comparison.
      depends: On what: `ancestry.FIXED`, `GIVEN` or `ACTIVE`.
      ancestors: The parameters that this is computed from, if it is no activation.
    """

    dims: tuple[Dim | None, ...]
    param: str | None = None
    after: tuple[str, ...] = ()
    summed: bool = False
    chosen: frozenset[Digit] = frozenset()
    fixed: bool = False
    normed: bool = False
    one_hot: bool = False
    depends: int = FIXED
    ancestors: tuple[Ancestor, ...] = ()

    def digits(self, dims: Sequence[int]) -> frozenset[Digit]:
        """The digits of some dimensions."""
        return frozenset(d for i in dims for d in self.dims[i] or ())

    def data(self, **changes: Any) -> "Value":
        """The same value as an activation, no longer a parameter."""
        return dataclasses.replace(self, param=None, **changes)


def trace(
    fn: Callable, paths: Sequence[str], shapes: Sequence[Any], data: Sequence[Any]
) -> dict[str, list[Use]]:
    """The uses of each parameter in `fn(arrays, data)`."""
    closed = jax.make_jaxpr(fn)(list(shapes), list(data))
    jaxpr, _ = compat.open_jaxpr(closed)
    walk = _Walk({path: tuple(x.shape) for path, x in zip(paths, shapes, strict=True)})
    params = [
        Value(digits.whole(path, x.shape), path) for path, x in zip(paths, shapes, strict=True)
    ]
    others = [
        dataclasses.replace(unknown(v.aval), depends=GIVEN) for v in jaxpr.invars[len(params) :]
    ]
    for value in walk.run(jaxpr, [*params, *others]):
        walk.settled(jaxpr.eqns[-1] if jaxpr.eqns else None, value)
    return {path: walk.uses[path] for path in paths}


def unknown(aval: Any) -> Value:
    """A value of which nothing is known."""
    return Value((None,) * len(getattr(aval, "shape", ())))


#: Primitives that hand a value on as it is.
_KEEP = {
    p.neg_p,
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
#: Primitives that only rearrange, so that a chosen row stays one.
_LAYOUT = {p.reshape_p, p.squeeze_p, p.transpose_p, p.broadcast_in_dim_p}
#: Primitives that hand their operands on to a jaxpr, where it shows what a chosen row is for.
_CALLS = {p.jit_p, p.remat_p, p.cond_p, p.custom_jvp_call_p, p.custom_vjp_call_p}
_SUMS = {p.add_p, p.sub_p, p.add_jaxvals_p}
_PRODUCTS = {p.mul_p, p.div_p}


class _Walk:
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.uses: dict[str, list[Use]] = collections.defaultdict(list)

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        jaxpr, _ = compat.open_jaxpr(jaxpr)
        env: dict[Any, Value] = {v: unknown(v.aval) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [unknown(v.aval) if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self.step(eqn, values), strict=True))
        return [unknown(v.aval) if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]

    def note(self, value: Value, kind: str, eqn: Any, **what: Any) -> None:
        """Records a use, once."""
        if value.param is None:
            return
        for name in ("rows", "cols", "stack"):  # in part of copies
            what[name] = frozenset(d for d in what.get(name, ()) if d.of == value.param)
        use = Use(kind, source=compat.source(eqn), **what)
        if use not in self.uses[value.param]:
            self.uses[value.param].append(use)

    def ancestors(self, value: Value, aval: Any) -> tuple[Ancestor, ...]:
        """The parameters that a value of this type is computed from."""
        return ancestry.ancestors_of(value, getattr(aval, "shape", ()), self.shapes)

    def step(self, eqn: Any, values: list[Value]) -> list[Value]:
        if any(isinstance(x, (jex.Jaxpr, jex.ClosedJaxpr)) for x in _parameters(eqn)):
            return self.equation(eqn, values)
        self.computed(eqn, values)
        return ancestry.inherited(eqn, values, self.equation(eqn, values), self.shapes)

    def computed(self, eqn: Any, values: list[Value]) -> None:
        """Records what parameters are whose descendants meet a product or a sum here."""
        if eqn.primitive in _SUMS:
            for ancestor in ancestry.added(values):
                if cols := ancestry.own(ancestor, self.shapes):
                    self.note(Value((), ancestor.param), "added", eqn, cols=cols)
        elif eqn.primitive in ancestry.PRODUCTS | {p.gather_p}:
            for value, other in (values[:2], values[1::-1]):
                alone = value.param is None and other.param is None and not other.ancestors
                for ancestor in value.ancestors if alone else ():
                    # What its parameter would do in its place.
                    walk, stand = _Walk(self.shapes), Value(ancestor.dims, ancestor.param)
                    _STEPS[eqn.primitive](walk, eqn, [stand if v is value else v for v in values])
                    ancestry.adopt(ancestor, self.shapes, self.uses, walk.uses)

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        """One equation: what it does with parameters, and what is known of its results."""
        primitive = eqn.primitive
        if primitive not in _SUMS | _PRODUCTS | _KEEP | _LAYOUT | _CALLS:
            values = [self.settled(eqn, v) for v in values]
        if primitive in _STEPS:
            return _STEPS[primitive](self, eqn, values)
        if primitive in _KEEP:
            return list(values[: len(eqn.outvars)])
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if name in eqn.params:
                inner, _ = compat.open_jaxpr(eqn.params[name])
                if len(inner.invars) == len(values):
                    return self.run(inner, values)
        return self.elementwise(eqn, values)

    def settled(self, eqn: Any, value: Value) -> Value:
        """A chosen row that is used like an activation was a row of a table."""
        if not value.chosen:
            return value
        if value.fixed:
            return dataclasses.replace(value, chosen=frozenset(), fixed=False)
        cols = value.digits(range(len(value.dims)))
        self.note(value, "embedding", eqn, rows=value.chosen, cols=cols, free=(1,))
        return value.data(after=(value.param,) if value.param else (), chosen=frozenset())

    def elementwise(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Sums and products with a parameter have a meaning; everything else is `other`."""
        primitive = eqn.primitive
        if len(eqn.outvars) != 1:
            for value in values:
                self.note(value, "other", eqn)
            return [unknown(v.aval) for v in eqn.outvars]
        shape = getattr(eqn.outvars[0].aval, "shape", ())
        if primitive in _SUMS | _PRODUCTS and len(values) == 2:
            scalar = [not v.dims for v in values]
            if any(scalar) and values[not scalar.index(True)].param:
                return [values[not scalar.index(True)]]  # a weight times a number
            values = [
                v if v.param is None or _is_vector_use(w) else self.settled(eqn, v)
                for v, w in zip(values, values[::-1], strict=True)
            ]
            found = [v for v in values if v.param]
            if len(found) == 1 and any(found[0].dims):
                other = values[values[0] is found[0]]
                if not _is_computed(found[0], other):
                    return [_as_wide(self.meet(eqn, found[0], other), shape)]
        for value in values:
            self.note(value, "other", eqn, cols=value.digits(range(len(value.dims))))
        shapes = [getattr(x.aval, "shape", None) for x in eqn.invars]
        same = [v for v, s in zip(values, shapes, strict=True) if s == shape]
        normed = primitive in (p.rsqrt_p, p.sqrt_p) or any(v.normed for v in values)
        dims = tuple(next((v.dims[i] for v in same if v.dims[i]), None) for i in range(len(shape)))
        # A residual is often added before the bias: (x + h @ w) + b is x + (h @ w + b).
        after: tuple[str, ...] = ()
        if primitive in _SUMS:
            # Of a residual stream and a new product, the bias belongs to the product.
            products = [v for v in values if v.after]
            products = [v for v in products if not v.summed] or products
            after = tuple(dict.fromkeys(w for v in products for w in v.after))
        one_hot = primitive is p.eq_p
        return [Value(dims, after=after, summed=bool(after), normed=normed, one_hot=one_hot)]

    def meet(self, eqn: Any, param: Value, other: Value) -> Value:
        """A parameter is added to an activation, or multiplied with it."""
        cols = param.digits(range(len(param.dims)))
        stack = frozenset(_stack_of(param, other, self.uses)) | param.chosen
        pairs = zip(param.dims, other.dims, strict=False)
        aligned = [theirs for mine, theirs in pairs if digits.significant(mine or ())]
        if eqn.primitive in _SUMS:
            if other.after and not other.normed and all(aligned):
                self.note(param, "bias", eqn, cols=cols - stack, stack=stack, of=other.after)
                return other.data(after=())
            kinds = ["norm", "bias"] if other.normed else ["added"]
            for kind in kinds:
                self.note(param, kind, eqn, cols=cols - stack, stack=stack)
            return other.data(after=())
        kind = "norm" if other.normed else "scale"
        of = () if other.normed else other.after
        self.note(param, kind, eqn, cols=cols - stack, stack=stack, of=of)
        return other.data(after=())


def _parameters(eqn: Any) -> list:
    """The parameters of an equation, those in tuples too."""
    nested = [x if isinstance(x, (tuple, list)) else (x,) for x in eqn.params.values()]
    return [x for some in nested for x in some]


def _is_computed(param: Value, other: Value) -> bool:
    """Whether a matrix meets what is no activation: the result is another matrix."""
    wide = [dim for dim in param.dims if dim is None or digits.significant(dim)]
    return len(wide) > 1 and other.depends == FIXED


def _as_wide(value: Value, shape: Sequence[int]) -> Value:
    """The value, of which nothing is known where it was as long as 1 and is longer now."""
    dims = tuple(
        None if dim is not None and math.prod(d.size for d in dim) != n else dim
        for dim, n in zip(value.dims, shape, strict=True)
    )
    return dataclasses.replace(value, dims=dims)


def _is_vector_use(other: Value) -> bool:
    """Whether what meets `other` is a bias or the scale of a normalization."""
    return bool(other.after) or other.normed


def _stack_of(param: Value, other: Value, uses: dict[Any, list[Use]]) -> set[Digit]:
    """Digits of a bias that line up with stack digits of the weight it follows."""
    out: set[Digit] = set()
    for mine, theirs in zip(param.dims, other.dims, strict=False):
        for digit in theirs or ():
            if any(digit in use.stack for use in uses.get(digit.of, ())):
                out.update(mine or ())
    return out


# --- One function per kind of primitive -------------------------------------------------------


def _product(
    walk: _Walk,
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
    for side, value in enumerate(pair):
        if value.param is None:
            continue
        other = pair[1 - side]
        mine = [*batch[side], *(groups if side else ())]
        rows, cols = value.digits(contracted[side]), value.digits(free[side])
        stack = value.digits(mine)
        shape = eqn.invars[1 - side].aval.shape
        where: dict[str, Any] = {"rows": rows, "cols": cols, "stack": stack}
        where["free"] = tuple(shape[i] for i in free[1 - side])
        walk.note(value, "other" if other.param else "linear", eqn, **where)
        if stack:
            walk.note(value, "expert", eqn, stack=stack)
        if other.one_hot:
            walk.note(value, "one-hot", eqn, **where)
        after.append(value.param)
    dims = [pair[0].dims[i] or pair[1].dims[j] for i, j in zip(*batch, strict=True)]
    dims += [pair[side].dims[i] for side in (0, 1) for i in free[side]]
    return [Value(tuple(dims), after=tuple(after))]


def _dot_general(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    return _product(walk, eqn, values, contracted, batch)


def _ragged_dot(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    return _product(walk, eqn, values[:2], contracted, batch, numbers.rhs_group_dimensions)


def _convolution(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    x, kernel = values
    numbers = eqn.params["dimension_numbers"]
    out, *rows = numbers.rhs_spec
    walk.note(kernel, "conv", eqn, rows=kernel.digits(rows), cols=kernel.digits([out]))
    for value in values[:1]:
        walk.note(value, "other", eqn)
    dims: list[Dim | None] = [None] * len(x.dims)
    dims[numbers.out_spec[0]] = x.dims[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = kernel.dims[out]
    return [Value(tuple(dims), after=(kernel.param,) if kernel.param else ())]


def _gather(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    table, ids = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows, batch = row_dims(eqn), numbers.operand_batching_dims
    keep = [i for i in range(len(table.dims)) if i not in rows and i not in batch]
    shape = eqn.invars[0].aval.shape
    whole = all(sizes[i] == shape[i] for i in keep)
    if len(rows) == 1 and sizes[rows[0]] == 1 and whole:
        walk.note(
            table,
            "embedding",
            eqn,
            rows=table.digits(rows),
            cols=table.digits(keep),
            stack=table.digits(batch),
            free=tuple(eqn.invars[1].aval.shape[:-1]),
        )
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
    return [Value(tuple(dims), after=(table.param,) if table.param else ())]


def _transpose(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    dims = tuple(values[0].dims[i] for i in eqn.params["permutation"])
    return [dataclasses.replace(values[0], dims=dims)]


def _reshape(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    value, old, new = values[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if value.param is None or None not in value.dims:
        return [dataclasses.replace(value, dims=digits.reshape(value.dims, old, new))]
    # Entries are repeated: a dimension of copies and of the parameter's own is known in part.
    dims = ancestry.reshaped(walk.ancestors(value, eqn.invars[0].aval)[0], old, new)
    return [dataclasses.replace(value, dims=dims)]


def _squeeze(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    gone = eqn.params["dimensions"]
    dims = tuple(dim for i, dim in enumerate(values[0].dims) if i not in gone)
    return [dataclasses.replace(values[0], dims=dims)]


def _broadcast(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    value, shape = values[0], eqn.params["shape"]
    dims: list[Dim | None] = [() if n == 1 else None for n in shape]
    for i, j in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[i] == shape[j]:
            dims[j] = value.dims[i]
    return [dataclasses.replace(value, dims=tuple(dims))]


def _slice(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
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
        fixed = eqn.primitive is p.slice_p
        return [dataclasses.replace(value, dims=kept, chosen=value.digits(one), fixed=fixed)]
    if eqn.primitive is p.dynamic_slice_p and len(cut) == 1 and len(rest) == 1:
        count = (shape[cut[0]],)
        walk.note(
            value, "embedding", eqn, rows=value.digits(cut), cols=value.digits(rest), free=count
        )
        return [value.data(dims=dims, after=(value.param,))]
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


def _split(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    old = eqn.invars[0].aval.shape
    return [
        dataclasses.replace(values[0], dims=_shortened(values[0], old, out.aval.shape))
        for out in eqn.outvars
    ]


def _scan(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
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


def _while(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    params = eqn.params
    body, _ = compat.open_jaxpr(params["body_jaxpr"])
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    consts, carry = values[n_cond : n_cond + n_body], []
    for i, value in enumerate(values[n_cond + n_body :]):
        fixed = body.outvars[i] is body.invars[n_body + i]
        carry.append(value if fixed else value.data(after=()))
    walk.run(params["cond_jaxpr"], [*values[:n_cond], *carry])
    return walk.run(body, [*consts, *carry])


def _cond(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    outs = [walk.run(branch, values[1:]) for branch in eqn.params["branches"]]
    results = []
    for each, v in zip(zip(*outs, strict=True), eqn.outvars, strict=True):
        if all(x == each[0] for x in each):
            results.append(each[0])
            continue
        for value in each:
            walk.note(value, "other", eqn)
        depends, made = ancestry.either(each, v.aval, walk.shapes)
        results.append(dataclasses.replace(unknown(v.aval), depends=depends, ancestors=made))
    return results


def _shard_map(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """Inside, a dimension that is split over devices keeps its label and is shorter."""
    body, _ = compat.open_jaxpr(eqn.params["jaxpr"])
    local = [
        dataclasses.replace(value, dims=_shortened(value, outer.aval.shape, inner.aval.shape))
        for value, outer, inner in zip(values, eqn.invars, body.invars, strict=True)
    ]
    return [out.data() for out in walk.run(body, local)]


def _all_gather(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    """A dimension that is split over devices is as long as before the split."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not eqn.params["tiled"]:
        return walk.elementwise(eqn, values)
    return [dataclasses.replace(values[0], dims=_shortened(values[0], old, new))]


def _reduce(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
    walk.note(values[0], "other", eqn)
    gone = eqn.params["axes"]
    dims = tuple(dim for i, dim in enumerate(values[0].dims) if i not in gone)
    return [Value(dims, normed=values[0].normed)]


_STEPS: dict[Any, Callable[[_Walk, Any, list[Value]], list[Value]]] = {
    p.dot_general_p: _dot_general,
    compat.ragged_dot_p: _ragged_dot,
    p.conv_general_dilated_p: _convolution,
    p.gather_p: _gather,
    p.transpose_p: _transpose,
    p.reshape_p: _reshape,
    p.squeeze_p: _squeeze,
    p.broadcast_in_dim_p: _broadcast,
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
