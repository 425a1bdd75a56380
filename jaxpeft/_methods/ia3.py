"""IA3: learned vectors that scale activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._operand import Operand
from jaxpeft._sites import OutputSlice, Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class ScaledOut(Weight):
    """The matrix `w * scale`: each output times a number."""

    w: Any = base_weight()
    scale: Any = axes("out")

    local_in = local_out = True

    def forward(self, x):
        """x @ (w * scale) = (x @ w) * scale."""
        return x @ self.w * self.scale

    def transposed(self, y):
        """y @ (w * scale).T = (y * scale) @ w.T."""
        return (y * self.scale).astype(y.dtype) @ self.w.T

    def lookup(self, ids):
        """(w * scale)[ids] = w[ids] * scale."""
        return self.w[ids] * self.scale

    def materialize(self):
        return dense(self.w) * self.scale


@weight
class ScaledPart(Weight):
    """The matrix `w` with each output of a part of them times a number."""

    w: Any = base_weight()
    scale: Any = axes("part")
    part: OutputSlice = static()

    local_in = True

    def forward(self, x):
        """(x @ w) * scale, where the scale of every other output is 1."""
        return x @ self.w * self._whole()

    def transposed(self, y):
        """(y * scale) @ w.T."""
        return (y * self._whole()).astype(y.dtype) @ self.w.T

    def lookup(self, ids):
        """w[ids] * scale."""
        return self.w[ids] * self._whole()

    def materialize(self):
        return dense(self.w) * self.part.spread(self.scale, 1)

    def _whole(self):
        """The scale of all outputs, as an operand of the site."""
        scale: Operand = self.scale
        roles = [OUT if role == scale.rows else role for role in scale.roles]
        return Operand(self.part.spread(scale.array, 1), roles, OUT, OUT, scale.site)


@weight
class ScaledIn(Weight):
    """The matrix `scale[:, None] * w`: each input times a number."""

    w: Any = base_weight()
    scale: Any = axes("in")

    local_in = local_out = True

    def forward(self, x):
        """x @ diag(scale) @ w = (x * scale) @ w."""
        return (x * self.scale).astype(x.dtype) @ self.w

    def transposed(self, y):
        """y @ (diag(scale) @ w).T = (y @ w.T) * scale."""
        return y @ self.w.T * self.scale

    def materialize(self):
        return dense(self.w) * self.scale[:, None]


@register_method
def ia3(sites: Sites, feedforward: Sites | None = None, *, dtype: Any = jnp.float32) -> Method:
    """(IA)^3: scales keys, values and the inner activations of the feed-forward block.

    y = l * (x @ w + b) for the weights of `sites`, and y = (l * x) @ w + b for those of
    `feedforward`, with one vector l of ones each, so that training starts at the base model.
    A bias that follows a weight of `sites` is scaled with it, so both can be merged. In a fused
    kernel, `chain` scales the keys and the values:

        jp.chain(jp.ia3(fused.output_slice(1, 3)), jp.ia3(fused.output_slice(2, 3), feedforward))

    Args:
      sites: Weights whose outputs are scaled: the key and value projections; with
        `Sites.columns`, a part of their outputs.
      feedforward: Weights whose inputs are scaled: the second of the feed-forward block.
      dtype: Of the vectors.

    Returns:
      A method with `out` trainable parameters for each of `sites` (those of its part), and `in`
      for each of `feedforward`.

    Raises:
      ValueError: A part of the outputs is selected in `feedforward`, whose inputs are scaled; or,
        when it is called, a bias has not one number for each output of its weight, or follows
        several weights.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
      In-Context Learning, 2022, section 3.3. https://arxiv.org/abs/2205.05638
    """

    check_whole("ia3(feedforward=...)", feedforward or Sites({}))

    def name(site: Site) -> str:
        """Of the scale, which the bias shares; parts of one weight are told apart."""
        part = site.part
        which = "" if part is None else f"_{part.index}_of_{part.of}"
        return f"{site.path}/scale{which}"

    def scaled(view: View, scale: Trainable | Placeholder, part: OutputSlice | None) -> View:
        w = ScaledOut(view.weight, scale) if part is None else ScaledPart(view.weight, scale, part)
        return dataclasses.replace(view, weight=w)

    def scaled_out(key: jax.Array, site: Site, view: View) -> View:
        del key
        size = site.size(OUT) if site.part is None else site.part.size(site.size(OUT))
        ones = jnp.ones((*site.stack, size), dtype)
        return scaled(view, Trainable(ones, name=name(site)), site.part)

    def scaled_in(key: jax.Array, site: Site, view: View) -> View:
        del key
        ones = jnp.ones((*site.stack, site.size("in")), dtype)
        return dataclasses.replace(view, weight=ScaledIn(view.weight, Trainable(ones)))

    def apply(key: jax.Array, tree: Any) -> Any:
        _check_biases(sites)
        if sites:
            tree = apply_to_sites(key, tree, sites, scaled_out, caller="ia3", parts=True)
            biases = {site.bias: site for site in sites.values() if site.bias}

            def scaled_bias(key: jax.Array, site: Site, view: View) -> View:
                owner = biases[site.path]
                return scaled(view, Placeholder(name(owner)), owner.part)

            if biases:
                found = sites.every.match(lambda site: site.path in biases)
                tree = apply_to_sites(key, tree, found, scaled_bias, caller="ia3", vectors=True)
        if feedforward is not None:
            tree = apply_to_sites(key, tree, feedforward, scaled_in, caller="ia3")
        return tree

    return Method("ia3", {"sites": sites, "feedforward": feedforward, "dtype": dtype}, apply)


def _check_biases(sites: Sites) -> None:
    """Raises ValueError where a bias cannot be scaled as its weight is; names both."""
    for site in sites.values():
        if site.bias is None:
            continue
        bias = sites.every[site.bias]
        numbers, outputs = bias.size(OUT), site.size(OUT)
        if numbers != outputs or bias.stack != site.stack:
            raise ValueError(
                f"`ia3`: the model adds '{bias.path}' of shape {bias.shape} to the product of "
                f"'{site.path}' of shape {site.shape}, and both are scaled by one vector: there "
                f"are {numbers} numbers for {outputs} outputs, in stacks {bias.stack} and "
                f"{site.stack}. Leave '{site.path}' out of the sites."
            )
        followed = [other.path for other in sites.every.values() if other.bias == site.bias]
        if len(followed) > 1:
            raise ValueError(
                f"`ia3`: the model adds '{bias.path}' to the products of {followed}, which have "
                f"a vector each, so it cannot be scaled with '{site.path}'. Leave it out of the "
                "sites."
            )
