"""A rematerialized matrix: computed where it is used, and again in the backward pass.

Between the two passes only the arrays are kept that it is computed from: quantized values and
scales, or factors and a base.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft._operand import BaseOperand, CallSite, Operand, permute, refold
from jaxpeft._weight import IN, OUT, STACK, dense


class Computed:
    """A matrix that is computed from fields of a weight: `x @ m`, `y @ m.T`, `m[ids]`.

    Args:
      compute: From the arrays of the fields, each as (*stack, *its axes), to the matrix
        (*stack, in, out).
      fields: The bound fields, by name; `None` where an optional one is absent. The first is one
        of the weight's own, with leading stack axes.
      rows, cols: The roles of the sides that `x @ m` contracts and keeps.
    """

    __array_ufunc__ = None

    def __init__(
        self,
        compute: Callable[..., jax.Array],
        fields: dict[str, Any],
        rows: str = IN,
        cols: str = OUT,
    ):
        self.compute, self.fields, self.rows, self.cols = compute, fields, rows, cols

    @property
    def T(self) -> "Computed":
        return Computed(self.compute, self.fields, self.cols, self.rows)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return _product(self, x, self._arrays, self._site.arrays)

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        return self._at(self._site, self._arrays)[ids]

    @property
    def _arrays(self) -> dict[str, Any]:
        return {k: None if op is None else op.array for k, op in self.fields.items()}

    @property
    def _first(self) -> Operand:
        return next(op for op in self.fields.values() if op is not None)

    @property
    def _site(self) -> CallSite:
        return self._first.site

    def _at(self, site: CallSite, arrays: dict[str, Any]) -> Operand:
        """The matrix as an operand of the call site."""
        stack = tuple(role for role in self._first.roles if role == STACK)
        matrix = self.compute(**arrays).astype(site.dtype)
        return BaseOperand(matrix, (*stack, IN, OUT), self.rows, self.cols, site)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(m: Computed, x: jax.Array, arrays: dict, of_site: dict) -> jax.Array:
    """x @ m, as a function of every array that it depends on."""
    return x @ m._at(m._site.with_arrays(of_site), arrays)


def _product_jvp(m: Computed, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The derivative, with a matrix of its own.

    `jax.checkpoint` computes that matrix in the backward pass instead of keeping it, and
    `_read_again` keeps XLA from merging it with the matrix of the forward pass.
    """
    x, arrays, of_site = primals
    dx, darrays, _ = tangents
    moved = {k: v for k, v in darrays.items() if not _is_zero(v)}

    def tangent(x: jax.Array, arrays: dict, dx: Any, moved: dict) -> jax.Array:
        again, terms = _read_again(arrays), []
        if not _is_zero(dx):
            terms.append(dx @ m._at(m._site.with_arrays(of_site), again))
        if moved:  # arrays that the matrix is computed from are differentiated, too

            def product(part: dict) -> jax.Array:
                return x @ m._at(m._site.with_arrays(of_site), again | part)

            terms.append(jax.jvp(product, ({k: again[k] for k in moved},), (moved,))[1])
        return functools.reduce(jnp.add, terms)

    y = _product(m, x, arrays, of_site)
    if _is_zero(dx) and not moved:
        return y, jnp.zeros_like(y)
    if _is_zero(dx):
        return y, jax.checkpoint(lambda x, a, m: tangent(x, a, dx, m))(x, arrays, moved)
    return y, jax.checkpoint(tangent)(x, arrays, dx, moved)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _read_again(arrays: dict[str, Any]) -> dict[str, Any]:
    """The same arrays, in a form that XLA's CPU backend does not recognize as the same.

    `jax.checkpoint` puts a barrier before what is computed again. The CPU backend drops it before
    it eliminates common subexpressions, and would so keep every dense weight of the forward pass
    for the backward pass. No number both equals itself and does not, but XLA does not know that.
    """
    floats = [x for x in arrays.values() if x is not None and _is_float(x)]

    def first(number: jax.Array) -> jax.Array:
        return lax.reshape(lax.slice(number, (0,) * number.ndim, (1,) * number.ndim), ())

    def never(number: jax.Array) -> jax.Array:
        return (first(number) != first(number)) & (first(number) == first(number))

    def plainly_never(number: jax.Array) -> jax.Array:
        return (first(number) != first(number)) & jnp.zeros((), bool)  # same type as `never`

    def again(x: jax.Array) -> jax.Array:
        # A number of its own where it has one: another array's may vary over devices where x does
        # not.
        number = x if _is_float(x) else floats[0]
        given = lax.platform_dependent(number, cpu=never, default=plainly_never)
        return jnp.where(given, jnp.zeros_like(x), x)

    return {name: None if x is None else again(x) for name, x in arrays.items()}


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def matrix_of(w: Any) -> tuple[dict[str, Operand], Callable[[dict[str, Any]], jax.Array]]:
    """The operands of a bound weight or array, and how its matrix is computed from their arrays.

    So a weight that computes with the entries of its base works over any base, quantized ones too.

    Returns:
      The operands by name, for the fields of `Computed`; and a function from their arrays, by the
      same names, to the matrix (*stack, in, out).
    """
    leaves, treedef = jax.tree.flatten(w)
    operands = {f"w{i}": op for i, op in enumerate(leaves)}

    def matrix(arrays: dict[str, Any]) -> jax.Array:
        plain = (
            _canonical(op, arrays[name]) if isinstance(op, BaseOperand) else arrays[name]
            for name, op in operands.items()
        )
        return dense(jax.tree.unflatten(treedef, plain))

    return operands, matrix


def _canonical(op: Operand, array: jax.Array) -> jax.Array:
    """An array in the program's layout as (*stack, in, out)."""
    at = {role: [i for i, r in enumerate(op.roles) if r == role] for role in (STACK, IN, OUT)}
    stack = [array.shape[i] for i in at[STACK]]
    order = [i for positions in at.values() for i in positions]
    sides = [math.prod(array.shape[i] for i in at[role]) for role in (IN, OUT)]
    return refold(permute(array, order), (*stack, *sides))
