"""AdaLoRA: low-rank deltas in the form of a singular value decomposition, with ranks to give up."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole
from jaxpeft.extend._dropout import dropped


@weight
class Triplets(Weight):
    """The matrix `w + scale * (a * values) @ b`: value k is of column k of a and row k of b."""

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    values: Any = axes("rank")
    b: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ w + scale * ((x @ a) * values) @ b."""
        low = (dropped(x, self.key, self.dropout) @ self.a * self.values) @ self.b
        return x @ self.w + self.scale * low

    def transposed(self, y):
        """y @ w.T + scale * ((y @ b.T) * values) @ a.T."""
        low = (dropped(y, self.key, self.dropout) @ self.b.T * self.values) @ self.a.T
        return y @ self.w.T + self.scale * low

    def lookup(self, ids):
        """w[ids] + scale * (a[ids] * values) @ b."""
        change = self.scale * ((self.a[ids] * self.values) @ self.b)
        return self.with_delta(self.w[ids], ids, change, self.a.site.rows)

    def materialize(self):
        return dense(self.w) + self.scale * (self.a * self.values) @ self.b


@register_method
def adalora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Adaptive budget allocation: LoRA as singular values that can be given up one by one.

    Each selected matrix `w` becomes `w + s * (a * values) @ b`, s = alpha / r, with `a` (in, r)
    and `b` (r, out) from Normal(0, std^2) and `values` (r,) zero, so that training starts at the
    base model. Train it under `optim.rank_allocator`, which sets the least important values of all
    matrices to zero until a budget is met, with `penalty * orthogonality(adapter)` in the loss;
    `shrunk` then takes them out of the arrays.

    Args:
      rank: What each matrix begins with, 1.5 times the target in the paper.
      sites: The matrices to adapt.
      alpha: `None` means s = 1.
      dropout: As for `lora`.
      std: See above.
      dtype: Of what is trained.

    Returns:
      A method with r * (in + out + 1) trained numbers per matrix.

    Raises:
      ValueError: As `lora`; or a part of the outputs is selected, or a std that is not positive.

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning,
      2023, section 3. https://arxiv.org/abs/2303.10512
    """
    if std <= 0:
        raise ValueError(f"`adalora(std={std})`: factors of zero would stay there.")
    check_whole("adalora", sites)
    low = low_rank("adalora", rank, sites, alpha=alpha, dropout=dropout, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del site
        old: LowRank = view.weight
        keys = jax.random.split(key)
        a, b = (
            Trainable(std * jax.random.normal(k, x.value.shape, dtype))
            for k, x in zip(keys, (old.a, old.b), strict=True)
        )
        values = Trainable(jnp.zeros((*a.shape[:-2], a.shape[-1]), dtype))
        weight = Triplets(old.w, a, values, b, old.key, old.scale, old.dropout)
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="adalora")

    options = dict(rank=rank, sites=sites, alpha=alpha, dropout=dropout, std=std, dtype=dtype)
    return Method("adalora", options, apply)
