"""RoAd: rotation and scaling of a weight's outputs in pairs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.oft import check_blocks
from jaxpeft._rules.contractions import ConvCallSite
from jaxpeft._sites import Site, Sites, by_pattern
from jaxpeft._view import View
from jaxpeft._weight import OUT, Unsupported, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class PairRotatedOutputs(Weight):
    """The matrix `w * cos + partner(w) * sin`, where partner(w) swaps the columns of each pair.

    In a group of g outputs, output i of the first half and output i of the second half are a pair.
    In an odd group, the first half is longer, and its last output has no partner: its partner
    counts as zero.
    """

    w: Any = base_weight()
    cos: Any = axes("out")
    sin: Any = axes("out")
    group_size: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """Groups stay whole."""
        del field
        return (self.group_size, self.group_size) if axis == OUT else (1, 1)

    def forward(self, x):
        """x @ (w * cos + partner(w) * sin) = y * cos + partner(y) * sin, y = x @ w."""
        site = self.cos.site
        if isinstance(site, ConvCallSite) and self.cos.shape[-1] // site.groups % self.group_size:
            raise Unsupported("pairs of outputs across groups of a convolution")
        return self._rotated(x @ self.w)

    def transposed(self, y):
        """y @ (w * cos + partner(w) * sin).T = (y * cos + partner(y * sin)) @ w.T."""
        return (y * self.cos + self._partner(y * self.sin)).astype(y.dtype) @ self.w.T

    def lookup(self, ids):
        """(w * cos + partner(w) * sin)[ids] = w[ids] * cos + partner(w[ids]) * sin."""
        return self._rotated(self.w[ids])

    def materialize(self):
        return self._rotated(dense(self.w))

    def _rotated(self, y):
        return y * self.cos + self._partner(y) * self.sin

    def _partner(self, y):
        """y (..., out) with the two outputs of each pair swapped."""
        groups = y.reshape(*y.shape[:-1], -1, self.group_size)
        if odd := self.group_size % 2:
            groups = jnp.pad(groups, [(0, 0)] * (groups.ndim - 1) + [(0, 1)])
        halves = groups.reshape(*groups.shape[:-1], 2, -1)[..., ::-1, :]
        swapped = halves.reshape(groups.shape)
        return (swapped[..., : self.group_size] if odd else swapped).reshape(y.shape)


@weight
class ScaledPairRotations(Weight):
    """The matrix `w` with each pair of outputs rotated by trainable angles, and scaled.

    The angles `theta` and the scales `alpha` (pairs, k) map a pair (x, y) of outputs to

        k = 1    a cos t x  - a sin t y       k = 2    a1 cos t1 x - a1 sin t1 y
                 a sin t x  + a cos t y                a2 sin t2 x + a2 cos t2 y

        k = 4    a1 cos t1 x - a3 sin t3 y
                 a4 sin t4 x + a2 cos t2 y

    Pairs are numbered group by group, as in `PairRotatedOutputs`. An output without a partner has
    a pair of its own.
    """

    w: Any = base_weight()
    theta: Any = axes("out", "variant")
    alpha: Any = axes("out", "variant")
    group_size: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """The pairs of a group stay together."""
        del field
        return (self.group_size, (self.group_size + 1) // 2) if axis == OUT else (1, 1)

    def derived(self):
        return self._coefficients(self.theta.array, self.alpha.array)

    def acting(self, **derived):
        return PairRotatedOutputs(self.w, **derived, group_size=self.group_size)

    def materialize(self):
        return self.acting(**self._coefficients(self.theta, self.alpha)).materialize()

    def _coefficients(self, theta, alpha):
        """`cos` and `sin` (out,): the factors of each output and of its partner."""
        wide = jnp.promote_types(theta.dtype, jnp.float32)
        theta, alpha = (self._by_coefficient(x.astype(wide)) for x in (theta, alpha))
        cos, sin = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
        signs = jnp.array([-1, 1], wide)
        return {"cos": self._by_output(cos[:, 0]), "sin": self._by_output(sin[:, 1] * signs)}

    def _by_coefficient(self, x):
        """(pairs, k) to (pairs, 2, 2): (cos or sin, first or second output) of each pair."""
        pairs, k = x.shape
        return jnp.broadcast_to(x.reshape(pairs, max(k // 2, 1), min(k, 2)), (pairs, 2, 2))

    def _by_output(self, x):
        """(pairs, 2) to (out,)."""
        half = (self.group_size + 1) // 2
        groups = jnp.swapaxes(x.reshape(-1, half, 2), 1, 2).reshape(-1, 2 * half)
        return groups[:, : self.group_size].reshape(-1)


@register_method
def road(
    sites: Sites,
    *,
    variant: int = 1,
    group_size: int | Mapping[str, int] = 2,
    dtype: Any = jnp.float32,
) -> Method:
    """2D rotary adaptation: rotates and scales the outputs of a weight in pairs.

    Each pair (x, y) of outputs of a selected weight, with its bias, becomes

        x' = a cos(t) x - a sin(t) y,    y' = a sin(t) x + a cos(t) y

    with trainable angles t, which start at zero, and scales a, which start at one, so that
    training starts at the base model. The bias is rotated together with the outputs, so that both
    can be merged. The cost is two multiplications and one addition per output.

    Args:
      sites: The matrices to adapt, with all of their outputs.
      variant: Number of angles and of scales of each pair. 1: one of each for all four
        coefficients above. 2: one of each for x' and one for y'. 4: one of each for each
        coefficient.
      group_size: g. Outputs i and i + g / 2 of each group of g outputs are a pair. 2 pairs
        neighbours, as in the paper; Hugging Face PEFT has 64. In an odd group one output has no
        partner and is only scaled. A mapping from path patterns to sizes gives each matrix its
        own; the first pattern that matches wins.
      dtype: Dtype of the trainable arrays. Cosines are computed in float32 or wider.

    Returns:
      A `Method` with variant * out trainable parameters per matrix, half of them angles and half
      scales. An output without a partner counts as two.

    Raises:
      ValueError: A group size does not divide the outputs of a weight (the message names the
        weight and sizes that do), `variant` is unknown, a slice of the outputs is selected, or a
        bias has another size than the outputs of its weight or is added to the products of several
        weights.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.road(sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/theta': (2, 1), 'w/alpha': (2, 1)}

    References:
      Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
      Composability, 2024, section 3. https://arxiv.org/abs/2409.00119
    """
    if variant not in (1, 2, 4):
        raise ValueError(f"`road(variant={variant})`: choose 1, 2 or 4.")
    groups = by_pattern(group_size, sites, "group_size")
    check_whole("road", sites)
    for path, site in sites.items():
        check_blocks("road", "group_size", groups[path], site, OUT)
    weight_of_bias = _weight_of_bias(sites)

    def rotated(key: jax.Array, site: Site, view: View) -> View:
        del key
        g = groups[site.path]
        shape = (*site.stack, site.size(OUT) // g * ((g + 1) // 2), variant)
        # Named, because the bias shares them.
        theta = Trainable(jnp.zeros(shape, dtype), name=f"{site.path}/theta")
        alpha = Trainable(jnp.ones(shape, dtype), name=f"{site.path}/alpha")
        return dataclasses.replace(view, weight=ScaledPairRotations(view.weight, theta, alpha, g))

    def rotated_bias(key: jax.Array, site: Site, view: View) -> View:
        del key
        path = weight_of_bias[site.path]
        theta, alpha = (Placeholder(f"{path}/{name}") for name in ("theta", "alpha"))
        return dataclasses.replace(
            view, weight=ScaledPairRotations(view.weight, theta, alpha, groups[path])
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        tree = apply_to_sites(key, tree, sites, rotated, caller="road")
        if weight_of_bias:
            biases = sites.every.match(lambda site: site.path in weight_of_bias)
            tree = apply_to_sites(key, tree, biases, rotated_bias, caller="road", vectors=True)
        return tree

    options = dict(sites=sites, variant=variant, group_size=group_size, dtype=dtype)
    return Method("road", options, apply)


def _weight_of_bias(sites: Sites) -> dict[str, str]:
    """{path of a bias: path of the weight to whose product the model adds it}.

    Raises:
      ValueError: A bias cannot be rotated with the outputs of its weight.
    """
    found: dict[str, str] = {}
    for path, site in sites.items():
        if site.bias is None:
            continue
        bias = sites.every[site.bias]
        if bias.size(OUT) != site.size(OUT) or bias.stack != site.stack:
            raise ValueError(
                f"`road`: the model adds '{bias.path}' of shape {bias.shape} to the product of "
                f"'{path}' of shape {site.shape}, and one rotation cannot act on both: the bias "
                f"has {bias.size(OUT)} entries in a stack {bias.stack}, and should have "
                f"{site.size(OUT)} in {site.stack}. Leave '{path}' out of the sites."
            )
        if other := found.get(bias.path):
            raise ValueError(
                f"`road`: '{bias.path}' is the bias of '{other}' and of '{path}', and cannot be "
                "rotated with both. Leave one of them out of the sites."
            )
        found[bias.path] = path
    return found
