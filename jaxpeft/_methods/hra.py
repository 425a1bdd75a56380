"""HRA: a product of reflections of the inputs."""

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
class Reflected(Weight):
    """The matrix `H_r @ ... @ H_1 @ w`, H_i = I - 2 n_i n_i.T with n_i = u_i / |u_i|.

    In the compact form of such a product it is w + a @ b, with

        a = n,    b = -(I / 2 + tril(n.T @ n, -1))^-1 @ (n.T @ w)

    so that no (in, in) matrix is formed, and it acts wherever a low-rank matrix does.
    """

    w: Any = base_weight()
    u: Any = axes("in", "rank")

    local_out = True

    def derived(self):
        u = self._unit(self.u.matrix)
        across = u.T.astype(jnp.promote_types(u.dtype, self.u.site.dtype)) @ self.w
        return {"a": u, "b": self._reflecting(u, across)}

    def acting(self, **derived):
        return LowRank(self.w, derived["a"], derived["b"], None, scale=1.0, dropout=0.0, part=None)

    def materialize(self):
        return as_sharded(self._reflected, dense(self.w), self.u)

    def _reflected(self, w, u):
        u = self._unit(u)
        return w + u @ self._reflecting(u, u.T @ w)

    def _unit(self, u):
        wide = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        return wide / jnp.linalg.norm(wide, axis=0)

    def _reflecting(self, u, across):
        """b, from n and n.T @ w."""
        with jax.default_matmul_precision("highest"):
            system = jnp.tril(u.T @ u, -1) + jnp.eye(u.shape[1], dtype=u.dtype) / 2
        dtype = jnp.promote_types(u.dtype, across.dtype)
        return -jax.scipy.linalg.solve_triangular(
            system.astype(dtype), across.astype(dtype), lower=True
        )


@register_method
def hra(rank: int | Mapping[str, int], sites: Sites, *, dtype: Any = jnp.float32) -> Method:
    """Householder reflection adaptation: an orthogonal map of the inputs, r reflections long.

    Each selected matrix `w` (in, out) becomes `H_r @ ... @ H_1 @ w`, H_i the reflection along
    column i of a trained `u` (in, r). Columns start as random directions in equal pairs, whose
    reflections cancel, so that training starts at the base model but for rounding. The result is
    a change of rank r: a product costs what LoRA's does, and once for each call r more rows
    go through the weight. The penalty on the overlap of the columns that the paper adds to
    the loss, and its limit of orthogonal columns, which cannot start at the base model, are not
    part of the method.

    Args:
      rank: r, an even number up to `in`. A mapping from path patterns gives each target its own;
        the first match wins.
      sites: The matrices to adapt.
      dtype: Of `u`. What follows from it is computed in float32 at least.

    Returns:
      A method with r * in trained numbers per matrix.

    Raises:
      ValueError: A rank that is odd or out of range (names the matrix), or a part of the
        outputs is selected.

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
                f"rank from 2 to {n - n % 2}: reflections start in pairs that cancel."
            )

    def make(key: jax.Array, site: Site, view: View) -> View:
        half = (*site.stack, site.size(IN), ranks[site.path] // 2)
        u = jnp.repeat(jax.random.normal(key, half, dtype), 2, axis=-1)
        return dataclasses.replace(view, weight=Reflected(view.weight, Trainable(u)))

    options = dict(rank=rank, sites=sites, dtype=dtype)
    return Method(
        "hra", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="hra")
    )
