"""A weight times a number is a weight; times numbers along one side, a composite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from jaxpeft._operand import Operand
from jaxpeft._rules.composites import scaled
from jaxpeft._rules.registry import rule
from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, axes, base_of, base_weight, dense, static, weight


@weight
class Scaled(Weight):
    """The matrix `factor * w`, or `w / factor`."""

    w: Any = base_weight()
    factor: Any = axes(shared=True)
    divides: bool = static(False)
    rounded_to: tuple[Any, ...] = static(())  # what the program has cast `w` to before, in turn

    local_in = local_out = True

    def forward(self, x):
        """x @ (factor * w) = (x @ w) * factor."""
        return self._times(x @ self.w)

    def transposed(self, y):
        """y @ (factor * w).T = (y @ w.T) * factor."""
        return self._times(y @ self.w.T)

    def lookup(self, ids):
        """(factor * w)[ids] = w[ids] * factor."""
        return self._times(self._rounded(self.w[ids]))

    def materialize(self) -> jax.Array:
        return self._times(self._rounded(dense(self.w)))

    def _times(self, y):
        return y / _number(self.factor) if self.divides else y * self.factor

    def _rounded(self, entries):
        for dtype in self.rounded_to:
            entries = entries.astype(dtype)
        return entries


def _number(factor: Any) -> jax.Array:
    return factor.matrix if isinstance(factor, Operand) else factor


def _scaled(w: Any, *how: Any) -> Any:
    """The number goes around the largest part that is a matrix: an adapter sees the product."""
    if isinstance(w, Weight) and not w.is_mergeable:
        return dataclasses.replace(w, w=_scaled(base_of(w), *how))  # type: ignore
    return Scaled(w, *how)


def _times(view: View, factor: Any, divides: bool = False) -> list:
    """The product is rounded to the view's dtype, which a wider one would show."""
    before = (*view.rounded_from, view.dtype)
    weight = _scaled(view.weight, jnp.asarray(factor), divides, before)
    return [dataclasses.replace(view, weight=weight, rounded_from=before)]


@rule(p.mul_p)
def multiply(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """By one number, or by numbers along a side; by an array it is no weight any more."""
    view, factor = (a, b) if is_view(a) else (b, a)
    if is_view(factor):
        return None
    return scaled(eqn, view, factor) if jnp.ndim(factor) else _times(view, factor)


@rule(p.div_p)
def divide(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """By one number, or by numbers along a side."""
    if is_view(b):
        return None
    return scaled(eqn, a, 1 / b) if jnp.ndim(b) else _times(a, b, divides=True)


@rule(p.neg_p)
def negate(run: Any, eqn: Any, view: View) -> list:
    """A product with -1, which rounds nothing."""
    weight = _scaled(view.weight, jnp.asarray(-1, view.dtype), False, ())
    return [dataclasses.replace(view, weight=weight)]
