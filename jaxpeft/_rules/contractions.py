"""Products with a weight: dense, batched over a stack, ragged over experts, convolutions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.typing import DTypeLike

from jaxpeft import _compat as compat
from jaxpeft._dimensions import free_dims
from jaxpeft._operand import (
    CallSite,
    Operand,
    as_program,
    bind_weight,
    computing,
    holds,
    permute,
    refold,
)
from jaxpeft._rules.registry import ArrayOrView, Results, RuleContext, rule
from jaxpeft._rules.sharding import refuse_parts
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, OUT, STACK, Unsupported


def site_of(
    ctx: RuleContext, view: View, eqn: JaxprEqn, kind: type[CallSite] = CallSite, **more: Any
) -> CallSite:
    """The call site of a view at this equation."""
    refuse_parts(ctx, view, eqn)
    preferred = eqn.params.get("preferred_element_type")
    if preferred is not None and not holds(preferred, view.dtype):
        preferred = None  # a narrower result: the whole sum is rounded to it once
    return kind(
        view.dtype,
        precision=eqn.params.get("precision"),
        preferred=preferred,
        where=compat.source(eqn),
        salt=ctx.next_site_number(),
        # Under vmap over a stack, no weight could read what another one has left in the taps.
        taps=None if view.indices(STACK) else ctx.taps,
        **more,
    )


def promoted(view: View, x: jax.Array, eqn: JaxprEqn) -> tuple[View, jax.Array] | None:
    """The view and x in the dtype in which the program multiplies the two.

    `jnp` leaves the promotion of two dtypes to the product, which takes that of its result.
    `None` where the entries of the weight are needed: the program multiplies integers or floats
    of 8 bits, or it has rounded the weight and multiplies it in a wider dtype.
    """
    wanted = compat.aval(eqn.outvars[0]).dtype
    same = x.dtype == view.dtype and computing(x.dtype) == x.dtype
    dtype = view.dtype if same else wanted
    cast = view.cast(dtype)
    sums = jnp.issubdtype(wanted, jnp.inexact) and computing(dtype) == dtype
    return (cast, x.astype(dtype)) if sums and cast is not None else None


def bound(view: View, w: Any, site: CallSite) -> Any:
    """The weight of one slice of the stack, bound to a site in the program's dtype."""
    roles = [a.role for a in view.axes if a.role != STACK] if view.natural else [IN, OUT]
    return bind_weight(w, site, roles, view.dtype)


def _orientation(view: View, contracted: list[int], batch: list[int]) -> tuple[str, str] | None:
    """(IN, OUT) for a forward use of a refined view, (OUT, IN) for a transposed one, else None.

    Axes of the stack may be anywhere: wherever they are, each of them selects a matrix.
    """

    def axes_of(dims: list[int]) -> set[int]:
        return {d.axis for i in dims for d in view.dims[i] if d.size > 1}

    def axes_with(role: str) -> set[int]:
        return {i for i in view.indices(role) if view.axes[i].size > 1}

    free = free_dims(view.ndim, contracted, batch)
    stack = axes_with(STACK)
    if not axes_of(batch) <= stack or not stack <= axes_of([*batch, *contracted, *free]):
        return None
    for a, b in ((IN, OUT), (OUT, IN)):
        if axes_of(contracted) - stack == axes_with(a) and axes_of(free) - stack == axes_with(b):
            return a, b
    return None


def _sorting(axes: list[int]) -> list[int]:
    return sorted(range(len(axes)), key=axes.__getitem__)


def _contract(
    ctx: RuleContext,
    eqn: JaxprEqn,
    view: View,
    x: jax.Array,
    dims: tuple[list[int], list[int]],
    x_dims: tuple[list[int], list[int]],
    *,
    first: bool,
) -> jax.Array | None:
    """(*batch, *x free, *view free) = x contracted with the view, in the equation's order.

    Args:
      dims: The view's contracted and batch dimensions.
      x_dims: Those of x, pairwise the same.
      first: Whether the weight is the equation's first operand.
    """
    both = promoted(view, x, eqn)
    if both is None:
        return None
    view, x = both[0].refined(), both[1]
    (vc, vb), (xc, xb) = dims, x_dims
    orientation = _orientation(view, vc, vb)
    if orientation is None:
        return None
    if any(len(view.dims[i]) > 1 for i in vb):
        return None
    # Stack axes by their role in the product: batched over, summed over, or of the result alone.
    batch = [view.dims[i][0].axis if view.dims[i] else -1 for i in vb]
    stack, parts = view.indices(STACK), [d for i in vc for d in view.dims[i]]
    summed = [i for i in stack if i in {d.axis for d in parts}]
    view_free = free_dims(view.ndim, vc, vb)
    alone = [i for i in stack if i in {d.axis for k in view_free for d in view.dims[k]}]
    if len(stack) != len(batch) + len(summed) + len(alone):
        return None  # the program has squeezed away a stack of length 1
    # x as (*stack but for axes of the result alone, *free, *contracted axes in the weight's order)
    free = free_dims(x.ndim, xc, xb)
    stack_order = _sorting(batch)
    x = permute(x, [*(xb[i] for i in stack_order), *free, *xc])
    lead = x.shape[: len(xb) + len(free)]
    x = refold(x, (*lead, *(d.size for d in parts)))
    order = _sorting([d.axis for d in parts])
    x = permute(x, [*range(len(lead)), *(len(lead) + i for i in order)])
    if summed:
        at = {parts[i].axis: len(lead) + place for place, i in enumerate(order)}
        at |= {batch[i]: place for place, i in enumerate(stack_order)}
        front = [at[i] for i in stack if i in at]
        x = permute(x, [*front, *(i for i in range(x.ndim) if i not in front)])
    shared = x.shape[: len(batch) + len(summed) + len(free)]
    x = refold(x, (*shared, math.prod(d.size for d in parts if d.axis not in summed)))

    # y is (*stack, *free, m); m is cut into the axes of the weight, then into the program's dims
    parts = [d for i in view_free for d in view.dims[i]]
    out = [d for d in parts if d.axis not in alone]
    order = _sorting([d.axis for d in out])

    def beside(row: int | None) -> list[jax.Array]:
        found = [refold(r, (*lead, *(d.size for d in parts))) for r in ctx.residual(view.path, row)]
        to_weight = [*range(len(lead)), *(len(lead) + i for i in order)]
        return [permute(r, to_weight) for r in found]

    # Only here has y the layout of the equation's own result, up to the order of its outputs.
    plain = not stack and not first and orientation == (IN, OUT)
    site = site_of(ctx, view, eqn, residual=beside if plain else None)

    def product(w: Any, x: jax.Array) -> jax.Array:
        w = bound(view, w, site)
        return x @ w if orientation == (IN, OUT) else x @ w.T

    y = view.over_stack(product, x, [i not in alone for i in stack])
    if summed:
        y = jnp.sum(y, [stack.index(i) for i in summed])
    kept = [i for i in stack if i not in summed]
    lead = y.shape[: len(kept) + len(free)]
    y = refold(y, (*lead, *(out[i].size for i in order)))
    # The dimensions of y in the program's order: those of the batch, of x, and of the weight.
    at = {axis: place for place, axis in enumerate(kept)}
    at |= {out[i].axis: len(lead) + place for place, i in enumerate(order)}
    mine, theirs = [at[d.axis] for d in parts], [at[i] for i in batch]
    y = permute(y, [*theirs, *range(len(kept), len(lead)), *mine])
    return refold(y, (*y.shape[: len(batch) + len(free)], *(view.shape[i] for i in view_free)))


@rule(p.dot_general_p, computes=True)
def dot_general(ctx: RuleContext, eqn: JaxprEqn, lhs: ArrayOrView, rhs: ArrayOrView) -> Results:
    """Forward where `in` is contracted, transposed where `out` is; stacks are batched over."""
    (lc, rc), (lb, rb) = (tuple(map(list, pair)) for pair in eqn.params["dimension_numbers"])
    if is_view(lhs) and is_view(rhs):
        rhs = ctx.dense(rhs, eqn, " with another weight")
    if is_view(rhs):
        assert not is_view(lhs)
        view, y = rhs, _contract(ctx, eqn, rhs, lhs, (rc, rb), (lc, lb), first=False)
    else:
        assert is_view(lhs)
        view, y = lhs, _contract(ctx, eqn, lhs, rhs, (lc, lb), (rc, rb), first=True)
        if y is not None:  # the weight came first: its free dimensions come before those of x
            batch, x_free = len(lb), rhs.ndim - len(rc) - len(rb)
            y = permute(
                y,
                [*range(batch), *range(batch + x_free, y.ndim), *range(batch, batch + x_free)],
            )
    dtype = compat.aval(eqn.outvars[0]).dtype
    return None if y is None else [as_program(y, dtype, view.path)]


class RaggedCallSite(CallSite):
    """x (tokens, n), sorted by expert, against stacks of experts: `jax.lax.ragged_dot`."""

    def __init__(self, dtype: DTypeLike, *, groups: jax.Array, tokens: int, **kwargs: Any):
        super().__init__(dtype, **kwargs)
        self.arrays, self.tokens = {"groups": groups}, tokens

    @property
    def groups(self) -> jax.Array:
        return self.arrays["groups"]

    def product(self, x: jax.Array, op: Operand) -> jax.Array:
        if STACK not in op.roles:
            return super().product(x, op)
        order = [op.roles.index(role) for role in (STACK, op.rows, op.cols)]
        if len(op.roles) != 3:
            raise Unsupported("experts with more than two axes")
        same = x.dtype == op.array.dtype == self.dtype
        return lax.ragged_dot(
            x,
            permute(op.array, order),
            self.groups,
            precision=self.precision,
            preferred_element_type=self.preferred if same else None,
        )

    def spread(self, op: Operand) -> jax.Array:
        if STACK not in op.roles:
            return super().spread(op)
        return jnp.repeat(op.array, self.groups, axis=0, total_repeat_length=self.tokens)

    def matrix(self, op: Operand) -> jax.Array:
        raise Unsupported("the matrix of one expert")


@rule(compat.ragged_dot_p, computes=True)
def ragged_dot(
    ctx: RuleContext, eqn: JaxprEqn, x: ArrayOrView, view: ArrayOrView, groups: ArrayOrView
) -> Results:
    """Sorted tokens against a stack of whole experts with one group axis, forward."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if is_view(x) or is_view(groups) or not is_view(view):
        return None
    if numbers.dot_dimension_numbers != (((1,), (1,)), ((), ())) or view.ndim != 3:
        return None
    both = promoted(view, x, eqn)
    if tuple(numbers.lhs_ragged_dimensions) != (0,) or both is None:
        return None
    view, x = both[0].refined(), both[1]
    if _orientation(view, [1], list(numbers.rhs_group_dimensions)) != (IN, OUT):
        return None
    if len(view.indices(STACK)) != 1:
        return None
    # ragged_dot wants (experts, in, out), which is the canonical form.
    view = view.in_canonical_layout()
    site = site_of(ctx, view, eqn, RaggedCallSite, groups=groups, tokens=x.shape[0])
    site.taps = ctx.taps  # tokens stay together, unlike under vmap over a stack
    y = x @ bind_weight(view.weight, site, (STACK, IN, OUT), view.dtype)
    return [as_program(y, compat.aval(eqn.outvars[0]).dtype, view.path)]


class ConvCallSite(CallSite):
    """x (batch, *space, channels) against kernels: `jax.lax.conv_general_dilated`.

    The `in` side of a kernel is its window and its input channels together; a field that
    has it is a smaller kernel, any other field is a product over channels. In a grouped
    convolution every group has its own output channels and its own copy of what a method
    puts between `in` and `out`, so that `a @ b` stays the delta of the whole kernel.
    """

    def __init__(self, dtype: DTypeLike, *, kernels: View, params: dict[str, Any], **kwargs: Any):
        super().__init__(dtype, **kwargs)
        self.kernels, self.params = kernels, params
        self.groups = params["feature_group_count"]

    def product(self, x: jax.Array, op: Operand) -> jax.Array:
        if op.cols == IN:
            raise Unsupported("a transposed convolution")
        if op.rows != IN:
            return self._pointwise(x, op)
        numbers = self.params["dimension_numbers"]
        same = x.dtype == op.array.dtype == self.dtype
        spatial = tuple(range(1, x.ndim - 1))
        last = (0, x.ndim - 1, *spatial)
        return lax.conv_general_dilated(
            x,
            self.kernel(op, numbers.rhs_spec[0]),
            window_strides=self.params["window_strides"],
            padding=self.params["padding"],
            lhs_dilation=self.params["lhs_dilation"],
            rhs_dilation=self.params["rhs_dilation"],
            feature_group_count=self.groups,
            dimension_numbers=lax.ConvDimensionNumbers(last, numbers.rhs_spec, last),
            precision=self.precision,
            preferred_element_type=self.preferred if same else None,
        )

    def _pointwise(self, x: jax.Array, op: Operand) -> jax.Array:
        """A product over channels: (..., groups * n) to (..., m), or (..., groups * m)."""
        if self.groups == 1:
            return super().product(x, op)
        x = x.reshape(*x.shape[:-1], self.groups, -1)
        matrix = op.matrix
        if op.cols == OUT:
            blocks = matrix.reshape(matrix.shape[0], self.groups, -1)
            y = jnp.einsum("...gr,rgo->...go", x, blocks, precision=self.precision)
        else:
            y = jnp.einsum("...gr,rs->...gs", x, matrix, precision=self.precision)
        return y.reshape(*y.shape[:-2], -1)

    def spread(self, op: Operand) -> jax.Array:
        if IN in op.roles:
            raise Unsupported("a vector over the entries of a convolution's window")
        own = op.roles and OUT not in op.roles
        return jnp.tile(op.matrix, self.groups) if own else super().spread(op)

    def kernel(self, op: Operand, out_dim: int) -> jax.Array:
        """A kernel in the program's layout, with the columns of `op` as output channels."""
        view = self.kernels
        array = op.array
        if len(op.roles) == 2:  # canonical: cut `in` into the window and the channels
            rows = op.roles.index(IN)
            array = permute(array, (rows, 1 - rows))
            if self.groups > 1 and op.cols != OUT:
                array = jnp.tile(array, (1, self.groups))
            array = refold(array, (*view.sizes(IN), array.shape[1]))
            place = {axis: i for i, axis in enumerate(view.indices(IN))}
            place[view.indices(OUT)[0]] = array.ndim - 1
        else:
            place = {i: i for i in range(array.ndim)}
        order = [place[dim[0].axis] for dim in view.dims]
        assert view.dims[out_dim][0].axis == view.indices(OUT)[0]
        return permute(array, order)

    def matrix(self, op: Operand) -> jax.Array:
        if op.rows == IN and len(op.roles) > 2:
            raise Unsupported("the matrix of a convolution kernel")
        return super().matrix(op)


@rule(p.conv_general_dilated_p, computes=True)
def convolution(ctx: RuleContext, eqn: JaxprEqn, x: ArrayOrView, view: ArrayOrView) -> Results:
    """Kernels whose dimensions are one axis each; not in a batch-grouped convolution."""
    if is_view(x) or not is_view(view) or eqn.params["batch_group_count"] != 1:
        return None
    both = promoted(view, x, eqn)
    if both is None:
        return None
    view, x = both[0].refined(), both[1]
    numbers = eqn.params["dimension_numbers"]
    if any(len(dim) != 1 for dim in view.dims) or len(view.axes) != view.ndim:
        return None
    out = view.dims[numbers.rhs_spec[0]][0].axis
    if view.indices(OUT) != [out] or view.indices(STACK):
        return None
    site = site_of(ctx, view, eqn, ConvCallSite, kernels=view, params=eqn.params)
    x = permute(x, [numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]])
    y = x @ bound(view, view.weight, site)
    # (batch, *space, channels) back into the program's layout
    place = [numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]]
    y = permute(y, [place.index(i) for i in range(y.ndim)])
    return [as_program(y, compat.aval(eqn.outvars[0]).dtype, view.path)]
