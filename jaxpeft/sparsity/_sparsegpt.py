"""SparseGPT: the kept entries of a pruned matrix are updated to compensate for the others."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import takes_sites
from jaxpeft._sites import Sites
from jaxpeft.calibration._statistics import Moments, check_moments, selected_arrays
from jaxpeft.extend._apply import check_whole
from jaxpeft.sparsity._masks import unpack_mask


@takes_sites
def sparsegpt_update(
    params: Any,
    sites: Sites,
    masks: Mapping[str, Any],
    moments: Mapping[str, Moments],
    *,
    damping: float = 0.01,
) -> Any:
    """Prunes by masks, and updates the kept entries of each column to compensate (SparseGPT).

    For y = x @ w with inputs x let H = X^T X + damping * mean(diag(X^T X)) * I, and H^-1 = U^T U
    with U upper triangular. The inputs i are visited in order: with e = w_i / U_ii, and e = 0
    where entry i is kept, w_j -= U_ij * e for all j > i, and w_i = 0 where it is not kept. Each
    step is optimal for H with the entries before i held fixed (`obs_scores`). All steps together
    are not the optimum over the kept entries, and with few, nearly orthogonal inputs they may
    even be worse than no update: compare outputs.

    Args:
      params: Parameters; the selected ones must be plain arrays.
      sites: The weights.
      masks: {path: bool array of the weight's shape}, from `topk_mask`.
      moments: From `calibration.input_moments`, of at least these sites.
      damping: Fraction of the mean of H's diagonal that is added to it, so that it can be
        inverted.

    Returns:
      The tree, with arrays of the same shapes and dtypes, computed in float32 or wider.

    Raises:
      ValueError: A damping that is not positive, or too small for H to be inverted in its dtype;
        a mask or moments that are missing or of another shape; a selected weight is no plain
        array, has another shape, or is selected in part.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0], [2.0]])}
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])  # the second input can replace the first
      >>> sites = jp.sites(f, params, x)
      >>> moments = jp.calibration.input_moments(f, params, sites, [x])
      >>> masks = {"w": jnp.array([[False], [True]])}
      >>> jnp.round(sparsegpt_update(params, sites, masks, moments)["w"], 1).tolist()
      [[0.0], [3.0]]

    References:
      Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot, 2023, section 3. https://arxiv.org/abs/2301.00774
    """
    if damping <= 0:
        raise ValueError(
            f"`sparsegpt_update(damping={damping})`: `damping` must be positive, such as 0.01."
        )
    check_whole("sparsegpt_update", sites)
    selected, with_selected = selected_arrays(params, sites, "sparsegpt_update")
    inputs = {}
    for path, site in sites.items():
        if selected[path].shape != site.shape:
            raise ValueError(
                f"`sparsegpt_update`: '{path}' has shape {selected[path].shape}, but had "
                f"{site.shape} when the sites were found. Find the sites of these parameters."
            )
        mask = unpack_mask(masks.get(path), site, "sparsegpt_update")
        inputs[path] = mask, check_moments(moments, site, "sparsegpt_update").second
    updated = {}
    for path, site in sites.items():
        mask, second = inputs[path]
        w = _updated(site.matrices(selected[path]), site.matrices(mask), second, damping)
        if not jnp.all(jnp.isfinite(w)):
            raise ValueError(
                f"`sparsegpt_update(damping={damping})`: the moments of '{path}' cannot be "
                f"inverted in {second.dtype}, or the weight is not finite. Give a larger damping."
            )
        updated[path] = site.array(w)
    return with_selected(updated, params)


@jax.jit
def _updated(w: jax.Array, mask: jax.Array, second: jax.Array, damping: Any) -> jax.Array:
    """Matrices (*stack, in, out), zero outside their masks, in the dtype of `w`."""
    wide = jnp.promote_types(jnp.promote_types(w.dtype, second.dtype), jnp.float32)
    of_stack = jnp.vectorize(_updated_matrix, excluded=(3,), signature="(n,m),(n,m),(n,n)->(n,m)")
    with jax.default_matmul_precision("highest"):
        return of_stack(w.astype(wide), mask, second.astype(wide), damping).astype(w.dtype)


def _updated_matrix(w: jax.Array, mask: jax.Array, second: jax.Array, damping: Any) -> jax.Array:
    """One matrix (in, out); its inputs are visited in order."""
    n = len(second)
    size = jnp.trace(second) / n
    factor = _inverse_factor(second + (damping * size).astype(w.dtype) * jnp.eye(n, dtype=w.dtype))

    def step(i: jax.Array, w: jax.Array) -> jax.Array:
        error = jnp.where(mask[i], 0, w[i]) / factor[i, i]
        return w - factor[i][:, None] * error[None, :]  # factor[i] is zero before i.

    # A pruned entry is w_i - U_ii * (w_i / U_ii), which is zero only up to rounding.
    return jnp.where(mask, jax.lax.fori_loop(0, n, step, w), 0)


def _inverse_factor(h: jax.Array) -> jax.Array:
    """The upper triangular U of h^-1 = U^T U, without forming the inverse.

    The Cholesky factor of h with rows and columns reversed, reversed back, is an upper
    triangular R with h = R R^T; so U = R^-1.
    """
    upper = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(h), dtype=h.dtype), lower=False)
