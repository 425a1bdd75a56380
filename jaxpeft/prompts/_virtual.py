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
    """Tokens behind `length` placeholders, and the virtual positions, (batch, length + time) each.

    Packed rows (several examples in one), and models with a sliding window, need segment ids:
    virtual tokens are in segment -1, to which every segment of `jaxpeft.models.decoder` attends
    at any distance, so that each example gets what it gets alone in its row. For a model without
    segment -1, `jaxpeft.data.Batches(..., virtual_tokens=...)` gives each example virtual tokens of
    its own.

    Args:
      tokens: (batch, time).
      length: Number of virtual positions.
      fill: The placeholder, any id of the table; for a soft prompt, the ids (length,) of its
        virtual tokens.
      segment_ids: (batch, time): 1, 2, ... for the examples of a row, 0 for padding. Ones where
        each row is one example.

    Returns:
      The tokens and the virtual positions int32, 0, 1, ... at virtual tokens and -1 at real
      ones, for `combine(..., virtual_positions=...)`. With `segment_ids`, also the segment ids
      of all positions. Leave `positions` to the model, or count them from the first virtual
      token in each segment.

    Raises:
      ValueError: The segment ids have another shape than the tokens, or are negative.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, segments = jnp.array([[5, 6, 7, 8]]), jnp.array([[1, 1, 2, 0]])
      >>> [x.tolist() for x in prepend_virtual_tokens(rows, 2, segment_ids=segments)]
      [[[0, 0, 5, 6, 7, 8]], [[0, 1, -1, -1, -1, -1]], [[-1, -1, 1, 1, 2, 0]]]
    """
    task = jnp.zeros(len(tokens), int)
    tokens, positions, segments = prepend_prefixes(tokens, (length,), task, fill, segment_ids)
    return (tokens, positions) if segment_ids is None else (tokens, positions, segments)


def prepend_prefixes(
    tokens: jax.Array,
    lengths: Sequence[int],
    tasks: jax.Array,
    fill: Any = 0,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Examples of several tasks, each behind the placeholders of its own task's prefix.

    Args:
      tokens: (batch, time).
      lengths: Number of virtual positions of each task, as given to the method.
      tasks: (batch,), the index of each example's task.
      fill: The placeholder, any id of the table, or one id for each position of the longest
        prefix.
      segment_ids: As for `prepend_virtual_tokens`; all examples of a row belong to the row's
        task.

    Returns:
      Tokens, virtual positions and a mask, each (batch, max(lengths) + time). Shorter prefixes are
      padded on the left, where the mask is false; pass it to the model, combined with the mask
      of the tokens. With `segment_ids`, the third is the segment ids of all positions instead.

    Raises:
      ValueError: `tasks` does not have one valid index for each example; or as
        `prepend_virtual_tokens`.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, tasks = jnp.array([[5, 6], [7, 8]]), jnp.array([1, 0])
      >>> [x.tolist() for x in prepend_prefixes(rows, (1, 2), tasks)[1:]]
      [[[1, 2, -1, -1], [-1, 0, -1, -1]], [[True, True, True, True], [False, True, True, True]]]
    """
    (batch, time), longest = tokens.shape, max(lengths)
    tasks = jnp.asarray(tasks)
    known = not isinstance(tasks, jax.core.Tracer)
    if tasks.shape != (batch,) or known and ((tasks < 0) | (tasks >= len(lengths))).any():
        shown = tasks.tolist() if known else f"of shape {tasks.shape}"
        raise ValueError(
            f"`prepend_prefixes`: tasks {shown} for {batch} examples; give each example an index "
            f"from 0 to {len(lengths) - 1}, for prefixes of lengths {list(lengths)}."
        )
    ends = jnp.cumsum(jnp.asarray(lengths))
    # The positions of a task end where those of the next task begin.
    positions = ends[tasks][:, None] - longest + jnp.arange(longest)
    starts = ends - jnp.asarray(lengths)
    positions = jnp.where(positions >= starts[tasks][:, None], positions, -1)
    fill = jnp.asarray(fill, tokens.dtype)
    if (calls := _replaced.get()) is not None:
        calls.append(segment_ids is not None)
        if not fill.ndim:  # The ids of a soft prompt are not placeholders.
            fill = jnp.where(fill == 1, 0, 1).astype(tokens.dtype)
    front = jnp.broadcast_to(fill, (batch, longest))
    real = jnp.full((batch, time), -1)
    third = jnp.concatenate([positions >= 0, jnp.ones((batch, time), bool)], axis=1)
    if segment_ids is not None:
        _check_segments(segment_ids, tokens)
        virtual = jnp.where(positions >= 0, _VIRTUAL, 0).astype(jnp.int32)
        third = jnp.concatenate([virtual, jnp.asarray(segment_ids, jnp.int32)], axis=1)
    positions = jnp.concatenate([positions, real], axis=1).astype(jnp.int32)
    return jnp.concatenate([front, tokens], axis=1), positions, third


_replaced: contextvars.ContextVar[list[bool] | None]
_replaced = contextvars.ContextVar("replaced", default=None)


@contextlib.contextmanager
def replaced_placeholders() -> Iterator[list[bool]]:
    """Makes `prepend_virtual_tokens` and `prepend_prefixes` use other placeholders than `fill`.

    Yields a list with one bool for each of their calls: whether it was given segment ids.
    """
    calls: list[bool] = []
    token = _replaced.set(calls)
    try:
        yield calls
    finally:
        _replaced.reset(token)


#: The segment of virtual tokens, to which every segment of `jaxpeft.models.decoder` attends.
_VIRTUAL = -1


def _check_segments(segment_ids: jax.Array, tokens: jax.Array) -> None:
    if segment_ids.shape != tokens.shape:
        raise ValueError(
            f"`segment_ids` have shape {segment_ids.shape}, but the tokens have {tokens.shape}; "
            "both must be (batch, time), without virtual positions."
        )
    known = not isinstance(segment_ids, jax.core.Tracer)
    if known and (least := int(jnp.min(segment_ids, initial=0))) < 0:
        raise ValueError(
            f"`segment_ids` contain {least}, but must be 0 for padding and 1, 2, ... for the "
            "examples of a row. Give them as they are without virtual tokens."
        )


def drop_virtual_positions(outputs: jax.Array, length: int) -> jax.Array:
    """The outputs at real positions, (batch, time, ...) of (batch, length + time, ...).

    Args:
      outputs: Outputs of the model, virtual positions first.
      length: Number of virtual positions.

    Example:
      >>> import jax.numpy as jnp
      >>> drop_virtual_positions(jnp.ones((2, 3 + 5, 4)), 3).shape
      (2, 5, 4)
    """
    return outputs[:, length:]
