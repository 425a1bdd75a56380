"""Bottleneck adapters: a small feed-forward network behind a sub-layer, or beside it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.method import Method
from jaxpeft.methods.placing import bias_of, place
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import Unsupported, View, Weight, axes, base, static, weight

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@weight
class Bottleneck(Weight):
    """y + act((y + bias) @ down + down_bias) @ up + up_bias, where y = x @ w.

    The program adds its own bias to what this returns, so the adapter sees the sub-layer's
    true output y + bias and adds to it.
    """

    w: Any = base()
    down: Any = axes("out", "hidden")
    down_bias: Any = axes("hidden")
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    bias: Any = axes("out", optional=True)
    activation: str = static("relu")

    is_matrix = False

    def forward(self, x):
        y = x @ self.w
        h = y if self.bias is None else y + self.bias
        h = ACTIVATIONS[self.activation](h @ self.down + self.down_bias)
        return y + (h @ self.up + self.up_bias)


@weight
class Tap(Weight):
    """x @ w, and act(x @ down + down_bias) left for the `Add` of the same name."""

    w: Any = base()
    down: Any = axes("in", "hidden")
    down_bias: Any = axes("hidden")
    activation: str = static("relu")
    name: str = static("")

    is_matrix = False

    def forward(self, x):
        taps = self.down.site.taps
        if taps is None:
            raise Unsupported("a parallel adapter on a stack of experts")
        taps[self.name] = ACTIVATIONS[self.activation](x @ self.down + self.down_bias)
        return x @ self.w


@weight
class Add(Weight):
    """x @ w + scale * (h @ up + up_bias), where h is what the `Tap` of the same name left."""

    w: Any = base()
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    scale: float = static(1.0)
    name: str = static("")

    is_matrix = False

    def forward(self, x):
        taps = self.up.site.taps
        if taps is None or self.name not in taps:
            raise ValueError(
                f"The parallel adapter '{self.name}' is to add at its sub-layer's output, but "
                "nothing has passed its input in the same scope of the model. Choose an input "
                "that the model multiplies first, in the same loop body or branch."
            )
        return x @ self.w + self.scale * (taps.pop(self.name) @ self.up + self.up_bias)


def bottleneck(
    width: int, sites: Sites, *, activation: str = "relu", dtype: Any = jnp.float32
) -> Method:
    """Sequential bottleneck adapter behind a sub-layer.

    h + act(h @ down + c) @ up + e for the output h = x @ w + b of each selected kernel and its
    bias, with `up` and e zero, so that training starts at the base model.

    Args:
      width: m, the size of the bottleneck.
      sites: The kernels that end a sub-layer. The bias that follows is known from the sites.
      activation: "relu", "gelu", "silu" or "tanh".
      dtype: Of the adapter.

    Returns:
      A method with 2md + d + m trained numbers per kernel with d outputs.

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019, section 2.1.
      https://arxiv.org/abs/1902.00751
    """
    _check("bottleneck", width, activation)

    def make(key: jax.Array, site: Site, view: View) -> View:
        d = site.size("out")
        down, c, up, e = _network(key, site.stack, d, width, d, dtype)
        bias = bias_of(site, sites)
        return dataclasses.replace(
            view, weight=Bottleneck(view.weight, down, c, up, e, bias, activation)
        )

    options = {"width": width, "sites": sites, "activation": activation, "dtype": dtype}
    return Method(
        "bottleneck", options, lambda key, tree: place(key, tree, sites, make, who="bottleneck")
    )


def parallel(
    width: int,
    inputs: Sites,
    outputs: Sites,
    *,
    scale: float = 1.0,
    activation: str = "relu",
    dtype: Any = jnp.float32,
) -> Method:
    """Parallel adapter around a sub-layer f: f(x) + scale * (act(x @ down + c) @ up + e).

    One weight reads x where the sub-layer's first kernel does, another adds where its last
    one ends; they meet when the model is traced.

    Args:
      width: m, the size of the bottleneck.
      inputs: The first kernel of each sub-layer.
      outputs: The last one, in the same order.
      scale: s of the scaled parallel adapter.
      activation: "relu", "gelu", "silu" or "tanh".
      dtype: Of the adapter.

    Returns:
      A method with m (in + out) + m + out trained numbers per sub-layer.

    Raises:
      ValueError: Inputs and outputs differ in number, or (when the model is called) the two
        ends lie in scopes of the model that cannot see each other.

    References:
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021,
      section 4.1. https://arxiv.org/abs/2110.04366
    """
    _check("parallel", width, activation)
    if len(inputs) != len(outputs) or set(inputs) & set(outputs):
        raise ValueError(
            f"`parallel` pairs the first and the last kernel of each sub-layer, but got "
            f"{list(inputs)} and {list(outputs)}."
        )
    name = dict(zip(inputs, outputs, strict=True)) | {path: path for path in outputs}

    def tap(key: jax.Array, site: Site, view: View) -> View:
        down, c, _, _ = _network(key, site.stack, site.size("in"), width, 1, dtype)
        weight = Tap(view.weight, down, c, activation, name[site.path])
        return dataclasses.replace(view, weight=weight)

    def add(key: jax.Array, site: Site, view: View) -> View:
        _, _, up, e = _network(key, site.stack, 1, width, site.size("out"), dtype)
        return dataclasses.replace(view, weight=Add(view.weight, up, e, scale, name[site.path]))

    def apply(key: jax.Array, tree: Any) -> Any:
        tree = place(key, tree, inputs, tap, who="parallel")
        return place(key, tree, outputs, add, who="parallel")

    options = dict(
        width=width, inputs=inputs, outputs=outputs, scale=scale, activation=activation, dtype=dtype
    )
    return Method("parallel", options, apply)


def _check(who: str, width: int, activation: str) -> None:
    if width < 1:
        raise ValueError(f"`{who}(width={width})`: the bottleneck needs at least one unit.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"`{who}(activation='{activation}')`: choose of {sorted(ACTIVATIONS)}.")


def _network(
    key: jax.Array, stack: tuple[int, ...], n: int, m: int, d: int, dtype: Any
) -> tuple[Train, Train, Train, Train]:
    """down (n, m), its bias, up (m, d) and its bias; zero at its end."""
    down = jax.random.normal(key, (*stack, n, m), dtype) / n**0.5
    c, up, e = (Train(jnp.zeros((*stack, *shape), dtype)) for shape in ((m,), (m, d), (d,)))
    return Train(down), c, up, e
