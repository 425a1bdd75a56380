"""Hybrids: methods that are several others at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.bottleneck_adapter import Bottleneck, bottleneck_adapter
from jaxpeft._methods.lora import low_rank
from jaxpeft._methods.prefix_tuning import Prefix, prefix_tuning, virtual_positions_of
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites

# --- UniPELT -------------------------------------------------------------------------------


def gate(x: jax.Array, kernel: Any, bias: Any, slots: Any, path: str) -> jax.Array:
    """sigmoid(x @ kernel + bias), its mean over the real positions: (batch, 1, 1).

    Args:
      x: (batch, time, n).
      kernel, bias: Operands with axes (n) and (1).
      slots: Operand (batch, time), -1 at real positions.
      path: Of the weight, for messages.

    Raises:
      ValueError: x has other leading axes than the slots.
    """
    slots = virtual_positions_of(slots, x, f"gate at '{path}'")
    real = (slots < 0)[..., None]
    open_ = jnp.where(real, jax.nn.sigmoid(x @ kernel + bias), 0)
    return jnp.sum(open_, -2, keepdims=True) / jnp.sum(real, -2, keepdims=True)


@weight
class GatedLowRank(Weight):
    """x @ w + g(x) * x @ a @ b."""

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("in")
    gate_bias: Any = axes("one")
    slots: Any = axes(shared=True)
    path: str = static("")

    is_mergeable = False
    per_position = "slots"

    def forward(self, x):
        g = gate(x, self.gate, self.gate_bias, self.slots, self.path)
        return x @ self.w + (g * (x @ self.a @ self.b)).astype(x.dtype)


@weight
class GatedPrefix(Prefix):
    """Trained rows times g(x)."""

    gate: Any = axes("in", optional=True)
    gate_bias: Any = axes("one", optional=True)

    def weighed(self, virtual, x):
        return virtual * gate(x, self.gate, self.gate_bias, self.slots, self.path)


@weight
class GatedBottleneck(Bottleneck):
    """y + g(z) * delta(z)."""

    gate: Any = axes("out", optional=True)
    gate_bias: Any = axes("one", optional=True)
    slots: Any = axes(shared=True, optional=True)
    path: str = static("")

    per_position = "slots"

    def delta(self, z):
        g = gate(z, self.gate, self.gate_bias, self.slots, self.path)
        return (g * super().delta(z)).astype(z.dtype)


@register_method
def unipelt(
    lora_sites: Sites,
    keys: Sites,
    values: Sites,
    outputs: Sites,
    *,
    rank: int = 8,
    length: int = 10,
    width: int = 48,
    norms: Sites | None = None,
    eps: float = 1e-12,
    rope: Sequence[float] | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """UniPELT: LoRA, a prefix and Pfeiffer's adapter, each behind a gate of its own.

    Of the input z of each (batch, time, n), a gate g = mean over time of sigmoid(z @ v + c) is one
    number per example and layer, which multiplies

    - LoRA's x @ a @ b, in the place of alpha / r, with z = x;
    - the prefix's keys and values, with z the input of their projections, one gate for both;
    - the adapter's act(z @ down + c) @ up + e, with z = LN(h + r).

    The mean leaves virtual positions out. It counts padding, as the paper does, so an example's
    outputs depend on how far it is padded; and in cached decoding it is that of the new token.

    Args:
      lora_sites: For LoRA; the paper takes the query and value projections.
      keys, values: The projections that get a prefix.
      outputs: The last kernel of each feed-forward block, for the adapter.
      rank, length, width: Sizes of the three; the paper takes 8, 10 and 48.
      norms, eps: The LayerNorms behind the feed-forward blocks, as for `bottleneck`.
      rope: As for `prefix`.
      activation, dropout: Of the adapter.
      dtype: Of what is trained.

    Returns:
      A method with the trained numbers of the three, and n + 1 for each gate.

    Raises:
      ValueError: Keys and values differ in number; or as `lora`, `prefix` and `bottleneck`.

    References:
      Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning,
      2022, section 3. https://arxiv.org/abs/2110.07577
    """
    if len(keys) != len(values):
        raise ValueError(
            "`unipelt` has one gate for the keys and the values of a layer, so it takes them in "
            f"pairs, but got {list(keys)} and {list(values)}."
        )
    low = low_rank("unipelt", rank, lora_sites, dtype=dtype)
    virtual = prefix_tuning(length, keys, values, rope=rope, dtype=dtype)
    behind = bottleneck_adapter(
        width,
        outputs,
        adapter_input="output_plus_residual",
        norms=norms,
        eps=eps,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )

    def parts(key: jax.Array, site: Site, size: int, name: str) -> dict[str, Any]:
        kernel = 0.02 * jax.random.normal(key, (*site.stack, size), dtype)
        return {
            "gate": Trainable(kernel, name=f"{name}/gate"),
            "gate_bias": Trainable(jnp.zeros((*site.stack, 1), dtype), name=f"{name}/gate_bias"),
            "slots": Placeholder("virtual"),
            "path": site.path,
        }

    def gated_lora(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        fields = parts(key, site, site.size(IN), f"{site.path}/lora")
        return dataclasses.replace(view, weight=GatedLowRank(old.w, old.a, old.b, **fields))

    owner = dict(zip([*keys, *values], [*keys, *keys], strict=True))

    def gated_prefix(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        name = f"{owner[site.path]}/prefix"
        fields = parts(key, site, site.size(IN), name)
        if owner[site.path] != site.path:
            fields |= {field: Placeholder(f"{name}/{field}") for field in ("gate", "gate_bias")}
        return dataclasses.replace(view, weight=GatedPrefix(**(_fields(old) | fields)))

    def gated_bottleneck(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        fields = parts(key, site, site.size(OUT), f"{site.path}/bottleneck")
        return dataclasses.replace(view, weight=GatedBottleneck(**(_fields(old) | fields)))

    def apply(key: jax.Array, tree: Any) -> Any:
        for i, (method, sites, make) in enumerate(
            [
                (low, lora_sites, gated_lora),
                (virtual, keys | values, gated_prefix),
                (behind, outputs, gated_bottleneck),
            ]
        ):
            first, second = jax.random.split(jax.random.fold_in(key, i))
            tree = apply_to_sites(second, method(first, tree), sites, make, caller="unipelt")
        return tree

    options = dict(
        lora_sites=lora_sites,
        keys=keys,
        values=values,
        outputs=outputs,
        rank=rank,
        length=length,
        width=width,
        norms=norms,
        eps=eps,
        rope=None if rope is None else [float(f) for f in rope],
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )
    return Method("unipelt", options, apply)


def _fields(w: Any) -> dict[str, Any]:
    return {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
