"""The layout of bitsandbytes: blocks over the whole array as PyTorch has it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._weight import axes, static, weight
from jaxpeft.quant import _dynamic as dynamic
from jaxpeft.quant._book import GROUP, Book, mean, relative, rounded
from jaxpeft.quant._quantized import Quantized, checked_block, wide


@weight
class Flat(Quantized):
    """A matrix whose blocks run over the row-major (out, in) array, across its rows.

    The numbers of a file of bitsandbytes, exactly; they cannot be cut along a side, so that
    a model which slices or shards the weight gets it decoded. `tiles` and `offset` are there
    with double quantization.
    """

    codes: Any = axes("pairs")  # uint8, two neighbours to a byte, the first in the high bits
    scales: Any = axes("blocks")  # one per block, a float or uint8
    tiles: Any = axes("groups", optional=True)  # one per 256 blocks
    offset: Any = axes(optional=True)  # ()
    shape: tuple[int, int] = static(None)  # (in, out)
    block: int = static(64)
    book: Book = static(None)

    local_in = local_out = False

    def decode(self):
        scales = self.scales
        if self.tiles is not None:
            scaled = dynamic.value(scales).astype(self.tiles.dtype) * _each(
                self.tiles, GROUP, scales.shape[-1]
            )
            scales = rounded(scaled) + self.offset[..., None]
        rows, cols = self.shape
        pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1)
        codes = pairs.reshape(*self.codes.shape[:-1], -1)[..., : rows * cols]
        values = self.book.decode(codes, scales.dtype) * _each(scales, self.block, rows * cols)
        return jnp.swapaxes(values.reshape(*values.shape[:-1], cols, rows), -2, -1)

    def again(self, matrix):
        return flat(matrix, self.book, block=self.block, double=self.tiles is not None)


def flat(matrix: jax.Array, book: Book, *, block: int, double: bool) -> Flat:
    """Rounds a matrix (*stack, in, out) to a codebook as bitsandbytes does.

    Codes and scales are its own on CPU bit for bit; only the mean of the scales may differ in
    its last bit, since the order of a sum is nobody's promise.
    """
    w = wide(matrix)
    stack = w.shape[:-2]
    values = jnp.swapaxes(w, -2, -1).reshape(*stack, -1)
    scales, ratios = _in_blocks(values, checked_block(block), divide_tail=True)
    codes = book.encode(jnp.pad(ratios, [(0, 0)] * len(stack) + [(0, ratios.shape[-1] % 2)]))
    packed = (codes[..., ::2] << 4 | codes[..., 1::2]).astype(jnp.uint8)
    tiles = offset = None
    if double:
        offset = mean(scales)
        tiles, ratios = _in_blocks(scales - offset[..., None], GROUP)
        each = _each(tiles, GROUP, scales.shape[-1])
        scales = jnp.where(each > 0, dynamic.nearest(ratios), 0).astype(jnp.uint8)
    return Flat(packed, scales, tiles, offset, (w.shape[-2], w.shape[-1]), block, book)


def _each(scales: jax.Array, block: int, count: int) -> jax.Array:
    """Scales (*stack, blocks) at each of the `count` entries they cover."""
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, block))
    return each.reshape(*scales.shape[:-1], -1)[..., :count]


def _in_blocks(
    x: jax.Array, block: int, *, divide_tail: bool = False
) -> tuple[jax.Array, jax.Array]:
    """max |x| per block, and x in units of it; a short last block may be divided by it."""
    count = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -count % block)])
    scales = jnp.max(jnp.abs(padded.reshape(*x.shape[:-1], -1, block)), axis=-1)
    each = _each(scales, block, count)
    ratios = relative(x, each)
    if divide_tail and count % block:
        tail = jnp.arange(count) >= count - count % block
        ratios = jnp.where(tail, relative(x, each, divide=True), ratios)
    return scales, ratios
