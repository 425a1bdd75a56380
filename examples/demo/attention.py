"""Attention for a CPU: the decoder's own, over blocks of queries, an `attention_fn`.

A block attends to the keys up to its own end, which leaves out most of the upper triangle, and its
scores are formed again in the backward pass, so that they stay in the cache instead of passing
through memory. The values are those of `decoder.attention`.
"""

import jax

from jaxpeft.models import decoder

BLOCK = 128


def blocked(q, k, v, *, query_positions, key_positions, window):
    """As `decoder.attention`; in cached decoding, with other keys than queries, it is that."""
    length = q.shape[1]

    @jax.checkpoint
    def block(q, k, v, queries, keys):
        return decoder.attention(
            q, k, v, query_positions=queries, key_positions=keys, window=window
        )

    if length != k.shape[1]:
        return decoder.attention(
            q, k, v, query_positions=query_positions, key_positions=key_positions, window=window
        )

    def cut(positions, start, end):
        return jax.tree.map(lambda x: x[:, start:end], positions)

    starts = range(0, length, BLOCK)
    ends = [min(start + BLOCK, length) for start in starts]
    blocks = [
        block(
            q[:, start:end],
            k[:, :end],
            v[:, :end],
            cut(query_positions, start, end),
            cut(key_positions, 0, end),
        )
        for start, end in zip(starts, ends, strict=True)
    ]
    return jax.numpy.concatenate(blocks, axis=1)
