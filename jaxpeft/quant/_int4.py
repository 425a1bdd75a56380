"""int4: a scale for each block of a column, with or without a zero point."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._weight import axes, static, weight
from jaxpeft.quant._blocks import half, join, pack, split_into_blocks, unpack
from jaxpeft.quant._quantized import Quantized, checked_block, widened


@weight
class Int4(Quantized):
    """The matrix `(values - zeros) * scales`, values in 0 .. 15, two to a byte.

    Without `zeros`, 8 stands for zero everywhere.
    """

    values: Any = axes("in", "out")  # uint8 (bytes, out)
    scales: Any = axes("in", "out")  # (blocks, out)
    zeros: Any = axes("in", "out", optional=True)  # uint8 (blocks, out)
    block: int = static(64)
    tail: int = static(0)

    def granularity(self, field, axis):
        if axis != "in":
            return 1, 1
        return (0, 0) if self.tail else (self.block, half(self.block) if field == "values" else 1)

    def dequantize(self):
        scales, full = self.scales, self.scales.shape[-2] - bool(self.tail)
        quantized = unpack(self.values, full, self.block, self.tail)
        zeros: list[Any] = [8] * len(quantized)
        if self.zeros is not None:
            zeros = split_into_blocks(self.zeros.astype(scales.dtype), 1, full)
        parts = zip(quantized, split_into_blocks(scales, 1, full), zeros, strict=True)
        return join([(c.astype(s.dtype) - z) * s for c, s, z in parts])

    def requantize(self, matrix):
        return int4(matrix, block=self.block, symmetric=self.zeros is None)


def int4(matrix: jax.Array, *, block: int = 64, symmetric: bool = True) -> Int4:
    """Quantizes a matrix (*stack, in, out) to integers of four bits.

    Symmetric: scale = max |w| / 7 over `block` rows of a column, values = round(w / scale) + 8.
    Asymmetric: scale = (max(w, 0) - min(w, 0)) / 15, zero = round(-min(w, 0) / scale),
    values = round(w / scale) + zero. Either way a weight of zero stays zero, and the error of
    an entry is at most scale / 2 (scale, where a zero point was rounded the other way).

    Args:
      matrix: The weights, (*stack, in, out).
      block: Rows under one scale. 4 + 32 / block bits per parameter.
      symmetric: Whether zero is in the middle of the quantized values. If not, each block has a
        zero point of its own, for 8 / block bits more.
    """
    w = widened(matrix)
    full, tail = divmod(w.shape[-2], checked_block(block))
    quantized, scales, zeros = [], [], []
    for part in split_into_blocks(w, block, full):
        high = jnp.max(part, axis=-2, keepdims=True, initial=0)
        low = jnp.min(part, axis=-2, keepdims=True, initial=0)
        scale = jnp.maximum(high, -low) / 7 if symmetric else (high - low) / 15
        ratio = jnp.where(scale > 0, scale, 1)
        zero = jnp.full_like(scale, 8) if symmetric else jnp.round(-low / ratio)
        quantized.append(pack(jnp.clip(jnp.round(part / ratio) + zero, 0, 15).astype(jnp.uint8)))
        scales.append(scale)
        zeros.append(zero.astype(jnp.uint8))
    return Int4(
        join(quantized), join(scales), None if symmetric else join(zeros), block=block, tail=tail
    )
