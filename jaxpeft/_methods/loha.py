"""LoHa: two low-rank matrices multiplied entry by entry."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_rank, check_whole
from jaxpeft.extend._dropout import check_rate, dropout_key


@weight
class HadamardProduct(Weight):
    """The matrix `w + scale * (a1 @ b1) * (a2 @ b2)`, of which the change has rank r ** 2.

    With `a[i, (p, q)] = a1[i, p] * a2[i, q]` and `b[(p, q), j] = b1[p, j] * b2[q, j]`,

        (a1 @ b1) * (a2 @ b2) = a @ b

    so that it acts as a low-rank matrix, and nothing of the weight's size is formed.
    """

    w: Any = base_weight()
    a1: Any = axes("in", "rank")
    b1: Any = axes("rank", "out")
    a2: Any = axes("in", "rank")
    b2: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def derived(self):
        a1, a2, b1, b2 = (f.matrix for f in (self.a1, self.a2, self.b1, self.b2))
        a = a1[:, :, None] * a2[:, None, :]
        b = b1[:, None, :] * b2[None, :, :]
        return {"a": a.reshape(a1.shape[0], -1), "b": b.reshape(-1, b1.shape[1])}

    def acting(self, **derived):
        a, b = derived["a"], derived["b"]
        return LowRank(self.w, a, b, self.key, self.scale, self.dropout, part=None)

    def materialize(self):
        return dense(self.w) + self.scale * (self.a1 @ self.b1) * (self.a2 @ self.b2)


@register_method
def loha(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Low-rank Hadamard product: twice LoRA's numbers for the square of its rank.

    Each selected matrix `w` (in, out) becomes `w + s * (a1 @ b1) * (a2 @ b2)`, entry by entry,
    with `a1` and `a2` (in, r) Normal(0, 1), `b1` (r, out) Normal(0, 0.01) (a deviation of 0.1,
    as LyCORIS draws them) and `b2` (r, out) zero, so that training starts at the base model;
    `s` is alpha / r.

    A product costs what that of a `lora` of rank r ** 2 costs, in factors of that size: from
    r ** 2 = in * out / (in + out) on, more than the weight itself.

    Args:
      rank: Columns of `a1` and of `a2`; a mapping as for `lora`. At most min(in, out).
      sites: The matrices to adapt.
      alpha: Strength of the update, or a mapping. `None` means `s` = 1.
      dropout, dtype: As for `lora`.

    Returns:
      A method with 2 * r * (in + out) trained numbers per matrix.

    Raises:
      ValueError: A rank out of range (names the matrix), a dropout outside [0, 1), or a part of
        the outputs is selected.

    References:
      Hyeon-Woo et al., FedPara: Low-rank Hadamard Product for Communication-Efficient Federated
      Learning, 2022, section 2.2. https://arxiv.org/abs/2108.06098
      Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
      Evaluation, 2024. https://arxiv.org/abs/2309.14859
    """
    check_rate("loha", dropout)
    check_whole("loha", sites)
    ranks = by_pattern(rank, sites, "rank")
    alphas = by_pattern(alpha, sites, "alpha")

    def make(key: jax.Array, site: Site, view: View) -> View:
        r, alpha = ranks[site.path], alphas[site.path]
        n, m = site.size(IN), site.size(OUT)
        check_rank("loha", r, site)
        keys = jax.random.split(key, 3)

        def normal(key: jax.Array, size: float, *shape: int) -> Trainable:
            return Trainable(size * jax.random.normal(key, (*site.stack, *shape), dtype))

        weight = HadamardProduct(
            view.weight,
            normal(keys[0], 1.0, n, r),
            normal(keys[1], 0.1, r, m),
            normal(keys[2], 1.0, n, r),
            Trainable(jnp.zeros((*site.stack, r, m), dtype)),
            key=dropout_key(site, view, dropout),
            scale=1.0 if alpha is None else alpha / r,
            dropout=dropout,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(rank=rank, sites=sites, alpha=alpha, dropout=dropout, dtype=dtype)
    return Method(
        "loha", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="loha")
    )
