"""Virtual tokens in a batch: prepended to the tokens, dropped from the outputs."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def prepend_virtual_tokens(
    tokens: jax.Array,
    length: int,
    fill: Any = 0,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Tokens (batch, length + time) behind placeholders, and their slots of the same shape.

    Rows of several examples each, and models with a sliding window, need segments: virtual
    tokens are of segment -1, which in `jaxpeft.models.decoder` every segment sees at any distance,
    so that each example is what it is alone in its row. For a model that does not know segment
    -1, `jaxpeft.data.Batches(..., virtual=...)` gives each example virtual tokens of its own.

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
      >>> [x.tolist() for x in prepend_virtual_tokens(rows, 2, segment_ids=segments)]
      [[[0, 0, 5, 6, 7, 8]], [[0, 1, -1, -1, -1, -1]], [[-1, -1, 1, 1, 2, 0]]]
    """
    task = jnp.zeros(len(tokens), int)
    tokens, slots, last = prepend_prefixes(tokens, (length,), task, fill, segment_ids)
    return (tokens, slots) if segment_ids is None else (tokens, slots, last)


def prepend_prefixes(
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
      segment_ids: As for `prepend_virtual_tokens`; all examples of a row are of the row's task.

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
            f"`prepend_prefixes`: tasks {shown} of {batch} examples; give each a number from 0 to "
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
    """Within it, `prepend_virtual_tokens` and `prepend_prefixes` put another placeholder than they are told.

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


def drop_virtual_positions(outputs: jax.Array, length: int) -> jax.Array:
    """Outputs (batch, length + time, ...) at real positions only."""
    return outputs[:, length:]
