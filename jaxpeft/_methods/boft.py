"""BOFT: a rotation of the inputs as a product of sparse rotations in a butterfly pattern."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.ia3 import ScaledOutputs
from jaxpeft._methods.oft import RotatedInputs, cayley_rotations, check_blocks
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class ButterflyRotation(Weight):
    """The matrix `R @ w * scale`, R = R_m ... R_1, each block-diagonal up to a permutation.

    A block of R_1 has b neighbouring inputs. A block of R_k has two runs of b / 2 neighbouring
    inputs, the second 2^(k - 1) runs after the first, so that each factor mixes twice as many
    inputs as the one before.
    """

    w: Any = base_weight()
    skew: Any = axes("factor", "in", "pair")
    scale: Any = axes("out")
    block_size: int = static()
    n_factors: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """Inputs that the factors mix stay together."""
        del field
        joined = 2 ** (self.n_factors - 1)
        return (joined * self.block_size, joined) if axis == IN else (1, 1)

    def derived(self):
        return {"rotations": self._rotations(self.skew.array)}

    def acting(self, **derived):
        w: Any = ScaledOutputs(self.w, self.scale)
        for i in range(self.n_factors):
            w = RotatedInputs(w, derived["rotations"][..., i, :, :], self.block_size, 2**i)
        return w

    def materialize(self):
        return self.acting(rotations=self._rotations(self.skew)).materialize()

    def _rotations(self, skew):
        """(factors, in, block), each factor as `RotatedInputs` takes it."""
        blocks = cayley_rotations(skew, self.block_size)
        return blocks.reshape(self.n_factors, -1, self.block_size)


@register_method
def boft(
    block_size: int | Mapping[str, int],
    sites: Sites,
    *,
    n_butterfly_factors: int | Mapping[str, int] = 2,
    dtype: Any = jnp.float32,
) -> Method:
    """Orthogonal butterfly finetuning: `oft` with a denser rotation from the same small blocks.

    Each selected matrix `w` (in, out) becomes

        R_m @ ... @ R_1 @ w * s

    with trainable rotations R_k (in, in), each block-diagonal as in `oft` after a permutation of
    the inputs in a butterfly pattern, and a trainable scale s (out,). Each factor mixes twice as
    many inputs as the one before: log2(2 in / b) factors mix every input with every other, if
    that is a whole number. One factor is `oft` with a scale. The rotations start at the identity
    and s at ones, so that training starts at the base model.

    Args:
      block_size: b, the number of inputs in a block. b * 2^(m - 1) divides `in`, and b is even if
        m > 1. A mapping from path patterns to sizes gives each matrix its own; the first pattern
        that matches wins.
      sites: The matrices to adapt, as for `oft`.
      n_butterfly_factors: m, or a mapping as for `block_size`. A product takes m * in * b more
        multiplications per token than the base product.
      dtype: Dtype of the trainable arrays. Rotations are computed in float32 or wider.

    Returns:
      A `Method` with m * in * (b - 1) / 2 + out trainable parameters per matrix.

    Raises:
      ValueError: The blocks do not divide the inputs of a weight (the message names the weight and
        sizes that do), a number of factors is below 1, or a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.boft(4, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/skew': (2, 2, 6), 'w/scale': (4,)}

    References:
      Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023,
      section 4. https://arxiv.org/abs/2311.06243
    """
    sizes = by_pattern(block_size, sites, "block_size")
    counts = by_pattern(n_butterfly_factors, sites, "n_butterfly_factors")
    check_whole("boft", sites)
    for path, site in sites.items():
        if counts[path] < 1:
            raise ValueError(
                f"`boft(n_butterfly_factors={counts[path]})` for '{path}': give 1 (as in `oft`) or "
                "more."
            )
        check_blocks("boft", "block_size", sizes[path], site, doublings=counts[path] - 1)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        b, m = sizes[site.path], counts[site.path]
        shape = (*site.stack, m, site.size(IN) // b, b * (b - 1) // 2)
        skew = Trainable(jnp.zeros(shape, dtype))
        scale = Trainable(jnp.ones((*site.stack, site.size(OUT)), dtype))
        weight = ButterflyRotation(view.weight, skew, scale, b, m)
        return dataclasses.replace(view, weight=weight)

    options = dict(
        block_size=block_size, sites=sites, n_butterfly_factors=n_butterfly_factors, dtype=dtype
    )
    return Method(
        "boft", options, lambda key, tree: apply_to_sites(key, tree, sites, make, caller="boft")
    )
