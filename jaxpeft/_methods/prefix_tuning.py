"""Prefix tuning: trainable keys and values at virtual positions in front of the input."""

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
    virtual_positions: Any = axes(shared=True)  # (batch, time): a row of `rows`, or -1
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    lengths: tuple[int, ...] = static(())  # number of rows of each task
    path: str = static("")

    is_mergeable = False
    per_position = "virtual_positions"

    def forward(self, x):
        """x @ w at real positions, rows - bias at virtual ones: the model adds the bias."""
        positions = virtual_positions_of(self.virtual_positions, x, f"prefix at '{self.path}'")
        y = x @ self.w
        rows = self.rows.array
        if self.rope is not None:
            rows = _inverse_rotary(rows, np.asarray(self.rope), self.lengths)
        # NaN instead of the last row for a virtual position that has no row.
        virtual = jnp.take(rows, jnp.maximum(positions, 0), axis=0, mode="fill", fill_value=jnp.nan)
        virtual = self.gated(virtual, x)
        if self.bias is not None:
            virtual = virtual - self.bias.array.astype(rows.dtype)
        return jnp.where((positions >= 0)[..., None], virtual.astype(y.dtype), y)

    def gated(self, virtual, x):
        """The rows (batch, time, out) as they are used at inputs x; here they are not gated."""
        del x
        return virtual


@weight
class EncodedPrefix(Weight):
    """A prefix whose rows are the output of a network on a table shared by all layers.

    rows = tanh(table @ down + down_bias) @ up + up_bias
    """

    w: Any = base_weight()
    table: Any = axes("virtual", "embed", shared=True)
    down: Any = axes("embed", "hidden", shared=True)
    down_bias: Any = axes("hidden", shared=True)
    up: Any = axes("hidden", "out")
    up_bias: Any = axes("out")
    virtual_positions: Any = axes(shared=True)
    bias: Any = axes("out", optional=True)
    rope: tuple[float, ...] | None = static(None)
    lengths: tuple[int, ...] = static(())
    path: str = static("")

    is_mergeable = False
    is_reparameterized = True
    per_position = "virtual_positions"

    def derived(self):
        hidden = jnp.tanh(self.table.array @ self.down + self.down_bias)
        return {"rows": hidden @ self.up + self.up_bias}

    def acting(self, **derived):
        own = (self.virtual_positions, self.bias, self.rope, self.lengths, self.path)
        return Prefix(self.w, derived["rows"], *own)


def virtual_positions_of(positions: Any, x: jax.Array, caller: str) -> jax.Array:
    """The virtual position (batch, time) of each entry of x (batch, time, n), -1 at real ones.

    Raises:
      PositionsError: x has other leading axes; names the caller and both shapes.
    """
    if positions.array.shape != x.shape[:-1]:
        raise PositionsError(
            f"The {caller} was given virtual positions of shape {positions.array.shape} (batch, "
            f"time), but its input has leading axes {x.shape[:-1]}: the model merges or transposes "
            "batch and time before this projection. Lift the model over one example and use "
            "`jax.vmap`."
        )
    return positions.array


def _has_prefix_at(w: Weight, name: str) -> bool:
    """Whether a weight is a prefix at the virtual positions of this name."""
    if not isinstance(w, (Prefix, EncodedPrefix)):
        return False
    return getattr(w.virtual_positions, "name", name) == name


def _inverse_rotary(rows: jax.Array, frequencies: np.ndarray, lengths: Sequence[int]) -> jax.Array:
    """Keys (n, heads * head_dim) that the model's rotary embedding turns into `rows`."""
    half = len(frequencies)
    position = np.concatenate([np.arange(length) for length in lengths])
    angle = jnp.asarray(position[:, None, None] * frequencies, rows.dtype)
    heads = rows.reshape(rows.shape[0], -1, 2 * half)
    left, right = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotated = jnp.concatenate([left * cos + right * sin, right * cos - left * sin], axis=-1)
    return rotated.reshape(rows.shape)


@register_method
def prefix_tuning(
    length: int | Sequence[int],
    keys: Sites,
    values: Sites,
    *,
    hidden: int | None = None,
    embed: int | None = None,
    rope: Sequence[float] | None = None,
    init_std: float = 0.02,
    positions_name: str = "virtual_positions",
    dtype: Any = jnp.float32,
) -> Method:
    """Prefix tuning: every layer attends to `length` trainable keys and values before its input.

    With P_k and P_v the trainable rows of a layer, its attention becomes

        softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]

    The model is not changed, and no cache is needed. `prompts.prepend_virtual_tokens` puts `length`
    placeholder tokens in front of the input and returns the virtual positions; at these
    positions the key and value projections give the trainable rows, or NaN where there is no
    row. Real tokens move back by `length` positions. `prompts.drop_virtual_positions` drops the
    outputs at virtual positions, which mean nothing; `prompts.check_prefix` finds a model that
    reads them. Packed rows and sliding windows need `segment_ids`
    (`prompts.prepend_virtual_tokens`), or real tokens do not attend to the prefix.

    Training and prefill pass the positions, `combine(frozen, adapter,
    virtual_positions=positions)`. A decoding step over a cache that holds the prefix passes
    positions of -1, so `serve.generator` takes

        def forward(parts, tokens, **kwargs):
            frozen, adapter, positions = parts
            now = positions if positions.shape == tokens.shape else jnp.full(tokens.shape, -1)
            tree = jp.combine(frozen, adapter, virtual_positions=now)
            return jp.lift(model)(tree, tokens, **kwargs)

    For a decoder of this library with a sliding window, pass also
    `segment_ids=jnp.where(now < 0, 1, -1)`.

    LoRA on the same projections goes first in the `chain`, or it would also add to the rows.

    With `hidden`, the rows of all layers are the output of one network on a table of
    embeddings P, tanh(P @ down + c) @ up + e, as in the first paper, where free rows did worse
    (section 4.3); `adapters.drop_reparameterization` turns it into plain rows after training.
    Without `hidden` it is P-tuning v2: deep prompts with a length for each task.

    An encoder-decoder takes one prefix for each attention: [PREFIX; x; PREFIX; y] is a `chain` of a
    prefix on the encoder's self-attention and one on the decoder's with another
    `positions_name`. The decoder's cross-attention sees the virtual positions of the encoder; a
    third prefix on its keys and values gives it trainable rows there, too.

    Args:
      length: Number of virtual positions. For several tasks that share the base, one length for
        each; their virtual positions follow each other (`prompts.prepend_prefixes`).
      keys: The key projections.
      values: The value projections.
      hidden: Hidden size of the network. `None` trains the rows themselves.
      embed: Width of the table P. `None` means that of the first projection's input.
      rope: The rotary frequencies of the model, radians per position for each pair (i, i + H/2)
        of a head of size H. The trainable keys are then those after the rotation, as Hugging
        Face PEFT stores them. `None` for a model without rotary embeddings.
      init_std: The rows, or the table P, start at Normal(0, init_std ** 2).
      positions_name: The argument of `combine` that takes the virtual positions.
      dtype: Dtype of the trainable parameters.

    Returns:
      A method with length * (out of keys + out of values) trainable parameters per layer; with
      `hidden`, length * embed + hidden * (embed + 1) for all layers and (hidden + 1) * (out of
      keys + out of values) per layer.

    Raises:
      ValueError: A length or width is less than 1; a weight is not a projection, is a key and a
        value projection at once, or already has a prefix; the rotary frequencies do not fit the
        heads; or, in a call of the model, batch and time are merged before a projection.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f = lambda p, ids: (p["embed"][ids] @ p["k"], p["embed"][ids] @ p["v"])
      >>> params = {"embed": jnp.ones((9, 2)), "k": jnp.ones((2, 4)), "v": jnp.ones((2, 4))}
      >>> ids, positions = jp.prompts.prepend_virtual_tokens(jnp.array([[7, 8]]), 3)
      >>> sites = jp.sites(f, params, ids)
      >>> method = jp.prefix_tuning(3, sites.match("k"), sites.match("v"))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> keys, _ = jp.lift(f)(jp.combine(frozen, adapter, virtual_positions=positions), ids)
      >>> bool((keys[0, :3] == adapter["k/rows"]).all()), keys[0, 3:].tolist()
      (True, [[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])

    References:
      Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021,
      sections 4.2 and 4.3. https://arxiv.org/abs/2101.00190
      Liu et al., P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across
      Scales and Tasks, 2021, section 3. https://arxiv.org/abs/2110.07602
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"`prefix_tuning(length={length})`: `length` must be at least 1, the number of virtual "
            "positions, or a sequence of such numbers, one for each task."
        )
    widths = [n for n in (hidden, embed) if n is not None]
    if min(widths, default=1) < 1 or embed is not None and hidden is None:
        raise ValueError(
            f"`prefix_tuning(hidden={hidden}, embed={embed})`: both must be at least 1, and "
            "`embed`, the width of the network's input, needs `hidden`, its hidden size."
        )
    if twice := [path for path in keys if path in values]:
        raise ValueError(
            f"`prefix_tuning`: {twice} are among the keys and among the values. A weight that "
            "projects to both at once cannot have a prefix; split it into one for each."
        )
    both = keys | values
    frequencies = None if rope is None else tuple(float(f) for f in rope)

    def made(key: jax.Array, site: Site) -> tuple[Callable[..., Weight], list[Any]]:
        """The class of a weight, and its fields between `w` and `virtual_positions`."""
        count, out = sum(lengths), site.size(OUT)
        if hidden is None:
            rows = init_std * jax.random.normal(key, (*site.stack, count, out), dtype)
            return Prefix, [Trainable(rows)]
        # Not the first of `both`, whose order is not kept in a file.
        first = next(iter((*keys.values(), *values.values())))
        names = [f"{first.path}/{name}" for name in ("table", "down", "down_bias")]
        up = jax.random.normal(key, (*site.stack, hidden, out), dtype) / hidden**0.5
        own = [Trainable(up), Trainable(jnp.zeros((*site.stack, out), dtype))]
        if site.path != first.path:
            return EncodedPrefix, [*map(Placeholder, names), *own]
        width = embed or first.size("in")
        a, b = jax.random.split(jax.random.fold_in(key, 1))
        table = init_std * jax.random.normal(a, (count, width), dtype)
        down = jax.random.normal(b, (width, hidden), dtype) / width**0.5
        arrays = (table, down, jnp.zeros((hidden,), dtype))
        shared = [Trainable(x, name=name) for x, name in zip(arrays, names, strict=True)]
        return EncodedPrefix, [*shared, *own]

    def make(key: jax.Array, site: Site, view: View) -> View:
        if "linear" not in site.kinds or "embedding" in site.kinds:
            raise ValueError(
                f"`prefix_tuning`: the model uses '{site.path}' as "
                f"{', '.join(sorted(site.kinds))}, which is not a projection. Select the key and "
                "the value projections of attention."
            )
        if any(_has_prefix_at(w, positions_name) for w in chain_of(view.weight)):
            raise ValueError(
                f"`prefix_tuning`: '{site.path}' already has a prefix at the positions "
                f"'{positions_name}', which this one would replace. Give several tasks one prefix, "
                "`length=[...]`, or this one another `positions_name`."
            )
        rotary = frequencies if site.path in keys else None
        if rotary is not None and site.size(OUT) % (2 * len(rotary)):
            raise ValueError(
                f"`prefix_tuning(rope=...)` has {len(rotary)} frequencies, one per pair, so heads "
                f"of size {2 * len(rotary)}, but '{site.path}' has {site.size(OUT)} outputs, which "
                "is not a multiple of it. Give the frequencies of one head of this model."
            )
        kind, fields = made(key, site)
        rest = (Placeholder(positions_name), bias_of(site, both), rotary, lengths, site.path)
        return dataclasses.replace(view, weight=kind(view.weight, *fields, *rest))

    options = dict(
        length=length if isinstance(length, int) else list(lengths),
        keys=keys,
        values=values,
        hidden=hidden,
        embed=embed,
        rope=None if frequencies is None else list(frequencies),
        init_std=init_std,
        positions_name=positions_name,
        dtype=dtype,
    )
    return Method(
        "prefix_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, both, make, caller="prefix_tuning"),
    )
