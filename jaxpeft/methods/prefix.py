"""Prefix tuning: trained keys and values at virtual positions in front of the input."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.method import Method
from jaxpeft.methods.placing import bias_of, place, takes_sites
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Hole, Train
from jaxpeft.weight import (
    OUT,
    PositionsError,
    View,
    Weight,
    axes,
    base,
    chain_of,
    static,
    weight,
)


@weight
class Prefix(Weight):
    """A projection whose output at virtual position j is row j of `rows`, whatever its input."""

    w: Any = base()
    rows: Any = axes("virtual", "out")
    slots: Any = axes(shared=True)  # (batch, time): the row, or -1
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    lengths: tuple[int, ...] = static(())  # rows of each task
    path: str = static("")

    is_matrix = False
    per_position = "slots"

    def forward(self, x):
        """x @ w at real positions, rows - bias at virtual ones: the program adds the bias."""
        slots = slots_of(self.slots, x, f"prefix at '{self.path}'")
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

    w: Any = base()
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

    is_matrix = False
    folds = True
    per_position = "slots"

    def derived(self):
        hidden = jnp.tanh(self.table.array @ self.down + self.down_bias)
        return {"rows": hidden @ self.up + self.up_bias}

    def acting(self, **derived):
        rows = derived["rows"]
        return Prefix(self.w, rows, self.slots, self.bias, self.rope, self.lengths, self.path)


def slots_of(slots: Any, x: jax.Array, who: str) -> jax.Array:
    """The virtual position (batch, time) of each entry of x (batch, time, n), or -1.

    Raises:
      PositionsError: x has other leading axes; names who was told.
    """
    if slots.array.shape != x.shape[:-1]:
        raise PositionsError(
            f"The {who} is told of virtual positions {slots.array.shape} (batch, time), but its "
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


@takes_sites
def prefix(
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
    front of the input (`with_virtual`), and at their positions the key and value projections
    give the trained rows (NaN for a slot that has none). Real tokens stand `length` positions
    later. What the model computes at virtual positions is read by nothing: drop it from the
    output (`without_virtual`), so that no head reads it; `check_prefix` finds a model that reads
    it. Packed rows and sliding windows need `segment_ids` (`with_virtual`), or they hide the
    prefix from tokens. Training and prefill give the slots,
    `combine(frozen, adapter, virtual=slots)`; a decoding step over a cache that holds the
    prefix has slots of -1. So this is what `jaxpeft.serve.generate.generator` takes:

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
        their slots one behind the other (`with_prefixes`).
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
        raise ValueError(f"`prefix(length={length})`: at least one virtual position is needed.")
    widths = [n for n in (hidden, embed) if n is not None]
    if min(widths, default=1) < 1 or embed is not None and hidden is None:
        raise ValueError(
            f"`prefix(hidden={hidden}, embed={embed})`: widths are positive, and `embed` is the "
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
            return Prefix, [Train(std * jax.random.normal(key, (*site.stack, count, out), dtype))]
        # Not the first of both, whose order a file does not keep.
        first = next(iter((*keys.values(), *values.values())))
        names = [f"{first.path}/{name}" for name in ("table", "down", "down_bias")]
        up = jax.random.normal(key, (*site.stack, hidden, out), dtype) / hidden**0.5
        own = [Train(up), Train(jnp.zeros((*site.stack, out), dtype))]
        if site.path != first.path:
            return EncodedPrefix, [*map(Hole, names), *own]
        width = embed or first.size("in")
        a, b = jax.random.split(jax.random.fold_in(key, 1))
        table = std * jax.random.normal(a, (count, width), dtype)
        down = jax.random.normal(b, (width, hidden), dtype) / width**0.5
        arrays = (table, down, jnp.zeros((hidden,), dtype))
        shared = [Train(x, name=name) for x, name in zip(arrays, names, strict=True)]
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
                f"`prefix(rope=...)` has {len(turns)} frequencies, one per pair, so heads of "
                f"size {2 * len(turns)}, but '{site.path}' has {site.size(OUT)} outputs."
            )
        kind, fields = made(key, site)
        rest = (Hole(slots), bias_of(site, both), turns, lengths, site.path)
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
    return Method("prefix", options, lambda key, tree: place(key, tree, both, make, who="prefix"))


def with_virtual(
    tokens: jax.Array,
    length: int,
    fill: Any = 0,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Tokens (batch, length + time) behind placeholders, and their slots of the same shape.

    Rows of several examples each, and models with a sliding window, need segments: virtual
    tokens are of segment -1, which in `jaxpeft.models.decoder` every segment sees at any distance,
    so that each example is what it is alone in its row. For a model that does not know segment
    -1, `jaxpeft.train.Batches(..., virtual=...)` gives each example virtual tokens of its own.

    Args:
      tokens: (batch, time).
      length: Virtual positions.
      fill: The placeholder: any id of the table. For a prompt, its ids (length,).
      segment_ids: (batch, time), 0 for padding; of ones where each row is one example.

    Returns:
      Tokens and slots, with `segment_ids` also those of all positions. Leave `positions` to the
      model, or count them from the first virtual one in each segment.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, segments = jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 2, 0]])
      >>> [x.tolist() for x in with_virtual(rows, 2, segment_ids=segments)]
      [[[0, 0, 5, 6, 7, 8]], [[0, 1, -1, -1, -1, -1]], [[-1, -1, 1, 1, 2, 0]]]
    """
    task = jnp.zeros(len(tokens), int)
    tokens, slots, last = with_prefixes(tokens, (length,), task, fill, segment_ids)
    return (tokens, slots) if segment_ids is None else (tokens, slots, last)


def with_prefixes(
    tokens: jax.Array,
    lengths: Sequence[int],
    tasks: jax.Array,
    fill: Any = 0,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Examples of several tasks, each behind the placeholders of its own prefix.

    Args:
      tokens: (batch, time).
      lengths: Virtual positions of each task, as the method was given them.
      tasks: (batch,), the number of each example's task.
      fill: The placeholder: any id of the table, or one for each of the longest prefix.
      segment_ids: As for `with_virtual`; all examples of a row are of the row's task.

    Returns:
      Tokens, slots and a mask, each (batch, longest + time). Shorter prefixes stand at the right,
      behind padding, where the mask is false; hand it to the model, with that of the tokens.
      With `segment_ids`, in the place of the mask those of all positions.

    Raises:
      ValueError: There is no such task, or not one for each example; segments of another shape
        than the tokens, or that hold virtual tokens already.
    """
    (batch, time), longest = tokens.shape, max(lengths)
    tasks = jnp.asarray(tasks)
    known = not isinstance(tasks, jax.core.Tracer)
    if tasks.shape != (batch,) or known and ((tasks < 0) | (tasks >= len(lengths))).any():
        shown = tasks.tolist() if known else tasks.shape
        raise ValueError(
            f"`with_prefixes`: tasks {shown} of {batch} examples; give each a number from 0 to "
            f"{len(lengths) - 1}, for prefixes of lengths {list(lengths)}."
        )
    ends = jnp.cumsum(jnp.asarray(lengths))
    # Slots of a task end where those of the next begin.
    slots = ends[tasks][:, None] - longest + jnp.arange(longest)
    starts = ends - jnp.asarray(lengths)
    slots = jnp.where(slots >= starts[tasks][:, None], slots, -1)
    fill = jnp.asarray(fill, tokens.dtype)
    if (told := _exchanged.get()) is not None:
        told.append(segment_ids is not None)
        if not fill.ndim:  # ids of a prompt are no placeholders
            fill = jnp.where(fill == 1, 0, 1).astype(tokens.dtype)
    pad = jnp.broadcast_to(fill, (batch, longest))
    real = jnp.full((batch, time), -1)
    last = jnp.concatenate([slots >= 0, jnp.ones((batch, time), bool)], axis=1)
    if segment_ids is not None:
        _check_segments(segment_ids, tokens)
        virtual = jnp.where(slots >= 0, _VIRTUAL, 0).astype(jnp.int32)
        last = jnp.concatenate([virtual, jnp.asarray(segment_ids, jnp.int32)], axis=1)
    slots = jnp.concatenate([slots, real], axis=1).astype(jnp.int32)
    return jnp.concatenate([pad, tokens], axis=1), slots, last


_exchanged: contextvars.ContextVar[list[bool] | None]
_exchanged = contextvars.ContextVar("exchanged", default=None)


@contextlib.contextmanager
def exchanged_placeholders() -> Iterator[list[bool]]:
    """Within it, `with_virtual` and `with_prefixes` put another placeholder than they are told.

    Yields a list of whether each of their calls has been told of segments.
    """
    told: list[bool] = []
    token = _exchanged.set(told)
    try:
        yield told
    finally:
        _exchanged.reset(token)


_VIRTUAL = -1  # the segment of virtual tokens, which `jaxpeft.models.decoder` shows to every other


def _check_segments(segment_ids: jax.Array, tokens: jax.Array) -> None:
    if segment_ids.shape != tokens.shape:
        raise ValueError(
            f"`segment_ids` {segment_ids.shape} are told of tokens {tokens.shape}; both are "
            "(batch, time), without virtual positions."
        )
    known = not isinstance(segment_ids, jax.core.Tracer)
    if known and (least := int(jnp.min(segment_ids, initial=0))) < 0:
        raise ValueError(
            f"`segment_ids` hold {least}, but are 0 for padding and 1, 2, ... for the examples of "
            "a row: give them as they are without virtual tokens."
        )


def without_virtual(outputs: jax.Array, length: int) -> jax.Array:
    """Outputs (batch, length + time, ...) at real positions only.

    Args:
      outputs: Of a model with a prefix, (batch, length + time, ...).
      length: Virtual positions in front.
    """
    return outputs[:, length:]
