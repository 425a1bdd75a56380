"""AdaLoRA: updates in the form of a singular value decomposition, whose ranks can be pruned."""

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
class SVDTriplets(Weight):
    """The matrix `w + scale * (a * values) @ b`.

    A triplet is an entry of `values`, a column of `a` and a row of `b`, as a singular value with
    its two singular vectors.
    """

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
        delta = (dropped(x, self.key, self.dropout) @ self.a * self.values) @ self.b
        return x @ self.w + self.scale * delta

    def transposed(self, y):
        """y @ w.T + scale * ((y @ b.T) * values) @ a.T."""
        delta = (dropped(y, self.key, self.dropout) @ self.b.T * self.values) @ self.a.T
        return y @ self.w.T + self.scale * delta

    def lookup(self, ids):
        """w[ids] + scale * (a[ids] * values) @ b."""
        delta = self.scale * ((self.a[ids] * self.values) @ self.b)
        return self.with_delta(self.w[ids], ids, delta, self.a.site.rows)

    def materialize(self):
        return dense(self.w) + self.scale * (self.a * self.values) @ self.b


@register_method
def adalora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    init_std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Adaptive budget allocation: LoRA in a form whose ranks can be pruned one by one.

    Each selected matrix `w` (in, out) becomes

        w + s * (a * values) @ b,    s = alpha / r

    with trainable `a` (in, r) and `b` (r, out), which start at Normal(0, init_std^2), and `values`
    (r,), which start at zero, so that training starts at the base model. During training,
    `optim.rank_allocator` sets the least important values of all matrices to zero until a budget
    is met. Add `penalty * adapters.orthogonality_penalty(adapter)` to the loss. After training,
    `adapters.drop_pruned_ranks` removes the zero values from the arrays.

    Args:
      rank: r, the initial rank of each matrix, or a mapping as for `lora`. In the paper it is 1.5
        times the mean rank at the end.
      sites: The matrices to adapt, with all of their outputs.
      alpha, dropout: As for `lora`.
      init_std: Standard deviation of `a` and `b` at the start, positive.
      dtype: Dtype of the trainable arrays.

    Returns:
      A `Method` with r * (in + out + 1) trainable parameters per matrix.

    Raises:
      ValueError: As for `lora`. Also if a slice of the outputs is selected, or if `init_std` is
        not positive.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.adalora(3, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 3), 'w/values': (3,), 'w/b': (3, 4)}

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning,
      2023, section 3. https://arxiv.org/abs/2303.10512
    """
    if init_std <= 0:
        raise ValueError(
            f"`adalora(init_std={init_std})`: give a positive number; factors that start at zero "
            "have no gradient."
        )
    check_whole("adalora", sites)
    low = low_rank("adalora", rank, sites, alpha=alpha, dropout=dropout, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del site
        old: LowRank = view.weight
        keys = jax.random.split(key)
        a, b = (
            Trainable(init_std * jax.random.normal(k, x.value.shape, dtype))
            for k, x in zip(keys, (old.a, old.b), strict=True)
        )
        values = Trainable(jnp.zeros((*a.shape[:-2], a.shape[-1]), dtype))
        weight = SVDTriplets(old.w, a, values, b, old.key, old.scale, old.dropout)
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="adalora")

    options = dict(
        rank=rank, sites=sites, alpha=alpha, dropout=dropout, init_std=init_std, dtype=dtype
    )
    return Method("adalora", options, apply)
