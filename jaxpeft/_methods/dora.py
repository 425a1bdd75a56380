"""DoRA: a matrix decomposed into the norms of its columns and their directions."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.ia3 import ScaledOutputs
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_floating, check_whole


@weight
class WeightDecomposed(Weight):
    """The matrix `magnitude * v / |v|`, where v = w + scale * a @ b and |v| (out,) is columnwise.

    The norms follow from the factors. With squared_norms = sum(w ** 2) over each column,

        |v| ** 2 = squared_norms + 2 scale * sum((a.T @ w) * b)
                 + scale ** 2 * sum((a.T @ a @ b) * b)

    so that no array of the matrix's size is formed. Gradients treat the norms as constants
    (section 4.3 of the paper).
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    magnitude: Any = axes("out")
    squared_norms: Any = axes("out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_out = True

    def derived(self):
        a, b = self.a.matrix, self.b.matrix
        aw = a.T.astype(jnp.promote_types(a.dtype, self.a.site.dtype)) @ self.w
        norms, magnitude = self.squared_norms.array, self.magnitude.array
        return {"column_scale": self._column_scale(aw, a, b, magnitude, norms)}

    def acting(self, **derived):
        low = LowRank(self.w, self.a, self.b, self.key, self.scale, self.dropout, part=None)
        return ScaledOutputs(low, derived["column_scale"])

    def materialize(self):
        w = dense(self.w)
        aw = self.a.T @ w
        scale = self._column_scale(aw, self.a, self.b, self.magnitude, self.squared_norms)
        return (w + self.scale * self.a @ self.b) * scale

    def _column_scale(self, aw, a, b, magnitude, squared_norms):
        """magnitude / |v| (out,), from aw = a.T @ w (rank, out)."""
        s = self.scale
        squares = squared_norms + 2 * s * jnp.sum(aw * b, 0) + s * s * jnp.sum(a.T @ a @ b * b, 0)
        # A column of zeros, as `prune` leaves them, has no direction: it stays zero.
        norms = jax.lax.stop_gradient(jnp.sqrt(jnp.where(squares > 0, squares, jnp.inf)))
        return magnitude / norms


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
    """Weight-decomposed low-rank adaptation: LoRA for directions, trainable column norms.

    Each selected matrix `w` (in, out) becomes

        m * v / |v|,    v = w + s * a @ b

    with the norm |v| (out,) over each column, trainable magnitudes `m` (out,) and factors `a`
    (in, r) and `b` (r, out) as for `lora`. `m` starts at |w|, so that training starts at the base
    model. To train on a quantized base, put `quantize` before `dora` in the `chain`, so that `m`
    starts at the norms of the quantized matrix. A column of zeros has no direction and stays zero.

    Args:
      rank, alpha, scaling, dropout, init, dtype: As for `lora`.
      sites: The matrices to adapt, with all of their outputs.

    Returns:
      A `Method` with r * (in + out) + out trainable parameters per matrix.

    Raises:
      ValueError: As for `lora`. Also if a slice of the outputs is selected, or if another method
        trains a selected matrix already.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.dora(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 2), 'w/b': (2, 4), 'w/magnitude': (4,)}

    References:
      Liu et al., DoRA: Weight-WeightDecomposed Low-Rank Adaptation, 2024, section 4.
      https://arxiv.org/abs/2402.09353
    """
    check_whole("dora", sites)
    more = dict(alpha=alpha, scaling=scaling, dropout=dropout, init=init, dtype=dtype)
    low = low_rank("dora", rank, sites, **more)  # type: ignore[arg-type]

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        old: Any = view.weight
        check_floating("dora", site.path, view.dtype)
        if any(isinstance(x, Trainable) for x in jax.tree.leaves(old.w, is_leaf=_is_trainable)):
            raise ValueError(
                f"`dora`: '{site.path}' is trained by another method already, so the norms of its "
                "columns would change during training. Put that method after `dora` in the "
                "`chain`, or leave this weight out of the sites."
            )
        squared_norms = _squared_norms(dataclasses.replace(view, weight=old.w), dtype)
        magnitude = Trainable(jnp.sqrt(squared_norms))
        weight = WeightDecomposed(
            old.w, old.a, old.b, magnitude, squared_norms, old.key, old.scale, old.dropout
        )
        return dataclasses.replace(view, weight=weight)

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="dora")

    return dataclasses.replace(low, apply=apply)


def _is_trainable(x: Any) -> bool:
    return isinstance(x, Trainable)


def _squared_norms(view: View, dtype: Any) -> jax.Array:
    """The squared norm of each column (*stack, out), computed one matrix of a stack at a time."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def one(view: View) -> jax.Array:
        w = dense(view.canonical()).astype(wide)
        return jnp.sum(w * w, axis=-2)

    return view.unfolded().over_each(one)
