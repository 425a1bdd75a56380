"""Walks a jaxpr with labelled dimensions and records every use of a parameter."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core as jex
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Digit
from jaxpeft._dimensions import IDENTITIES, LAYOUT, free_dims
from jaxpeft._tracing import ancestry, flow, roles
from jaxpeft._tracing.primitives import STEPS
from jaxpeft._tracing.values import FIXED, GIVEN, Ancestor, Flow, Use, Value, unknown


def trace(
    program: jex.ClosedJaxpr, paths: Sequence[str], shapes: Sequence[jax.ShapeDtypeStruct]
) -> tuple[dict[str, list[Use]], dict[str, str]]:
    """The uses of each parameter in a program.

    Args:
      program: The jaxpr, of which the parameters are the first arguments.
      paths, shapes: Paths and shapes of the parameters.

    Returns:
      The uses by path; and, by path too, what the program does with the product of a weight where
      it does not add one unchanged bias to it.
    """
    jaxpr, _ = compat.open_jaxpr(program)
    others = jaxpr.invars[len(paths) :]
    # Where no argument could be ids, the function closes over its data.
    walk = Walk(
        {path: tuple(x.shape) for path, x in zip(paths, shapes, strict=True)},
        ids_are_constants=not any(map(_is_integer, others)),
    )
    params = [
        Value(digits.whole(path, x.shape), path, flow=flow.parameter(path))
        for path, x in zip(paths, shapes, strict=True)
    ]
    given = [
        dataclasses.replace(unknown(v), depends=GIVEN, flow=Flow(True, _is_integer(v)))
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


def _is_integer(v: jex.Var | jex.Literal) -> bool:
    """Whether a variable holds integers."""
    return jnp.issubdtype(compat.aval(v).dtype, jnp.integer)


#: Primitives whose results have the dimensions of their operands, and come from where they do.
_KEEP = IDENTITIES | {p.neg_p}
#: Primitives that pass their operands to a jaxpr, which shows what a selected row is used for.
_CALLS = {p.jit_p, p.remat_p, p.cond_p, p.custom_jvp_call_p, p.custom_vjp_call_p}
#: Elementwise sums and products.
_SUMS = {p.add_p, p.sub_p, p.add_jaxvals_p}
_PRODUCTS = {p.mul_p, p.div_p}
#: Primitives that do not decide what a selected row is: it may still be a row or a vector.
_UNDECIDED = _SUMS | _PRODUCTS | _KEEP | LAYOUT | _CALLS


class Walk:
    """One walk through a program.

    Attributes:
      shapes: Shapes of each parameter.
      uses: Uses of each parameter.
      ids_are_constants: Whether integers that the function closes over may be ids.
      stacks: Dimensions that are aligned with each other, and those that select a matrix.
      statistics: Parameters that a normalization subtracts or takes the square root of.
      consumed: Weights whose output another weight reads.
      sums: Each bias that is added to a product: (weights, use, bias).
      products: Per weight and product, the digits that it is contracted over.
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

    def run(self, closed: jex.Jaxpr | jex.ClosedJaxpr, args: Sequence[Value]) -> list[Value]:
        """What is known about the results of a jaxpr with these arguments."""
        jaxpr, _ = compat.open_jaxpr(closed)
        env: dict[jex.Var, Value] = {v: self.constant(v) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: jex.Var | jex.Literal) -> Value:
            if isinstance(v, jex.Literal):
                return dataclasses.replace(unknown(v), flow=Flow())
            return env[v]

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            outs = self.step(eqn, values)
            if any(out.flow is None for out in outs):
                followed = flow.merged(eqn, [v.flow for v in values])
                outs = [dataclasses.replace(x, flow=x.flow or followed) for x in outs]
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def constant(self, v: jex.Var) -> Value:
        """An array that the function closes over counts as data, a scalar does not."""
        live = bool(compat.shape_of(v))
        ids = live and self.ids_are_constants and _is_integer(v)
        return dataclasses.replace(unknown(v), flow=Flow(live, ids))

    def note(self, value: Value, kind: str, eqn: JaxprEqn | None, **what: Any) -> None:
        """Records a use of a parameter, once."""
        if value.param is None:
            return
        for name in ("rows", "cols", "stack"):  # without digits that count copies
            what[name] = frozenset(d for d in what.get(name, ()) if d.of == value.param)
        use = Use(kind, source=compat.source(eqn) if eqn is not None else "", **what)
        if use not in self.uses[value.param]:
            self.uses[value.param].append(use)

    def ancestors(self, value: Value, aval: ShapedArray) -> tuple[Ancestor, ...]:
        """The parameters that a value of this type is computed from."""
        return ancestry.ancestors_of(value, getattr(aval, "shape", ()), self.shapes)

    def step(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """What is known about the results of an equation, their ancestors included."""
        if any(isinstance(x, (jex.Jaxpr, jex.ClosedJaxpr)) for x in _parameters(eqn)):
            return self.equation(eqn, values)
        self.computed(eqn, values)
        return ancestry.inherited(eqn, values, self.equation(eqn, values), self.shapes)

    def computed(self, eqn: JaxprEqn, values: list[Value]) -> None:
        """Records the uses of parameters whose descendants meet a product or a sum here."""
        if eqn.primitive in _SUMS:
            for ancestor in ancestry.added(values):
                # The scale and shift of a normalization may be folded into a sum that follows.
                kinds = {use.kind for use in self.uses[ancestor.param]}
                cols = ancestry.own(ancestor, self.shapes)
                if cols and not kinds & {"norm", "scale", "bias"}:
                    self.note(Value((), ancestor.param), "added", eqn, cols=cols)
        elif eqn.primitive in ancestry.PRODUCTS | {p.gather_p}:
            for value, other in (values[:2], values[1::-1]):
                alone = value.param is None and other.param is None and not other.ancestors
                for ancestor in value.ancestors if alone else ():
                    # The uses that its parameter would have in its place.
                    walk = Walk(self.shapes)
                    substitute = Value(ancestor.dims, ancestor.param, flow=value.flow)
                    substituted = [substitute if v is value else v for v in values]
                    for out in STEPS[eqn.primitive](walk, eqn, substituted):
                        walk.settled(eqn, out)
                    ancestry.adopt(ancestor, self.shapes, self.uses, walk.uses)
                    self.consumed |= walk.consumed

    def equation(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Records what an equation does with parameters; returns what is known of its results."""
        primitive = eqn.primitive
        if primitive is p.dot_general_p:
            values = [self.as_matrices(eqn, side, v) for side, v in enumerate(values)]
        if primitive not in _UNDECIDED:
            values = [self.settled(eqn, v) for v in values]
        if primitive in STEPS:
            return STEPS[primitive](self, eqn, values)
        if primitive in _KEEP:
            if primitive is p.neg_p:  # a bias that is added to -(x @ w) is not a bias of x @ w
                return [dataclasses.replace(values[0], plain=False, after=(), biased=())]
            return list(values[: len(eqn.outvars)])
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if name in eqn.params:
                inner, _ = compat.open_jaxpr(eqn.params[name])
                if len(inner.invars) == len(values):
                    return self.run(inner, values)
        return self.elementwise(eqn, values)

    def settled(self, eqn: JaxprEqn | None, value: Value) -> Value:
        """The value as an activation: a selected row that is used like one is a row of a table."""
        if not value.selected:
            return value
        if value.static_index:
            return dataclasses.replace(value, selected=frozenset(), static_index=False)
        cols = value.digits(range(len(value.dims)))
        where: dict[str, Any] = {"rows": value.selected, "cols": cols, "free": value.ids or (1,)}
        self.note(value, "embedding", eqn, by_id=value.by_id, **where)
        if not value.param:
            return value.as_activation(selected=frozenset())
        rows = flow.of_rows(dataclasses.replace(value.flow, live=True), value.param)
        return value.as_activation(after=(value.param,), selected=frozenset(), flow=rows)

    def as_matrices(self, eqn: JaxprEqn, side: int, value: Value) -> Value:
        """A value that this product takes as matrices that a gather or a one-hot product selected.

        It is one where the product contracts some of its dimensions and keeps others; of a row of
        a table, a product contracts all or none.
        """
        contracted, batch = (pair[side] for pair in eqn.params["dimension_numbers"])
        free = free_dims(len(value.dims), contracted, batch)
        path, stack = value.mixture or (value.param, value.selected)
        rows, cols = (
            frozenset(d for d in digits.significant(value.digits(dims)) if d.of == path)
            for dims in (contracted, free)
        )
        if not (rows and cols and (value.mixture or value.ids and stack)):
            return value
        if not value.mixture:
            return dataclasses.replace(value, selected=frozenset(), stack=stack)
        kinds = ("linear", "one-hot")
        uses = self.uses[str(path)]
        uses[:] = [use for use in uses if use.kind not in kinds or use.rows != stack]
        owner = dataclasses.replace(value, param=path)
        self.note(owner, "linear", eqn, rows=rows, cols=cols, stack=stack)
        self.note(owner, "expert", eqn, stack=stack)
        return value

    def elementwise(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Interprets sums and products with a parameter; every other use is `other`."""
        primitive = eqn.primitive
        if len(eqn.outvars) != 1:
            for value in values:
                self.note(value, "other", eqn)
            return [unknown(v) for v in eqn.outvars]
        shape = compat.shape_of(eqn.outvars[0])
        if primitive in _SUMS | _PRODUCTS and len(values) == 2:
            scalar = [not v.dims for v in values]
            if any(scalar) and values[not scalar.index(True)].param:
                return [self.times_scalar(*sorted(values, key=lambda v: not v.dims))]
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
        shapes = [compat.shape_of(x) for x in eqn.invars]
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
                after = ()  # y - x @ w changes the sign of the product
        one_hot = primitive is p.eq_p
        out = Value(dims, after=after, summed=bool(after), normed=normed, one_hot=one_hot)
        if primitive in _SUMS and len(same) == 2:
            made = flow.merged(eqn, [v.flow for v in values])
            out = dataclasses.replace(out, flow=dataclasses.replace(made, made=_stream(same)))
        return [out]

    def is_vector_use(self, value: Value, other: Value) -> bool:
        """Whether `value` acts on `other` as a bias or as the scale of a normalization.

        Rows that a gather has selected do so only beside matrices of as many experts.
        """
        if not value.ids or not value.selected:
            return bool(other.after) or other.normed
        count = roles.size(value.selected)
        return bool(other.after) and all(
            any(use.kind == "expert" and roles.size(use.stack) == count for use in self.uses[path])
            for path in other.after
        )

    def times_scalar(self, param: Value, scalar: Value) -> Value:
        """A weight times a scalar is the weight.

        A scalar that is computed from the weight's own product only scales it, so what was
        recorded of that product is no use as a matrix.
        """
        if scalar.flow.live and (param.param, False) in scalar.flow.made:
            path = str(param.param)
            self.uses[path] = [
                dataclasses.replace(use, kind="other") if use.kind in ("linear", "expert") else use
                for use in self.uses[path]
            ]
            self.products[path] = []
        return dataclasses.replace(param, plain=False)

    def observe(self, primitive: Primitive, values: list[Value]) -> None:
        """Records what a sum or a product of activations reveals about their parameters."""
        first, second = values
        if len(first.dims) == len(second.dims):
            pairs = list(zip(first.dims, second.dims, strict=True))
            if primitive in _PRODUCTS:
                where = [(i, i) for i in range(len(pairs))]
                for value, other in ((first, second), (second, first)):
                    for dim in flow.weighted(value, other, where):
                        self.stacks.note(dim)
            for a, b in pairs:
                self.stacks.align(a, b)
        if primitive in _PRODUCTS:
            for value, other in ((first, second), (second, first)):
                if value.scaled and other.normed and other.flow.live and not value.normed:
                    # scale * x / deviation: the model scales before it divides.
                    uses = self.uses[value.scaled]
                    uses[:] = [
                        dataclasses.replace(use, kind="norm", of=()) if use.kind == "scale" else use
                        for use in uses
                    ]
                by = other.flow.deviation
                if primitive is p.div_p and other is second:
                    by = by or other.flow.entries
                if value.flow.minus and by and not other.flow.live:
                    self.statistics |= {value.flow.minus, *by}
        elif primitive is p.sub_p and second.flow.times and second.flow.deviation:
            # x * inv - mean * inv, where inv is 1 / deviation.
            self.statistics |= {second.flow.times, *second.flow.deviation}

    def meet(self, eqn: JaxprEqn, values: list[Value], param: Value, other: Value) -> Value:
        """A parameter that is added to an activation, or multiplied with it."""
        second = values[1] is param
        cols = param.digits(range(len(param.dims)))
        stack = frozenset(_stack_of(param, other, self.uses)) | param.selected
        pairs = list(zip(param.dims, other.dims, strict=False))
        aligned = [theirs for mine, theirs in pairs if digits.significant(mine or ())]
        for mine, theirs in pairs:
            self.stacks.align(mine, theirs)
        where: dict[str, Any] = {"cols": cols - stack, "stack": stack}
        flows = [flow.parameter(str(v.param)) if v is param else v.flow for v in values]
        made = flow.merged(eqn, flows)
        normed, met = _is_normed(other), other.as_activation(after=(), biased=(), scaled=None)
        if param.param in other.flow.weights:  # computed from the parameter itself, to scale it
            self.note(param, "other", eqn, **where)
        elif eqn.primitive not in _SUMS:
            met = self.scale(eqn, param, other, **where)
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
                # After a second bias the first is not the only one, unless the residual stream was
                # added in between.
                biased = () if other.summed else product
                return dataclasses.replace(met, biased=biased, flow=made)
            if product and not normed and _lost(param, other, product):
                use = Use("added", source=compat.source(eqn), **where)
                self.sums.append((product, use, str(param.param)))
            for kind in ["norm", "bias"] if normed else ["added"]:
                self.note(param, kind, eqn, **where)
        return dataclasses.replace(met, flow=made)

    def scale(self, eqn: JaxprEqn, param: Value, other: Value, **where: Any) -> Value:
        """A parameter that multiplies an activation entry by entry."""
        normed = _is_normed(other)
        kind, of = ("norm", ()) if normed else ("scale", other.after)
        self.note(param, kind, eqn, of=of, **where)
        return other.as_activation(after=(), biased=(), scaled=None if normed else param.param)


def _is_normed(value: Value) -> bool:
    """Whether it was divided by a standard deviation of activations, or by a running one.

    Weight normalization divides by neither.
    """
    return value.normed and (value.flow.live or bool(value.flow.deviation))


def _lost(param: Value, other: Value, product: Sequence[str]) -> bool:
    """Whether a vector is added to a part of a product, or to the product in another order.

    The dimensions of what it is added to have no digits of the product's own sides left.
    """
    wide = [dim for dim in param.dims if dim is None or digits.significant(dim)]
    left = {d.of for dim in other.dims for d in digits.significant(dim or ())}
    return len(wide) == 1 and not left & set(product)


def _stream(pair: list[Value]) -> frozenset[tuple[str, bool]]:
    """`Flow.made` of a sum: a product that joins a residual stream is not what the sum is made of.

    A residual stream begins with the rows of a table.
    """
    out: set[tuple[str, bool]] = set()
    for value, other in zip(pair, pair[::-1], strict=True):
        own = {d.of for dim in value.dims for d in dim or ()}
        joins = any(lookup for _, lookup in other.flow.made)
        out |= {(w, rows) for w, rows in value.flow.made if rows or not (joins and w in own)}
    return frozenset(out)


def _parameters(eqn: JaxprEqn) -> list[Any]:
    """The parameters of an equation, including those inside tuples."""
    nested = [x if isinstance(x, (tuple, list)) else (x,) for x in eqn.params.values()]
    return [x for some in nested for x in some]


def _is_computed(param: Value, other: Value) -> bool:
    """Whether a matrix meets a value that is not an activation: the result is another matrix."""
    wide = [dim for dim in param.dims if dim is None or digits.significant(dim)]
    return len(wide) > 1 and other.depends == FIXED


def _as_wide(value: Value, shape: Sequence[int]) -> Value:
    """The value; nothing is known of a dimension whose digits do not make up its length."""
    dims = tuple(
        None if dim is not None and math.prod(d.size for d in dim) != n else dim
        for dim, n in zip(value.dims, shape, strict=True)
    )
    return dataclasses.replace(value, dims=dims)


def _stack_of(param: Value, other: Value, uses: dict[Any, list[Use]]) -> set[Digit]:
    """Digits of a bias that are aligned with stack digits of the weight that it follows."""
    out: set[Digit] = set()
    for mine, theirs in zip(param.dims, other.dims, strict=False):
        for digit in theirs or ():
            if any(digit in use.stack for use in uses.get(digit.of, ())):
                out.update(mine or ())
    return out
