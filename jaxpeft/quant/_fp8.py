"""fp8: eight-bit floats of four exponent and three fraction bits (e4m3)."""

import jax
import jax.numpy as jnp

from jaxpeft.quant._quantized import Blockwise, PerChannel, linear_codes


def fp8(matrix: jax.Array, *, block: int | None = None) -> PerChannel | Blockwise:
    """Rounds a matrix (*stack, in, out) to float8 e4m3.

    scale = max |w| / 448 over a column, or over `block` rows of it; codes = w / scale rounded
    to the nearest float8, whose relative error is at most 1/16 down to scale / 64.

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, 2022, section 3.
      https://arxiv.org/abs/2209.05433
    """
    return linear_codes(matrix, block, jnp.float8_e4m3fn)
