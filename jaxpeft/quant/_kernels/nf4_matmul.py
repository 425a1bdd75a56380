"""A product with a matrix of 4 bits that is dequantized tile by tile (Pallas, Mosaic).

    x (tokens, in) @ W (in, out)        grid (tokens, out, in), the sum runs over the last
    y (tokens, out) @ W.T (out, in)     grid (tokens, in, out)

A tile of W is `8 * block` rows (4 * block bytes of quantized values, 8 of scales: what a TPU's
registers hold of float32) by 512 columns, or the whole of an axis that is shorter. It is
dequantized in float32 by selections, cast to the dtype of the product and multiplied; the sum stays
in a float32 scratch in VMEM. Where a tile reaches beyond the axis that is summed over, both
operands are zero there; beyond the other axes, what is computed is not written.

Experimental: it has only run in Pallas's interpreter, never on a TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KERNELS = ("pallas", "interpret")
#: Most tokens and most columns of a tile.
TILE = 512


def why_not(weight: Any) -> str | None:
    """Why the kernel does not serve a `Codebook`, or `None` where it does."""
    if weight.tail:
        return f"has a last block of {weight.tail} rows instead of {weight.block}"
    if weight.block % 16:
        return f"has blocks of {weight.block} rows, no multiple of 16"
    return None


def serves(x: jax.Array, weight: Any, dtype: Any) -> bool:
    """Whether the kernel multiplies x (..., side of W) by the weight, in that dtype."""
    factors = weight.nested if weight.nested is not None else weight.scales
    narrow = dtype in (jnp.float32, jnp.bfloat16) and factors.dtype == jnp.float32
    return why_not(weight) is None and weight.values.ndim == 2 and narrow and x.size > 0


def product(
    x: jax.Array,
    weight: Any,
    *,
    dtype: Any,
    out_dtype: Any = None,
    transposed: bool = False,
    precision: Any = None,
) -> jax.Array:
    """x @ W, or x @ W.T, where W (in, out) is `weight.dequantize()` in `dtype`.

    Args:
      x: (..., in), or (..., out) if `transposed`.
      weight: A `Codebook` without stack that the kernel `serves`; `weight.kernel` says how it runs:
        "interpret", or "pallas", which is the plain product where the program is not for a TPU.
      dtype: Dtype of both operands of the product, bfloat16 or float32.
      out_dtype: Dtype of the result; `None` for `dtype`.
      transposed: Which of the two products.
      precision: As in `jax.lax.dot_general`.
    Returns:
      (..., out), or (..., in). Only x has a gradient; the backward pass is the other product.
    """
    out_dtype = out_dtype or dtype
    given = x.dtype

    @jax.custom_vjp
    def multiply(x: jax.Array, weight: Any) -> jax.Array:
        return _either(x.astype(dtype), weight, transposed, out_dtype, precision)

    def forward(x: jax.Array, weight: Any) -> tuple[jax.Array, Any]:
        return multiply(x, weight), weight

    def backward(weight: Any, y: jax.Array) -> tuple[jax.Array, None]:
        # The barrier keeps XLA from saving the scales that the forward pass has expanded.
        weight, y = lax.optimization_barrier((weight, y))
        x = _either(y.astype(dtype), weight, not transposed, dtype, precision)
        return x.astype(given), None

    multiply.defvjp(forward, backward)
    return multiply(x, weight)


def _either(x, weight, transposed, out_dtype, precision):
    """By the kernel where it runs, else by the dequantized matrix."""

    def kernel(x, weight, *, interpret=False):
        call = functools.partial(
            _call, weight.book, weight.block, transposed, out_dtype, precision, interpret
        )
        rows = call(x.reshape(-1, x.shape[-1]), weight.values, weight.float_scales())
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def plain(x, weight):
        w = weight.dequantize().astype(x.dtype)
        sides = ((x.ndim - 1,), (int(transposed),)), ((), ())
        y = lax.dot_general(x, w, sides, precision=precision, preferred_element_type=out_dtype)
        return y.astype(out_dtype)

    if weight.kernel == "interpret":
        return kernel(x, weight, interpret=True)
    return lax.platform_dependent(x, weight, tpu=kernel, default=plain)


def _call(book, block, transposed, out_dtype, precision, interpret, x, quantized, scales):
    """x (tokens, in) times the matrix, or (tokens, out) times its transpose."""
    tokens, rows, columns = x.shape[0], 2 * quantized.shape[0], quantized.shape[1]
    summed, kept = (columns, rows) if transposed else (rows, columns)
    tall, width = min(8 * block, rows), min(TILE, columns)
    tile_summed, tile_kept = (width, tall) if transposed else (tall, width)
    tile_tokens = min(TILE, tokens)
    grid = tuple(
        pl.cdiv(*axis) for axis in ((tokens, tile_tokens), (kept, tile_kept), (summed, tile_summed))
    )

    def of_matrix(height):
        at = (lambda i, j, k: (j, k)) if transposed else (lambda i, j, k: (k, j))
        return pl.BlockSpec((height, width), at)

    kernel = functools.partial(_kernel, book, block, transposed, precision, summed)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            pl.BlockSpec((tile_tokens, tile_summed), lambda i, j, k: (i, k)),
            of_matrix(tall // 2),
            of_matrix(tall // block),
        ],
        out_specs=pl.BlockSpec((tile_tokens, tile_kept), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((tokens, kept), out_dtype),
        scratch_shapes=[pltpu.VMEM((tile_tokens, tile_kept), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * rows * columns,
            transcendentals=0,
            bytes_accessed=x.nbytes
            + grid[0] * (quantized.nbytes + scales.nbytes)
            + tokens * kept * 4,
        ),
        interpret=interpret,
        name="nf4_matmul_transposed" if transposed else "nf4_matmul",
    )(x, quantized, scales)


def _kernel(
    book, block, transposed, precision, summed, x_ref, quantized_ref, scales_ref, y_ref, sum_ref
):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x = x_ref[...]
    w = _dequantized(quantized_ref[...], scales_ref[...], block, book)
    along = int(transposed)  # the axis of w that is summed over
    if summed % x.shape[1]:
        left = summed - step * x.shape[1]
        x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, jnp.zeros_like(x))
        w = jnp.where(lax.broadcasted_iota(jnp.int32, w.shape, along) < left, w, jnp.zeros_like(w))
    sum_ref[...] += lax.dot_general(
        x,
        w.astype(x.dtype),
        (((1,), (along,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _dequantized(quantized, scales, block, book):
    """float32 (rows, columns) of values (rows / 2, columns) and scales (rows / block, columns)."""
    blocks, columns = scales.shape
    quantized = quantized.astype(jnp.int32).reshape(blocks, block // 2, columns)
    quantized = jnp.concatenate([quantized >> 4, quantized & 15], axis=1)
    values = book.dequantize(quantized, jnp.float32) * scales[:, None, :]
    return values.reshape(blocks * block, columns)
