"""RoAd: the outputs of a weight turned and stretched in pairs."""

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
class RotatedOut(Weight):
    """The matrix `w * cos + partner(w) * sin`: each output with its partner in its group.

    In a group of g, output i of the first half has output i of the second for its partner. Of an
    odd group, the last of the first half, which is the longer one, has none.
    """

    w: Any = base_weight()
    cos: Any = axes("out")
    sin: Any = axes("out")
    group: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """Groups stay whole."""
        del field
        return (self.group, self.group) if axis == OUT else (1, 1)

    def forward(self, x):
        """x @ (w * cos + partner(w) * sin) = y * cos + partner(y) * sin, y = x @ w."""
        site = self.cos.site
        if isinstance(site, ConvCallSite) and self.cos.shape[-1] // site.groups % self.group:
            raise Unsupported("partners in two groups of a convolution, which see other inputs")
        return self._turned(x @ self.w)

    def transposed(self, y):
        """y @ (w * cos + partner(w) * sin).T = (y * cos + partner(y * sin)) @ w.T."""
        return (y * self.cos + self._partner(y * self.sin)).astype(y.dtype) @ self.w.T

    def lookup(self, ids):
        """(w * cos + partner(w) * sin)[ids] = w[ids] * cos + partner(w[ids]) * sin."""
        return self._turned(self.w[ids])

    def materialize(self):
        return self._turned(dense(self.w))

    def _turned(self, y):
        return y * self.cos + self._partner(y) * self.sin

    def _partner(self, y):
        groups = y.reshape(*y.shape[:-1], -1, self.group)
        if odd := self.group % 2:
            groups = jnp.pad(groups, [(0, 0)] * (groups.ndim - 1) + [(0, 1)])
        halves = groups.reshape(*groups.shape[:-1], 2, -1)[..., ::-1, :]
        swapped = halves.reshape(groups.shape)
        return swapped[..., : self.group].reshape(y.shape) if odd else swapped.reshape(y.shape)


@weight
class Turned(Weight):
    """The matrix whose outputs are turned in pairs by trained angles, and scaled.

    `theta` and `alpha` (pairs, k) make of a pair (x, y) of outputs

        k = 1    a cos t x  - a sin t y       k = 2    a1 cos t1 x - a1 sin t1 y
                 a sin t x  + a cos t y                a2 sin t2 x + a2 cos t2 y

        k = 4    a1 cos t1 x - a3 sin t3 y
                 a4 sin t4 x + a2 cos t2 y

    Pairs count through groups as in `RotatedOut`; an output without a partner counts as one
    whose partner is zero.
    """

    w: Any = base_weight()
    theta: Any = axes("out", "each")
    alpha: Any = axes("out", "each")
    group: int = static()

    local_in = local_out = True

    def granularity(self, field, axis):
        """The pairs of a group stay together."""
        del field
        return (self.group, (self.group + 1) // 2) if axis == OUT else (1, 1)

    def derived(self):
        return self._factors(self.theta.array, self.alpha.array)

    def acting(self, **derived):
        return RotatedOut(self.w, **derived, group=self.group)

    def materialize(self):
        return self.acting(**self._factors(self.theta, self.alpha)).materialize()

    def _factors(self, theta, alpha):
        """The two numbers (out,) that each output and its partner are multiplied by."""
        wide = jnp.promote_types(theta.dtype, jnp.float32)
        theta, alpha = (self._by_row(x.astype(wide)) for x in (theta, alpha))
        cos, sin = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
        rows = (cos[:, 0], sin[:, 1] * jnp.array([-1, 1], wide))
        return {name: self._outputs(x) for name, x in zip(("cos", "sin"), rows, strict=True)}

    def _by_row(self, x):
        """(pairs, k) to (pairs, 2, 2): of cosine and sine, for the first and the second output."""
        pairs, k = x.shape
        return jnp.broadcast_to(x.reshape(pairs, max(k // 2, 1), min(k, 2)), (pairs, 2, 2))

    def _outputs(self, x):
        """(pairs, 2) to (out,)."""
        half = (self.group + 1) // 2
        groups = jnp.swapaxes(x.reshape(-1, half, 2), 1, 2).reshape(-1, 2 * half)
        return groups[:, : self.group].reshape(-1)


@register_method
def road(
    sites: Sites,
    *,
    variant: int = 1,
    group: int | Mapping[str, int] = 2,
    dtype: Any = jnp.float32,
) -> Method:
    """2D rotary adaptation: outputs of a weight are turned and stretched in pairs.

    Each pair (x, y) of outputs of a selected weight becomes

        x' = a cos(t) x - a sin(t) y,    y' = a sin(t) x + a cos(t) y

    with angles t of zero and scales a of one, so that training starts at the base model. A bias
    that follows the weight is turned with it, so both can be merged. It costs two products and a
    sum for each output; there is no matrix.

    Args:
      sites: The matrices to adapt.
      variant: Numbers t and a of a pair: 1, the same for all four entries; 2, one for each of the
        two outputs; 4, one for each entry.
      group: Outputs i and i + group / 2 of each group of so many make a pair: 2 for neighbours, as
        in the paper. `peft` has 64. Of an odd group one output is alone, and only scaled. A
        mapping from path patterns gives each target its own; the first match wins.
      dtype: Of the trained numbers. Cosines are computed in float32 at least.

    Returns:
      A method with `variant` * out trained numbers per matrix: half of them angles, half scales.
      An odd group counts as one more.

    Raises:
      ValueError: A group that does not divide a weight's outputs (names it, and what does), an
        unknown variant, a part of the outputs is selected, or a bias that cannot be turned with
        its weight because it has other numbers, or another weight's too.

    References:
      Liao and Monz, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
      Composability, 2024, section 3. https://arxiv.org/abs/2409.00119
    """
    if variant not in (1, 2, 4):
        raise ValueError(f"`road(variant={variant})`: choose 1, 2 or 4 numbers for each pair.")
    groups = by_pattern(group, sites, "group")
    check_whole("road", sites)
    for path, site in sites.items():
        check_blocks("road", "group", groups[path], site, OUT)
    biases = _biases(sites)

    def turned(key: jax.Array, site: Site, view: View) -> View:
        del key
        g = groups[site.path]
        shape = (*site.stack, site.size(OUT) // g * ((g + 1) // 2), variant)
        # The bias shares them.
        theta = Trainable(jnp.zeros(shape, dtype), name=f"{site.path}/theta")
        alpha = Trainable(jnp.ones(shape, dtype), name=f"{site.path}/alpha")
        return dataclasses.replace(view, weight=Turned(view.weight, theta, alpha, g))

    def turned_bias(key: jax.Array, site: Site, view: View) -> View:
        del key
        path = biases[site.path]
        theta, alpha = (Placeholder(f"{path}/{name}") for name in ("theta", "alpha"))
        return dataclasses.replace(view, weight=Turned(view.weight, theta, alpha, groups[path]))

    def apply(key: jax.Array, tree: Any) -> Any:
        tree = apply_to_sites(key, tree, sites, turned, caller="road")
        if biases:
            found = sites.every.match(lambda site: site.path in biases)
            tree = apply_to_sites(key, tree, found, turned_bias, caller="road", vectors=True)
        return tree

    options = dict(sites=sites, variant=variant, group=group, dtype=dtype)
    return Method("road", options, apply)


def _biases(sites: Sites) -> dict[str, str]:
    """{path of a bias: that of the weight that it follows}."""
    biases: dict[str, str] = {}
    for path, site in sites.items():
        if site.bias is None:
            continue
        bias = sites.every[site.bias]
        if bias.size(OUT) != site.size(OUT) or bias.stack != site.stack:
            raise ValueError(
                f"`road`: the model adds '{bias.path}' of shape {bias.shape} to the product of "
                f"'{path}' of shape {site.shape}, and it cannot be turned with it: it takes "
                f"{site.size(OUT)} numbers in a stack {site.stack}, and has {bias.size(OUT)} in "
                f"{bias.stack}. Leave '{path}' out of the sites."
            )
        if other := biases.get(bias.path):
            raise ValueError(
                f"`road`: '{bias.path}' is the bias of '{other}' and of '{path}', and cannot be "
                "turned with both. Leave one of them out of the sites."
            )
        biases[bias.path] = path
    return biases
