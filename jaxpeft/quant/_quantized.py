"""What all formats share: a matrix in codes, decoded where it is used.

    format      weight     codes                 scales
    nf4, fp4    Codebook   two to a byte         a block of a column, themselves in 8 bits ("+dq")
    nf4, fp4    Flat       two to a byte         a block of the whole array, as bitsandbytes has it
    int4        Int4       two to a byte         a block of a column, with a zero point ("asym")
    int8, fp8   Columns    one to a byte         a column
    int8, fp8   Blocks     one to a byte         a block of a column

An encoder is a function from a matrix (*stack, in, out) to one of these weights.
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
    """A matrix that `decode` computes from its fields.

    Products, lookups and convolutions decode at the place of use, and again in the backward
    pass: what is saved are codes. Decoding runs in the dtype of the scales (float32, or
    float64 for a float64 matrix) and casts once to what the program has there.
    """

    local_in = local_out = True

    def decode(self) -> jax.Array:
        """The matrix (*stack, in, out)."""
        raise NotImplementedError

    def again(self, matrix: jax.Array) -> "Quantized":
        """Another matrix (*stack, in, out) in the same format, rounded anew."""
        raise NotImplementedError

    def forward(self, x):
        return x @ self._decoded()

    def transposed(self, y):
        return y @ self._decoded().T

    def lookup(self, ids):
        return self._decoded()[ids]

    def materialize(self):
        """Where shardings are part of the types, the matrix lies as its codes do."""
        codes = max(jax.tree.leaves(self), key=lambda x: x.size * x.dtype.itemsize)
        lies = compat.typed_sharding(jax.typeof(codes))
        if lies is None:
            return self.decode()
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)
        sides = jax.eval_shape(type(self).decode, plain).shape
        names = lies.spec if codes.ndim == len(sides) else (*lies.spec, *(None,) * len(sides))
        spec = [
            name if size % parts_of(lies.mesh, PartitionSpec(name)) == 0 else None
            for name, size in zip(names, sides, strict=False)
        ]
        place = NamedSharding(lies.mesh, PartitionSpec(*spec))
        return jax.sharding.auto_axes(type(self).decode, out_sharding=place)(self)

    def _decoded(self) -> Computed:
        declared = dataclasses.fields(self)  # type: ignore[arg-type]
        fields = {f.name: getattr(self, f.name) for f in declared if "axes" in f.metadata}

        def decode(**arrays: Any) -> jax.Array:
            return dataclasses.replace(self, **arrays).decode()  # type: ignore[type-var]

        return Computed(decode, fields)


@weight
class PerChannel(Quantized):
    """The matrix `codes * scale`, one scale for each column."""

    codes: Any = axes("in", "out")  # of `dtype`, or uint8 with the bits of a float of 8 bits
    scale: Any = axes("out")
    dtype: Any = static(jnp.dtype(jnp.int8))

    def forward(self, x):
        """x @ (codes * scale) = (x @ codes) * scale."""
        y = x @ self._codes()
        return (y * self.scale).astype(y.dtype)

    def transposed(self, y):
        """y @ (codes * scale).T = (y * scale) @ codes.T."""
        return (y * self.scale).astype(y.dtype) @ self._codes().T

    def lookup(self, ids):
        """(codes * scale)[ids] = codes[ids] * scale."""
        return _values(self.codes[ids], self.dtype, self.scale.dtype) * self.scale

    def decode(self):
        return _values(self.codes, self.dtype, self.scale.dtype) * self.scale[..., None, :]

    def again(self, matrix):
        return linear_codes(matrix, None, self.dtype)

    def _codes(self) -> Computed:
        def decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
            return _values(codes, self.dtype, scale.dtype)

        return Computed(decode, {"codes": self.codes, "scale": self.scale})


@weight
class Blockwise(Quantized):
    """The matrix `codes * scales`, one scale for `block` rows of a column.

    The last block has `tail` rows, or as many as the others where `tail` is 0.
    """

    codes: Any = axes("in", "out")  # of `dtype`, or uint8 with the bits of a float of 8 bits
    scales: Any = axes("in", "out")  # (blocks, out)
    block: int = static(64)
    tail: int = static(0)
    dtype: Any = static(jnp.dtype(jnp.int8))

    def granularity(self, field, axis):
        if axis != "in":
            return 1, 1
        rows = {"codes": self.block, "scales": 1}[field]
        return (0, 0) if self.tail else (self.block, rows)

    def lookup(self, ids):
        """(codes * scales)[ids] = codes[ids] * scales[ids // block]."""
        scales = self.scales[ids // self.block]
        return _values(self.codes[ids], self.dtype, scales.dtype) * scales

    def decode(self):
        scales, full = self.scales, self.scales.shape[-2] - bool(self.tail)
        codes = split_into_blocks(_values(self.codes, self.dtype, scales.dtype), self.block, full)
        pairs = zip(codes, split_into_blocks(scales, 1, full), strict=True)
        return join([codes * scale for codes, scale in pairs])

    def again(self, matrix):
        return linear_codes(matrix, self.block, self.dtype)


def linear_codes(matrix: jax.Array, block: int | None, dtype: Any) -> PerChannel | Blockwise:
    """Codes of one byte, `round(w / scale)` with `scale = max |w| / (the largest code)`.

    Args:
      matrix: (*stack, in, out).
      block: Rows under one scale; `None` for whole columns.
      dtype: Of the codes, int8 or a float of 8 bits.
    """
    integers = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    w = wide(matrix)
    rows = w.shape[-2]
    size = rows if block is None else checked_block(block)
    full, tail = divmod(rows, size)
    parts = split_into_blocks(w, size, full)
    scales = [jnp.max(jnp.abs(part), axis=-2, keepdims=True) / largest for part in parts]
    ratios = [part / _nonzero(scale) for part, scale in zip(parts, scales, strict=True)]
    if integers:
        ratios = [jnp.round(ratio) for ratio in ratios]
    codes, scale = join([ratio.astype(dtype) for ratio in ratios]), join(scales)
    if not integers:
        # XLA's CPU backend widens floats of 8 bits wherever a loop carries them.
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    if block is None:
        return PerChannel(codes, scale[..., 0, :], jnp.dtype(dtype))
    return Blockwise(codes, scale, size, tail, jnp.dtype(dtype))


def _values(codes: jax.Array, dtype: Any, wanted: Any) -> jax.Array:
    """What the codes say, without their scale."""
    if codes.dtype != dtype:
        codes = lax.bitcast_convert_type(codes, dtype)
    return codes.astype(wanted)


def wide(matrix: jax.Array) -> jax.Array:
    """The matrix in the dtype that codes are computed in: float32, or wider if it is.

    Raises:
      ValueError: It is of complex numbers.
    """
    if jnp.issubdtype(matrix.dtype, jnp.complexfloating):
        raise ValueError(
            f"A matrix of {matrix.dtype}, of shape {matrix.shape}, has no codes: formats are of "
            "real numbers. Keep real and imaginary parts as two matrices."
        )
    return matrix.astype(jnp.promote_types(computing(matrix.dtype), jnp.float32))


def checked_block(block: int) -> int:
    """The number of rows of a block.

    Raises:
      ValueError: It is no integer of 1 or more.
    """
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"`block={block!r}`: a number of rows of 1 or more is needed.")
    return block


def _nonzero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1)
