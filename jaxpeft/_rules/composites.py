"""What a program does with arrays that it has made of weights: see `jaxpeft.composite`.

Each rule writes the equation once more as a program of the parts, which the evaluator runs on
them: a product with joined kernels is products with each, joined.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Digit
from jaxpeft._composite import (
    Composite,
    Concatenation,
    Repetition,
    Scaling,
    is_composite,
    is_structured,
)
from jaxpeft._operand import holds
from jaxpeft._rules import control
from jaxpeft._rules.registry import composite_rule, cut_dims, row_dims, rule
from jaxpeft._view import is_view

# --- Where composites come from ----------------------------------------------------------------


def _joins(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether what comes of these operands can be a composite.

    A weight without a dense equivalent adds more than a product, and where shardings are part
    of the types the program's own operation says how its result lies.
    """
    matrices = all(v.is_mergeable for v in values if is_view(v))
    return matrices and compat.typed_sharding(eqn.outvars[0].aval) is None


@rule(p.concatenate_p)
@composite_rule(p.concatenate_p)
def concatenate(run: Any, eqn: Any, *values: Any) -> list | None:
    """Pieces end to end."""
    if not _joins(eqn, values):
        return None
    return [Concatenation(values, eqn.params["dimension"])]


@rule(compat.stack_p)
@composite_rule(compat.stack_p)
def stack(run: Any, eqn: Any, *values: Any) -> list | None:
    """Pieces of length 1 end to end, along a new dimension."""
    if "axis" not in eqn.params:
        return concatenate(run, eqn, *values)
    if not _joins(eqn, values):
        return None
    dim = eqn.params["axis"] % len(eqn.outvars[0].aval.shape)
    expand = functools.partial(jnp.expand_dims, axis=dim)
    return [Concatenation(tuple(run.program(expand, eqn, v) for v in values), dim)]


@rule(p.pad_p)
@composite_rule(p.pad_p)
def pad(run: Any, eqn: Any, value: Any, filling: Any) -> list | None:
    """With a number on either side: pieces, one of which is the weight."""
    config = eqn.params["padding_config"]
    if not is_structured(value) or is_structured(filling) or not _joins(eqn, [value]):
        return None
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
        return None

    def padded(weight: jax.Array, filling: jax.Array) -> jax.Array:
        for dim, (low, high, _) in enumerate(config):
            shape = list(weight.shape)
            pieces = [weight]
            for at, count in ((0, int(low)), (len(pieces), int(high))):
                shape[dim] = count
                if count:
                    pieces.insert(at and len(pieces), jnp.broadcast_to(filling, shape))
            if len(pieces) > 1:
                weight = lax.concatenate(pieces, dim)
        return weight

    return [run.program(padded, eqn, value, filling)]


def repeated(eqn: Any, value: Any) -> list | None:
    """A broadcast that repeats entries."""
    if not _joins(eqn, [value]):
        return None
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    weight, old = _unrepeated(value)
    copies = 1 + max((d.axis for dim in old for d in dim), default=0)
    copies = max(copies, len(weight.shape))
    dims = [(Digit(0, copies + i, 1, n),) for i, n in enumerate(shape)]
    for i, j in enumerate(places):
        if value.shape[i] == shape[j]:
            dims[j] = old[i]
    return [Repetition(weight, tuple(dims))]


def _unrepeated(value: Any) -> tuple[Any, tuple]:
    """What is repeated, and the dimensions of the value as digits of that and of its copies."""
    if isinstance(value, Repetition):
        return value.weight, value.dims
    return value, digits.whole(0, value.shape)


@rule(compat.tile_p)
@composite_rule(compat.tile_p)
def tile(run: Any, eqn: Any, value: Any) -> list | None:
    """Whole dimensions repeated: copies lead."""
    if not _joins(eqn, [value]):
        return None
    reps = eqn.params["reps"]

    def tiled(weight: jax.Array) -> jax.Array:
        shape = [n for pair in zip(reps, weight.shape, strict=True) for n in pair]
        weight = lax.broadcast_in_dim(weight, shape, range(1, len(shape), 2))
        return lax.reshape(weight, eqn.outvars[0].aval.shape)

    return [run.program(tiled, eqn, value)]


def scaled(eqn: Any, value: Any, factor: Any) -> list | None:
    """Times numbers that are constant along some dimension."""
    shape = jnp.shape(factor)
    if len(shape) != len(value.shape) or shape == tuple(value.shape):
        return None
    if value.shape != eqn.outvars[0].aval.shape or not _joins(eqn, [value]):
        return None
    return [Scaling(value, factor)]


@composite_rule(p.mul_p)
def multiply(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """By a number, or by numbers that are constant along some dimension."""
    value, factor = (a, b) if is_structured(a) else (b, a)
    if is_structured(factor):
        return None
    if not jnp.ndim(factor):
        factor = jnp.reshape(factor, (1,) * len(value.shape))
        return [Scaling(value, factor)]
    return scaled(eqn, value, factor)


@composite_rule(p.div_p)
def divide(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """As a product with the inverse."""
    return None if is_structured(b) else multiply(run, eqn, a, 1 / b)


# --- Layout ------------------------------------------------------------------------------------


def _mapped(run: Any, eqn: Any, x: Composite, f: Callable, *, factors: bool = True) -> list:
    """The composite with `f(array)` at the place of its parts; of a scaling, maybe not of both."""

    def program(*parts: jax.Array) -> jax.Array:
        last = isinstance(x, Scaling) and not factors
        kept = parts[-1:] if last else ()
        return x.array(*map(f, parts[: len(parts) - len(kept)]), *kept)

    return [run.program(program, eqn, *x.parts)]


@composite_rule(p.convert_element_type_p)
def astype(run: Any, eqn: Any, x: Composite) -> list | None:
    """To a dtype of floats, where that does not show a rounding of what was scaled."""
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if dtype != x.dtype and holds(dtype, x.dtype) and _is_scaled(x):
        return None
    return _mapped(run, eqn, x, lambda part: part.astype(dtype))


def _is_scaled(x: Any) -> bool:
    """Whether something in a composite was multiplied, and so rounded to its dtype."""
    return isinstance(x, Scaling) or (is_composite(x) and any(map(_is_scaled, x.parts)))


@composite_rule(p.copy_p, p.name_p, p.sharding_constraint_p)
def keep(run: Any, eqn: Any, x: Composite) -> list:
    """What copies, names or places a value leaves it as it is."""
    return [x]


@composite_rule(p.stop_gradient_p)
def stop_gradient(run: Any, eqn: Any, x: Composite) -> list:
    """On every part."""
    return [lax.stop_gradient(x)]


@composite_rule(compat.optimization_barrier_p)
def optimization_barrier(run: Any, eqn: Any, *values: Any) -> list:
    """On every part."""
    return list(lax.optimization_barrier(values))


@composite_rule(p.neg_p)
def negate(run: Any, eqn: Any, x: Composite) -> list:
    """Of every piece."""
    return _mapped(run, eqn, x, jnp.negative, factors=False)


@composite_rule(p.transpose_p)
def transpose(run: Any, eqn: Any, x: Composite) -> list:
    """The dimensions in another order."""
    order = eqn.params["permutation"]
    if isinstance(x, Repetition):
        return [Repetition(x.weight, tuple(x.dims[i] for i in order))]

    def program(*parts: jax.Array) -> jax.Array:
        moved = [lax.transpose(part, order) for part in parts]
        if isinstance(x, Concatenation):
            return lax.concatenate(moved, order.index(x.dim))
        return x.array(*moved)

    return [run.program(program, eqn, *x.parts)]


@composite_rule(p.reshape_p, p.squeeze_p)
def reshape(run: Any, eqn: Any, x: Composite) -> list | None:
    """Dimensions cut and joined, where the pieces stay whole."""
    return _reshaped(run, eqn, x, eqn.outvars[0].aval.shape)


@composite_rule(p.broadcast_in_dim_p)
def broadcast(run: Any, eqn: Any, x: Composite) -> list | None:
    """Dimensions of size 1 come, or entries are repeated."""
    shape = eqn.params["shape"]
    if math.prod(shape) != math.prod(x.shape):
        return repeated(eqn, x)
    return _reshaped(run, eqn, x, shape)


def _reshaped(run: Any, eqn: Any, x: Composite, shape: Sequence[int]) -> list | None:
    if isinstance(x, Repetition):
        dims = digits.reshape(x.dims, x.shape, shape)
        return None if None in dims else [Repetition(x.weight, dims)]  # type: ignore[arg-type]
    if isinstance(x, Scaling):
        factor = _refolded(x.factor, x.shape, shape)
        program = lambda w, f: lax.reshape(w, shape) * f  # noqa: E731
        return [run.program(program, eqn, x.weight, factor)]
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

            return [run.program(joined, eqn, *x.pieces)]
    return None


def _refolded(factor: jax.Array, old: Sequence[int], new: Sequence[int]) -> jax.Array:
    """The numbers of a scaling after a reshape of what they scale: constant where they were."""
    kept = {i for i, n in enumerate(factor.shape) if n > 1}
    # A dimension of the result is constant if nothing in it comes from one that is not.
    moved = digits.reshape(digits.whole(0, old), old, new)
    shape = [
        n if dim is None or any(d.axis in kept for d in dim) else 1
        for n, dim in zip(new, moved, strict=True)
    ]
    whole = lax.reshape(jnp.broadcast_to(factor, old), new)
    return lax.slice(whole, (0,) * len(new), shape)


@composite_rule(p.slice_p)
def static_slice(run: Any, eqn: Any, x: Composite) -> list | None:
    """The parts of the pieces that are left."""
    strides = eqn.params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        return None
    return _sliced(run, eqn, x, eqn.params["start_indices"], eqn.params["limit_indices"])


@composite_rule(compat.split_p)
def split(run: Any, eqn: Any, x: Composite) -> list | None:
    """Runs along a dimension."""
    dim, first, outs = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        start, stop = [0] * len(x.shape), list(x.shape)
        start[dim], stop[dim] = first, first + size
        out = _sliced(run, eqn, x, start, stop)
        if out is None:
            return None
        outs.extend(out)
        first += size
    return outs


def _sliced(
    run: Any, eqn: Any, x: Composite, start: Sequence[int], stop: Sequence[int]
) -> list | None:
    if isinstance(x, Repetition):
        return None

    def cut(part: jax.Array, at: int | None = None, first: int = 0, last: int = 0) -> jax.Array:
        """The slice of a part; along the dimension `at`, from first to last."""
        low, high = list(start), list(stop)
        for i, n in enumerate(part.shape):
            if i == at:
                low[i], high[i] = first, last
            elif n == 1:  # also where the numbers of a scaling are constant
                low[i], high[i] = 0, 1
        return lax.slice(part, low, high)

    if isinstance(x, Scaling):
        return [run.program(lambda w, f: cut(w) * cut(f), eqn, *x.parts)]
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

    return [run.program(left, eqn, *chosen)] if chosen else None


@composite_rule(p.dynamic_slice_p)
def dynamic_slice(run: Any, eqn: Any, x: Any, *starts: Any) -> list | None:
    """One of a stack, at an index known at run time."""
    if not isinstance(x, Concatenation) or cut_dims(eqn) != [x.dim]:
        return None
    view = x.stacked()
    return None if view is None else run.apply(eqn, [view, *starts])


# Calls and branches hand composites on as the pytrees they are.
for primitive in (p.jit_p, p.closed_call_p, p.call_p):
    composite_rule(primitive)(control.inlined)
composite_rule(p.remat_p)(control.remat)
composite_rule(p.scan_p)(control.scan)
composite_rule(p.while_p)(control.while_loop)
composite_rule(p.cond_p)(control.cond)


# --- Products ----------------------------------------------------------------------------------


@composite_rule(p.dot_general_p)
def dot_general(run: Any, eqn: Any, lhs: Any, rhs: Any) -> list | None:
    """Joined along outputs: outputs joined; along inputs: a sum; along a stack: a batch."""
    if is_structured(lhs) and is_structured(rhs):
        return run.apply(eqn, [lhs, run.dense(rhs, eqn, " with another weight")])
    first = is_structured(lhs)
    w, x = (lhs, rhs) if first else (rhs, lhs)
    contracted, batch = eqn.params["dimension_numbers"]
    (xc, wc), (xb, wb) = (
        tuple(map(list, reversed(d) if first else d)) for d in (contracted, batch)
    )
    write: dict[type, Callable] = {
        Concatenation: _joined_product,
        Scaling: _scaled_product,
        Repetition: _repeated_product,
    }
    program = write[type(w)](eqn, w, x, (xc, xb), (wc, wb), first)
    if program is None:
        return None
    return [run.program(program, eqn, x, *w.parts).astype(eqn.outvars[0].aval.dtype)]


def _wide(eqn: Any) -> Any:
    """The dtype in which products are summed, so that only their sum is rounded."""
    return jnp.promote_types(eqn.outvars[0].aval.dtype, jnp.float32)


def _dot(
    eqn: Any,
    first: bool,
    x: jax.Array,
    w: jax.Array,
    numbers: Any = None,
    preferred: Any = None,
) -> jax.Array:
    """The equation's product, or one with other dimensions; operands in the equation's order."""
    dtype = jnp.promote_types(x.dtype, w.dtype)
    if x.dtype != w.dtype and dtype != eqn.outvars[0].aval.dtype:
        dtype = jnp.promote_types(dtype, eqn.outvars[0].aval.dtype)
    x, w = (v if v.dtype == dtype else v.astype(dtype) for v in (x, w))
    return lax.dot_general(
        *((w, x) if first else (x, w)),
        numbers or eqn.params["dimension_numbers"],
        precision=eqn.params["precision"],
        preferred_element_type=preferred or eqn.params["preferred_element_type"],
    )


def _without(dim: int, dims: tuple[list[int], list[int]]) -> tuple[list[int], ...]:
    """(contracted, batch) dimensions of an operand that has lost one of its dimensions."""
    return tuple([i - (i > dim) for i in some if i != dim] for some in dims)


def _free(dims: tuple[list[int], list[int]], ndim: int) -> list[int]:
    return [i for i in range(ndim) if i not in dims[0] and i not in dims[1]]


def _joined_product(
    eqn: Any, w: Concatenation, x: Any, x_dims: Any, w_dims: Any, first: bool
) -> Callable:
    dot = functools.partial(_dot, eqn, first)
    (xc, xb), (wc, wb) = x_dims, w_dims
    if w.dim in wc:
        at, dot = xc[wc.index(w.dim)], functools.partial(dot, preferred=_wide(eqn))
        return lambda x, *ws: functools.reduce(jnp.add, map(dot, lax.split(x, w.lengths, at), ws))
    if w.dim in wb:
        at, out = xb[wb.index(w.dim)], wb.index(w.dim)
        if set(w.lengths) == {1}:  # one weight for each index: no batch is left
            x_dims, w_dims = _without(at, x_dims), _without(w.dim, w_dims)
            numbers = tuple(zip(*((w_dims, x_dims) if first else (x_dims, w_dims)), strict=True))

            def each(x: jax.Array, *ws: jax.Array) -> jax.Array:
                xs = [lax.squeeze(part, [at]) for part in lax.split(x, w.lengths, at)]
                pieces = [lax.squeeze(piece, [w.dim]) for piece in ws]
                ys = [dot(x, piece, numbers) for x, piece in zip(xs, pieces, strict=True)]
                return jnp.stack(ys, out)

            return each
        xs = lambda x: lax.split(x, w.lengths, at)  # noqa: E731
        return lambda x, *ws: lax.concatenate(list(map(dot, xs(x), ws)), out)
    lead = len(wb) + (0 if first else len(_free(x_dims, jnp.ndim(x))))
    out = lead + _free(w_dims, w.ndim).index(w.dim)
    return lambda x, *ws: lax.concatenate([dot(x, piece) for piece in ws], out)


def _scaled_product(
    eqn: Any, w: Scaling, x: Any, x_dims: Any, w_dims: Any, first: bool
) -> Callable | None:
    (xc, xb), (wc, wb) = x_dims, w_dims
    free, x_free = _free(w_dims, w.ndim), _free(x_dims, jnp.ndim(x))
    varying = [i for i, n in enumerate(w.factor.shape) if n > 1]
    if any(i in wc for i in varying):
        if any(i in free for i in varying):
            return None  # of both sides at once
        place = dict(zip([*wb, *wc], [*xb, *xc], strict=True))
        rank = len(xb) + len(xc) + len(x_free)
        return lambda x, w, f: _dot(eqn, first, x * _along(f, place, rank), w)
    lead = len(wb) + (0 if first else len(x_free))
    place = {i: k for k, i in enumerate(wb)} | {i: lead + k for k, i in enumerate(free)}
    rank = len(wb) + len(x_free) + len(free)
    return lambda x, w, f: _dot(eqn, first, x, w) * _along(f, place, rank)


def _along(factor: jax.Array, place: dict[int, int], rank: int) -> jax.Array:
    """The factor with each dimension where `place` says; it is constant along all others."""
    kept = sorted(place, key=place.__getitem__)
    factor = lax.squeeze(factor, [i for i in range(factor.ndim) if i not in place])
    left = sorted(place)
    factor = lax.transpose(factor, [left.index(i) for i in kept])
    return jnp.expand_dims(factor, [i for i in range(rank) if i not in place.values()])


def _repeated_product(
    eqn: Any, w: Repetition, x: Any, x_dims: Any, w_dims: Any, first: bool
) -> Callable:
    """Copies that are summed over sum x; all others repeat the product of the one."""
    (xc, xb), (wc, wb) = x_dims, w_dims
    labels: dict[Any, int] = {}

    def of(keys: Any) -> list[int]:
        return [labels.setdefault(key, len(labels)) for key in keys]

    def parts(dims: Sequence[int]) -> list[Digit]:
        return [d for i in dims for d in digits.significant(w.dims[i])]

    x_free = _free(x_dims, jnp.ndim(x))
    met = dict(zip([*xc, *xb], [*wc, *wb], strict=True))
    in_x: list[Any] = []
    for i in range(jnp.ndim(x)):
        in_x += parts([met[i]]) if i in met else [("free", i)]
    mine, free = parts(_free(w_dims, w.ndim)), [("free", i) for i in x_free]
    order = [*parts(wb), *(mine + free if first else free + mine)]
    counted = [d for d in order if isinstance(d, Digit) and w.is_copy(d) and d not in in_x]

    def program(x: jax.Array, weight: jax.Array) -> jax.Array:
        sizes = [d.size if isinstance(d, Digit) else x.shape[d[1]] for d in in_x]
        y = jnp.einsum(
            x.reshape(sizes),
            of(in_x),
            weight.reshape([d.size for d in w.cuts]),
            of(w.cuts),
            of(d for d in order if d not in counted),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )
        shape = [d.size if isinstance(d, Digit) else x.shape[d[1]] for d in order]
        kept = [i for i, d in enumerate(order) if d not in counted]
        return lax.broadcast_in_dim(y, shape, kept).reshape(eqn.outvars[0].aval.shape)

    return program


@composite_rule(compat.ragged_dot_p)
def ragged_dot(run: Any, eqn: Any, x: Any, w: Any, groups: Any) -> list | None:
    """Experts joined along their outputs or their inputs, or stacked."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if not isinstance(w, Concatenation) or is_structured(x) or is_structured(groups):
        return None
    if numbers.dot_dimension_numbers != (((1,), (1,)), ((), ())) or w.ndim != 3:
        return None
    if tuple(numbers.lhs_ragged_dimensions) != (0,) or list(numbers.rhs_group_dimensions) != [0]:
        return None

    def dot(x: jax.Array, w: jax.Array, groups: jax.Array) -> jax.Array:
        return lax.ragged_dot(
            x,
            w,
            groups,
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )

    if w.dim == 0:
        view = w.stacked()
        return None if view is None else run.apply(eqn, [x, view, groups])

    def program(x: jax.Array, groups: jax.Array, *ws: jax.Array) -> jax.Array:
        if w.dim == 2:
            return lax.concatenate([dot(x, piece, groups) for piece in ws], 1)
        terms = [
            dot(part, piece, groups)
            for part, piece in zip(lax.split(x, w.lengths, 1), ws, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    return [run.program(program, eqn, x, groups, *w.pieces).astype(eqn.outvars[0].aval.dtype)]


@composite_rule(p.conv_general_dilated_p)
def convolution(run: Any, eqn: Any, x: Any, w: Any) -> list | None:
    """Kernels joined along channels, or scaled by channel; not in groups."""
    params = eqn.params
    if is_structured(x) or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    out, into = numbers.rhs_spec[:2]

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    rank = len(numbers.out_spec)
    if isinstance(w, Scaling):
        varying = [i for i, n in enumerate(w.factor.shape) if n > 1]
        if varying == [out]:
            place = {out: numbers.out_spec[1]}
            scale = lambda x, w, f: conv(x, w) * _along(f, place, rank)  # noqa: E731
        elif varying == [into]:
            place = {into: numbers.lhs_spec[1]}
            scale = lambda x, w, f: conv(x * _along(f, place, rank), w)  # noqa: E731
        else:
            return None
        return [run.program(scale, eqn, x, *w.parts).astype(eqn.outvars[0].aval.dtype)]
    if not isinstance(w, Concatenation) or w.dim not in (out, into):
        return None

    def program(x: jax.Array, *ws: jax.Array) -> jax.Array:
        if w.dim == out:
            return lax.concatenate([conv(x, kernel) for kernel in ws], numbers.out_spec[1])
        parts = lax.split(x, w.lengths, numbers.lhs_spec[1])
        return functools.reduce(jnp.add, map(conv, parts, ws))

    return [run.program(program, eqn, x, *w.pieces)]


@composite_rule(p.gather_p)
def gather(run: Any, eqn: Any, table: Any, indices: Any) -> list | None:
    """Rows of tables that are joined end to end: each id finds its table."""
    rows = row_dims(eqn)
    if not isinstance(table, Concatenation) or is_structured(indices) or rows != [table.dim]:
        return None
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["slice_sizes"][table.dim] != 1 or numbers.operand_batching_dims:
        return None
    if table.dim not in numbers.collapsed_slice_dims:
        return None
    column = numbers.start_index_map.index(table.dim)
    shape, total = eqn.outvars[0].aval.shape, sum(table.lengths)
    lead = [i for i in range(len(shape)) if i not in numbers.offset_dims]

    def program(indices: jax.Array, *tables: jax.Array) -> jax.Array:
        ids = indices[..., column]
        near = jnp.clip(ids, 0, total - 1)
        at = lambda x: lax.broadcast_in_dim(x, shape, lead)  # noqa: E731
        y, begin = jnp.zeros(shape, eqn.outvars[0].aval.dtype), 0
        for part, count in zip(tables, table.lengths, strict=True):
            here = indices.at[..., column].set(jnp.clip(near - begin, 0, count - 1))
            found = lax.gather(part, here, numbers, params["slice_sizes"], mode="clip")
            y = jnp.where(at((near >= begin) & (near < begin + count)), found, y)
            begin += count
        if params["mode"].name == "FILL_OR_DROP":
            fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
            y = jnp.where(at((ids >= 0) & (ids < total)), y, fill)
        return y

    return [run.program(program, eqn, indices, *table.pieces)]
