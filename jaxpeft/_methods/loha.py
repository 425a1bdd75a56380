"""LoHa: the Hadamard (entrywise) product of two low-rank matrices as the update."""

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
class LowRankHadamard(Weight):
    """The matrix `w + scale * (a1 @ b1) * (a2 @ b2)`, whose delta has rank r ** 2.

    With `a[i, (p, q)] = a1[i, p] * a2[i, q]` and `b[(p, q), j] = b1[p, j] * b2[q, j]`,

        (a1 @ b1) * (a2 @ b2) = a @ b

    so that it acts as a low-rank matrix, and no array of the weight's size is formed.
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
    """Low-rank Hadamard product adaptation.

    Each selected matrix `w` (in, out) becomes

        w + s * (a1 @ b1) * (a2 @ b2),    s = alpha / r

    where the middle product is entrywise, so that an update of rank up to r ** 2 has twice the
    trainable parameters of a LoRA of rank r. `a1` and `a2` (in, r) start at Normal(0, 1), `b1`
    (r, out) at a normal distribution with standard deviation 0.1 (as in LyCORIS) and `b2` (r, out)
    at zero, so that training starts at the base model.

    A product with the update costs as much as in a `lora` of rank r ** 2, in time and in memory of
    its factors. This is more than the base product itself if r ** 2 > in * out / (in + out).

    Args:
      rank: r, the number of columns of `a1` and of `a2`, at most min(in, out), or a mapping as for
        `lora`.
      sites: The matrices to adapt, with all of their outputs.
      alpha: Strength of the update, or a mapping as for `lora`. `None` means s = 1.
      dropout, dtype: As for `lora`.

    Returns:
      A `Method` with 2 * r * (in + out) trainable parameters per matrix.

    Raises:
      ValueError: A rank is out of range (the message names the matrix), the dropout is outside
        [0, 1), or a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.loha(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a1': (8, 2), 'w/b1': (2, 4), 'w/a2': (8, 2), 'w/b2': (2, 4)}

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

        def normal(key: jax.Array, std: float, *shape: int) -> Trainable:
            return Trainable(std * jax.random.normal(key, (*site.stack, *shape), dtype))

        weight = LowRankHadamard(
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
