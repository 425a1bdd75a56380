"""LoRA-GA: low-rank factors whose first step approximates that of full fine-tuning."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, register_method
from jaxpeft._methods.pissa import top_singular_triplets
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
    n_iter: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """LoRA with gradient approximation: factors start along the gradient's singular vectors.

    With the gradient G = U S V^T of the loss in a selected matrix `w` (in, out), the matrix becomes

        w - s * a0 @ b0 + s * a @ b,    a0 = c U_[0:r],    b0 = c V_[r:2r]^T

    where the trainable `a` (in, r) and `b` (r, out) start at a0 and b0, and
    c = out^(1/4) / sqrt(gamma). The first update of a @ b is then the best approximation of G of
    rank 2r.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`; 2 * rank is at most min(in, out).
      sites: The matrices to adapt, with all of their outputs.
      gradients: Mean gradients {path: array}, from `calibration.mean_gradients` with at least
        these sites.
      gamma: Divides the start: a0 and b0 are proportional to 1 / sqrt(gamma).
      n_iter: As for `pissa`.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix. `save_adapter` cannot store
      it, because its gradients are arrays; store the plain LoRA that `adapters.to_lora` returns.

    Raises:
      ValueError: As for `pissa`. Also if 2 * rank is more than min(in, out), if `gamma` is not
        positive, or if the gradient of a site is missing, has another shape, or is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> x = jnp.ones((1, 8))
      >>> sites = jp.sites(fn, params, x).linear
      >>> loss = lambda p, x: jnp.sum(fn(p, x) ** 2)
      >>> gradients = jp.calibration.mean_gradients(loss, params, sites, [x])
      >>> method = jp.lora_ga(2, sites, gradients)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 2), 'w/b': (2, 4)}

    References:
      Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024, section 3.
      https://arxiv.org/abs/2407.05000
    """
    if gamma <= 0:
        raise ValueError(f"`lora_ga(gamma={gamma})`: give a positive number.")
    for path, site in sites.items():
        shape = gradients[path].shape if path in gradients else None
        if shape != site.shape:
            raise ValueError(
                f"`lora_ga`: the gradient of '{path}' has shape {shape}, but should have "
                f"{site.shape}. Give the gradients that `mean_gradients` returns for these sites."
            )
        if not seems_finite(gradients[path]):
            raise ValueError(
                f"`lora_ga`: the gradient of '{path}' is not finite, so it has no singular "
                "vectors. Compute it with `mean_gradients`, which names the batch at fault."
            )

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del scale
        if 2 * r > min(w.shape[-2:]):
            raise ValueError(
                f"`lora_ga(rank={r})` needs 2 * rank = {2 * r} singular vectors, but "
                f"'{site.path}' is {w.shape[-2]} x {w.shape[-1]}. Lower the rank to "
                f"{min(w.shape[-2:]) // 2}, or leave this weight out of the sites."
            )
        gradient = site.matrices(gradients[site.path]).astype(w.dtype)
        u, _, v = top_singular_triplets(key, gradient, 2 * r, n_iter)
        size = site.size(OUT) ** 0.25 / gamma**0.5
        return size * u[..., :r], size * v[..., r:, :]

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "lora_ga")
    more = {"sites": sites, "gradients": gradients, "gamma": gamma, "n_iter": n_iter}
    return Method("lora_ga", {**more, **low}, apply)
