"""Prefix tuning: trained keys and values at virtual positions in front of the input."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.method import Method
from jaxpeft.methods.placing import bias_of, place
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Hole, Train
from jaxpeft.weight import OUT, View, Weight, axes, base, static, weight


@weight
class Prefix(Weight):
    """A projection whose output at virtual position j is row j of `rows`, whatever its input."""

    w: Any = base()
    rows: Any = axes("virtual", "out")
    slots: Any = axes(shared=True)  # (batch, time): the virtual position, or -1
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    path: str = static("")

    is_matrix = False

    def forward(self, x):
        """x @ w at real positions, rows - bias at virtual ones: the program adds the bias."""
        slots = self.slots.array
        if slots.shape != x.shape[:-1]:
            raise ValueError(
                f"The prefix at '{self.path}' is told of virtual positions {slots.shape} "
                f"(batch, time), but its input has leading axes {x.shape[:-1]}: the model "
                "merges or moves batch and time before this projection. Lift it over one "
                "example and use `jax.vmap`."
            )
        y = x @ self.w
        rows = self.rows.array
        if self.rope is not None:
            rows = _unrotate(rows, jnp.asarray(self.rope, rows.dtype))
        if self.bias is not None:
            rows = rows - self.bias.array.astype(rows.dtype)
        virtual = jnp.take(rows, jnp.maximum(slots, 0), axis=0, mode="clip")
        return jnp.where((slots >= 0)[..., None], virtual.astype(y.dtype), y)


def _unrotate(rows: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Keys (n, heads * head_dim) before the rotation that position j of the model gives row j."""
    half = frequencies.shape[0]
    angle = jnp.arange(rows.shape[0], dtype=rows.dtype)[:, None, None] * frequencies
    heads = rows.reshape(rows.shape[0], -1, 2 * half)
    left, right = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)
    return turned.reshape(rows.shape)


def prefix(
    length: int,
    keys: Sites,
    values: Sites,
    *,
    rope: Sequence[float] | None = None,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Prefix tuning: every layer attends to `length` trained keys and values before its input.

    No change of the model and no cache is needed: `length` placeholder tokens are put in
    front of the input (`with_virtual`), and at their positions the key and value projections
    give the trained rows. Real tokens stand `length` positions later. What the model computes
    at virtual positions is read by nothing: drop it from the output (`without_virtual`), so
    that no head reads it. Training and prefill give the slots,
    `combine(frozen, adapter, virtual=slots)`; a decoding step over a cache that holds the
    prefix has slots of -1.

    Args:
      length: Virtual positions.
      keys: The key projections.
      values: The value projections.
      rope: The model's rotary frequencies, radians per position for each pair (i, i + H/2)
        of a head. Trained keys are then those after the rotation, as prefixes are stored
        elsewhere. `None` for a model without rotary positions.
      std: Rows start at Normal(0, std ** 2).
      dtype: Of the rows.

    Returns:
      A method with length * (out of keys + out of values) trained numbers per layer.

    Raises:
      ValueError: The length is not positive, or the model merges batch and time before a
        projection (when it is called).

    References:
      Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021,
      section 4.2. https://arxiv.org/abs/2101.00190
    """
    if length < 1:
        raise ValueError(f"`prefix(length={length})`: at least one virtual position is needed.")
    both = keys | values
    frequencies = None if rope is None else tuple(float(f) for f in rope)

    def make(key: jax.Array, site: Site, view: View) -> View:
        if "linear" not in site.kinds:
            raise ValueError(f"`prefix`: '{site.path}' is no projection but {sorted(site.kinds)}.")
        turns = frequencies if site.path in keys else None
        if turns is not None and site.size(OUT) % (2 * len(turns)):
            raise ValueError(
                f"`prefix(rope=...)` has {len(turns)} frequencies, one per pair, so heads of "
                f"size {2 * len(turns)}, but '{site.path}' has {site.size(OUT)} outputs."
            )
        rows = std * jax.random.normal(key, (*site.stack, length, site.size(OUT)), dtype)
        bias = bias_of(site, both)
        weight = Prefix(view.weight, Train(rows), Hole("virtual"), bias, turns, site.path)
        return dataclasses.replace(view, weight=weight)

    options = dict(
        length=length,
        keys=keys,
        values=values,
        rope=None if frequencies is None else list(frequencies),
        std=std,
        dtype=dtype,
    )
    return Method("prefix", options, lambda key, tree: place(key, tree, both, make, who="prefix"))


def with_virtual(tokens: jax.Array, length: int, fill: int = 0) -> tuple[jax.Array, jax.Array]:
    """Tokens (batch, length + time) behind placeholders, and their slots of the same shape.

    Args:
      tokens: (batch, time).
      length: Virtual positions.
      fill: The placeholder: any id of the table.
    """
    batch, time = tokens.shape
    pad = jnp.full((batch, length), fill, tokens.dtype)
    slots = jnp.concatenate([jnp.arange(length), jnp.full(time, -1)]).astype(jnp.int32)
    return jnp.concatenate([pad, tokens], axis=1), jnp.broadcast_to(slots, (batch, length + time))


def without_virtual(outputs: jax.Array, length: int) -> jax.Array:
    """Outputs (batch, length + time, ...) at real positions only."""
    return outputs[:, length:]
