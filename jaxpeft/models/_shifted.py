"""LongLoRA's shifted sparse attention: training on long texts at the cost of short ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft.models.decoder import TokenPositions, attention


def shifted_sparse(group: int) -> Callable[..., Array]:
    """An `attention_fn` for training: attention within groups of tokens, shifted in half the heads.

    The first half of the heads attends within the groups [0, g), [g, 2 g), ..., the second half
    within groups that begin g / 2 later, so that information passes between neighbouring groups
    from layer to layer. A token attends to the tokens of its group that are not after it; the half
    groups at both ends, which the shift puts into one group, do not attend to each other. T tokens
    cost T g instead of T^2. It is for training only: the fine-tuned model runs with full attention
    and, where the context has grown, with interpolated positions
    (`Rope(rope_type="linear", factor=...)`), which training has too.

        train_fn = decoder.apply_fn(config, attention_fn=shifted_sparse(2048), remat="full")
        model = decoder.apply_fn(config)

    Args:
      group: g, an even number of tokens; a quarter of the context in the paper. Texts of at most
        g tokens have full attention.

    Returns:
      A function of the signature of `decoder.attention`.

    Raises:
      ValueError: An odd group; when called, a length that groups do not divide, an odd number of
        heads, keys of other tokens than the queries, as with a cache, or virtual tokens for all
        (segment -1; under jit the result is NaN then).

    References:
      Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, 2023,
      section 3.2. https://arxiv.org/abs/2309.12307
    """
    if group < 2 or group % 2:
        raise ValueError(
            f"`shifted_sparse({group})`: `group` must be an even number of tokens, at least 2."
        )

    def attention_fn(
        q: Array,
        k: Array,
        v: Array,
        *,
        query_positions: TokenPositions,
        key_positions: TokenPositions,
        window: int | Array | None,
    ) -> Array:
        length, heads = q.shape[1:3]
        if k.shape[1] != length:
            raise ValueError(
                f"`shifted_sparse` is for training, where queries and keys are of the same tokens, "
                f"but got {length} queries and {k.shape[1]} keys. Generate with the decoder's own "
                "attention."
            )
        if length <= group:
            where = {"query_positions": query_positions, "key_positions": key_positions}
            return attention(q, k, v, **where, window=window)
        if length % group or heads % 2:
            raise ValueError(
                f"`shifted_sparse({group})`: the number of tokens must be a multiple of {group}, "
                f"and the number of heads even, got {length} tokens and {heads} heads. Pad the "
                "texts, or choose another group."
            )
        if k.shape[2] % 2:  # the halves of the heads share keys
            k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        near = group if window is None else jnp.minimum(window, group)
        halves = []
        for half, shift in ((0, 0), (1, group // 2)):
            parts = [jnp.split(x, 2, axis=2)[half] for x in (q, k, v)]
            q_, k_, v_ = (_grouped(x, group, shift) for x in parts)
            own = _grouped_positions(query_positions, q.shape[0], group, shift)
            y = attention(q_, k_, v_, query_positions=own, key_positions=own, window=near)
            halves.append(jnp.roll(y.reshape(parts[0].shape), shift, axis=1))
        y = jnp.concatenate(halves, axis=2)
        if query_positions.segment_ids is None:
            return y
        # Under jit nothing can raise, and a prefix must not be left out silently.
        return jnp.where(_any_virtual(query_positions.segment_ids), jnp.nan, y)

    return attention_fn


def _any_virtual(segment_ids: Array) -> Array:
    """Whether there are virtual tokens, to which every token attends, in whatever group it is."""
    virtual = segment_ids == -1
    if not isinstance(virtual, jax.core.Tracer) and virtual.any():
        raise ValueError(
            f"With `shifted_sparse`, tokens attend to their own group only, but "
            f"{int(virtual.sum())} tokens are virtual (segment -1), to which every token attends. "
            "Train with the decoder's own attention."
        )
    return virtual.any()


def _grouped(x: Array, group: int, shift: int) -> Array:
    """(B, T, ...) as groups (B * T / g, g, ...), the first of which begins at `shift`."""
    return jnp.roll(x, -shift, axis=1).reshape(-1, group, *x.shape[2:])


def _grouped_positions(tokens: TokenPositions, rows: int, group: int, shift: int) -> TokenPositions:
    positions = jnp.broadcast_to(tokens.positions, (rows, tokens.positions.shape[1]))
    segment_ids = tokens.segment_ids
    return TokenPositions(
        _grouped(positions, group, shift),
        None if segment_ids is None else _grouped(segment_ids, group, shift),
    )
