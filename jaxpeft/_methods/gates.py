"""Gates: numbers in [0, 1] that multiply groups of entries, trained until some of them are zero.

gates        the method: one logit for each group
openness     the expected share of open entries, for the loss
open_gates   masks of what is open at the end, for `prune`
"""

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

#: Where gates may start, by kind. A hard concrete gate is clipped to 1 from sigmoid(logit) = 11/12
#: on; what is above leaves room for rounding, logits of 16 bits included.
_STARTS = {
    "hard concrete": (0.92, "0.92 <= start"),
    "sigmoid": (math.nextafter(0.5, 1), "0.5 < start"),
}


def by_entry(gates: jax.Array, block: tuple[int, int]) -> jax.Array:
    """(..., in, out): the number of each block for all of its entries."""
    return jnp.repeat(jnp.repeat(gates, block[0], axis=-2), block[1], axis=-1)


@weight
class GatedEntries(Entrywise):
    """The matrix `w`, each block of it times a number of its own."""

    w: Any = base_weight()
    gates: Any = axes("in", "out")  # (in / rows, out / columns)
    block: tuple[int, int] = static((1, 1))

    def granularity(self, field, axis):
        return self.block[(IN, OUT).index(axis)], 1

    def changes(self):
        return {"gates": self.gates}, lambda matrix, gates: matrix * by_entry(gates, self.block)

    def lookup(self, ids):
        """w[ids] * gates[ids]."""
        rows = self.w[ids]
        gates = jnp.repeat(self.gates[ids // self.block[0]], self.block[1], axis=-1)
        return self.with_delta(rows, ids, rows * (gates - 1), self.gates.site.rows)


@weight
class GatedRows(ScaledInputs):
    """The matrix `scale[:, None] * w`, which may be a table that is read by row."""

    def lookup(self, ids):
        """w[ids] * scale[ids]."""
        rows = self.w[ids]
        return self.with_delta(rows, ids, rows * (self.scale[ids] - 1), self.scale.site.rows)


@weight
class Gated(Weight):
    """The matrix `w * z`, with a gate z of its own for each block of entries.

    hard concrete:  z = clip(1.2 sigmoid(s) - 0.1, 0, 1), s the logit, or with a key of the call
                    s = (log u - log(1 - u) + logit) / beta, u uniform
    sigmoid:        z = sigmoid(sharpness * logit), or without a sharpness whether logit > 0

    Gates of whole outputs scale what comes out of a product, those of whole inputs what goes in;
    else the matrix is formed where it is used, and again in the backward pass.
    """

    w: Any = base_weight()
    logits: Any = axes("group")  # blocks, row by row
    sharpness: Any = arrays()  # a number or nothing
    key: Any = axes(optional=True)
    kind: str = static("hard concrete")
    block: tuple[int, int] = static((1, 1))
    sides: tuple[int, int] = static((1, 1))
    scales: str | None = static(None)  # "in" or "out" where gates are those of a whole side

    def derived(self):
        key = None if self.key is None else self.key.array
        gates = gate_values(self.kind, self.logits.array, key, self.sharpness)
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
        def weighed(w: jax.Array, logits: jax.Array) -> jax.Array:
            gates = gate_values(self.kind, logits, self.key, self.sharpness)
            return w * by_entry(self._by_block(gates), self.block)

        return as_sharded(weighed, dense(self.w), self.logits)

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
    """Learned gates: numbers in [0, 1] on groups of entries, of which training closes some.

    Each selected matrix becomes `w * z`, with one gate z and one trained logit for each group. The
    matrix under it stays frozen, or is what another method in the `chain` makes of it; biases stay
    as they are. Gates close where the loss asks for it: add a multiple of `expected_density`. At the end
    `merge` multiplies the gates in, or `prune(open_gates(...))` leaves out what they closed.

    "hard concrete": z = clip(1.2 sigmoid(s) - 0.1, 0, 1). A call with a key, `combine(frozen,
    adapter, gates=key)`, draws s = (log u - log(1 - u) + logit) / (2/3), u uniform in (0, 1), anew
    for each weight and layer: gates are exactly 0 or 1 much of the time, and yet the loss has a
    gradient. Without a key s = logit. A clipped gate has no gradient then, so train with keys. A
    trained gate may stay strictly between 0 and 1: merging keeps it multiplied in, `gate_masks`
    counts it as open.

    "sigmoid": z = sigmoid(sharpness * logit), the sharpness a value of the call, `combine(frozen,
    adapter, sharpness=number)`, which grows from 1 to about 200 in training: the schedule
    `optax.exponential_decay(1.0, steps, 200.0)`. Without a sharpness z is 1 where logit > 0, else
    0, which has no gradient.

    Both compute the base model exactly at the start where the call has neither key nor sharpness.

    Args:
      sites: The matrices.
      kind: Of the gates.
      structure: What a gate multiplies: see `keep`. A head is `(None, head_dim)` where it makes
        outputs, `(head_dim, None)` where it is read.
      start: sigmoid(logit) where training starts, below 1: from 0.92 on for "hard concrete", whose
        gates are then clipped to 1, and above 0.5 for "sigmoid".
      dtype: Of the logits.

    Returns:
      A method with one trained number for each group, under "<path>/gates/<structure>" in the
      adapter. Gates of whole inputs or outputs cost no more than `ia3`; with others the matrix is
      formed where it is used, and again in the backward pass.

    Raises:
      ValueError: An unknown kind or structure, a start out of range, blocks that do not divide a
        matrix, nothing selected, a part of the outputs, or gates of entries or blocks over a
        method whose weight is no matrix; names the weight.

    References:
      Louizos et al., Learning Sparse Neural Networks through L0 Regularization, 2018, sections 2.2
      to 2.4 and 4. https://arxiv.org/abs/1712.01312
      Savarese et al., Winning the Lottery with Continuous Sparsification, 2020, section 3.
      https://arxiv.org/abs/1912.04427
    """
    if kind not in _STARTS:
        raise ValueError(f"`gates(kind='{kind}')`: choose {' or '.join(map(repr, _STARTS))}.")
    least, rule = _STARTS[kind]
    if not least <= start < 1:
        raise ValueError(
            f"`gates(kind='{kind}', start={start})`: {rule} < 1 is needed, so that every gate is "
            "open and training starts at the base model."
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
        drawn = sharpness = None
        if kind == "sigmoid":
            sharpness = Placeholder("sharpness", optional=True)
        else:
            own = zlib.crc32(name.encode())
            drawn = Placeholder("gates", optional=True, fold=own, stack=site.stack)
        gated = Gated(
            view.weight, Trainable(logits, name=name), sharpness, drawn, kind, block, sides, scales
        )
        return dataclasses.replace(view, weight=gated)

    return Method(
        "gates",
        dict(sites=sites, kind=kind, structure=structure, start=start, dtype=dtype),
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="gates"),
    )


def _side(site: Site, block: tuple[int, int]) -> str | None:
    """The side on which gates can be a scale: that of whole outputs, or of whole inputs."""
    if block[0] == site.size(IN):
        return OUT
    # An input of a convolution is one of its window, and no channel of the activation.
    return IN if block[1] == site.size(OUT) and "conv" not in site.kinds else None


def _groups(sides: tuple[int, int], block: tuple[int, int]) -> int:
    return (sides[0] // block[0]) * (sides[1] // block[1])
