"""LoftQ and QPiSSA: LoRA factors that start at what quantization has lost."""

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
from jaxpeft.quant._quantize import check_finite_weight, encoder


@register_method
def loftq(
    rank: int,
    sites: Sites,
    *,
    format: str = "nf4+dq",
    steps: int = 5,
    start: Literal["quantized", "principal"] = "quantized",
    dtype: Any = jnp.float32,
    **options: Any,
) -> Method:
    """LoRA on a quantized base, with factors that make up for the rounding.

    Each selected matrix `w` (in, out) becomes `q + a @ b` with `q` in the format. In turns,

        q = quantize(w - a @ b)
        a, b = the best rank-r approximation of w - q, split as U sqrt(S), sqrt(S) V^T

    from a @ b = 0 (start="quantized", LoftQ), or from the best rank-r approximation of `w`
    itself (start="principal", QPiSSA: the residual of the principal components is quantized).
    The alternation need not lower |w - q - a @ b| at every step; the best pair is kept.

    Args:
      rank: Columns of `a`. At most min(in, out).
      sites: The matrices, with plain arrays so far.
      format: As in `quantize`.
      steps: Turns; 0 quantizes once and leaves the start's factors.
      start: See above.
      dtype: Of the factors.
      options: Of the format.

    Returns:
      A method with r * (in + out) trained numbers per matrix.

    Raises:
      ValueError: A rank out of range, a negative number of steps, an unknown start or format,
        or a selected weight that is no plain array of finite numbers (names it).

    References:
      Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
      section 3. https://arxiv.org/abs/2310.08659
      Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
      Language Models, 2024, section 4 and appendix. https://arxiv.org/abs/2404.02948
    """
    encode = encoder(format, **options)
    if start not in ("quantized", "principal"):
        raise ValueError(f"`loftq(start={start!r})`: choose 'quantized' or 'principal'.")
    if steps < 0:
        raise ValueError(f"`loftq(steps={steps})`: a number of turns of 0 or more is needed.")

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
        q, a, b = _alternate(view.canonical(), encode, rank, steps, start)
        factors = Trainable(a.astype(dtype)), Trainable(b.astype(dtype))
        low = LowRank(q, *factors, key=None, scale=1.0, dropout=0.0, part=None)
        return dataclasses.replace(view, weight=low, natural=False)

    given = dict(rank=rank, sites=sites, format=format, steps=steps, start=start, dtype=dtype)
    return Method(
        "loftq",
        given | options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="loftq"),
    )


def _alternate(
    w: jax.Array, encode: Any, rank: int, steps: int, start: str
) -> tuple[Any, jax.Array, jax.Array]:
    """The codes and factors of the turn with the smallest error, each matrix for itself."""
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    with jax.default_matmul_precision("highest"):
        a, b = _best(w, rank)
        if start == "quantized":
            a, b = jnp.zeros_like(a), jnp.zeros_like(b)
        q = encode(w - a @ b)
        kept = (q, a, b, _error(w, q, a, b))
        for _ in range(steps):
            a, b = _best(w - q.materialize(), rank)
            kept = _better(kept, (q, a, b, _error(w, q, a, b)))
            q = encode(w - a @ b)
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
