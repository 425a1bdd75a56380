"""Compensation: what is kept of a pruned matrix makes up for what is not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import takes_sites
from jaxpeft._sites import Sites
from jaxpeft.calibration._statistics import Moments, check_moments, chosen_arrays
from jaxpeft.extend._apply import check_whole
from jaxpeft.sparsity._masks import unpacked


@takes_sites
def sparsegpt_update(
    params: Any,
    sites: Sites,
    masks: Mapping[str, Any],
    moments: Mapping[str, Moments],
    *,
    damping: float = 0.01,
) -> Any:
    """Sets the entries to zero that the masks do not keep; others of their column make up for it.

    For y = x @ w with inputs x let H = X^T X + damping * mean(diag(X^T X)) * I, and H^-1 = U^T U
    with U upper triangular. The inputs i are visited in order: with e = w_i / U_ii, and e = 0
    where entry i is kept, w_j -= U_ij * e for all j > i, and w_i = 0 where it is not kept. Each
    step is the best one for H, with the entries up to i held where they are (obs in scores.py). All
    steps together are not the best that the kept entries can do, and with few inputs that have
    little in common they may even be worse than none: compare outputs.

    Args:
      params: Parameters; the selected ones are plain arrays.
      sites: The weights.
      masks: {path: bools of the weight's shape}, from `keep`.
      moments: From `input_moments`, of at least these sites.
      damping: Share of the mean of H's diagonal that is added to it, so that it can be inverted.

    Returns:
      The tree, with arrays of the same shapes and dtypes, computed in float32 or wider.

    Raises:
      ValueError: A damping that is not positive, or too small for H to be inverted in its dtype;
        a mask or moments that are missing or of another shape; a selected weight is no plain
        array, has another shape, or is selected in part.

    References:
      Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot, 2023, section 3. https://arxiv.org/abs/2301.00774
    """
    if damping <= 0:
        raise ValueError(f"`sparsegpt_update(damping={damping})`: a positive share is needed.")
    check_whole("sparsegpt_update", sites)
    chosen, with_chosen = chosen_arrays(params, sites, "sparsegpt_update")
    given = {}
    for path, site in sites.items():
        if chosen[path].shape != site.shape:
            raise ValueError(
                f"`sparsegpt_update`: '{path}' has shape {chosen[path].shape}, but had {site.shape} "
                "when the sites were found."
            )
        mask = unpacked(masks.get(path), site, "sparsegpt_update")
        given[path] = mask, check_moments(moments, site, "sparsegpt_update").second
    found = {}
    for path, site in sites.items():
        mask, second = given[path]
        w = _compensated(site.matrices(chosen[path]), site.matrices(mask), second, damping)
        if not jnp.all(jnp.isfinite(w)):
            raise ValueError(
                f"`sparsegpt_update(damping={damping})`: the moments of '{path}' cannot be inverted in "
                f"{second.dtype}, or the weight is not finite. Give a larger damping."
            )
        found[path] = site.array(w)
    return with_chosen(found, params)


@jax.jit
def _compensated(w: jax.Array, mask: jax.Array, second: jax.Array, damping: Any) -> jax.Array:
    """Matrices (*stack, in, out) with zeros outside of their masks, in the dtype of `w`."""
    wide = jnp.promote_types(jnp.promote_types(w.dtype, second.dtype), jnp.float32)
    each = jnp.vectorize(_sequential, excluded=(3,), signature="(n,m),(n,m),(n,n)->(n,m)")
    with jax.default_matmul_precision("highest"):
        return each(w.astype(wide), mask, second.astype(wide), damping).astype(w.dtype)


def _sequential(w: jax.Array, mask: jax.Array, second: jax.Array, damping: Any) -> jax.Array:
    """One matrix (in, out), its inputs in order."""
    n = len(second)
    size = jnp.trace(second) / n
    factor = _inverse_factor(second + (damping * size).astype(w.dtype) * jnp.eye(n, dtype=w.dtype))

    def step(i: jax.Array, w: jax.Array) -> jax.Array:
        error = jnp.where(mask[i], 0, w[i]) / factor[i, i]
        return w - factor[i][:, None] * error[None, :]  # zero for inputs before i

    # Where an entry meets itself, the difference is zero but for rounding.
    return jnp.where(mask, jax.lax.fori_loop(0, n, step, w), 0)


def _inverse_factor(h: jax.Array) -> jax.Array:
    """The upper triangular U of h^-1 = U^T U; the inverse itself is not formed.

    With rows and columns in reverse order h is L L^T, in their order R R^T with R upper
    triangular, and U = R^-1.
    """
    upper = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(h), dtype=h.dtype), lower=False)
