"""HiRA: the Hadamard (entrywise) product of the frozen matrix and a low-rank one as the update."""

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
class HadamardWithBase(Weight):
    """The matrix `w + scale * w * (a @ b)`, where `w * (a @ b)` is entrywise.

    A product with an entrywise product has no factored form, so the delta is formed where it is
    used, and again in the backward pass.
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    scale: float = static(1.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ w + x @ (scale * w * (a @ b))."""
        return x @ self.w + x @ self._delta()

    def transposed(self, y):
        """y @ w.T + y @ (scale * w * (a @ b)).T."""
        return y @ self.w.T + y @ self._delta().T

    def lookup(self, ids):
        """w[ids] * (1 + scale * a[ids] @ b)."""
        rows = self.w[ids]
        delta = rows * (self.scale * (self.a[ids] @ self.b)).astype(rows.dtype)
        return self.with_delta(rows, ids, delta, self.a.site.rows)

    def materialize(self):
        w = dense(self.w)
        return w + w * (self.scale * self.a @ self.b)

    def _delta(self):
        operands, matrix = matrix_of(self.w)

        def delta(a: jax.Array, b: jax.Array, **base: Any) -> jax.Array:
            return matrix(base) * (self.scale * a @ b)

        return Computed(delta, {"a": self.a, "b": self.b, **operands})


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

    Each selected matrix `w` (in, out) becomes

        w + s * w * (a @ b),    s = alpha / r

    where `w * (a @ b)` is entrywise, with trainable factors `a` (in, r), which starts at random,
    and `b` (r, out), which starts at zero, so that training starts at the base model. The update
    has rank up to r * rank(w) with as many parameters as LoRA's. Entries of `w` that are zero stay
    zero. A product costs twice the base product, and needs one temporary array of the weight's
    size.

    Args:
      rank, init, dtype: As for `lora`.
      sites: The matrices to adapt, with all of their outputs.
      alpha: Strength of the update, or a mapping as for `lora`. `None` means s = 1, as in the
        paper.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix.

    Raises:
      ValueError: As for `lora`. Also if a slice of the outputs is selected, or if another method's
        weight at a selected matrix is not mergeable.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.hira(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 2), 'w/b': (2, 4)}

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
        return dataclasses.replace(view, weight=HadamardWithBase(old.w, old.a, old.b, old.scale))

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="hira")

    options = dict(rank=rank, sites=sites, alpha=alpha, init=init, dtype=dtype)
    return Method("hira", options, apply)
