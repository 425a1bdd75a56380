"""int8: symmetric, one scale for each output channel or for each block of one."""

import jax
import jax.numpy as jnp

from jaxpeft.quant._quantized import Blockwise, PerChannel, linear_codes


def int8(matrix: jax.Array, *, block: int | None = None) -> PerChannel | Blockwise:
    """Rounds a matrix (*stack, in, out) to int8.

    scale = max |w| / 127 over a column, or over `block` rows of it; codes = round(w / scale);
    the error of an entry is at most scale / 2. Where all are zero, scale and codes are.
    """
    return linear_codes(matrix, block, jnp.int8)
