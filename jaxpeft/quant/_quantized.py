"""What all formats share: a quantized matrix, dequantized where it is used.

    format      weight     quantized values      scales
    nf4, fp4    Codebook   two to a byte         a block of a column, themselves in 8 bits ("+dq")
    nf4, fp4    Flat       two to a byte         a block of the whole array, as bitsandbytes has it
    int4        Int4       two to a byte         a block of a column, with a zero point ("+asym")
    int8, fp8   PerChannel one to a byte         a column
    int8, fp8   Blockwise  one to a byte         a block of a column

A quantizer is a function from a matrix (*stack, in, out) to one of these weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import _compat as compat
from jaxpeft._computed import Computed
from jaxpeft._operand import computing
from jaxpeft._rules.sharding import parts_of
from jaxpeft._weight import Weight, axes, static, weight
from jaxpeft.quant._blocks import join, split_into_blocks


class Quantized(Weight):
    """A matrix that `dequantize` computes from its fields.

    Products, lookups and convolutions dequantize where the matrix is used, and again in the
    backward pass: only quantized values are saved. Dequantization runs in the dtype of the scales
    (float32, or float64 for a float64 matrix) and casts once to the dtype of the program.
    """

    local_in = local_out = True

    def dequantize(self) -> jax.Array:
        """The matrix (*stack, in, out)."""
        raise NotImplementedError

    def requantize(self, matrix: jax.Array) -> "Quantized":
        """Another matrix (*stack, in, out), quantized in the same format."""
        raise NotImplementedError

    def forward(self, x):
        return x @ self._dequantized()

    def transposed(self, y):
        return y @ self._dequantized().T

    def lookup(self, ids):
        return self._dequantized()[ids]

    def materialize(self):
        """Where shardings are part of the types, the matrix has that of its quantized values."""
        quantized = max(jax.tree.leaves(self), key=lambda x: x.size * x.dtype.itemsize)
        lies = compat.typed_sharding(jax.typeof(quantized))
        if lies is None:
            return self.dequantize()
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)
        sides = jax.eval_shape(type(self).dequantize, plain).shape
        names = lies.spec if quantized.ndim == len(sides) else (*lies.spec, *(None,) * len(sides))
        spec = [
            name if size % parts_of(lies.mesh, PartitionSpec(name)) == 0 else None
            for name, size in zip(names, sides, strict=False)
        ]
        place = NamedSharding(lies.mesh, PartitionSpec(*spec))
        return jax.sharding.auto_axes(type(self).dequantize, out_sharding=place)(self)

    def _dequantized(self) -> Computed:
        declared = dataclasses.fields(self)  # type: ignore[arg-type]
        fields = {f.name: getattr(self, f.name) for f in declared if "axes" in f.metadata}

        def dequantize(**arrays: Any) -> jax.Array:
            return dataclasses.replace(self, **arrays).dequantize()  # type: ignore[type-var]

        return Computed(dequantize, fields)


@weight
class PerChannel(Quantized):
    """The matrix `values * scale`, one scale for each column."""

    values: Any = axes("in", "out")  # of `dtype`, or uint8 with the bits of a float of 8 bits
    scale: Any = axes("out")
    dtype: Any = static(jnp.dtype(jnp.int8))

    def forward(self, x):
        """x @ (values * scale) = (x @ values) * scale."""
        y = x @ self._quantized()
        return (y * self.scale).astype(y.dtype)

    def transposed(self, y):
        """y @ (values * scale).T = (y * scale) @ values.T."""
        return (y * self.scale).astype(y.dtype) @ self._quantized().T

    def lookup(self, ids):
        """(values * scale)[ids] = values[ids] * scale."""
        return _values(self.values[ids], self.dtype, self.scale.dtype) * self.scale

    def dequantize(self):
        return _values(self.values, self.dtype, self.scale.dtype) * self.scale[..., None, :]

    def requantize(self, matrix):
        return quantize_linear(matrix, None, self.dtype)

    def _quantized(self) -> Computed:
        def dequantize(values: jax.Array, scale: jax.Array) -> jax.Array:
            return _values(values, self.dtype, scale.dtype)

        return Computed(dequantize, {"values": self.values, "scale": self.scale})


@weight
class Blockwise(Quantized):
    """The matrix `values * scales`, one scale for `block` rows of a column.

    The last block has `tail` rows, or as many as the others where `tail` is 0.
    """

    values: Any = axes("in", "out")  # of `dtype`, or uint8 with the bits of a float of 8 bits
    scales: Any = axes("in", "out")  # (blocks, out)
    block: int = static(64)
    tail: int = static(0)
    dtype: Any = static(jnp.dtype(jnp.int8))

    def granularity(self, field, axis):
        if axis != "in":
            return 1, 1
        rows = {"values": self.block, "scales": 1}[field]
        return (0, 0) if self.tail else (self.block, rows)

    def lookup(self, ids):
        """(values * scales)[ids] = values[ids] * scales[ids // block]."""
        scales = self.scales[ids // self.block]
        return _values(self.values[ids], self.dtype, scales.dtype) * scales

    def dequantize(self):
        scales, full = self.scales, self.scales.shape[-2] - bool(self.tail)
        quantized = split_into_blocks(
            _values(self.values, self.dtype, scales.dtype), self.block, full
        )
        pairs = zip(quantized, split_into_blocks(scales, 1, full), strict=True)
        return join([quantized * scale for quantized, scale in pairs])

    def requantize(self, matrix):
        return quantize_linear(matrix, self.block, self.dtype)


def quantize_linear(matrix: jax.Array, block: int | None, dtype: Any) -> PerChannel | Blockwise:
    """Quantizes to one byte, `round(w / scale)` with `scale = max |w| / (the largest value)`.

    Args:
      matrix: (*stack, in, out).
      block: Rows under one scale; `None` for whole columns.
      dtype: The dtype of the quantized values, int8 or a float of 8 bits.
    """
    integers = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    w = widened(matrix)
    rows = w.shape[-2]
    size = rows if block is None else checked_block(block)
    full, tail = divmod(rows, size)
    parts = split_into_blocks(w, size, full)
    scales = [jnp.max(jnp.abs(part), axis=-2, keepdims=True) / largest for part in parts]
    ratios = [part / _nonzero(scale) for part, scale in zip(parts, scales, strict=True)]
    if integers:
        ratios = [jnp.round(ratio) for ratio in ratios]
    quantized, scale = join([ratio.astype(dtype) for ratio in ratios]), join(scales)
    if not integers:
        # XLA's CPU backend widens floats of 8 bits wherever a loop carries them.
        quantized = lax.bitcast_convert_type(quantized, jnp.uint8)
    if block is None:
        return PerChannel(quantized, scale[..., 0, :], jnp.dtype(dtype))
    return Blockwise(quantized, scale, size, tail, jnp.dtype(dtype))


def _values(quantized: jax.Array, dtype: Any, wanted: Any) -> jax.Array:
    """The quantized values as numbers of a wider dtype, without their scale."""
    if quantized.dtype != dtype:
        quantized = lax.bitcast_convert_type(quantized, dtype)
    return quantized.astype(wanted)


def widened(matrix: jax.Array) -> jax.Array:
    """The matrix in the dtype that quantization runs in: float32, or its own if that is wider.

    Raises:
      ValueError: The matrix is complex.
    """
    if jnp.issubdtype(matrix.dtype, jnp.complexfloating):
        raise ValueError(
            f"A matrix of dtype {matrix.dtype} and shape {matrix.shape} cannot be quantized: "
            "formats hold real numbers. Store its real and imaginary parts as two matrices."
        )
    return matrix.astype(jnp.promote_types(computing(matrix.dtype), jnp.float32))


def checked_block(block: int) -> int:
    """The number of rows of a block.

    Raises:
      ValueError: It is not an integer of at least 1.
    """
    if not isinstance(block, int) or block < 1:
        raise ValueError(
            f"`block={block!r}`: the number of rows of a block is an integer of at least 1."
        )
    return block


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1)
