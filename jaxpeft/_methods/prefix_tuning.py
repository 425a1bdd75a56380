"""Prefix tuning: trained keys and values at virtual positions in front of the input."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import OUT, PositionsError, Weight, axes, base_weight, chain_of, static, weight
from jaxpeft.extend._apply import apply_to_sites, bias_of


@weight
class Prefix(Weight):
    """A projection whose output at virtual position j is row j of `rows`, whatever its input."""

    w: Any = base_weight()
    rows: Any = axes("virtual", "out")
    slots: Any = axes(shared=True)  # (batch, time): the row, or -1
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    lengths: tuple[int, ...] = static(())  # rows of each task
    path: str = static("")

    is_mergeable = False
    per_position = "slots"

    def forward(self, x):
        """x @ w at real positions, rows - bias at virtual ones: the program adds the bias."""
        slots = virtual_positions_of(self.slots, x, f"prefix at '{self.path}'")
        y = x @ self.w
        rows = self.rows.array
        if self.rope is not None:
            rows = _unrotate(rows, np.asarray(self.rope), self.lengths)
        # A slot without a row must not pass for the last one.
        virtual = jnp.take(rows, jnp.maximum(slots, 0), axis=0, mode="fill", fill_value=jnp.nan)
        virtual = self.weighed(virtual, x)
        if self.bias is not None:
            virtual = virtual - self.bias.array.astype(rows.dtype)
        return jnp.where((slots >= 0)[..., None], virtual.astype(y.dtype), y)

    def weighed(self, virtual, x):
        """Rows (batch, time, out) as they are used where the input is x: as they are."""
        del x
        return virtual


@weight
class EncodedPrefix(Weight):
    """A prefix whose rows a network makes of a table which all layers share.

    rows = tanh(table @ down + down_bias) @ up + up_bias
    """

    w: Any = base_weight()
    table: Any = axes("virtual", "embed", shared=True)
    down: Any = axes("embed", "hidden", shared=True)
    down_bias: Any = axes("hidden", shared=True)
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    slots: Any = axes(shared=True)
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    lengths: tuple[int, ...] = static(())
    path: str = static("")

    is_mergeable = False
    is_reparameterized = True
    per_position = "slots"

    def derived(self):
        hidden = jnp.tanh(self.table.array @ self.down + self.down_bias)
        return {"rows": hidden @ self.up + self.up_bias}

    def acting(self, **derived):
        rows = derived["rows"]
        return Prefix(self.w, rows, self.slots, self.bias, self.rope, self.lengths, self.path)


def virtual_positions_of(slots: Any, x: jax.Array, caller: str) -> jax.Array:
    """The virtual position (batch, time) of each entry of x (batch, time, n), or -1.

    Raises:
      PositionsError: x has other leading axes; names who was told.
    """
    if slots.array.shape != x.shape[:-1]:
        raise PositionsError(
            f"The {caller} is told of virtual positions {slots.array.shape} (batch, time), but its "
            f"input has leading axes {x.shape[:-1]}: the model merges or moves batch and time "
            "before this projection. Lift it over one example and use `jax.vmap`."
        )
    return slots.array


def _same(w: Weight, slots: str) -> bool:
    """Whether a weight below has a prefix at the same positions."""
    return isinstance(w, (Prefix, EncodedPrefix)) and getattr(w.slots, "name", slots) == slots


def _unrotate(rows: jax.Array, frequencies: np.ndarray, lengths: Sequence[int]) -> jax.Array:
    """Keys (n, heads * head_dim) before the rotation that the model gives their positions."""
    half = len(frequencies)
    position = np.concatenate([np.arange(length) for length in lengths])
    angle = jnp.asarray(position[:, None, None] * frequencies, rows.dtype)
    heads = rows.reshape(rows.shape[0], -1, 2 * half)
    left, right = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)
    return turned.reshape(rows.shape)


@register_method
def prefix_tuning(
    length: int | Sequence[int],
    keys: Sites,
    values: Sites,
    *,
    hidden: int | None = None,
    embed: int | None = None,
    rope: Sequence[float] | None = None,
    std: float = 0.02,
    slots: str = "virtual",
    dtype: Any = jnp.float32,
) -> Method:
    """Prefix tuning: every layer attends to `length` trained keys and values before its input.

    No change of the model and no cache is needed: `length` placeholder tokens are put in
    front of the input (`prepend_virtual_tokens`), and at their positions the key and value projections
    give the trained rows (NaN for a slot that has none). Real tokens stand `length` positions
    later. What the model computes at virtual positions is read by nothing: drop it from the
    output (`drop_virtual_positions`), so that no head reads it; `check_prefix` finds a model that reads
    it. Packed rows and sliding windows need `segment_ids` (`prepend_virtual_tokens`), or they hide the
    prefix from tokens. Training and prefill give the slots,
    `combine(frozen, adapter, virtual=slots)`; a decoding step over a cache that holds the
    prefix has slots of -1. So this is what `jaxpeft.serve._generate.generator` takes:

        def forward(parts, tokens, **where):
            frozen, adapter, slots = parts
            now = slots if slots.shape == tokens.shape else jnp.full(tokens.shape, -1)
            return jp.lift(model)(jp.combine(frozen, adapter, virtual=now), tokens, **where)

    where the decoder of this library has a window, with `segment_ids=jnp.where(now < 0, 1, -1)`.

    LoRA on the same projections comes first in the `chain`, or it would add to virtual rows too.

    With `hidden`, the rows of all layers are made by one network of a table of embeddings P,
    tanh(P @ down + c) @ up + e, as the first paper does because free rows did worse there
    (section 4.3); `fold` turns it into plain rows afterwards. Without, it is P-tuning v2: deep
    prompts with a length for each task.

    An encoder-decoder takes one for each attention: [PREFIX; x; PREFIX; y] is `chain` of a prefix
    on the encoder's own attention and one on the decoder's, `slots="virtual_targets"`. The
    decoder's attention to the encoder sees the encoder's virtual positions; a third prefix on
    its keys and values gives them trained rows too.

    Args:
      length: Virtual positions; several tasks that share the base have one length each, and
        their slots one behind the other (`prepend_prefixes`).
      keys: The key projections.
      values: The value projections.
      hidden: Inner width of the network. `None` trains the rows themselves.
      embed: Width of the table P; `None` takes that of the first projection's input.
      rope: The model's rotary frequencies, radians per position for each pair (i, i + H/2)
        of a head. Trained keys are then those after the rotation, as prefixes are stored
        elsewhere. `None` for a model without rotary positions.
      std: Rows, or the table, start at Normal(0, std ** 2).
      slots: What `combine` calls the positions.
      dtype: Of what is trained.

    Returns:
      A method with length * (out of keys + out of values) trained numbers per layer; with
      `hidden`, length * embed + hidden * (embed + 1) for all and (hidden + 1) * (out of keys +
      out of values) per layer.

    Raises:
      ValueError: A length or width is not positive, a weight is no projection, is key and value
        at once or has a prefix already, rotary frequencies do not divide its heads, or (when it
        is called) the model merges batch and time before a projection.

    References:
      Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021,
      sections 4.2 and 4.3. https://arxiv.org/abs/2101.00190
      Liu et al., P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across
      Scales and Tasks, 2021, section 3. https://arxiv.org/abs/2110.07602
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"`prefix_tuning(length={length})`: at least one virtual position is needed."
        )
    widths = [n for n in (hidden, embed) if n is not None]
    if min(widths, default=1) < 1 or embed is not None and hidden is None:
        raise ValueError(
            f"`prefix_tuning(hidden={hidden}, embed={embed})`: widths are positive, and `embed` is the "
            "width of the table which the network of `hidden` units reads."
        )
    if twice := [path for path in keys if path in values]:
        raise ValueError(
            f"`prefix`: {twice} are among the keys and among the values. A weight that gives both "
            "at once cannot have a prefix; split it into one for each."
        )
    both = keys | values
    frequencies = None if rope is None else tuple(float(f) for f in rope)

    def made(key: jax.Array, site: Site) -> tuple[Callable[..., Weight], list[Any]]:
        """The class of a weight, and what it has between `w` and `slots`."""
        count, out = sum(lengths), site.size(OUT)
        if hidden is None:
            return Prefix, [
                Trainable(std * jax.random.normal(key, (*site.stack, count, out), dtype))
            ]
        # Not the first of both, whose order a file does not keep.
        first = next(iter((*keys.values(), *values.values())))
        names = [f"{first.path}/{name}" for name in ("table", "down", "down_bias")]
        up = jax.random.normal(key, (*site.stack, hidden, out), dtype) / hidden**0.5
        own = [Trainable(up), Trainable(jnp.zeros((*site.stack, out), dtype))]
        if site.path != first.path:
            return EncodedPrefix, [*map(Placeholder, names), *own]
        width = embed or first.size("in")
        a, b = jax.random.split(jax.random.fold_in(key, 1))
        table = std * jax.random.normal(a, (count, width), dtype)
        down = jax.random.normal(b, (width, hidden), dtype) / width**0.5
        arrays = (table, down, jnp.zeros((hidden,), dtype))
        shared = [Trainable(x, name=name) for x, name in zip(arrays, names, strict=True)]
        return EncodedPrefix, [*shared, *own]

    def make(key: jax.Array, site: Site, view: View) -> View:
        if "linear" not in site.kinds or "embedding" in site.kinds:
            raise ValueError(f"`prefix`: '{site.path}' is no projection but {sorted(site.kinds)}.")
        if any(_same(w, slots) for w in chain_of(view.weight)):
            raise ValueError(
                f"`prefix`: '{site.path}' has a prefix at the positions '{slots}' already, which "
                "this one would hide. Give several tasks one prefix, `length=[...]`."
            )
        turns = frequencies if site.path in keys else None
        if turns is not None and site.size(OUT) % (2 * len(turns)):
            raise ValueError(
                f"`prefix_tuning(rope=...)` has {len(turns)} frequencies, one per pair, so heads of "
                f"size {2 * len(turns)}, but '{site.path}' has {site.size(OUT)} outputs."
            )
        kind, fields = made(key, site)
        rest = (Placeholder(slots), bias_of(site, both), turns, lengths, site.path)
        return dataclasses.replace(view, weight=kind(view.weight, *fields, *rest))

    options = dict(
        length=length if isinstance(length, int) else list(lengths),
        keys=keys,
        values=values,
        hidden=hidden,
        embed=embed,
        rope=None if frequencies is None else list(frequencies),
        std=std,
        slots=slots,
        dtype=dtype,
    )
    return Method(
        "prefix_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, both, make, caller="prefix_tuning"),
    )
