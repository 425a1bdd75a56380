"""Blocks of rows of a matrix (*stack, rows, out), the last of which may be shorter; nibbles.

A matrix cut into blocks is a list of one or two arrays (*stack, blocks, size, out): the whole
blocks, and the tail if there is one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def split_into_blocks(x: jax.Array, size: int, full: int) -> list[jax.Array]:
    """`full` blocks of `size` rows, then what is left as one more."""
    *stack, rows, out = x.shape
    parts = []
    if full:
        parts.append(x[..., : full * size, :].reshape(*stack, full, size, out))
    if rows > full * size:
        parts.append(x[..., full * size :, :].reshape(*stack, 1, rows - full * size, out))
    return parts


def join(parts: Sequence[jax.Array]) -> jax.Array:
    """The rows of all blocks, one after another."""
    rows = [p.reshape(*p.shape[:-3], p.shape[-3] * p.shape[-2], p.shape[-1]) for p in parts]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-2)


def half(size: int) -> int:
    """Bytes of a column's block of `size` codes of four bits."""
    return (size + 1) // 2


def pack(codes: jax.Array) -> jax.Array:
    """Codes 0 .. 15 (*, size, out) in bytes (*, half(size), out).

    Byte j holds row j in its high bits and row half + j in its low ones, so that unpacking
    puts two runs of rows one after the other and never interleaves.
    """
    size = codes.shape[-2]
    high, low = codes[..., : half(size), :], codes[..., half(size) :, :]
    if size % 2:
        low = jnp.pad(low, [(0, 0)] * (low.ndim - 2) + [(0, 1), (0, 0)])
    return (high << 4 | low).astype(jnp.uint8)


def unpack(packed: jax.Array, full: int, size: int, tail: int) -> list[jax.Array]:
    """The codes in bytes (*stack, bytes, out), as `full` blocks of `size` and one of `tail`."""
    parts = split_into_blocks(packed, half(size), full)
    sizes = [size] * (full > 0) + [tail] * (tail > 0)
    return [
        jnp.concatenate([part >> 4, part & 15], axis=-2)[..., :n, :]
        for part, n in zip(parts, sizes, strict=True)
    ]


def select(codes: jax.Array, values: Sequence[float], dtype: Any) -> jax.Array:
    """values[codes] for few values, as selections by the bits of the codes.

    Selections are fused into the loop that needs the result; a gather is not, on TPU.
    """
    level = [jnp.asarray(v, dtype) for v in values]
    bit = 0
    while len(level) > 1:
        one = (codes >> bit & 1).astype(bool)
        level = [jnp.where(one, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]
