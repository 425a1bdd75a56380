"""PiSSA and OLoRA: low-rank factors that start as a part of the matrix itself."""

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
    turns: int | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Principal singular values and vectors adaptation: trains what is largest in a matrix.

    With w = U S V^T, the factors of `w - s * a0 @ b0 + s * a @ b` start at the r largest
    singular values, a0 = U_r sqrt(S_r / s) and b0 = sqrt(S_r / s) V_r^T, so that training starts
    at the base model but for rounding, and the frozen rest is what they leave. Over codes, the
    rest is kept as codes and a frozen pair of factors; `loftq(start="principal")` quantizes it.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt.
      turns: Of the randomized decomposition (Halko et al. 2009); 4 is often enough, and far
        cheaper for large matrices. `None` decomposes exactly.

    Returns:
      A method with r * (in + out) trained numbers per matrix. Stored as it is, loading needs
      the same base and decomposes it again; `to_lora` makes it independent of that.

    Raises:
      ValueError: As `lora`; or a part of the outputs is selected, a weight that another method
        trains already, or a negative number of turns.

    References:
      Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models, 2024, section 3. https://arxiv.org/abs/2404.02948
    """
    if turns is not None and turns < 0:
        raise ValueError(f"`pissa(turns={turns})`: 0 or more turns, or None for an exact start.")

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del site
        u, s, v = leading(key, w, r, turns)
        root = jnp.sqrt(s / scale)
        return u * root[..., None, :], root[..., None] * v

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "pissa")
    return Method("pissa", {"sites": sites, "turns": turns, **low}, apply)


def leading(
    key: jax.Array, w: jax.Array, r: int, turns: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The r largest singular values of (*stack, n, m) with their vectors: U, S, V^T.

    Args:
      key: For the random sketch.
      w: The matrices.
      r: How many.
      turns: Power iterations on a sketch of r + 8 columns; `None` for the exact ones.
    """
    if turns is None:
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
        return u[..., :r], s[..., :r], v[..., :r, :]
    n, m = w.shape[-2:]
    across = jnp.swapaxes(w, -1, -2)
    sketch = w @ jax.random.normal(key, (*w.shape[:-2], m, min(r + 8, n, m)), w.dtype)
    q = jnp.linalg.qr(sketch)[0]
    for _ in range(turns):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(across @ q)[0])[0]
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
    """Orthonormal LoRA: factors start at the first r columns of a QR decomposition.

    With w^T = Q R, the factors of `w - s * a0 @ b0 + s * a @ b` start at a0 = R_r^T (in, r) and
    b0 = Q_r^T (r, out), whose rows are orthonormal. Otherwise as `pissa`.

    Args:
      rank, alpha, scaling, dropout, dtype: As for `lora`.
      sites: The matrices to adapt.

    Returns:
      A method with r * (in + out) trained numbers per matrix.

    Raises:
      ValueError: As `pissa`.

    References:
      Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024,
      section 3. https://arxiv.org/abs/2406.01775
    """

    def start(key: jax.Array, site: Site, w: jax.Array, r: int, scale: float) -> tuple:
        del key, site, scale
        q, across = jnp.linalg.qr(jnp.swapaxes(w, -1, -2))
        transposed = (jnp.swapaxes(x, -1, -2) for x in (across[..., :r, :], q[..., :r]))
        a, b = transposed
        return a, b

    low = dict(rank=rank, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)
    apply = residual_start(start, sites, low, "olora")
    return Method("olora", {"sites": sites, **low}, apply)
