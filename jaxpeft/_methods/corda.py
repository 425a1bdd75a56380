"""CorDA: low-rank factors that start where a matrix meets the inputs of a task."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._method import Method, register_method
from jaxpeft._methods.residual_init import residual_start
from jaxpeft._sites import Site, Sites
from jaxpeft.calibration._statistics import Moments, check_moments, seems_finite


@register_method
def corda(
    rank: int | Mapping[str, int],
    sites: Sites,
    moments: Mapping[str, Moments],
    *,
    keep: Literal["task", "knowledge"] = "task",
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    damping: float = 0.01,
    dtype: Any = jnp.float32,
) -> Method:
    """Context-oriented decomposition: as `pissa`, of the matrix as a task's inputs see it.

    With C (in, in) the mean of x x^T over the inputs of a matrix, and C w = U S V^T, the factors
    of `w - s * a0 @ b0 + s * a @ b` start at a0 = C^-1 U sqrt(S / s) and b0 = sqrt(S / s) V^T:
    the r largest components of the task's inputs are trained (keep="task"), or, for inputs that
    stand for knowledge to be kept, the r smallest (keep="knowledge").

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt.
      moments: From `input_moments`, of at least these sites.
      keep: What the inputs were: see above.
      damping: Share of the mean of C's diagonal that is added to it, so that it can be inverted.

    Returns:
      A method with r * (in + out) trained numbers per matrix. It cannot be described in a file:
      store what `to_lora` makes of its adapter.

    Raises:
      ValueError: As `pissa`; an unknown `keep`, a damping that is not positive, no moments of a
        site, those of another model, or of inputs that were all zero; when applied, a damping too
        small for C to be inverted in its dtype, or a weight that is not finite.

    References:
      Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
      Task-Aware Parameter-Efficient Fine-tuning, 2024, section 3.
      https://arxiv.org/abs/2406.05223
    """
    if keep not in ("task", "knowledge"):
        raise ValueError(f"`corda(keep='{keep}')`: choose 'task' or 'knowledge'.")
    if damping <= 0:
        raise ValueError(f"`corda(damping={damping})`: a positive share is needed.")
    found = {path: check_moments(moments, site, "corda") for path, site in sites.items()}
    for path, own in found.items():
        _check_inputs(path, own.second)

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del key
        second, _, rows = found[site.path]
        c = (second / rows[..., None, None]).astype(w.dtype)
        size = jnp.trace(c, axis1=-2, axis2=-1)[..., None, None] / c.shape[-1]
        c = c + damping * size * jnp.eye(c.shape[-1], dtype=c.dtype)
        u, s, v = jnp.linalg.svd(c @ w, full_matrices=False)
        part = slice(0, r) if keep == "task" else slice(s.shape[-1] - r, None)
        root = jnp.sqrt(s[..., part] / scale)
        a = jnp.linalg.solve(c, u[..., part] * root[..., None, :])
        if not seems_finite(a):
            raise ValueError(
                f"`corda(damping={damping})`: the moments of '{site.path}' cannot be inverted in "
                f"{c.dtype}, or the weight is not finite. Give a larger damping."
            )
        return a, root[..., None] * v[..., part, :]

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "corda")
    options = {"sites": sites, "moments": moments, "keep": keep, "damping": damping, **low}
    return Method("corda", options, apply)


def _check_inputs(path: str, second: jax.Array) -> None:
    """Raises ValueError where moments (*stack, in, in) are those of inputs that were all zero."""
    if isinstance(second, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        sizes = np.asarray(jnp.trace(second, axis1=-2, axis2=-1))
    if len(bad := np.argwhere(~(np.isfinite(sizes) & (sizes > 0)))):
        where = f" in {bad.tolist()} of its stack" if sizes.ndim else ""
        raise ValueError(
            f"`corda`: the inputs of '{path}' were all zero or not finite{where}, so that their "
            "moments cannot be inverted, whatever the damping. Take them over batches that reach "
            "this weight, or leave it out of the sites."
        )
