"""DoRA: a matrix taken apart into the lengths of its columns and their directions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.ia3 import ScaledOut
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_floating, check_whole


@weight
class Decomposed(Weight):
    """The matrix `v * magnitude / |v|`, where v = w + scale * a @ b and |v| is by column.

    The lengths follow from the factors: with squares = sum(w ** 2) by column,

        |v| ** 2 = squares + 2 scale * sum((a.T @ w) * b) + scale ** 2 * sum((a.T @ a @ b) * b)

    so that nothing of the matrix's size is formed. They count as constants where gradients are
    taken (section 4.3).
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    magnitude: Any = axes("out")
    squares: Any = axes("out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_out = True

    def derived(self):
        a, b = self.a.matrix, self.b.matrix
        across = a.T.astype(jnp.promote_types(a.dtype, self.a.site.dtype)) @ self.w
        return {"scale": self._scale(across, a, b, self.magnitude.array, self.squares.array)}

    def acting(self, **derived):
        low = LowRank(self.w, self.a, self.b, self.key, self.scale, self.dropout, part=None)
        return ScaledOut(low, derived["scale"])

    def materialize(self):
        w = dense(self.w)
        scale = self._scale(self.a.T @ w, self.a, self.b, self.magnitude, self.squares)
        return (w + self.scale * self.a @ self.b) * scale

    def _scale(self, across, a, b, magnitude, squares):
        s = self.scale
        square = squares + 2 * s * jnp.sum(across * b, 0) + s * s * jnp.sum(a.T @ a @ b * b, 0)
        # A column of zeros, as `prune` leaves them, has no direction: it stays zero.
        length = jax.lax.stop_gradient(jnp.sqrt(jnp.where(square > 0, square, jnp.inf)))
        return magnitude / length


@register_method
def dora(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    """Weight-decomposed low-rank adaptation: LoRA on directions, and a trained length by column.

    Each selected matrix `w` becomes `m * v / |v|`, v = w + s * a @ b, with `m` (out,) and the
    factors trained. `m` starts at |w|, so that training starts at the base model. Put it on
    a base that is quantized already: the lengths are those that it has then. A column of zeros
    has no direction, and stays zero.

    Args:
      rank, alpha, scaling, dropout, init, dtype: As for `lora`.
      sites: The matrices to adapt.

    Returns:
      A method with r * (in + out) + out trained numbers per matrix.

    Raises:
      ValueError: As `lora`; or a part of the outputs is selected, or a weight that another method
        trains already.

    References:
      Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, section 4.
      https://arxiv.org/abs/2402.09353
    """
    check_whole("dora", sites)
    more = dict(alpha=alpha, scaling=scaling, dropout=dropout, init=init, dtype=dtype)
    low = low_rank("dora", rank, sites, **more)  # type: ignore[arg-type]

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        old: Any = view.weight
        check_floating("dora", site.path, view.dtype)
        if any(isinstance(x, Trainable) for x in jax.tree.leaves(old.w, is_leaf=_is_trained)):
            raise ValueError(
                f"`dora`: '{site.path}' is trained by another method already, so the lengths of "
                "its columns would not stay those of the base. Put that method behind `dora` in "
                "the `chain`, or leave the weight out."
            )
        squares = _squares(dataclasses.replace(view, weight=old.w), dtype)
        magnitude = Trainable(jnp.sqrt(squares))
        weight = Decomposed(
            old.w, old.a, old.b, magnitude, squares, old.key, old.scale, old.dropout
        )
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="dora")

    return dataclasses.replace(low, apply=apply)


def _is_trained(x: Any) -> bool:
    return isinstance(x, Trainable)


def _squares(view: View, dtype: Any) -> jax.Array:
    """The sum of squares of each column (*stack, out), one matrix of a stack at a time."""

    wide = jnp.promote_types(dtype, jnp.float32)

    def one(view: View) -> jax.Array:
        w = dense(view.canonical()).astype(wide)
        return jnp.sum(w * w, axis=-2)

    return view.unfolded().over_each(one)
