"""IA3: trainable vectors that scale activations."""

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
class ScaledOutputs(Weight):
    """The matrix `w * scale`: each output is scaled."""

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
class ScaledOutputSlice(Weight):
    """The matrix `w` with a slice of its outputs scaled."""

    w: Any = base_weight()
    scale: Any = axes("part")
    part: OutputSlice = static()

    local_in = True

    def forward(self, x):
        """(x @ w) * scale, where the scale of every other output is 1."""
        return x @ self.w * self._full_scale()

    def transposed(self, y):
        """(y * scale) @ w.T."""
        return (y * self._full_scale()).astype(y.dtype) @ self.w.T

    def lookup(self, ids):
        """w[ids] * scale."""
        return self.w[ids] * self._full_scale()

    def materialize(self):
        return dense(self.w) * self.part.spread(self.scale, 1)

    def _full_scale(self):
        """The scale of all outputs (out,), as an operand of the call site."""
        scale: Operand = self.scale
        roles = [OUT if role == scale.rows else role for role in scale.roles]
        return Operand(self.part.spread(scale.array, 1), roles, OUT, OUT, scale.site)


@weight
class ScaledInputs(Weight):
    """The matrix `scale[:, None] * w`: each input is scaled."""

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

    Each selected weight `w` (in, out), with its bias `b` (out,) if it has one, gives

        y = l * (x @ w + b)    for the weights of `sites`, with l (out,)
        y = (l * x) @ w + b    for the weights of `feedforward`, with l (in,)

    where each weight has its own trainable vector l, which starts at ones, so that training starts
    at the base model. The bias is scaled together with the outputs, so that both can be merged.
    If one fused kernel gives queries, keys and values, `chain` scales the keys and the values:

        jp.chain(jp.ia3(fused.output_slice(1, 3)), jp.ia3(fused.output_slice(2, 3), feedforward))

    Args:
      sites: Weights whose outputs are scaled: the key and value projections.
        `Sites.output_slice` selects a slice of their outputs.
      feedforward: Weights whose inputs are scaled: the second projection of the feed-forward
        block. `None` selects no such weight.
      dtype: Dtype of the vectors.

    Returns:
      A `Method` with `out` trainable parameters for each of `sites` (the size of its slice, if
      one is selected), and `in` for each of `feedforward`.

    Raises:
      ValueError: A slice of the outputs is selected in `feedforward`, whose inputs are scaled.
        When the method is applied: a bias has another size than the outputs of its weight, or is
        added to the products of several weights.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 4)))
      >>> method = jp.ia3(sites.match("up"), sites.match("down"))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'down/scale': (8,), 'up/scale': (8,)}

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
      In-Context Learning, 2022, section 3.3. https://arxiv.org/abs/2205.05638
    """

    check_whole("ia3(feedforward=...)", feedforward or Sites({}))

    def name(site: Site) -> str:
        """Name of the scale, which the bias shares. Each slice of a weight has its own."""
        part = site.part
        which = "" if part is None else f"_{part.index}_of_{part.of}"
        return f"{site.path}/scale{which}"

    def scaled(view: View, scale: Trainable | Placeholder, part: OutputSlice | None) -> View:
        w = (
            ScaledOutputs(view.weight, scale)
            if part is None
            else ScaledOutputSlice(view.weight, scale, part)
        )
        return dataclasses.replace(view, weight=w)

    def scaled_out(key: jax.Array, site: Site, view: View) -> View:
        del key
        size = site.size(OUT) if site.part is None else site.part.size(site.size(OUT))
        ones = jnp.ones((*site.stack, size), dtype)
        return scaled(view, Trainable(ones, name=name(site)), site.part)

    def scaled_in(key: jax.Array, site: Site, view: View) -> View:
        del key
        ones = jnp.ones((*site.stack, site.size("in")), dtype)
        return dataclasses.replace(view, weight=ScaledInputs(view.weight, Trainable(ones)))

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
    """Raises ValueError if a bias cannot be scaled with the outputs of its weight."""
    for site in sites.values():
        if site.bias is None:
            continue
        bias = sites.every[site.bias]
        if bias.size(OUT) != site.size(OUT) or bias.stack != site.stack:
            raise ValueError(
                f"`ia3`: the model adds '{bias.path}' of shape {bias.shape} to the product of "
                f"'{site.path}' of shape {site.shape}, and one vector cannot scale both: the bias "
                f"has {bias.size(OUT)} entries for {site.size(OUT)} outputs, and their stacks are "
                f"{bias.stack} and {site.stack}. Leave '{site.path}' out of the sites."
            )
        followed = [other.path for other in sites.every.values() if other.bias == site.bias]
        if len(followed) > 1:
            raise ValueError(
                f"`ia3`: the model adds '{bias.path}' to the products of {followed}, each of which "
                f"has its own scale, so it cannot be scaled with '{site.path}'. Leave "
                f"'{site.path}' out of the sites."
            )
