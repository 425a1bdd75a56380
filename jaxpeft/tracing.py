"""Walks a jaxpr with labelled dimensions and notes every use of a parameter."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import ancestry, compat, flow, roles
from jaxpeft import axes as digits
from jaxpeft.ancestry import ACTIVE, FIXED, GIVEN, Ancestor
from jaxpeft.axes import Digit, Dim
from jaxpeft.flow import Flow
from jaxpeft.rules.registry import cut_dims, row_dims


@dataclasses.dataclass(frozen=True)
class Use:
    """One thing that a program does with a parameter.

    Attributes:
      kind: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", "added", "tied"
        (a table multiplied by its output side), "one-hot" (a table multiplied by something
        that is compared to ids), "head" (its product is the scores of a vocabulary),
        "statistic" (a mean or variance that was counted, not trained), or "other".
      rows, cols, stack: Digits of the parameter that are summed over or looked up, that
        remain, and that select one slice.
      of: For a bias or a scale, the weights whose product it acts on.
      plain: Whether a bias is added as it is, neither subtracted nor multiplied.
      by_id: Whether a table is read by whole numbers that the caller gives.
      free: Shape of what the activation keeps, such as (batch, time).
      source: Where in the model.
    """

    kind: str
    rows: frozenset[Digit] = frozenset()
    cols: frozenset[Digit] = frozenset()
    stack: frozenset[Digit] = frozenset()
    of: tuple[str, ...] = ()
    plain: bool = True
    by_id: bool = False
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
      plain: A parameter as it is, neither negated nor multiplied.
      biased: The weights whose product, with a bias and nothing else added, this is.
      stack: Digits of the parameter that a gather has chosen by, one slice for each id.
      ids: Shape of these ids.
      mixture: The weight of whose slices along these digits this is a sum, one-hot or by shares.
      by_id: Whether what was chosen was chosen by numbers that the caller gives.
      flow: Where it comes from; `None` where that follows from the operands.
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
    plain: bool = True
    biased: tuple[str, ...] = ()
    stack: frozenset[Digit] = frozenset()
    ids: tuple[int, ...] = ()
    mixture: tuple[str, frozenset[Digit]] | None = None
    by_id: bool = False
    flow: Flow = None  # type: ignore[assignment]  # filled in by `_Walk.step`

    def digits(self, dims: Sequence[int]) -> frozenset[Digit]:
        """The digits of some dimensions."""
        return frozenset(d for i in dims for d in self.dims[i] or ())

    def data(self, **changes: Any) -> "Value":
        """The same value as an activation, no longer a parameter."""
        return dataclasses.replace(self, param=None, **changes)


def trace(
    fn: Callable, paths: Sequence[str], shapes: Sequence[Any], data: Sequence[Any]
) -> tuple[dict[str, list[Use]], dict[str, str]]:
    """The uses of each parameter in `fn(arrays, data)`.

    Returns:
      Them by path; and for weights to whose product the program adds something else than one
      bias as it is, what it does instead.
    """
    closed = jax.make_jaxpr(fn)(list(shapes), list(data))
    jaxpr, _ = compat.open_jaxpr(closed)
    others = jaxpr.invars[len(paths) :]
    # A program that has its data closed over gives no argument that could be ids.
    walk = _Walk(
        {path: tuple(x.shape) for path, x in zip(paths, shapes, strict=True)},
        ids_are_constants=not any(map(_is_whole, others)),
    )
    params = [
        Value(digits.whole(path, x.shape), path, flow=flow.parameter(path))
        for path, x in zip(paths, shapes, strict=True)
    ]
    given = [
        dataclasses.replace(unknown(v.aval), depends=GIVEN, flow=Flow(True, _is_whole(v)))
        for v in others
    ]
    results = walk.run(jaxpr, [*params, *given])
    results = [walk.settled(jaxpr.eqns[-1] if jaxpr.eqns else None, v) for v in results]
    uses = {path: walk.uses[path] for path in paths}
    dims = {path: value.dims for path, value in zip(paths, params, strict=True)}
    roles.experts(uses, walk.stacks, dims)
    roles.statistics(uses, walk.statistics)
    roles.heads(uses, results, walk.consumed)
    return uses, roles.unlike(uses, walk.sums, walk.products)


def _is_whole(v: Any) -> bool:
    """Whether a variable holds whole numbers."""
    return jnp.issubdtype(v.aval.dtype, jnp.integer)


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
    """One walk.

    Attributes:
      shapes: Of each parameter.
      uses: Of each parameter.
      stacks: Dimensions that run along each other, and those that choose a matrix.
      statistics: Parameters that were subtracted or under the root in a normalization.
      consumed: Weights that another weight comes after.
      sums: Each bias that was added to a product: (weights, use, bias).
      products: How often a weight was multiplied, by the digits that it was contracted over.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], ids_are_constants: bool = False) -> None:
        self.shapes = shapes
        self.uses: dict[str, list[Use]] = collections.defaultdict(list)
        self.ids_are_constants = ids_are_constants
        self.stacks = flow.Stacks()
        self.statistics: set[str] = set()
        self.consumed: set[str] = set()
        self.sums: list[tuple[tuple[str, ...], Use, str]] = []
        self.products: dict[str, list[frozenset[Digit]]] = collections.defaultdict(list)

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        jaxpr, _ = compat.open_jaxpr(jaxpr)
        env: dict[Any, Value] = {v: self.constant(v) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Value:
            if isinstance(v, jex.Literal):
                return dataclasses.replace(unknown(v.aval), flow=Flow())
            return env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            outs = self.step(eqn, values)
            if any(out.flow is None for out in outs):
                followed = flow.merged(eqn, [v.flow for v in values])
                outs = [dataclasses.replace(x, flow=x.flow or followed) for x in outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def constant(self, v: Any) -> Value:
        """A closed-over array is data as an argument is; a closed-over number is a number."""
        live = bool(v.aval.shape)
        ids = live and self.ids_are_constants and _is_whole(v)
        return dataclasses.replace(unknown(v.aval), flow=Flow(live, ids))

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
                # What scales or shifts a normalization may be folded into a sum that follows.
                kinds = {use.kind for use in self.uses[ancestor.param]}
                cols = ancestry.own(ancestor, self.shapes)
                if cols and not kinds & {"norm", "scale", "bias"}:
                    self.note(Value((), ancestor.param), "added", eqn, cols=cols)
        elif eqn.primitive in ancestry.PRODUCTS | {p.gather_p}:
            for value, other in (values[:2], values[1::-1]):
                alone = value.param is None and other.param is None and not other.ancestors
                for ancestor in value.ancestors if alone else ():
                    # What its parameter would do in its place.
                    walk = _Walk(self.shapes)
                    stand = Value(ancestor.dims, ancestor.param, flow=value.flow)
                    stands = [stand if v is value else v for v in values]
                    for out in _STEPS[eqn.primitive](walk, eqn, stands):
                        walk.settled(eqn, out)
                    ancestry.adopt(ancestor, self.shapes, self.uses, walk.uses)
                    self.consumed |= walk.consumed

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        """One equation: what it does with parameters, and what is known of its results."""
        primitive = eqn.primitive
        if primitive is p.dot_general_p:
            values = [self.as_matrices(eqn, side, v) for side, v in enumerate(values)]
        if primitive not in _SUMS | _PRODUCTS | _KEEP | _LAYOUT | _CALLS:
            values = [self.settled(eqn, v) for v in values]
        if primitive in _STEPS:
            return _STEPS[primitive](self, eqn, values)
        if primitive in _KEEP:
            if primitive is p.neg_p:  # a bias that is added to -(x @ w) is none of x @ w
                return [dataclasses.replace(values[0], plain=False, after=(), biased=())]
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
        where: dict[str, Any] = {"rows": value.chosen, "cols": cols, "free": value.ids or (1,)}
        self.note(value, "embedding", eqn, by_id=value.by_id, **where)
        if not value.param:
            return value.data(chosen=frozenset())
        rows = flow.of_rows(dataclasses.replace(value.flow, live=True), value.param)
        return value.data(after=(value.param,), chosen=frozenset(), flow=rows)

    def as_matrices(self, eqn: Any, side: int, value: Value) -> Value:
        """Slices of a weight, chosen by a gather or a one-hot product, that this takes as matrices.

        Of a row that was looked up, a product takes all or nothing.
        """
        contracted, batch = (pair[side] for pair in eqn.params["dimension_numbers"])
        free = [i for i in range(len(value.dims)) if i not in contracted and i not in batch]
        path, stack = value.mixture or (value.param, value.chosen)
        rows, cols = (
            frozenset(d for d in digits.significant(value.digits(dims)) if d.of == path)
            for dims in (contracted, free)
        )
        if not (rows and cols and (value.mixture or value.ids and stack)):
            return value
        if not value.mixture:
            return dataclasses.replace(value, chosen=frozenset(), stack=stack)
        kinds = ("linear", "one-hot")
        uses = self.uses[str(path)]
        uses[:] = [use for use in uses if use.kind not in kinds or use.rows != stack]
        owner = dataclasses.replace(value, param=path)
        self.note(owner, "linear", eqn, rows=rows, cols=cols, stack=stack)
        self.note(owner, "expert", eqn, stack=stack)
        return value

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
                return [self.times_number(*sorted(values, key=lambda v: not v.dims))]
            values = [
                v if v.param is None or self.is_vector_use(v, w) else self.settled(eqn, v)
                for v, w in zip(values, values[::-1], strict=True)
            ]
            found = [v for v in values if v.param]
            if len(found) == 1 and (any(found[0].dims) or primitive in _SUMS):
                other = values[values[0] is found[0]]
                if not _is_computed(found[0], other):
                    return [_as_wide(self.meet(eqn, values, found[0], other), shape)]
        for value in values:
            self.note(value, "other", eqn, cols=value.digits(range(len(value.dims))))
        shapes = [getattr(x.aval, "shape", None) for x in eqn.invars]
        same = [v for v, s in zip(values, shapes, strict=True) if s == shape]
        normed = primitive in (p.rsqrt_p, p.sqrt_p) or any(v.normed for v in values)
        dims = tuple(next((v.dims[i] for v in same if v.dims[i]), None) for i in range(len(shape)))
        if primitive in _SUMS | _PRODUCTS:
            self.observe(primitive, values)
        # A residual is often added before the bias: (x + h @ w) + b is x + (h @ w + b).
        after: tuple[str, ...] = ()
        if primitive in _SUMS:
            # Of a residual stream and a new product, the bias belongs to the product.
            products = [v for v in values if v.after]
            products = [v for v in products if not v.summed] or products
            after = tuple(dict.fromkeys(w for v in products for w in v.after))
            if primitive is p.sub_p and after and not values[0].after:
                after = ()  # y - x @ w has the product's sign turned
        one_hot = primitive is p.eq_p
        out = Value(dims, after=after, summed=bool(after), normed=normed, one_hot=one_hot)
        if primitive in _SUMS and len(same) == 2:
            made = flow.merged(eqn, [v.flow for v in values])
            out = dataclasses.replace(out, flow=dataclasses.replace(made, made=_stream(same)))
        return [out]

    def is_vector_use(self, value: Value, other: Value) -> bool:
        """Whether what meets `other` is a bias or the scale of a normalization.

        Of rows that a gather has chosen, only those that go with the matrices of experts.
        """
        if not value.ids or not value.chosen:
            return bool(other.after) or other.normed
        count = roles.size(value.chosen)
        return bool(other.after) and all(
            any(use.kind == "expert" and roles.size(use.stack) == count for use in self.uses[path])
            for path in other.after
        )

    def times_number(self, param: Value, number: Value) -> Value:
        """A weight times a number is a weight; if the number was made of it, to scale it only."""
        if number.flow.live and (param.param, False) in number.flow.made:
            path = str(param.param)
            self.uses[path] = [
                dataclasses.replace(use, kind="other") if use.kind in ("linear", "expert") else use
                for use in self.uses[path]
            ]
            self.products[path] = []
        return dataclasses.replace(param, plain=False)

    def observe(self, primitive: Any, values: list[Value]) -> None:
        """What a sum or a product of activations tells of the parameters in them."""
        first, second = values
        if len(first.dims) == len(second.dims):
            pairs = list(zip(first.dims, second.dims, strict=True))
            if primitive in _PRODUCTS:
                where = [(i, i) for i in range(len(pairs))]
                for value, other in ((first, second), (second, first)):
                    for dim in flow.weighed(value, other, where):
                        self.stacks.note(dim)
            for a, b in pairs:
                self.stacks.align(a, b)
        if primitive in _PRODUCTS:
            for value, other in ((first, second), (second, first)):
                by = other.flow.deviation
                if primitive is p.div_p and other is second:
                    by = by or other.flow.entries
                if value.flow.minus and by and not other.flow.live:
                    self.statistics |= {value.flow.minus, *by}
        elif primitive is p.sub_p and second.flow.times and second.flow.deviation:
            # x * inv - mean * inv, where inv is 1 / deviation.
            self.statistics |= {second.flow.times, *second.flow.deviation}

    def meet(self, eqn: Any, values: list[Value], param: Value, other: Value) -> Value:
        """A parameter is added to an activation, or multiplied with it."""
        second = values[1] is param
        cols = param.digits(range(len(param.dims)))
        stack = frozenset(_stack_of(param, other, self.uses)) | param.chosen
        pairs = list(zip(param.dims, other.dims, strict=False))
        aligned = [theirs for mine, theirs in pairs if digits.significant(mine or ())]
        for mine, theirs in pairs:
            self.stacks.align(mine, theirs)
        where: dict[str, Any] = {"cols": cols - stack, "stack": stack}
        flows = [flow.parameter(str(v.param)) if v is param else v.flow for v in values]
        made = flow.merged(eqn, flows)
        # What weight normalization divides by is no standard deviation of activations.
        normed = other.normed and (other.flow.live or bool(other.flow.deviation))
        if param.param in other.flow.weights:  # computed of the parameter, to scale it
            self.note(param, "other", eqn, **where)
        elif eqn.primitive not in _SUMS:
            kind, of = ("norm", ()) if normed else ("scale", other.after)
            self.note(param, kind, eqn, of=of, **where)
            if eqn.primitive is p.div_p and second and other.flow.minus:
                self.statistics |= {other.flow.minus, str(param.param)}
            if other.flow.deviation and not other.flow.live:
                made = dataclasses.replace(made, times=param.param)
        else:
            minus = eqn.primitive is p.sub_p
            if minus and second:
                made = dataclasses.replace(made, minus=param.param)
            elif minus and other.flow.times:  # shift - mean * inverse, folded into one vector
                self.statistics |= {other.flow.times, *other.flow.deviation}
            product = other.after or other.biased
            if product and not normed and all(aligned):
                where |= {"of": product, "plain": param.plain and not minus}
                self.note(param, "bias", eqn, **where)
                use = Use("bias", source=compat.source(eqn), **where)
                self.sums.append((product, use, str(param.param)))
                # A second one makes the first not the only one, unless a stream came between.
                biased = () if other.summed else product
                return other.data(after=(), biased=biased, flow=made)
            for kind in ["norm", "bias"] if normed else ["added"]:
                self.note(param, kind, eqn, **where)
        return other.data(after=(), biased=(), flow=made)


def _stream(pair: list[Value]) -> frozenset[tuple[str, bool]]:
    """What a sum is made of: a product that joins the stream that began with rows is no result."""
    out: set[tuple[str, bool]] = set()
    for value, other in zip(pair, pair[::-1], strict=True):
        own = {d.of for dim in value.dims for d in dim or ()}
        joins = any(lookup for _, lookup in other.flow.made)
        out |= {(w, rows) for w, rows in value.flow.made if rows or not (joins and w in own)}
    return frozenset(out)


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
    dims = [pair[0].dims[i] or pair[1].dims[j] for i, j in zip(*batch, strict=True)]
    dims += [pair[side].dims[i] for side in (0, 1) for i in free[side]]
    made = flow.of_product([v.flow for v in pair], after)
    mixture = None
    for value, other in (pair, pair[::-1]):
        if value.param and len(after) == 1 and (other.one_hot or other.flow.shares):
            mixture = value.param, value.digits(contracted[pair.index(value)])
    return [Value(tuple(dims), after=tuple(after), mixture=mixture, flow=made)]


def _experts(walk: _Walk, pair: list[Value], contracted: Any, batch: Any) -> None:
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
            for dim in flow.weighed(pair[side], pair[1 - side], pairs):
                walk.stacks.note(dim)
                walk.stacks.align(dim, pair[1 - side].flow.shares)


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
    after = (kernel.param,) if kernel.param else ()
    if after:
        walk.products[after[0]].append(kernel.digits(rows))
        walk.consumed |= {w for w, lookup in x.flow.made if not lookup}
    return [Value(tuple(dims), after=after, flow=flow.of_product([x.flow, kernel.flow], after))]


def _gather(walk: _Walk, eqn: Any, values: list[Value]) -> list[Value]:
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
        bare = [dataclasses.replace(x, flow=None) for x in each]
        result = bare[0]
        if any(x != result for x in bare):
            for value in each:
                walk.note(value, "other", eqn)
            depends, made = ancestry.either(each, v.aval, walk.shapes)
            result = dataclasses.replace(unknown(v.aval), depends=depends, ancestors=made)
        results.append(dataclasses.replace(result, flow=flow.together(x.flow for x in each)))
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
    made = flow.merged(eqn, [values[0].flow])
    if eqn.primitive is p.reduce_sum_p and values[0].flow.powers and len(gone) == 1:
        made = dataclasses.replace(made, total=values[0].dims[gone[0]] or ())
    return [Value(dims, normed=values[0].normed, flow=made)]


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
