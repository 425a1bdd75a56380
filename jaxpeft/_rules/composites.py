"""Arrays that a program makes of weights: where they come from, and what rearranges them.

See `jaxpeft._composite`. A rule writes the equation once more as a program of the parts, which
the interpreter runs on them; so does `composite_products` for what uses such an array.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Digit, Dim
from jaxpeft._composite import (
    Composite,
    Concatenation,
    Repetition,
    Scaling,
    is_composite,
    is_structured,
)
from jaxpeft._dimensions import after_layout, cut_dims
from jaxpeft._operand import holds
from jaxpeft._rules import control
from jaxpeft._rules.registry import Results, RuleContext, Value, composite_rule, rule
from jaxpeft._view import View, is_view

Structured = View | Composite

# --- Where composites come from ----------------------------------------------------------------


def _can_join(eqn: JaxprEqn, values: Sequence[Value]) -> bool:
    """Whether the result of these operands can be a composite.

    A weight without a dense equivalent adds more than a product, and where shardings are part
    of the types the program's own operation says how its result is sharded.
    """
    mergeable = all(v.is_mergeable for v in values if is_view(v))
    return mergeable and compat.typed_sharding(compat.aval(eqn.outvars[0])) is None


@rule(p.concatenate_p)
@composite_rule(p.concatenate_p)
def concatenate(ctx: RuleContext, eqn: JaxprEqn, *values: Value) -> Results:
    """Pieces end to end stay pieces."""
    if not _can_join(eqn, values):
        return None
    return [Concatenation(values, eqn.params["dimension"])]


@rule(compat.stack_p)
@composite_rule(compat.stack_p)
def stack(ctx: RuleContext, eqn: JaxprEqn, *values: Value) -> Results:
    """A concatenation of pieces of length 1 along a new dimension."""
    if "axis" not in eqn.params:
        return concatenate(ctx, eqn, *values)
    if not _can_join(eqn, values):
        return None
    dim = eqn.params["axis"] % len(compat.aval(eqn.outvars[0]).shape)
    expand = functools.partial(jnp.expand_dims, axis=dim)
    pieces = [ctx.trace_and_run(expand, eqn, v) for v in values]
    return [Concatenation(tuple(pieces), dim)]


@rule(p.pad_p)
@composite_rule(p.pad_p)
def pad(ctx: RuleContext, eqn: JaxprEqn, value: Value, filling: Value) -> Results:
    """A concatenation of the weight and of pieces that hold the number it is padded with."""
    config = eqn.params["padding_config"]
    if not is_structured(value) or is_structured(filling) or not _can_join(eqn, [value]):
        return None
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return None

    def padded(weight: jax.Array, filling: jax.Array) -> jax.Array:
        for dim, (low, high, _) in enumerate(config):

            def side(count: int, dim: int = dim, like: jax.Array = weight) -> list[jax.Array]:
                shape = (*like.shape[:dim], int(count), *like.shape[dim + 1 :])
                return [jnp.broadcast_to(filling, shape)] if count else []

            pieces = [*side(low), weight, *side(high)]
            if len(pieces) > 1:
                weight = lax.concatenate(pieces, dim)
        return weight

    return [ctx.trace_and_run(padded, eqn, value, filling)]


def repeated(eqn: JaxprEqn, value: Structured) -> Results:
    """The result of a broadcast that repeats entries."""
    if not _can_join(eqn, [value]):
        return None
    weight, old = _unrepeated(value)
    copies = 1 + max((d.axis for dim in old for d in dim), default=0)
    copies = max(copies, len(weight.shape))
    dims = after_layout(eqn, old, lambda i, n: (Digit(0, copies + i, 1, n),))
    return [Repetition(weight, dims)]  # type: ignore[arg-type]  # all of them are known


def _unrepeated(value: Structured) -> tuple[Structured, tuple[Dim, ...]]:
    """What is repeated, and the dimensions of the value as digits of that and of its copies."""
    if isinstance(value, Repetition):
        return value.weight, value.dims
    return value, digits.whole(0, value.shape)


@rule(compat.tile_p)
@composite_rule(compat.tile_p)
def tile(ctx: RuleContext, eqn: JaxprEqn, value: Structured) -> Results:
    """Whole dimensions are repeated; in the result, the digits that count copies lead."""
    if not _can_join(eqn, [value]):
        return None
    reps = eqn.params["reps"]

    def tiled(weight: jax.Array) -> jax.Array:
        shape = [n for pair in zip(reps, weight.shape, strict=True) for n in pair]
        weight = lax.broadcast_in_dim(weight, shape, range(1, len(shape), 2))
        return lax.reshape(weight, compat.aval(eqn.outvars[0]).shape)

    return [ctx.trace_and_run(tiled, eqn, value)]


def scaled(eqn: JaxprEqn, value: Structured, factor: jax.Array) -> Results:
    """A weight times a factor of the same rank that is constant along some dimension."""
    shape = jnp.shape(factor)
    if len(shape) != len(value.shape) or shape == tuple(value.shape):
        return None
    if value.shape != compat.aval(eqn.outvars[0]).shape or not _can_join(eqn, [value]):
        return None
    return [Scaling(value, factor)]


@composite_rule(p.mul_p)
def multiply(ctx: RuleContext, eqn: JaxprEqn, a: Value, b: Value) -> Results:
    """By a scalar, or by a factor that is constant along some dimension."""
    value, factor = (a, b) if is_structured(a) else (b, a)
    if not is_structured(value) or is_structured(factor):
        return None
    if not jnp.ndim(factor):
        factor = jnp.reshape(factor, (1,) * len(value.shape))
        return [Scaling(value, factor)]
    return scaled(eqn, value, factor)


@composite_rule(p.div_p)
def divide(ctx: RuleContext, eqn: JaxprEqn, a: Value, b: Value) -> Results:
    """A product with the inverse."""
    return None if is_structured(b) else multiply(ctx, eqn, a, 1 / b)


# --- Layout ------------------------------------------------------------------------------------


def _mapped(
    ctx: RuleContext,
    eqn: JaxprEqn,
    x: Composite,
    f: Callable[[jax.Array], jax.Array],
    *,
    factors: bool = True,
) -> Results:
    """The composite of `f(part)`; without `factors`, the factor of a scaling stays."""

    def program(*parts: jax.Array) -> jax.Array:
        last = isinstance(x, Scaling) and not factors
        kept = parts[-1:] if last else ()
        return x.array(*map(f, parts[: len(parts) - len(kept)]), *kept)

    return [ctx.trace_and_run(program, eqn, *x.parts)]


@composite_rule(p.convert_element_type_p)
def astype(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """Every part is cast to a floating dtype, unless that would show a rounding of a scaling."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if dtype != x.dtype and holds(dtype, x.dtype) and _is_scaled(x):
        return None
    return _mapped(ctx, eqn, x, lambda part: part.astype(dtype))


def _is_scaled(x: Value) -> bool:
    """Whether a part of a composite was multiplied, and so rounded to its dtype."""
    return isinstance(x, Scaling) or (is_composite(x) and any(map(_is_scaled, x.parts)))


@composite_rule(p.copy_p, p.name_p, p.sharding_constraint_p)
def identity(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """A copy, a name or a placement changes nothing."""
    return [x]


@composite_rule(p.stop_gradient_p)
def stop_gradient(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """No part gets a gradient."""
    return [lax.stop_gradient(x)]


@composite_rule(compat.optimization_barrier_p)
def optimization_barrier(ctx: RuleContext, eqn: JaxprEqn, *values: Value) -> Results:
    """Every part passes the barrier."""
    return list(lax.optimization_barrier(values))


@composite_rule(p.neg_p)
def negate(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """Every piece is negated; of a scaling, the weight."""
    return _mapped(ctx, eqn, x, jnp.negative, factors=False)


@composite_rule(p.transpose_p)
def transpose(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """The dimensions in another order."""
    if isinstance(x, Repetition):
        return _rearranged(eqn, x)
    order = eqn.params["permutation"]

    def program(*parts: jax.Array) -> jax.Array:
        moved = [lax.transpose(part, order) for part in parts]
        if isinstance(x, Concatenation):
            return lax.concatenate(moved, order.index(x.dim))
        return x.array(*moved)

    return [ctx.trace_and_run(program, eqn, *x.parts)]


def _rearranged(eqn: JaxprEqn, x: Repetition) -> Results:
    dims = after_layout(eqn, x.dims)
    return None if None in dims else [Repetition(x.weight, dims)]  # type: ignore[arg-type]


@composite_rule(p.reshape_p, p.squeeze_p)
def reshape(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """Dimensions are cut and joined, where the pieces stay whole."""
    return _reshaped(ctx, eqn, x)


@composite_rule(p.broadcast_in_dim_p)
def broadcast(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """New dimensions of length 1, or repeated entries."""
    if math.prod(eqn.params["shape"]) != math.prod(x.shape):
        return repeated(eqn, x)
    return _reshaped(ctx, eqn, x)


def _reshaped(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """The result of an equation that keeps the row-major order of all entries."""
    shape = compat.aval(eqn.outvars[0]).shape
    if isinstance(x, Repetition):
        return _rearranged(eqn, x)
    if isinstance(x, Scaling):
        factor = _refolded(x.factor, x.shape, shape)
        program = lambda w, f: lax.reshape(w, shape) * f  # noqa: E731
        return [ctx.trace_and_run(program, eqn, x.weight, factor)]
    assert isinstance(x, Concatenation)
    before, after = math.prod(x.shape[: x.dim]), math.prod(x.shape[x.dim + 1 :])
    for dim in range(len(shape)):
        unit = math.prod(shape[dim + 1 :])
        fits = all(n * after % unit == 0 for n in x.lengths) if unit else False
        if math.prod(shape[:dim]) == before and fits:
            lengths = [n * after // unit for n in x.lengths]

            def joined(*parts: jax.Array, dim: int = dim, lengths: list = lengths) -> jax.Array:
                folded = [
                    lax.reshape(part, (*shape[:dim], n, *shape[dim + 1 :]))
                    for part, n in zip(parts, lengths, strict=True)
                ]
                return lax.concatenate(folded, dim)

            return [ctx.trace_and_run(joined, eqn, *x.pieces)]
    return None


def _refolded(factor: jax.Array, old: Sequence[int], new: Sequence[int]) -> jax.Array:
    """The factor of a scaling after a reshape of what it scales, still constant where it was."""
    varying = {i for i, n in enumerate(factor.shape) if n > 1}
    # The factor is constant along a dimension if none of its digits come from one where it varies.
    moved = digits.reshape(digits.whole(0, old), old, new)
    shape = [
        n if dim is None or any(d.axis in varying for d in dim) else 1
        for n, dim in zip(new, moved, strict=True)
    ]
    whole = lax.reshape(jnp.broadcast_to(factor, old), new)
    return lax.slice(whole, (0,) * len(new), shape)


@composite_rule(p.slice_p)
def static_slice(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """What is left of each piece."""
    strides = eqn.params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        return None
    return _sliced(ctx, eqn, x, eqn.params["start_indices"], eqn.params["limit_indices"])


@composite_rule(compat.split_p)
def split(ctx: RuleContext, eqn: JaxprEqn, x: Composite) -> Results:
    """Ranges along a dimension."""
    dim, first = eqn.params["axis"], 0
    outs: list[Value] = []
    for size in eqn.params["sizes"]:
        start, stop = [0] * len(x.shape), list(x.shape)
        start[dim], stop[dim] = first, first + size
        out = _sliced(ctx, eqn, x, start, stop)
        if out is None:
            return None
        outs.extend(out)
        first += size
    return outs


def _sliced(
    ctx: RuleContext, eqn: JaxprEqn, x: Composite, start: Sequence[int], stop: Sequence[int]
) -> Results:
    if isinstance(x, Repetition):
        return None

    def cut(part: jax.Array, at: int | None = None, first: int = 0, last: int = 0) -> jax.Array:
        """The slice of a part; along the dimension `at`, from first to last."""
        low, high = list(start), list(stop)
        for i, n in enumerate(part.shape):
            if i == at:
                low[i], high[i] = first, last
            elif n == 1:  # also where the factor of a scaling is constant
                low[i], high[i] = 0, 1
        return lax.slice(part, low, high)

    if isinstance(x, Scaling):
        return [ctx.trace_and_run(lambda w, f: cut(w) * cut(f), eqn, *x.parts)]
    assert isinstance(x, Concatenation)
    begin, chosen, ranges = 0, [], []
    for piece, n in zip(x.pieces, x.lengths, strict=True):
        low, high = (min(max(i[x.dim] - begin, 0), n) for i in (start, stop))
        if high > low:
            chosen.append(piece)
            ranges.append((low, high))
        begin += n

    def left(*parts: jax.Array) -> jax.Array:
        cuts = [cut(part, x.dim, *r) for part, r in zip(parts, ranges, strict=True)]
        return cuts[0] if len(cuts) == 1 else lax.concatenate(cuts, x.dim)

    return [ctx.trace_and_run(left, eqn, *chosen)] if chosen else None


@composite_rule(p.dynamic_slice_p)
def dynamic_slice(ctx: RuleContext, eqn: JaxprEqn, x: Value, *starts: Value) -> Results:
    """One weight of a stack, at an index known at run time."""
    if not isinstance(x, Concatenation) or cut_dims(eqn) != [x.dim]:
        return None
    view = x.stacked()
    return None if view is None else ctx.apply(eqn, [view, *starts])


# Composites pass into calls and branches as the pytrees they are.
for primitive in (p.jit_p, p.closed_call_p, p.call_p):
    composite_rule(primitive)(control.inlined)
composite_rule(p.remat_p)(control.remat)
composite_rule(p.scan_p)(control.scan)
composite_rule(p.while_p)(control.while_loop)
composite_rule(p.cond_p)(control.cond)
