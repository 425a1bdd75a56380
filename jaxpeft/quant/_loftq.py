"""LoftQ and QPiSSA: LoRA factors that start at the error of quantization."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight
from jaxpeft.extend._apply import apply_to_sites, check_floating, check_rank
from jaxpeft.quant._quantize import check_finite_weight, check_format, quantizer


@register_method
def loftq(
    rank: int,
    sites: Sites,
    *,
    format: str = "nf4+dq",
    n_iter: int = 5,
    init: Literal["loftq", "pissa"] = "loftq",
    dtype: Any = jnp.float32,
    **options: Any,
) -> Method:
    """LoRA on a quantized base, with factors that compensate the error of quantization.

    Each selected matrix `w` (in, out) becomes `q + a @ b` with `q` quantized. The two are computed
    alternately,

        q = quantize(w - a @ b)
        a, b = the best rank-r approximation of w - q, split as U sqrt(S), sqrt(S) V^T

    from a @ b = 0 (init="loftq"), or from the best rank-r approximation of `w` itself
    (init="pissa", QPiSSA: the residual of the principal components is quantized).
    The alternation need not lower |w - q - a @ b| at every step; the best pair is kept.

    Args:
      rank: Columns of `a`. At most min(in, out).
      sites: The matrices, which are plain arrays so far.
      format: As in `quantize`.
      n_iter: Number of iterations; 0 quantizes once and keeps the initial factors.
      init: The initial factors, see above.
      dtype: Dtype of both factors.
      options: Options of the format, such as `block=128`.

    Returns:
      A method with r * (in + out) trainable parameters per matrix.

    Raises:
      ValueError: The rank is out of range, the number of iterations is negative, the init or the
        format is unknown, or a selected weight is not a plain array of finite numbers (names it).

    References:
      Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
      section 3. https://arxiv.org/abs/2310.08659
      Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models, 2024, section 4 and appendix. https://arxiv.org/abs/2404.02948
    """
    check_format(f"loftq(format='{format}')", format, options)
    quantize = quantizer(format, **options)
    if init not in ("loftq", "pissa"):
        raise ValueError(f"`loftq(init={init!r})`: choose 'loftq' or 'pissa'.")
    if n_iter < 0:
        raise ValueError(f"`loftq(n_iter={n_iter})`: the number of iterations is at least 0.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key  # nothing is drawn
        check_rank("loftq", rank, site)
        if isinstance(view.weight, (Trainable, Weight)):
            raise ValueError(
                f"`loftq`: '{site.path}' holds {type(view.weight).__name__} already, but the "
                "factors start at what this weight loses in quantization. Put loftq first."
            )
        check_floating("loftq", site.path, view.dtype)
        check_finite_weight(view.weight, site.path, "loftq")
        q, a, b = _alternate(view.canonical(), quantize, rank, n_iter, init)
        factors = Trainable(a.astype(dtype)), Trainable(b.astype(dtype))
        low = LowRank(q, *factors, key=None, scale=1.0, dropout=0.0, part=None)
        return dataclasses.replace(view, weight=low, natural=False)

    given = dict(rank=rank, sites=sites, format=format, n_iter=n_iter, init=init, dtype=dtype)
    return Method(
        "loftq",
        given | options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="loftq"),
    )


def _alternate(
    w: jax.Array, quantize: Any, rank: int, n_iter: int, init: str
) -> tuple[Any, jax.Array, jax.Array]:
    """The quantized matrix and factors with the smallest error of all iterations, per matrix."""
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    with jax.default_matmul_precision("highest"):
        a, b = _best(w, rank)
        if init == "loftq":
            a, b = jnp.zeros_like(a), jnp.zeros_like(b)
        q = quantize(w - a @ b)
        kept = (q, a, b, _error(w, q, a, b))
        for _ in range(n_iter):
            a, b = _best(w - q.materialize(), rank)
            kept = _better(kept, (q, a, b, _error(w, q, a, b)))
            q = quantize(w - a @ b)
            kept = _better(kept, (q, a, b, _error(w, q, a, b)))
    return kept[:3]


def _best(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """a @ b, the best approximation of rank r, with the singular values shared evenly."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :, :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def _error(w: jax.Array, q: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """|w - q - a @ b|, one for each matrix of the stack."""
    return jnp.linalg.norm(w - q.materialize() - a @ b, axis=(-2, -1))


def _better(old: tuple, new: tuple) -> tuple:
    """Of each matrix of the stack, the one with the smaller error."""
    wins = new[-1] < old[-1]

    def choose(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(wins.reshape(wins.shape + (1,) * (x.ndim - wins.ndim)), y, x)

    return jax.tree.map(choose, old, new)
