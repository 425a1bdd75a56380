"""Products with, and reads of, arrays that a program makes of weights: see `composites`.

The product of a joined array is the joined products of its pieces, or their sum; a factor moves
to the input or the output; copies repeat the product of the one weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.typing import DTypeLike

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Digit
from jaxpeft._composite import Concatenation, Repetition, Scaling, is_structured
from jaxpeft._dimensions import Pair, free_dims, gather_sources, product_positions, row_dims
from jaxpeft._rules.registry import Results, RuleContext, Value, composite_rule

#: The equation once more, from x and the parts of a composite.
Program = Callable[..., jax.Array]


class _Product(NamedTuple):
    """A product of x with a composite.

    Attributes:
      eqn: The equation.
      first: Whether the composite is its first operand.
      x: The shape of the other operand.
      x_dims, w_dims: The (contracted, batch) dimensions of x and of the composite.
      w_at: {dimension of the composite: its position in the result}, of those that remain.
    """

    eqn: JaxprEqn
    first: bool
    x: tuple[int, ...]
    x_dims: Pair
    w_dims: Pair
    w_at: dict[int, int]

    @property
    def rank(self) -> int:
        """Of the result."""
        return compat.aval(self.eqn.outvars[0]).ndim

    def __call__(
        self,
        x: jax.Array,
        w: jax.Array,
        numbers: tuple[Pair, Pair] | None = None,
        preferred: DTypeLike | None = None,
    ) -> jax.Array:
        """The equation's product, or one with other dimensions, with operands in its order."""
        params, result = self.eqn.params, compat.aval(self.eqn.outvars[0]).dtype
        dtype = jnp.promote_types(x.dtype, w.dtype)
        if x.dtype != w.dtype and dtype != result:
            dtype = jnp.promote_types(dtype, result)
        x, w = (v if v.dtype == dtype else v.astype(dtype) for v in (x, w))
        return lax.dot_general(
            *((w, x) if self.first else (x, w)),
            numbers or params["dimension_numbers"],
            precision=params["precision"],
            preferred_element_type=preferred or params["preferred_element_type"],
        )


@composite_rule(p.dot_general_p)
def dot_general(ctx: RuleContext, eqn: JaxprEqn, lhs: Value, rhs: Value) -> Results:
    """Joined along outputs: joined outputs; along inputs: a sum; along a stack: a batch."""
    if is_structured(lhs) and is_structured(rhs):
        return ctx.apply(eqn, [lhs, ctx.dense(rhs, eqn, " with another weight")])
    first = is_structured(lhs)
    w, x = (lhs, rhs) if first else (rhs, lhs)
    contracted, batch = eqn.params["dimension_numbers"]
    shapes = compat.aval(eqn.invars[0]).shape, compat.aval(eqn.invars[1]).shape
    at = product_positions(contracted, batch, (len(shapes[0]), len(shapes[1])))
    mine, theirs = (0, 1) if first else (1, 0)
    product = _Product(
        eqn,
        first,
        shapes[theirs],
        x_dims=(contracted[theirs], batch[theirs]),
        w_dims=(contracted[mine], batch[mine]),
        w_at=at[mine],
    )
    program: Program | None
    if isinstance(w, Concatenation):
        program = _concatenated_product(product, w)
    elif isinstance(w, Scaling):
        program = _scaled_product(product, w)
    else:
        assert isinstance(w, Repetition)
        program = _repeated_product(product, w)
    if program is None:
        return None
    y = ctx.trace_and_run(program, eqn, x, *w.parts)
    return [y.astype(compat.aval(eqn.outvars[0]).dtype)]


def _without(dim: int, dims: Pair) -> Pair:
    """(contracted, batch) dimensions of an operand that has lost one of its dimensions."""
    contracted, batch = ([i - (i > dim) for i in some if i != dim] for some in dims)
    return contracted, batch


def _concatenated_product(dot: _Product, w: Concatenation) -> Program:
    (xc, xb), (wc, wb) = map(list, dot.x_dims), map(list, dot.w_dims)
    if w.dim in wc:  # a sum over the pieces, which only its result rounds
        at = xc[wc.index(w.dim)]
        wide = jnp.promote_types(compat.aval(dot.eqn.outvars[0]).dtype, jnp.float32)

        def summed(x: jax.Array, *ws: jax.Array) -> jax.Array:
            pairs = zip(lax.split(x, w.lengths, at), ws, strict=True)
            return functools.reduce(jnp.add, [dot(*pair, preferred=wide) for pair in pairs])

        return summed
    out = dot.w_at[w.dim]
    if w.dim not in wb:
        return lambda x, *ws: lax.concatenate([dot(x, piece) for piece in ws], out)
    at = xb[wb.index(w.dim)]
    if set(w.lengths) != {1}:

        def batched(x: jax.Array, *ws: jax.Array) -> jax.Array:
            pairs = zip(lax.split(x, w.lengths, at), ws, strict=True)
            return lax.concatenate([dot(*pair) for pair in pairs], out)

        return batched
    # One weight for each index: no batch is left.
    x_dims, w_dims = _without(at, dot.x_dims), _without(w.dim, dot.w_dims)
    pairs = (w_dims, x_dims) if dot.first else (x_dims, w_dims)
    numbers = (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])

    def each(x: jax.Array, *ws: jax.Array) -> jax.Array:
        xs = [lax.squeeze(part, [at]) for part in lax.split(x, w.lengths, at)]
        pieces = [lax.squeeze(piece, [w.dim]) for piece in ws]
        ys = [dot(x, piece, numbers) for x, piece in zip(xs, pieces, strict=True)]
        return jnp.stack(ys, out)

    return each


def _scaled_product(dot: _Product, w: Scaling) -> Program | None:
    (xc, xb), (wc, wb) = dot.x_dims, dot.w_dims
    varying = [i for i, n in enumerate(w.factor.shape) if n > 1]
    if not any(i in wc for i in varying):  # a factor of the output
        return lambda x, w, f: dot(x, w) * _along(f, dot.w_at, dot.rank)
    if any(i not in wc and i not in wb for i in varying):
        return None  # a factor of both sides at once
    place = dict(zip([*wb, *wc], [*xb, *xc], strict=True))
    return lambda x, w, f: dot(x * _along(f, place, len(dot.x)), w)


def _along(factor: jax.Array, place: dict[int, int], rank: int) -> jax.Array:
    """The factor with each dimension where `place` says; it is constant along all others."""
    kept = sorted(place, key=place.__getitem__)
    factor = lax.squeeze(factor, [i for i in range(factor.ndim) if i not in place])
    left = sorted(place)
    factor = lax.transpose(factor, [left.index(i) for i in kept])
    return jnp.expand_dims(factor, [i for i in range(rank) if i not in place.values()])


#: A label of an einsum: a digit of the weight or of its copies, or a dimension of x alone.
_Label = Digit | tuple[Literal["x"], int]


def _repeated_product(dot: _Product, w: Repetition) -> Program:
    """Copies that are summed over sum x; all others repeat the product of the one weight."""
    eqn, (xc, xb), (wc, wb) = dot.eqn, dot.x_dims, dot.w_dims
    numbers: dict[_Label, int] = {}

    def of(labels: Sequence[_Label]) -> list[int]:
        return [numbers.setdefault(label, len(numbers)) for label in labels]

    def size(label: _Label) -> int:
        return label.size if isinstance(label, Digit) else dot.x[label[1]]

    def parts(dims: Sequence[int]) -> list[_Label]:
        return [d for i in dims for d in digits.significant(w.dims[i])]

    met = dict(zip([*xc, *xb], [*wc, *wb], strict=True))
    in_x: list[_Label] = []
    for i in range(len(dot.x)):
        in_x += parts([met[i]]) if i in met else [("x", i)]
    mine = parts(free_dims(w.ndim, wc, wb))
    theirs: list[_Label] = [("x", i) for i in free_dims(len(dot.x), xc, xb)]
    order = [*parts(wb), *(mine + theirs if dot.first else theirs + mine)]
    repeated = [d for d in order if isinstance(d, Digit) and w.is_copy(d) and d not in in_x]
    kept = [i for i, label in enumerate(order) if label not in repeated]

    def program(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = jnp.einsum(
            x.reshape([size(label) for label in in_x]),
            of(in_x),
            weight.reshape([d.size for d in w.cuts]),
            of(w.cuts),
            of([order[i] for i in kept]),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )
        y = lax.broadcast_in_dim(y, [size(label) for label in order], kept)
        return y.reshape(compat.aval(eqn.outvars[0]).shape)

    return program


@composite_rule(compat.ragged_dot_p)
def ragged_dot(ctx: RuleContext, eqn: JaxprEqn, x: Value, w: Value, groups: Value) -> Results:
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
        return None if view is None else ctx.apply(eqn, [x, view, groups])

    def program(x: jax.Array, groups: jax.Array, *ws: jax.Array) -> jax.Array:
        if w.dim == 2:
            return lax.concatenate([dot(x, piece, groups) for piece in ws], 1)
        terms = [
            dot(part, piece, groups)
            for part, piece in zip(lax.split(x, w.lengths, 1), ws, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    y = ctx.trace_and_run(program, eqn, x, groups, *w.pieces)
    return [y.astype(compat.aval(eqn.outvars[0]).dtype)]


@composite_rule(p.conv_general_dilated_p)
def convolution(ctx: RuleContext, eqn: JaxprEqn, x: Value, w: Value) -> Results:
    """Kernels that are joined along channels, or scaled by channel; not in groups."""
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

    rank, dtype = len(numbers.out_spec), compat.aval(eqn.outvars[0]).dtype
    if isinstance(w, Scaling):
        varying = [i for i, n in enumerate(w.factor.shape) if n > 1]
        if varying == [out]:

            def scaled(x: jax.Array, kernel: jax.Array, factor: jax.Array) -> jax.Array:
                return conv(x, kernel) * _along(factor, {out: numbers.out_spec[1]}, rank)

        elif varying == [into]:

            def scaled(x: jax.Array, kernel: jax.Array, factor: jax.Array) -> jax.Array:
                return conv(x * _along(factor, {into: numbers.lhs_spec[1]}, rank), kernel)

        else:
            return None
        return [ctx.trace_and_run(scaled, eqn, x, *w.parts).astype(dtype)]
    if not isinstance(w, Concatenation) or w.dim not in (out, into):
        return None

    def program(x: jax.Array, *ws: jax.Array) -> jax.Array:
        if w.dim == out:
            return lax.concatenate([conv(x, kernel) for kernel in ws], numbers.out_spec[1])
        parts = lax.split(x, w.lengths, numbers.lhs_spec[1])
        return functools.reduce(jnp.add, map(conv, parts, ws))

    return [ctx.trace_and_run(program, eqn, x, *w.pieces)]


@composite_rule(p.gather_p)
def gather(ctx: RuleContext, eqn: JaxprEqn, table: Value, indices: Value) -> Results:
    """Rows of tables that are joined end to end: each id selects its table."""
    rows = row_dims(eqn)
    if not isinstance(table, Concatenation) or is_structured(indices) or rows != [table.dim]:
        return None
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["slice_sizes"][table.dim] != 1 or numbers.operand_batching_dims:
        return None
    if table.dim not in numbers.collapsed_slice_dims:
        return None
    column = numbers.start_index_map.index(table.dim)
    shape, total = compat.aval(eqn.outvars[0]).shape, sum(table.lengths)
    lead = [i for i, source in enumerate(gather_sources(eqn)) if source.operand == "ids"]

    def program(indices: jax.Array, *tables: jax.Array) -> jax.Array:
        ids = indices[..., column]
        near = jnp.clip(ids, 0, total - 1)
        y, begin = jnp.zeros(shape, compat.aval(eqn.outvars[0]).dtype), 0
        for part, count in zip(tables, table.lengths, strict=True):
            here = indices.at[..., column].set(jnp.clip(near - begin, 0, count - 1))
            found = lax.gather(part, here, numbers, params["slice_sizes"], mode="clip")
            in_table = (near >= begin) & (near < begin + count)
            y = jnp.where(lax.broadcast_in_dim(in_table, shape, lead), found, y)
            begin += count
        if params["mode"].name == "FILL_OR_DROP":
            fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
            valid = (ids >= 0) & (ids < total)
            y = jnp.where(lax.broadcast_in_dim(valid, shape, lead), y, fill)
        return y

    return [ctx.trace_and_run(program, eqn, indices, *table.pieces)]
