"""A weight times a scalar is a weight; times a factor along one side, a composite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxpeft._operand import Operand
from jaxpeft._rules.composites import scaled
from jaxpeft._rules.registry import ArrayOrView, Results, RuleContext, rule
from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, axes, base_of, base_weight, dense, static, weight


@weight
class Scaled(Weight):
    """The matrix `factor * w`, or `w / factor`."""

    w: Any = base_weight()
    factor: Any = axes(shared=True)
    divides: bool = static(False)
    rounded_to: tuple[Any, ...] = static(())  # dtypes that the program has cast `w` to, in turn

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
        return y / _scalar(self.factor) if self.divides else y * self.factor

    def _rounded(self, entries):
        for dtype in self.rounded_to:
            entries = entries.astype(dtype)
        return entries


def _scalar(factor: jax.Array | Operand) -> jax.Array:
    return factor.matrix if isinstance(factor, Operand) else factor


def _scaled(w: Any, factor: jax.Array, divides: bool, rounded_to: tuple[Any, ...]) -> Any:
    """The weight with its outermost mergeable part scaled, which an adapter around it sees."""
    if isinstance(w, Weight) and not w.is_mergeable:
        inner = _scaled(base_of(w), factor, divides, rounded_to)
        return dataclasses.replace(w, w=inner)  # type: ignore
    return Scaled(w, factor, divides, rounded_to)


def _times(view: View, factor: ArrayLike, divides: bool = False) -> list[View]:
    """The scaled view. The program rounds the product to its dtype; a wider one would show that."""
    before = (*view.rounded_from, view.dtype)
    weight = _scaled(view.weight, jnp.asarray(factor), divides, before)
    return [dataclasses.replace(view, weight=weight, rounded_from=before)]


@rule(p.mul_p)
def multiply(ctx: RuleContext, eqn: JaxprEqn, a: ArrayOrView, b: ArrayOrView) -> Results:
    """By a scalar, or by a factor along a side; a full array of factors is not covered."""
    view, factor = (a, b) if is_view(a) else (b, a)
    if not is_view(view) or is_view(factor):
        return None
    return scaled(eqn, view, factor) if jnp.ndim(factor) else _times(view, factor)


@rule(p.div_p)
def divide(ctx: RuleContext, eqn: JaxprEqn, a: ArrayOrView, b: ArrayOrView) -> Results:
    """By a scalar, or by a factor along a side."""
    if not is_view(a) or is_view(b):
        return None
    return scaled(eqn, a, 1 / b) if jnp.ndim(b) else _times(a, b, divides=True)


@rule(p.neg_p)
def negate(ctx: RuleContext, eqn: JaxprEqn, view: View) -> list[View]:
    """A product with -1, which rounds nothing."""
    weight = _scaled(view.weight, jnp.asarray(-1, view.dtype), False, ())
    return [dataclasses.replace(view, weight=weight)]
