"""IA3: learned vectors that scale activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.method import Method
from jaxpeft.methods.placing import check_whole, place
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Hole, Train
from jaxpeft.weight import View, Weight, axes, base, dense, weight


@weight
class ScaledOut(Weight):
    """The matrix `w * scale`: each output times a number."""

    w: Any = base()
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
class ScaledIn(Weight):
    """The matrix `scale[:, None] * w`: each input times a number."""

    w: Any = base()
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


def ia3(sites: Sites, feedforward: Sites | None = None, *, dtype: Any = jnp.float32) -> Method:
    """(IA)^3: scales keys, values and the inner activations of the feed-forward block.

    y = l * (x @ w + b) for the weights of `sites`, and y = (l * x) @ w + b for those of
    `feedforward`, with one vector l of ones each, so that training starts at the base model.
    A bias that follows a weight of `sites` is scaled with it, so both can be merged.

    Args:
      sites: Weights whose outputs are scaled: the key and value projections.
      feedforward: Weights whose inputs are scaled: the second of the feed-forward block.
      dtype: Of the vectors.

    Returns:
      A method with `out` trained numbers for each of `sites`, `in` for each of `feedforward`.

    Raises:
      ValueError: A part of the outputs is selected; or, when it is called, a bias has not one
        number for each output of its weight, or follows several weights.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
      In-Context Learning, 2022, section 3.3. https://arxiv.org/abs/2205.05638
    """

    check_whole("ia3", sites if feedforward is None else sites | feedforward)

    def scaled_out(key: jax.Array, site: Site, view: View) -> View:
        del key
        ones = jnp.ones((*site.stack, site.size("out")), dtype)
        scale = Train(ones, name=f"{site.path}/scale")  # the bias shares it
        return dataclasses.replace(view, weight=ScaledOut(view.weight, scale))

    def scaled_in(key: jax.Array, site: Site, view: View) -> View:
        del key
        ones = jnp.ones((*site.stack, site.size("in")), dtype)
        return dataclasses.replace(view, weight=ScaledIn(view.weight, Train(ones)))

    def apply(key: jax.Array, tree: Any) -> Any:
        _check_biases(sites)
        if sites:
            tree = place(key, tree, sites, scaled_out, who="ia3")
            biases = {site.bias: path for path, site in sites.items() if site.bias}

            def scaled_bias(key: jax.Array, site: Site, view: View) -> View:
                shared = Hole(f"{biases[site.path]}/scale")
                return dataclasses.replace(view, weight=ScaledOut(view.weight, shared))

            if biases:
                found = sites.every.match(lambda site: site.path in biases)
                tree = place(key, tree, found, scaled_bias, who="ia3", vectors=True)
        if feedforward is not None:
            tree = place(key, tree, feedforward, scaled_in, who="ia3")
        return tree

    return Method("ia3", {"sites": sites, "feedforward": feedforward, "dtype": dtype}, apply)


def _check_biases(sites: Sites) -> None:
    """Raises ValueError where a bias cannot be scaled as its weight is; names both."""
    for site in sites.values():
        if site.bias is None:
            continue
        bias = sites.every[site.bias]
        numbers, outputs = bias.size("out"), site.size("out")
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
