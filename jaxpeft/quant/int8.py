"""int8: symmetric, one scale for each output channel."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.weight import Weight, axes, static, weight


@weight
class Int8(Weight):
    """The matrix `codes * scale`, codes in -127 .. 127, one scale per column."""

    codes: Any = axes("in", "out")
    scale: Any = axes("out")
    dtype: Any = static(jnp.float32)

    local_in = local_out = True

    def forward(self, x):
        """x @ (codes * scale) = (x @ codes) * scale."""
        return (x @ self.codes * self.scale).astype(x.dtype)

    def transposed(self, y):
        """y @ (codes * scale).T = (y * scale) @ codes.T."""
        return (y * self.scale).astype(y.dtype) @ self.codes.T

    def lookup(self, ids):
        """(codes * scale)[ids] = codes[ids] * scale."""
        return (self.codes[ids] * self.scale).astype(self.dtype)

    def materialize(self):
        return (self.codes * self.scale).astype(self.dtype)


def int8(matrix: jax.Array) -> Int8:
    """Rounds a matrix (*stack, in, out) to int8.

    scale = max |w| / 127 over each column, codes = round(w / scale); the error of an entry is
    at most scale / 2. Columns of zeros have scale 0 and codes 0.
    """
    wide = jnp.promote_types(matrix.dtype, jnp.float32)
    w = matrix.astype(wide)
    scale = jnp.max(jnp.abs(w), axis=-2) / 127
    safe = jnp.where(scale > 0, scale, 1)
    codes = jnp.round(w / safe[..., None, :]).astype(jnp.int8)
    return Int8(codes, scale, jnp.dtype(matrix.dtype))
