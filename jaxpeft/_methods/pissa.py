"""PiSSA and OLoRA: low-rank factors that start at a decomposition of the matrix itself."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, register_method
from jaxpeft._methods.residual_init import residual_start
from jaxpeft._sites import Site, Sites


@register_method
def pissa(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    n_iter: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Principal singular values and vectors adaptation.

    With the singular value decomposition w = U S V^T, each selected matrix `w` (in, out) becomes

        w - s * a0 @ b0 + s * a @ b,    a0 = U_r sqrt(S_r / s),    b0 = sqrt(S_r / s) V_r^T

    where the trainable `a` (in, r) and `b` (r, out) start at a0 and b0, the r largest singular
    values with their vectors. Training starts at the base model up to rounding, and the frozen
    residual w - s * a0 @ b0 holds the smaller singular values. If `w` is quantized already, it
    stays as it is, and a0 and b0 are kept as a frozen second pair of factors;
    `loftq(init="principal")` quantizes the residual instead.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt, with all of their outputs.
      n_iter: Number of power iterations of a randomized decomposition (Halko et al., 2009), which
        is far cheaper for large matrices; 4 is often enough. `None` decomposes exactly.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix. To load a saved adapter, the
      same base is needed, and it is decomposed again; `adapters.to_lora` converts the adapter to
      plain LoRA, which does not need this.

    Raises:
      ValueError: As for `lora`. Also if a slice of the outputs is selected, if another method
        trains a selected matrix already, or if `n_iter` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.diag(jnp.arange(1.0, 5.0))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 4)))
      >>> frozen, adapter = jp.split(jp.pissa(1, sites.linear)(jax.random.key(0), params))
      >>> abs(jnp.diag(adapter["w/a"] @ adapter["w/b"])).round(3).tolist()
      [0.0, 0.0, 0.0, 4.0]

    References:
      Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models, 2024, section 3. https://arxiv.org/abs/2404.02948
    """
    if n_iter is not None and n_iter < 0:
        raise ValueError(
            f"`pissa(n_iter={n_iter})`: give 0 or more iterations, or None for an exact "
            "decomposition."
        )

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del site
        u, s, v = top_singular_triplets(key, w, r, n_iter)
        root = jnp.sqrt(s / scale)
        return u * root[..., None, :], root[..., None] * v

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "pissa")
    return Method("pissa", {"sites": sites, "n_iter": n_iter, **low}, apply)


def top_singular_triplets(
    key: jax.Array, w: jax.Array, r: int, n_iter: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The r largest singular values of each matrix with their vectors.

    Args:
      key: PRNG key of the random sketch.
      w: The matrices (*stack, n, m).
      r: Number of singular values.
      n_iter: Number of power iterations on a sketch of r + 8 columns; `None` for an exact
        decomposition.

    Returns:
      U (*stack, n, r), S (*stack, r) and V^T (*stack, r, m).
    """
    if n_iter is None:
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        return u[..., :r], s[..., :r], v[..., :r, :]
    n, m = w.shape[-2:]
    w_transposed = jnp.swapaxes(w, -1, -2)
    sketch = w @ jax.random.normal(key, (*w.shape[:-2], m, min(r + 8, n, m)), w.dtype)
    q = jnp.linalg.qr(sketch)[0]
    for _ in range(n_iter):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w_transposed @ q)[0])[0]
    u, s, v = jnp.linalg.svd(jnp.swapaxes(q, -1, -2) @ w, full_matrices=False)
    return (q @ u)[..., :r], s[..., :r], v[..., :r, :]


@register_method
def olora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Orthonormal LoRA: factors start at a QR decomposition of the matrix.

    With w^T = Q R, each selected matrix `w` (in, out) becomes

        w - s * a0 @ b0 + s * a @ b,    a0 = R_r^T,    b0 = Q_r^T

    where the trainable `a` (in, r) and `b` (r, out) start at a0 and b0: the transposes of the
    first r rows of R and of the first r columns of Q, so that the rows of b0 are orthonormal.
    The frozen residual, a quantized base, and saved adapters are as for `pissa`.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt, with all of their outputs.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix.

    Raises:
      ValueError: As for `pissa`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 4)))
      >>> frozen, adapter = jp.split(jp.olora(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (4, 2), 'w/b': (2, 4)}

    References:
      Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024,
      section 3. https://arxiv.org/abs/2406.01775
    """

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del key, site, scale
        q, upper = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
        return jnp.swapaxes(upper[..., :r, :], -1, -2), jnp.swapaxes(q[..., :r], -1, -2)

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "olora")
    return Method("olora", {"sites": sites, **low}, apply)
