"""A weight times a number is a weight; times numbers along one side, a composite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as p

from jaxpeft.rules.composites import scaled
from jaxpeft.rules.registry import rule
from jaxpeft.weight import View, Weight, axes, base, base_of, dense, is_view, weight


@weight
class Scaled(Weight):
    """The matrix `factor * w`."""

    w: Any = base()
    factor: Any = axes(shared=True)

    local_in = local_out = True

    def forward(self, x):
        """x @ (factor * w) = (x @ w) * factor."""
        return x @ self.w * self.factor

    def transposed(self, y):
        """y @ (factor * w).T = (y @ w.T) * factor."""
        return y @ self.w.T * self.factor

    def lookup(self, ids):
        """(factor * w)[ids] = w[ids] * factor."""
        return self.w[ids] * self.factor

    def materialize(self) -> jax.Array:
        return dense(self.w) * self.factor


def _scaled(w: Any, factor: Any) -> Any:
    """The number goes around the largest part that is a matrix: an adapter sees the product."""
    if isinstance(w, Weight) and not w.is_matrix:
        return dataclasses.replace(w, w=_scaled(base_of(w), factor))  # type: ignore
    return Scaled(w, factor)


def _times(view: View, factor: Any) -> list:
    return [dataclasses.replace(view, weight=_scaled(view.weight, jnp.asarray(factor)))]


@rule(p.mul_p)
def multiply(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """By one number, or by numbers along a side; by an array it is no weight any more."""
    view, factor = (a, b) if is_view(a) else (b, a)
    if is_view(factor):
        return None
    return scaled(eqn, view, factor) if jnp.ndim(factor) else _times(view, factor)


@rule(p.div_p)
def divide(run: Any, eqn: Any, a: Any, b: Any) -> list | None:
    """By numbers, as a product with their inverse."""
    return None if is_view(b) else multiply(run, eqn, a, 1 / b)


@rule(p.neg_p)
def negate(run: Any, eqn: Any, view: View) -> list:
    """A product with -1."""
    return _times(view, jnp.asarray(-1, view.dtype))
