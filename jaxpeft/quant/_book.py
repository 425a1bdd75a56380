"""Books of sixteen values, and numbers in units of their block's scale."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._export import exportable
from jaxpeft.quant._blocks import select

#: The smallest normal float32. XLA takes what is smaller for zero, and so do the formats.
TINY = float(np.finfo(np.float32).tiny)
#: Scales that share a scale in double quantization.
GROUP = 256


@exportable
@dataclasses.dataclass(frozen=True)
class Book:
    """Sixteen values in [-1, 1], by code."""

    name: str
    values: tuple[float, ...]

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The codes by rising value."""
        return np.argsort(np.asarray(self.values, np.float32), kind="stable")

    @functools.cached_property
    def middles(self) -> np.ndarray:
        """Between neighbours; what lies on one goes to the lower value."""
        rising = np.asarray(self.values, np.float32)[self.order]
        return (rising[:-1] + rising[1:]) / np.float32(2)

    def encode(self, x: jax.Array) -> jax.Array:
        """uint8 codes of the nearest values to x in [-1, 1]."""
        rank = sum((x > m).astype(jnp.uint8) for m in self.middles.tolist())
        if (self.order == np.arange(16)).all():
            return rank
        return select(rank, self.order.tolist(), jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return select(codes, self.values, dtype)


def relative(x: jax.Array, absmax: jax.Array, *, divide: bool = False) -> jax.Array:
    """x in units of its block's scale, within [-1, 1]; 0 where the block is all zeros.

    Multiplied by the inverse of the scale, or divided by it, which rounds once less.
    """
    there = absmax >= TINY
    scale = jnp.where(there, absmax, 1)
    ratio = x / scale if divide else x * (1 / scale)
    return jnp.where(there, jnp.clip(ratio, -1, 1), 0)


def rounded(product: jax.Array) -> jax.Array:
    """A product that is rounded before it is added to, where a compiler would fuse the two.

    A NaN is the one value that the selection changes, and it stays one.
    """
    return jnp.where(product == product, product, jnp.nan)


def mean(x: jax.Array) -> jax.Array:
    """The mean over the last axis, the same to the bit eagerly, compiled, alone and in a stack.

    Halves are added to halves, since the order of a library's sum is nobody's promise.
    """
    count = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, (1 << (count - 1).bit_length()) - count)])
    while x.shape[-1] > 1:
        left, right = jnp.split(x, 2, axis=-1)
        x = left + right
    return rounded(x[..., 0] * jnp.asarray(1 / count, x.dtype))
