"""HiRA: a low-rank matrix that multiplies the frozen one entry by entry."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._computed import Computed, matrix_of
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_entries, check_whole


@weight
class Hadamard(Weight):
    """The matrix `w + scale * w * (a @ b)`, entry by entry: of full rank where `w` is.

    Unlike that of a sum, a product with it has no cheaper form, so the change is formed where it
    is used, and again in the backward pass.
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    scale: float = static(1.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ w + x @ (scale * w * (a @ b))."""
        return x @ self.w + x @ self._change()

    def transposed(self, y):
        """y @ w.T + y @ (scale * w * (a @ b)).T."""
        return y @ self.w.T + y @ self._change().T

    def lookup(self, ids):
        """w[ids] * (1 + scale * a[ids] @ b)."""
        rows = self.w[ids]
        change = rows * (self.scale * (self.a[ids] @ self.b)).astype(rows.dtype)
        return self.with_delta(rows, ids, change, self.a.site.rows)

    def materialize(self):
        w = dense(self.w)
        return w + w * (self.scale * self.a @ self.b)

    def _change(self):
        operands, matrix = matrix_of(self.w)

        def change(a: jax.Array, b: jax.Array, **of_base: Any) -> jax.Array:
            return matrix(of_base) * (self.scale * a @ b)

        return Computed(change, {"a": self.a, "b": self.b, **operands})


@register_method
def hira(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    """Hadamard high-rank adaptation: the update is the base times a low-rank matrix.

    Each selected matrix `w` becomes `w + s * w * (a @ b)`, entry by entry, with `a` (in, r) random
    and `b` (r, out) zero, so that training starts at the base model. An update of rank up to
    r * rank(w) from LoRA's number of parameters; entries of `w` that are zero stay zero.

    Args:
      rank, init, dtype: As for `lora`.
      sites: The matrices to adapt.
      alpha: `s` is alpha / r; `None`, as in the paper, means `s` = 1.

    Returns:
      A method with r * (in + out) trained numbers per matrix. A product costs twice the base's,
      and an array of the weight's size at a time.

    Raises:
      ValueError: As `lora`; or a part of the outputs is selected.

    References:
      Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
      Models, 2025, section 3. https://openreview.net/forum?id=TwJrTz9cRS
    """
    check_whole("hira", sites)
    low = low_rank("hira", rank, sites, alpha=alpha, init=init, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        old: LowRank = view.weight
        check_entries("hira", site, dataclasses.replace(view, weight=old.w))
        return dataclasses.replace(view, weight=Hadamard(old.w, old.a, old.b, old.scale))

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="hira")

    options = dict(rank=rank, sites=sites, alpha=alpha, init=init, dtype=dtype)
    return Method("hira", options, apply)
