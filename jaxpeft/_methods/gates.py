"""Learned gates: trainable factors in [0, 1] of groups of entries, some of which become zero."""

import dataclasses
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.ia3 import ScaledInputs, ScaledOutputs
from jaxpeft._methods.oft import as_sharded
from jaxpeft._methods.prune import Entrywise
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, arrays, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_entries, check_whole
from jaxpeft.sparsity._gates import gate_values, logits_name
from jaxpeft.sparsity._masks import Structure, block_of

#: The least `start` by kind. A hard concrete gate is clipped to 1 from sigmoid(logit) = 11/12
#: = 0.9167 on; 0.92 leaves room for rounding, also of 16-bit logits.
_STARTS = {
    "hard concrete": (0.92, "0.92 <= start"),
    "sigmoid": (math.nextafter(0.5, 1), "0.5 < start"),
}


def expand_blocks(gates: jax.Array, block: tuple[int, int]) -> jax.Array:
    """(..., in, out): the gate of each block at all of its entries."""
    return jnp.repeat(jnp.repeat(gates, block[0], axis=-2), block[1], axis=-1)


@weight
class GatedEntries(Entrywise):
    """The matrix `w`, each block multiplied by its gate."""

    w: Any = base_weight()
    gates: Any = axes("in", "out")  # (in / rows, out / columns) of a block (rows, columns)
    block: tuple[int, int] = static((1, 1))

    def granularity(self, field, axis):
        return self.block[(IN, OUT).index(axis)], 1

    def entrywise(self):
        expanded = lambda gates: expand_blocks(gates, self.block)  # noqa: E731
        return {"gates": self.gates}, lambda matrix, gates: matrix * expanded(gates)

    def lookup(self, ids):
        """w[ids] * gates[ids]."""
        rows = self.w[ids]
        gates = jnp.repeat(self.gates[ids // self.block[0]], self.block[1], axis=-1)
        return self.with_delta(rows, ids, rows * (gates - 1), self.gates.site.rows)


@weight
class GatedRows(ScaledInputs):
    """The matrix `scale[:, None] * w`, which may be an embedding table."""

    def lookup(self, ids):
        """w[ids] * scale[ids]."""
        rows = self.w[ids]
        return self.with_delta(rows, ids, rows * (self.scale[ids] - 1), self.scale.site.rows)


@weight
class Gated(Weight):
    """The matrix `w * z`, with a gate z of its own for each block of entries.

    hard concrete:  z = clip(1.2 sigmoid(s) - 0.1, 0, 1) with s = logit, or, in a call with a key,
                    s = (log u - log(1 - u) + logit) / beta with u uniform in (0, 1)
    sigmoid:        z = sigmoid(inverse_temperature * logit), or, in a call without it, logit > 0

    Gates of whole outputs scale the output of a product, gates of whole inputs its input;
    otherwise the matrix is formed where it is used, and again in the backward pass.
    """

    w: Any = base_weight()
    logits: Any = axes("group")  # of the blocks, row by row
    inverse_temperature: Any = arrays()  # a scalar or None
    key: Any = axes(optional=True)
    kind: str = static("hard concrete")
    block: tuple[int, int] = static((1, 1))
    sides: tuple[int, int] = static((1, 1))
    scales: str | None = static(None)  # "in" or "out" where a gate covers a whole input or output

    def derived(self):
        key = None if self.key is None else self.key.array
        gates = gate_values(self.kind, self.logits.array, key, self.inverse_temperature)
        rows, columns = self.block
        if self.scales == OUT:
            return {"gates": jnp.repeat(gates, columns)}
        if self.scales == IN:
            return {"gates": jnp.repeat(gates, rows)}
        return {"gates": self._by_block(gates)}

    def acting(self, **derived):
        gates = derived["gates"]
        if self.scales == OUT:
            return ScaledOutputs(self.w, gates)
        if self.scales == IN:
            return GatedRows(self.w, gates)
        return GatedEntries(self.w, gates, self.block)

    def materialize(self):
        def gated(w: jax.Array, logits: jax.Array) -> jax.Array:
            gates = gate_values(self.kind, logits, self.key, self.inverse_temperature)
            return w * expand_blocks(self._by_block(gates), self.block)

        return as_sharded(gated, dense(self.w), self.logits)

    def _by_block(self, gates: jax.Array) -> jax.Array:
        (n, m), (rows, columns) = self.sides, self.block
        return gates.reshape(n // rows, m // columns)


@register_method
def gates(
    sites: Sites,
    *,
    kind: Literal["hard concrete", "sigmoid"] = "hard concrete",
    structure: Structure = "entry",
    start: float = 0.95,
    dtype: Any = jnp.float32,
) -> Method:
    """Learned gates: each matrix becomes w * z, with a trainable gate z in [0, 1] per group.

    Training closes gates where the loss asks for it: add a multiple of
    `sparsity.expected_density`. The matrix under the gates stays frozen, or is trained by another
    method in the `chain`; biases have no gates. After training, `merge` multiplies by the gates,
    or `prune(sparsity.gate_masks(...))` prunes the groups whose gate is closed.

    "hard concrete": z = clip(1.2 sigmoid(s) - 0.1, 0, 1). A call with a key, `combine(frozen,
    adapter, gates=key)`, samples s = (log u - log(1 - u) + logit) / (2/3) with u uniform in (0, 1),
    for each weight and layer: gates are often exactly 0 or 1, and the loss still has a gradient.
    Without a key s = logit, and a clipped gate has no gradient, so train with keys. A trained gate
    may be strictly between 0 and 1: `merge` multiplies by it, and `gate_masks` keeps it.

    "sigmoid": z = sigmoid(inverse_temperature * logit). The inverse temperature is given in each
    call, `combine(frozen, adapter, inverse_temperature=beta)`, and grows from 1 to about 200 in
    training, for example by `optax.exponential_decay(1.0, steps, 200.0)`. Without it z is 1 where
    logit > 0 and otherwise 0, and has no gradient.

    At the start, without a key and an inverse temperature, both compute the base model exactly.

    Args:
      sites: The matrices.
      kind: "hard concrete" or "sigmoid".
      structure: The groups that share a gate: "entry", "input", "output", "matrix", or the shape
        of a block (rows, columns), with None for a whole side, as for `sparsity.topk_mask`. A
        head is `(None, head_dim)` in the projection that computes it, and `(head_dim, None)` in
        the one that reads it.
      start: sigmoid(logit) at the start, below 1: at least 0.92 for "hard concrete", whose gates
        are then clipped to 1, and above 0.5 for "sigmoid".
      dtype: Dtype of the logits.

    Returns:
      A method with one trainable parameter per group, under "<path>/gates/<structure>" in the
      adapter. Gates of whole inputs or outputs cost as little as `ia3`; for other gates the
      matrix is formed where it is used, and again in the backward pass.

    Raises:
      ValueError: An unknown kind or structure, a start out of range, blocks that do not divide a
        matrix, nothing selected, a part of the outputs, or gates of entries or blocks over a
        method whose weight has no dense equivalent; names the weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 6))}
      >>> sites, x = jp.sites(f, params, jnp.ones((1, 4))), jnp.ones((1, 4))
      >>> method = jp.gates(sites, structure="output")
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> sampled = jp.lift(f)(jp.combine(frozen, adapter, gates=jax.random.key(1)), x)
      >>> {path: a.shape for path, a in adapter.items()}, sampled.shape
      ({'w/gates/output': (6,)}, (1, 6))

    References:
      Louizos et al., Learning Sparse Neural Networks through L0 Regularization, 2018, sections 2.2
      to 2.4 and 4. https://arxiv.org/abs/1712.01312
      Savarese et al., Winning the Lottery with Continuous Sparsification, 2020, section 3.
      https://arxiv.org/abs/1912.04427
    """
    if kind not in _STARTS:
        raise ValueError(
            f"`gates(kind='{kind}')`: `kind` must be {' or '.join(map(repr, _STARTS))}."
        )
    least, bounds = _STARTS[kind]
    if not least <= start < 1:
        raise ValueError(
            f"`gates(kind='{kind}', start={start})` needs {bounds} < 1, so that every gate is open "
            "and training starts at the base model."
        )
    check_whole("gates", sites)
    blocks = {path: block_of(structure, site) for path, site in sites.items()}
    logit = math.log(start / (1 - start))

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        sides, block = (site.size(IN), site.size(OUT)), blocks[site.path]
        scales = _side(site, block)
        if scales is None:
            check_entries(f"gates(structure={structure!r})", site, view)
        name = logits_name(site.path, structure)
        logits = jnp.full((*site.stack, _groups(sides, block)), logit, dtype)
        sampling_key = inverse_temperature = None
        if kind == "sigmoid":
            inverse_temperature = Placeholder("inverse_temperature", optional=True)
        else:
            fold = zlib.crc32(name.encode())
            sampling_key = Placeholder("gates", optional=True, fold=fold, stack=site.stack)
        gated = Gated(
            view.weight,
            Trainable(logits, name=name),
            inverse_temperature,
            sampling_key,
            kind,
            block,
            sides,
            scales,
        )
        return dataclasses.replace(view, weight=gated)

    return Method(
        "gates",
        dict(sites=sites, kind=kind, structure=structure, start=start, dtype=dtype),
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="gates"),
    )


def _side(site: Site, block: tuple[int, int]) -> str | None:
    """The side that gates scale if each covers a whole output or a whole input, else `None`."""
    if block[0] == site.size(IN):
        return OUT
    # An input of a convolution is a position in its window, not a channel of the activation.
    return IN if block[1] == site.size(OUT) and "conv" not in site.kinds else None


def _groups(sides: tuple[int, int], block: tuple[int, int]) -> int:
    return (sides[0] // block[0]) * (sides[1] // block[1])
