"""BOFT: a rotation of the inputs as a product of sparse ones, in the pattern of a butterfly."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.ia3 import ScaledOut
from jaxpeft._methods.oft import RotatedIn, check_blocks, rotations
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class Butterfly(Weight):
    """The matrix `R @ w * scale`, R = R_m ... R_1, each of them block-diagonal up to its order.

    A block of R_1 takes b neighbours; one of R_k takes two runs of b / 2, the second 2^(k - 1)
    runs after the first, so that with each factor twice as many inputs meet.
    """

    w: Any = base_weight()
    skew: Any = axes("factor", "in", "pair")
    scale: Any = axes("out")
    block: int = static()
    factors: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """What all factors join stays whole."""
        del field
        joined = 2 ** (self.factors - 1)
        return (joined * self.block, joined) if axis == IN else (1, 1)

    def derived(self):
        return {"turns": self._turns(self.skew.array)}

    def acting(self, **derived):
        w: Any = ScaledOut(self.w, self.scale)
        for i in range(self.factors):
            w = RotatedIn(w, derived["turns"][..., i, :, :], self.block, 2**i)
        return w

    def materialize(self):
        return self.acting(turns=self._turns(self.skew)).materialize()

    def _turns(self, skew):
        return rotations(skew, self.block).reshape(self.factors, -1, self.block)


@register_method
def boft(
    block: int | Mapping[str, int],
    sites: Sites,
    *,
    factors: int | Mapping[str, int] = 2,
    dtype: Any = jnp.float32,
) -> Method:
    """Orthogonal butterfly: `oft` with a denser rotation from the same small blocks.

    Each selected matrix `w` (in, out) becomes `R_m @ ... @ R_1 @ w * s`, every R_k
    block-diagonal as in `oft` once its inputs are put into the order of a butterfly: each factor
    joins twice as many inputs as the one before. With log2(2 in / block) factors every input
    meets every other, if that is a whole number; with one it is `oft` and a scale. The rotations
    start at the identity and `s` (out,) at ones, so that training starts at the base model.

    Args:
      block: Inputs in a block, b. b * 2^(m - 1) divides `in`, and b is even where m > 1. A
        mapping from path patterns gives each target its own; the first match wins.
      sites: The matrices to adapt, as for `oft`.
      factors: m, or a mapping as for `block`. A product costs m * in * block more
        multiplications for each token than the base's.
      dtype: Of the trained numbers. Rotations are computed in float32 at least.

    Returns:
      A method with m * in * (block - 1) / 2 + out trained numbers per matrix.

    Raises:
      ValueError: A block that does not divide a weight's inputs so (names it, and what does), or
        `factors` below 1, or a part of the outputs is selected.

    References:
      Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023,
      section 4. https://arxiv.org/abs/2311.06243
    """
    sizes, counts = by_pattern(block, sites, "block"), by_pattern(factors, sites, "factors")
    check_whole("boft", sites)
    for path, site in sites.items():
        if counts[path] < 1:
            raise ValueError(
                f"`boft(factors={counts[path]})` for '{path}': give 1 (as `oft`) or more."
            )
        check_blocks("boft", "block", sizes[path], site, doublings=counts[path] - 1)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        b, m = sizes[site.path], counts[site.path]
        shape = (*site.stack, m, site.size(IN) // b, b * (b - 1) // 2)
        skew = Trainable(jnp.zeros(shape, dtype))
        scale = Trainable(jnp.ones((*site.stack, site.size("out")), dtype))
        weight = Butterfly(view.weight, skew, scale, b, m)
        return dataclasses.replace(view, weight=weight)

    options = dict(block=block, sites=sites, factors=factors, dtype=dtype)
    return Method(
        "boft", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="boft")
    )
