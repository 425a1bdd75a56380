"""CorDA: low-rank factors that start at a decomposition weighted by the inputs of a task."""

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
    mode: Literal["instruction-previewed", "knowledge-preserved"] = "instruction-previewed",
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    damping: float = 0.01,
    dtype: Any = jnp.float32,
) -> Method:
    """Context-oriented decomposition adaptation: `pissa` weighted by the inputs of each matrix.

    With C (in, in) the mean of x x^T over the inputs x of a selected matrix `w` (in, out), and the
    singular value decomposition C w = U S V^T, the matrix becomes

        w - s * a0 @ b0 + s * a @ b,    a0 = C^-1 U_k sqrt(S_k / s),    b0 = sqrt(S_k / s) V_k^T

    where the trainable `a` (in, r) and `b` (r, out) start at a0 and b0, and k selects r of the
    singular values, the largest or the smallest: see `mode`.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt, with all of their outputs.
      moments: Second moments of the inputs {path: Moments}, from `calibration.input_moments` with
        at least these sites.
      mode: "instruction-previewed" ("ipm" in Hugging Face PEFT): the moments are of inputs of the
        task, and the components of the r largest singular values are trained.
        "knowledge-preserved" ("kpm"): the moments are of inputs that stand for knowledge to be
        preserved, and the components of the r smallest are trained.
      damping: Fraction of the mean of C's diagonal that is added to the diagonal, so that C can be
        inverted.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix. `save_adapter` cannot store
      it, because its moments are arrays; store the plain LoRA that `adapters.to_lora` returns.

    Raises:
      ValueError: As for `pissa`. Also if `mode` is unknown, if `damping` is not positive, or if
        the moments of a site are missing, are those of another model, or are of inputs that were
        all zero. When the method is applied: if the damping is too small for C to be inverted in
        its dtype, or if a weight is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (16, 8))
      >>> sites = jp.sites(fn, params, x).linear
      >>> moments = jp.calibration.input_moments(fn, params, sites, [x])
      >>> method = jp.corda(2, sites, moments)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 2), 'w/b': (2, 4)}

    References:
      Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
      Task-Aware Parameter-Efficient Fine-tuning, 2024, section 3.
      https://arxiv.org/abs/2406.05223
    """
    if mode not in ("instruction-previewed", "knowledge-preserved"):
        raise ValueError(
            f"`corda(mode='{mode}')`: choose 'instruction-previewed' (PEFT's 'ipm') or "
            "'knowledge-preserved' ('kpm')."
        )
    if damping <= 0:
        raise ValueError(f"`corda(damping={damping})`: give a positive fraction, such as 0.01.")
    found = {path: check_moments(moments, site, "corda") for path, site in sites.items()}
    for path, own in found.items():
        _check_inputs(path, own.second)

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del key
        second, _, rows = found[site.path]
        c = (second / rows[..., None, None]).astype(w.dtype)
        diagonal_mean = jnp.trace(c, axis1=-2, axis2=-1)[..., None, None] / c.shape[-1]
        c = c + damping * diagonal_mean * jnp.eye(c.shape[-1], dtype=c.dtype)
        u, s, v = jnp.linalg.svd(c @ w, full_matrices=False)
        largest = mode == "instruction-previewed"
        k = slice(0, r) if largest else slice(s.shape[-1] - r, None)
        root = jnp.sqrt(s[..., k] / scale)
        a = jnp.linalg.solve(c, u[..., k] * root[..., None, :])
        if not seems_finite(a):
            raise ValueError(
                f"`corda(damping={damping})`: the moments of '{site.path}' cannot be inverted in "
                f"{c.dtype}, or the weight is not finite. Give a larger damping."
            )
        return a, root[..., None] * v[..., k, :]

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "corda")
    options = {"sites": sites, "moments": moments, "mode": mode, "damping": damping, **low}
    return Method("corda", options, apply)


def _check_inputs(path: str, second: jax.Array) -> None:
    """Raises ValueError if second moments (*stack, in, in) are of inputs that were all zero."""
    if isinstance(second, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        traces = np.asarray(jnp.trace(second, axis1=-2, axis2=-1))
    if len(bad := np.argwhere(~(np.isfinite(traces) & (traces > 0)))):
        where = f" in {bad.tolist()} of its stack" if traces.ndim else ""
        raise ValueError(
            f"`corda`: the inputs of '{path}' were all zero or not finite{where}, so that their "
            "moments cannot be inverted, whatever the damping. Compute the moments over batches "
            "that reach this weight, or leave it out of the sites."
        )
