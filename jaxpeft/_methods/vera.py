"""VeRA: one pair of random matrices for all weights, and two trained vectors for each."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped


@weight
class ScaledRandom(Weight):
    """The matrix `w + (left * d) @ (right * b)`: `left` and `right` random, `d` and `b` trained."""

    w: Any = base_weight()
    left: Any = axes("in", "rank", shared=True)
    right: Any = axes("rank", "out", shared=True)
    d: Any = axes("rank")
    b: Any = axes("out")
    key: Any = axes(optional=True)
    dropout: float = static(0.0)

    local_in = local_out = True

    def forward(self, x):
        """x @ (w + (left * d) @ (right * b)) = x @ w + ((x @ left) * d) @ right * b."""
        low = dropped(x, self.key, self.dropout) @ self.left * self.d
        return x @ self.w + low @ self.right * self.b

    def transposed(self, y):
        """y @ (w + (left * d) @ (right * b)).T = y @ w.T + ((y * b) @ right.T) * d @ left.T."""
        low = dropped(y, self.key, self.dropout) * self.b @ self.right.T * self.d
        return y @ self.w.T + low @ self.left.T

    def lookup(self, ids):
        """(w + (left * d) @ (right * b))[ids] = w[ids] + (left[ids] * d) @ right * b."""
        change = self.left[ids] * self.d @ self.right * self.b
        return self.with_delta(self.w[ids], ids, change, self.left.site.rows)

    def materialize(self):
        return dense(self.w) + (self.left * self.d) @ (self.right * self.b)


@register_method
def vera(
    rank: int,
    sites: Sites,
    *,
    initial: float = 0.1,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Vector-based random matrix adaptation: LoRA with frozen random factors and trained scales.

    Each selected matrix `w` (in, out) becomes `w + (left * d) @ (right * b)`, with vectors `d`
    (r,) at `initial` and `b` (out,) at zero, so that training starts at the base model. `left`
    (in, r) and `right` (r, out) are frozen and the same for all weights: the first rows and
    columns of one pair, as large as the largest sides among the sites and uniform within
    sqrt(6 / in) and sqrt(6 / r) (Kaiming's for rectified units). They follow from the key given
    to the method, so that an adapter stores the vectors alone and loading draws them anew.

    In memory, weights with a side of the same length hold the same array, a stack of layers one
    for all, and sides of another length a copy of their own; what rebuilds the tree may copy
    more (`jax.jit` around the method, a checkpoint of the frozen tree). `count` and `memory`
    know shapes alone and count them at every weight.

    Args:
      rank: Columns of `left`. May be more than the weights' own, as it costs one number each.
      sites: The matrices to adapt. A table of many rows makes `left` small for all of them; give
        it a `vera` of its own.
      initial: What `d` starts at.
      dropout: As for `lora`.
      dtype: Of both vectors and both random matrices.

    Returns:
      A method with r + out trained numbers per matrix.

    Raises:
      ValueError: A rank below 1, `initial` of zero (nothing would have a gradient), a dropout
        outside [0, 1), or a part of the outputs is selected.

    References:
      Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2024, sections 3.1 to 3.3.
      https://arxiv.org/abs/2310.11454
    """
    check_rate("vera", dropout)
    check_whole("vera", sites)
    if rank < 1:
        raise ValueError(f"`vera(rank={rank})`: a rank of at least 1 is needed.")
    if not initial:
        raise ValueError(
            f"`vera(initial={initial})`: with `d` and `b` both zero neither has a gradient. "
            "Give a number other than zero, such as 0.1."
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        n = max((site.size(IN) for site in sites.values()), default=0)
        m = max((site.size(OUT) for site in sites.values()), default=0)
        keys = jax.random.split(key)

        def drawn(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            bound = math.sqrt(6 / max(shape[0], 1))
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        left, right = drawn(keys[0], (n, rank)), drawn(keys[1], (rank, m))
        # Each length is cut once: weights that share it hold one array.
        rows = functools.cache(lambda side: left[:side])
        columns = functools.cache(lambda side: right[:, :side])

        def make(key: jax.Array, site: Site, view: View) -> View:
            del key
            weight = ScaledRandom(
                view.weight,
                rows(site.size(IN)),
                columns(site.size(OUT)),
                Trainable(jnp.full((*site.stack, rank), initial, dtype)),
                Trainable(jnp.zeros((*site.stack, site.size(OUT)), dtype)),
                dropout_key(site, view, dropout),
                dropout,
            )
            return dataclasses.replace(view, weight=weight)

        return apply_to_sites(key, tree, sites, make, caller="vera")

    options = dict(rank=rank, sites=sites, initial=initial, dropout=dropout, dtype=dtype)
    return Method("vera", options, apply)
