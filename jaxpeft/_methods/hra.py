"""HRA: a product of Householder reflections of the inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank
from jaxpeft._methods.oft import as_sharded
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, Weight, axes, base_weight, dense, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class HouseholderReflections(Weight):
    """The matrix `H_r @ ... @ H_1 @ w`, H_i = I - 2 n_i n_i.T with n_i = u_i / |u_i|.

    In the compact form of a product of reflections this is w + a @ b, with

        a = n,    b = -(I / 2 + tril(n.T @ n, -1))^-1 @ (n.T @ w)

    so that no (in, in) matrix is formed, and the weight acts as a low-rank update.
    """

    w: Any = base_weight()
    u: Any = axes("in", "rank")

    local_out = True

    def derived(self):
        n = self._normalized(self.u.matrix)
        nw = n.T.astype(jnp.promote_types(n.dtype, self.u.site.dtype)) @ self.w
        return {"a": n, "b": self._second_factor(n, nw)}

    def acting(self, **derived):
        return LowRank(self.w, derived["a"], derived["b"], None, scale=1.0, dropout=0.0, part=None)

    def materialize(self):
        return as_sharded(self._reflected, dense(self.w), self.u)

    def _reflected(self, w, u):
        n = self._normalized(u)
        return w + n @ self._second_factor(n, n.T @ w)

    def _normalized(self, u):
        """n (in, rank): the columns of u with norm 1."""
        wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        return wide / jnp.linalg.norm(wide, axis=0)

    def _second_factor(self, n, nw):
        """b (rank, out), from n and nw = n.T @ w."""
        with jax.default_matmul_precision("highest"):
            system = jnp.tril(n.T @ n, -1) + jnp.eye(n.shape[1], dtype=n.dtype) / 2
        dtype = jnp.promote_types(n.dtype, nw.dtype)
        return -jax.scipy.linalg.solve_triangular(
            system.astype(dtype), nw.astype(dtype), lower=True
        )


@register_method
def hra(rank: int | Mapping[str, int], sites: Sites, *, dtype: Any = jnp.float32) -> Method:
    """Householder reflection adaptation: a product of r reflections of the inputs.

    Each selected matrix `w` (in, out) becomes

        H_r @ ... @ H_1 @ w,    H_i = I - 2 u_i u_i^T / |u_i|^2

    with u_i the columns of a trainable `u` (in, r). The columns start at random directions in
    equal pairs, whose reflections cancel, so that training starts at the base model up to
    rounding. The update has rank r: a product costs as much as LoRA's, and each call computes the
    product of r rows with `w` once. Left out are the penalty on the overlap of the columns that
    the paper adds to the loss, and its variant with orthogonal columns, which cannot start at the
    base model.

    Args:
      rank: r, an even number from 2 to `in`, or a mapping as for `lora`.
      sites: The matrices to adapt, with all of their outputs.
      dtype: Dtype of `u`. The reflections are computed in float32 or wider.

    Returns:
      A `Method` with r * in trainable parameters per matrix.

    Raises:
      ValueError: A rank is odd or out of range (the message names the matrix), or a slice of the
        outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.hra(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/u': (8, 2)}

    References:
      Yuan et al., Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder
      Reflection Adaptation, 2024, section 3. https://arxiv.org/abs/2405.17484
      Joffrain et al., Accumulating Householder Transformations, Revisited, 2006 (the compact
      form). https://doi.org/10.1145/1141885.1141886
    """
    ranks = by_pattern(rank, sites, "rank")
    check_whole("hra", sites)
    for path, site in sites.items():
        r, n = ranks[path], site.size(IN)
        if not 2 <= r <= n or r % 2:
            raise ValueError(
                f"`hra(rank={r})`: '{path}' of shape {site.shape} has {n} inputs and takes an even "
                f"rank from 2 to {n - n % 2}, because reflections start in pairs that cancel."
            )

    def make(key: jax.Array, site: Site, view: View) -> View:
        half = (*site.stack, site.size(IN), ranks[site.path] // 2)
        u = jnp.repeat(jax.random.normal(key, half, dtype), 2, axis=-1)
        return dataclasses.replace(view, weight=HouseholderReflections(view.weight, Trainable(u)))

    options = dict(rank=rank, sites=sites, dtype=dtype)
    return Method(
        "hra", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="hra")
    )
