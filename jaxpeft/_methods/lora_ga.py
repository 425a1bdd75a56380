"""LoRA-GA: low-rank factors whose first step is the one that full fine-tuning would take."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, register_method
from jaxpeft._methods.pissa import leading
from jaxpeft._methods.residual_init import residual_start
from jaxpeft._sites import Site, Sites
from jaxpeft._weight import OUT
from jaxpeft.calibration._statistics import seems_finite


@register_method
def lora_ga(
    rank: int | Mapping[str, int],
    sites: Sites,
    gradients: Mapping[str, jax.Array],
    *,
    gamma: float = 16.0,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    turns: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """LoRA with gradient approximation: factors start along the gradient's singular vectors.

    With the gradient G = U S V^T of a matrix (in, out), the factors of `w - s * a0 @ b0 +
    s * a @ b` start at a0 = c U_[0:r] and b0 = c V_[r:2r]^T, c = out^(1/4) / sqrt(gamma): the
    first change of a @ b is then the best approximation of G that rank 2r allows.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`; 2 * rank is at most min(in, out).
      sites: The matrices to adapt.
      gradients: From `mean_gradients`, of at least these sites.
      gamma: The larger, the smaller the start.
      turns: As for `pissa`.

    Returns:
      A method with r * (in + out) trained numbers per matrix. It cannot be described in a file:
      store what `to_lora` makes of its adapter.

    Raises:
      ValueError: As `pissa`; a rank too large for 2r vectors, a gamma that is not positive, no
        gradient of a site, or one of another shape or that is not finite.

    References:
      Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024, section 3.
      https://arxiv.org/abs/2407.05000
    """
    if gamma <= 0:
        raise ValueError(f"`lora_ga(gamma={gamma})`: a positive number is needed.")
    for path, site in sites.items():
        shape = gradients[path].shape if path in gradients else None
        if shape != site.shape:
            raise ValueError(
                f"`lora_ga`: the gradient of '{path}' has shape {shape}, should be {site.shape}. "
                "Give those of `mean_gradients` with the same sites."
            )
        if not seems_finite(gradients[path]):
            raise ValueError(
                f"`lora_ga`: the gradient of '{path}' is not finite, so it has no singular "
                "vectors. Take it with `mean_gradients`, which names the batch that made it so."
            )

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del scale
        if 2 * r > min(w.shape[-2:]):
            raise ValueError(
                f"`lora_ga(rank={r})` takes 2 * rank = {2 * r} singular vectors, but "
                f"'{site.path}' is {w.shape[-2]} x {w.shape[-1]}. Lower the rank to "
                f"{min(w.shape[-2:]) // 2}, or leave this weight out of the sites."
            )
        gradient = site.matrices(gradients[site.path]).astype(w.dtype)
        u, _, v = leading(key, gradient, 2 * r, turns)
        size = site.size(OUT) ** 0.25 / gamma**0.5
        return size * u[..., :r], size * v[..., r:, :]

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "lora_ga")
    more = {"sites": sites, "gradients": gradients, "gamma": gamma, "turns": turns}
    return Method("lora_ga", {**more, **low}, apply)
