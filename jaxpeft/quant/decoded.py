"""Codes as an operand of a site: decoded where they are used, and again in the backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.weight import IN, OUT, STACK, BaseOperand, Operand, Site


class Decoded:
    """A matrix that is computed from coded fields where it is used: `x @ d`, `y @ d.T`, `d[ids]`.

    The backward pass decodes again: what is kept for it are the codes, never the matrix.

    Args:
      decode: From the arrays of the fields, each as (*stack, *its axes), to the matrix
        (*stack, in, out).
      fields: The bound fields, by name; `None` where an optional one is absent.
    """

    __array_ufunc__ = None

    def __init__(
        self,
        decode: Callable[..., jax.Array],
        fields: dict[str, Any],
        rows: str = IN,
        cols: str = OUT,
    ):
        self.decode, self.fields, self.rows, self.cols = decode, fields, rows, cols

    @property
    def T(self) -> "Decoded":
        return Decoded(self.decode, self.fields, self.cols, self.rows)

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
    def _site(self) -> Site:
        return self._first.site

    def _at(self, site: Site, arrays: dict[str, Any]) -> Operand:
        """The matrix as an operand of the site."""
        stack = tuple(role for role in self._first.roles if role == STACK)
        matrix = self.decode(**arrays).astype(site.dtype)
        return BaseOperand(matrix, (*stack, IN, OUT), self.rows, self.cols, site)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(d: Decoded, x: jax.Array, arrays: dict, of_site: dict) -> jax.Array:
    """x @ d, with every array that it depends on as an argument."""
    return x @ d._at(d._site.with_arrays(of_site), arrays)


def _product_jvp(d: Decoded, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Linear in x, with the matrix decoded anew: `jax.checkpoint` has it done in the backward pass
    instead of keeping it, and `_read_again` keeps it from being the matrix of the forward pass."""
    x, arrays, of_site = primals
    dx, darrays, _ = tangents
    moved = {k: v for k, v in darrays.items() if not _is_zero(v)}

    def tangent(x: jax.Array, arrays: dict, dx: Any, moved: dict) -> jax.Array:
        again, terms = _read_again(arrays), []
        if not _is_zero(dx):
            terms.append(dx @ d._at(d._site.with_arrays(of_site), again))
        if moved:  # somebody trains the scales

            def product(part: dict) -> jax.Array:
                return x @ d._at(d._site.with_arrays(of_site), again | part)

            terms.append(jax.jvp(product, ({k: again[k] for k in moved},), (moved,))[1])
        return functools.reduce(jnp.add, terms)

    y = _product(d, x, arrays, of_site)
    if _is_zero(dx) and not moved:
        return y, jnp.zeros_like(y)
    if _is_zero(dx):
        return y, jax.checkpoint(lambda x, a, m: tangent(x, a, dx, m))(x, arrays, moved)
    return y, jax.checkpoint(tangent)(x, arrays, dx, moved)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _is_zero(tangent: Any) -> bool:
    return tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _read_again(arrays: dict[str, Any]) -> dict[str, Any]:
    """The same arrays, in a way that the CPU's compiler does not take for the same.

    `jax.checkpoint` puts a barrier before what is computed again, which XLA's CPU backend drops
    before it looks for common subexpressions: every dense weight of the forward pass would be
    kept for the backward pass. No number is both itself and not itself, but XLA does not know.
    """
    number = next(
        x for x in arrays.values() if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
    )

    def first(number: jax.Array) -> jax.Array:
        return lax.reshape(lax.slice(number, (0,) * number.ndim, (1,) * number.ndim), ())

    def never(number: jax.Array) -> jax.Array:
        return (first(number) != first(number)) & (first(number) == first(number))

    def plainly_never(number: jax.Array) -> jax.Array:
        return (first(number) != first(number)) & jnp.zeros((), bool)  # of the type of `never`

    given = lax.platform_dependent(number, cpu=never, default=plainly_never)
    return {
        k: None if x is None else jnp.where(given, jnp.zeros_like(x), x) for k, x in arrays.items()
    }
