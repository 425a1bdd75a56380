"""VeRA: one pair of frozen random matrices for all weights, and two trainable vectors each."""

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
class ScaledRandomFactors(Weight):
    """The matrix `w + (left * d) @ (right * b)`, with `left` and `right` frozen at random."""

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
        delta = self.left[ids] * self.d @ self.right * self.b
        return self.with_delta(self.w[ids], ids, delta, self.left.site.rows)

    def materialize(self):
        return dense(self.w) + (self.left * self.d) @ (self.right * self.b)


@register_method
def vera(
    rank: int,
    sites: Sites,
    *,
    d_initial: float = 0.1,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Vector-based random matrix adaptation: frozen random factors, trainable scaling vectors.

    Each selected matrix `w` (in, out) becomes

        w + (left * d) @ (right * b)

    with trainable vectors `d` (r,), which starts at `d_initial`, and `b` (out,), which starts at
    zero, so that training starts at the base model. `left` (in, r) and `right` (r, out) are frozen
    and shared by all weights: they are the first rows and columns of one random pair, which is as
    large as the largest sides among the sites, with entries uniform within sqrt(6 / in) and
    sqrt(6 / r) (Kaiming's distribution for ReLU). They are computed from the method's key, so
    that an adapter folder stores only the vectors.

    Weights with a side of the same length share one array in memory, as do the layers of a stack;
    each other length needs a copy of its own. Functions that rebuild the tree may copy more, such
    as `jax.jit` around the method, or a checkpoint of the frozen tree. `count_params` and
    `estimate_memory` see shapes only and count the random matrices at every weight.

    Args:
      rank: r, the number of columns of `left`. It may be larger than the sides of a weight, since
        each rank adds only one trainable parameter per weight.
      sites: The matrices to adapt, with all of their outputs. An embedding of many rows makes the
        entries of `left` small for all weights; use a second `vera` for it.
      d_initial: Start of every entry of `d`, not zero.
      dropout: As for `lora`.
      dtype: Dtype of both vectors and both random matrices.

    Returns:
      A `Method` with r + out trainable parameters per matrix.

    Raises:
      ValueError: `rank` is below 1, `d_initial` is zero (no array would have a gradient), the
        dropout is outside [0, 1), or a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.vera(16, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/d': (16,), 'w/b': (4,)}

    References:
      Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2024, sections 3.1 to 3.3.
      https://arxiv.org/abs/2310.11454
    """
    check_rate("vera", dropout)
    check_whole("vera", sites)
    if rank < 1:
        raise ValueError(f"`vera(rank={rank})`: give a rank of at least 1.")
    if not d_initial:
        raise ValueError(
            f"`vera(d_initial={d_initial})`: with `d` and `b` both zero, neither has a gradient. "
            "Give a number other than zero, such as 0.1."
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        n = max((site.size(IN) for site in sites.values()), default=0)
        m = max((site.size(OUT) for site in sites.values()), default=0)
        keys = jax.random.split(key)

        def random_matrix(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            bound = math.sqrt(6 / max(shape[0], 1))
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        left, right = random_matrix(keys[0], (n, rank)), random_matrix(keys[1], (rank, m))
        # Each length is sliced once, so that weights with sides of that length share one array.
        rows = functools.cache(lambda side: left[:side])
        columns = functools.cache(lambda side: right[:, :side])

        def make(key: jax.Array, site: Site, view: View) -> View:
            del key
            weight = ScaledRandomFactors(
                view.weight,
                rows(site.size(IN)),
                columns(site.size(OUT)),
                Trainable(jnp.full((*site.stack, rank), d_initial, dtype)),
                Trainable(jnp.zeros((*site.stack, site.size(OUT)), dtype)),
                dropout_key(site, view, dropout),
                dropout,
            )
            return dataclasses.replace(view, weight=weight)

        return apply_to_sites(key, tree, sites, make, caller="vera")

    options = dict(rank=rank, sites=sites, d_initial=d_initial, dropout=dropout, dtype=dtype)
    return Method("vera", options, apply)
