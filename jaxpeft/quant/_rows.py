"""Codebooks in rows: a scale for each run of rows of a column, possibly itself in eight bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._operand import CallSite
from jaxpeft._weight import axes, static, weight
from jaxpeft.quant import _dynamic as dynamic
from jaxpeft.quant._blocks import half, join, pack, split_into_blocks, unpack
from jaxpeft.quant._book import GROUP, Book, mean, relative, rounded
from jaxpeft.quant._quantized import Quantized, checked_block, wide


@weight
class Codebook(Quantized):
    """The matrix `book[codes] * scales`, one scale for `block` rows of a column.

    With double quantization `scales` are codes too: their values are
    `map[scales] * tiles + offset`, with one of `tiles` for a tile of 256 scales (4 blocks of
    64 columns) and one `offset` for the matrix. The last block has `tail` rows, or as many as
    the others where `tail` is 0.
    """

    codes: Any = axes("in", "out")  # uint8 (bytes, out), two codes to a byte
    scales: Any = axes("in", "out")  # (blocks, out), a float or uint8
    tiles: Any = axes("in", "out", optional=True)  # (blocks / 4, out / 64)
    offset: Any = axes(optional=True)  # ()
    block: int = static(64)
    tail: int = static(0)
    book: Book = static(None)
    kernel: str | None = static(None)

    def forward(self, x):
        return super().forward(x) if (y := self._fused(x, False)) is None else y

    def transposed(self, y):
        return super().transposed(y) if (x := self._fused(y, True)) is None else x

    def granularity(self, field, axis):
        # A matrix of few blocks has wider tiles.
        height, width = _tile(self.scales.shape[-2]) if field == "tiles" else (1, 1)
        if axis == "out":
            return width, 1
        if self.tail:
            return 0, 0
        lie = {"codes": (1, half(self.block)), "scales": (1, 1), "tiles": (height, 1)}
        blocks, elements = lie[field]
        return blocks * self.block, elements

    def lookup(self, ids):
        """book[codes[ids]] * scales[ids // block], for blocks that hold the same row."""
        if self.tail or self.tiles is not None:
            return super().lookup(ids)
        within = ids % self.block
        byte = self.codes[ids // self.block * half(self.block) + within % half(self.block)]
        codes = jnp.where((within < half(self.block))[..., None], byte >> 4, byte & 15)
        scales = self.scales[ids // self.block]
        return self.book.decode(codes, scales.dtype) * scales

    def float_scales(self) -> jax.Array:
        """(*stack, blocks, out), out of their codes where they are in eight bits."""
        if self.tiles is None:
            return self.scales
        return expand(self.scales, self.tiles, self.offset)

    def decode(self):
        scales = self.float_scales()
        full = scales.shape[-2] - bool(self.tail)
        codes = unpack(self.codes, full, self.block, self.tail)
        parts = zip(codes, split_into_blocks(scales, 1, full), strict=True)
        return join([self.book.decode(c, s.dtype) * s for c, s in parts])

    def _fused(self, x, transposed):
        """The product by the kernel, or `None` where it is not asked for or does not serve."""
        if self.kernel is None or type(site := self.codes.site) is not CallSite:
            return None
        # Only now: Pallas takes a second to load.
        from jaxpeft.quant._kernels import nf4_matmul

        operands = (self.codes, self.scales, self.tiles, self.offset)
        codes, scales, tiles, offset = (None if op is None else op.array for op in operands)
        plain = dataclasses.replace(self, codes=codes, scales=scales, tiles=tiles, offset=offset)
        if not nf4_matmul.serves(x, plain, site.dtype):
            return None
        return nf4_matmul.product(
            x,
            plain,
            dtype=site.dtype,
            out_dtype=site.preferred,
            transposed=transposed,
            precision=site.precision,
        )

    def again(self, matrix):
        return rows(matrix, self.book, block=self.block, double=self.tiles is not None)


def rows(matrix: jax.Array, book: Book, *, block: int, double: bool) -> Codebook:
    """Rounds a matrix (*stack, in, out) to a codebook, in blocks of rows of each column."""
    w = wide(matrix)
    full, tail = divmod(w.shape[-2], checked_block(block))
    parts = split_into_blocks(w, block, full)
    scales = [jnp.max(jnp.abs(part), axis=-2, keepdims=True) for part in parts]
    codes = join([pack(book.encode(relative(p, s))) for p, s in zip(parts, scales, strict=True)])
    tiles = offset = None
    absmax = join(scales)
    if double:
        absmax, tiles, offset = compress(absmax)
    return Codebook(codes, absmax, tiles, offset, block, tail, book, kernel=None)


# --- Double quantization -------------------------------------------------------------------


def _tile(blocks: int) -> tuple[int, int]:
    """Rows and columns of a tile of 256 scales."""
    height = min(4, blocks)
    return height, GROUP // height


def compress(scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales (*stack, blocks, out) as (codes, tiles, offset), see `Codebook`."""
    *stack, blocks, out = scales.shape
    height, width = _tile(blocks)
    offset = mean(scales.reshape(*stack, -1))
    centred = scales - offset[..., None, None]
    pad = [(0, 0)] * len(stack) + [(0, -blocks % height), (0, -out % width)]
    tiled = jnp.pad(jnp.abs(centred), pad)
    down, across = tiled.shape[-2] // height, tiled.shape[-1] // width
    tiles = tiled.reshape(*stack, down, height, across, width).max(axis=(-3, -1))
    spread = _spread(tiles, blocks, out)
    codes = jnp.where(spread > 0, dynamic.nearest(relative(centred, spread)), 0)
    return codes.astype(jnp.uint8), tiles, offset


def expand(codes: jax.Array, tiles: jax.Array, offset: jax.Array) -> jax.Array:
    """The scales that `compress` has put into codes, up to their rounding."""
    scaled = dynamic.value(codes).astype(tiles.dtype) * _spread(tiles, *codes.shape[-2:])
    return rounded(scaled) + offset[..., None, None]


def _spread(tiles: jax.Array, blocks: int, out: int) -> jax.Array:
    """tiles (*stack, down, across) at each of the scales (*stack, blocks, out) they cover."""
    height, width = _tile(blocks)
    *stack, down, across = tiles.shape
    shape = (*stack, down, height, across, width)
    spread = jnp.broadcast_to(tiles[..., :, None, :, None], shape)
    return spread.reshape(*stack, down * height, across * width)[..., :blocks, :out]
