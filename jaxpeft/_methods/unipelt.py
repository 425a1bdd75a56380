"""UniPELT: LoRA, a prefix and a bottleneck adapter, each behind a learned gate."""

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


def gate(x: jax.Array, kernel: Any, bias: Any, positions: Any, path: str) -> jax.Array:
    """The mean of sigmoid(x @ kernel + bias) over the real positions, (batch, 1, 1).

    Args:
      x: (batch, time, n).
      kernel, bias: Operands with axes (n) and (1).
      positions: Operand (batch, time), the virtual positions; -1 at real ones.
      path: Path of the weight, for messages.

    Raises:
      PositionsError: x has other leading axes than the positions.
    """
    positions = virtual_positions_of(positions, x, f"gate at '{path}'")
    real = (positions < 0)[..., None]
    gates = jnp.where(real, jax.nn.sigmoid(x @ kernel + bias), 0)
    return jnp.sum(gates, -2, keepdims=True) / jnp.sum(real, -2, keepdims=True)


@weight
class GatedLowRank(Weight):
    """x @ w + g(x) * x @ a @ b."""

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    gate: Any = axes("in")
    gate_bias: Any = axes("one")
    virtual_positions: Any = axes(shared=True)
    path: str = static("")

    is_mergeable = False
    per_position = "virtual_positions"

    def forward(self, x):
        g = gate(x, self.gate, self.gate_bias, self.virtual_positions, self.path)
        return x @ self.w + (g * (x @ self.a @ self.b)).astype(x.dtype)


@weight
class GatedPrefix(Prefix):
    """A prefix with rows g(x) * rows."""

    gate: Any = axes("in", optional=True)
    gate_bias: Any = axes("one", optional=True)

    def gated(self, virtual, x):
        return virtual * gate(x, self.gate, self.gate_bias, self.virtual_positions, self.path)


@weight
class GatedBottleneck(Bottleneck):
    """y + g(z) * delta(z)."""

    gate: Any = axes("out", optional=True)
    gate_bias: Any = axes("one", optional=True)
    virtual_positions: Any = axes(shared=True, optional=True)
    path: str = static("")

    per_position = "virtual_positions"

    def delta(self, z):
        g = gate(z, self.gate, self.gate_bias, self.virtual_positions, self.path)
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
    bottleneck_dim: int = 48,
    norms: Sites | None = None,
    eps: float = 1e-12,
    rope: Sequence[float] | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """UniPELT: LoRA, a prefix and a bottleneck adapter, each multiplied by a learned gate.

    A gate reads an input z of shape (batch, time, n) and gives one number in (0, 1) per example
    and layer, g = mean over time of sigmoid(z @ v + c), with trainable v (n,) and c (1,):

        LoRA      y = x @ w + g * x @ a @ b    g instead of alpha / r; z = x
        prefix    rows g * P                   z = the input of the key and value projections,
                                               one gate for both
        adapter   g * (act(z @ down + c) @ up + e)    z = LN(h + r), r the residual stream

    The mean is over real positions, not over virtual ones. It includes padding, as in the paper:
    the outputs of an example depend on the amount of its padding. In cached decoding it is over
    the new token only.

    A call takes the virtual positions, `combine(frozen, adapter, virtual_positions=positions)`,
    as `prefix_tuning` does.

    Args:
      lora_sites: The weights for LoRA; the query and value projections in the paper.
      keys, values: The projections for the prefix, in pairs.
      outputs: The last kernel of each feed-forward block, for the adapter.
      rank: Rank of LoRA.
      length: Number of virtual positions of the prefix.
      bottleneck_dim: Bottleneck dimension of the adapter.
      norms: The LayerNorms behind the feed-forward blocks, as for `bottleneck_adapter`.
      eps: Epsilon of these LayerNorms.
      rope: The rotary frequencies of the model, as for `prefix_tuning`.
      activation: Activation of the adapter.
      dropout: Dropout rate of the adapter.
      dtype: Dtype of the trainable parameters.

    Returns:
      A method with the trainable parameters of the three methods, and n + 1 for each gate.

    Raises:
      ValueError: `keys` and `values` differ in number; or as `lora`, `prefix_tuning` and
        `bottleneck_adapter`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> def model(p, x):
      ...     scores = jax.nn.softmax((x @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2))
      ...     return x + scores @ (x @ p["v"]) @ p["down"]
      >>> params = {name: jnp.ones((4, 4)) for name in ("q", "k", "v", "down")}
      >>> x, positions = jnp.ones((1, 5, 4)), jnp.array([[0, 1, -1, -1, -1]])
      >>> q, k, v, down = map(jp.sites(model, params, x).match, ("q", "k", "v", "down"))
      >>> method = jp.unipelt(q, k, v, down, rank=2, length=2, bottleneck_dim=3)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> tree = jp.combine(frozen, adapter, virtual_positions=positions)
      >>> jp.lift(model)(tree, x).shape, sorted(path for path in adapter if "/gate" in path)[:2]
      ((1, 5, 4), ['down/bottleneck/gate', 'down/bottleneck/gate_bias'])

    References:
      Mao et al., UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning,
      2022, section 3. https://arxiv.org/abs/2110.07577
    """
    if len(keys) != len(values):
        raise ValueError(
            "`unipelt` has one gate for the keys and the values of a layer, so `keys` and `values` "
            f"must be pairs, but got {list(keys)} and {list(values)}. Select both projections of "
            "the same layers."
        )
    lora = low_rank("unipelt", rank, lora_sites, dtype=dtype)
    prefix = prefix_tuning(length, keys, values, rope=rope, dtype=dtype)
    bottleneck = bottleneck_adapter(
        bottleneck_dim,
        outputs,
        adapter_input="output_plus_residual",
        norms=norms,
        eps=eps,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )

    def gate_fields(key: jax.Array, site: Site, size: int, name: str) -> dict[str, Any]:
        kernel = 0.02 * jax.random.normal(key, (*site.stack, size), dtype)
        return {
            "gate": Trainable(kernel, name=f"{name}/gate"),
            "gate_bias": Trainable(jnp.zeros((*site.stack, 1), dtype), name=f"{name}/gate_bias"),
            "virtual_positions": Placeholder("virtual_positions"),
            "path": site.path,
        }

    def gated_lora(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        fields = gate_fields(key, site, site.size(IN), f"{site.path}/lora")
        return dataclasses.replace(view, weight=GatedLowRank(old.w, old.a, old.b, **fields))

    owner = dict(zip([*keys, *values], [*keys, *keys], strict=True))

    def gated_prefix(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        name = f"{owner[site.path]}/prefix"
        fields = gate_fields(key, site, site.size(IN), name)
        if owner[site.path] != site.path:
            fields |= {field: Placeholder(f"{name}/{field}") for field in ("gate", "gate_bias")}
        return dataclasses.replace(view, weight=GatedPrefix(**(_fields(old) | fields)))

    def gated_bottleneck(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        fields = gate_fields(key, site, site.size(OUT), f"{site.path}/bottleneck")
        return dataclasses.replace(view, weight=GatedBottleneck(**(_fields(old) | fields)))

    def apply(key: jax.Array, tree: Any) -> Any:
        for i, (method, sites, make) in enumerate(
            [
                (lora, lora_sites, gated_lora),
                (prefix, keys | values, gated_prefix),
                (bottleneck, outputs, gated_bottleneck),
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
        bottleneck_dim=bottleneck_dim,
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
