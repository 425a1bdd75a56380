"""The dynamic map of eight bits: values whose exponent takes as many bits as it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values in rising order, float32.

    For each power 10^-6 .. 10^0 the interval (0.1, 1] times it is divided evenly, into twice
    as many parts as for the power below, and the middles of the parts are taken, with both
    signs (unsigned: with twice as many parts). 0 and 1 complete the map.

    References:
      Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016, section 2.
      https://arxiv.org/abs/1511.04561
    """
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        edges = _even(count)
        # The power is rounded before it meets the middles, as in the files of others.
        power = np.float32(10.0 ** (i - 6))
        middles = (power * ((edges[:-1] + edges[1:]) / np.float32(2))).tolist()
        values += middles + [-v for v in middles] * signed
    values += [0.0] * (256 - len(values))
    return np.sort(np.asarray(values, np.float32))


def _even(count: int) -> np.ndarray:
    """count + 1 edges from 0.1 to 1, each counted from the nearer end, rounded once to float32
    (as the maps in files are)."""
    low, high = np.float32(0.1), np.float32(1)
    step = np.float64((high - low) / np.float32(count))
    up = np.arange(count + 1)
    near = up < (count + 1) // 2
    return np.where(near, low + step * up, high - step * up[::-1]).astype(np.float32)


#: Steps of the grid on [-1, 1] that values are rounded to before their code is looked up.
GRID = 65535


def nearest(x: jax.Array) -> jax.Array:
    """uint8 codes of the signed map's values nearest to x in [-1, 1]; ties go down.

    As bitsandbytes does on CPU, x is first rounded to one of 65,536 points: where it lies
    within 2^-16 of the middle of two values, either may be taken.
    """
    values = dynamic_map()
    middles = jnp.asarray(np.float32(0.5) * (values[:-1] + values[1:]))
    x = jnp.clip(x.astype(jnp.float32), -1, 1)
    point = jnp.floor((x + 1) * np.float32(0.5) * np.float32(GRID) + np.float32(0.5))
    snapped = np.float32(-1) + 2 * point / np.float32(GRID)
    return jnp.searchsorted(middles, snapped).astype(jnp.uint8)


def value(codes: jax.Array) -> jax.Array:
    """The values of codes of the signed map."""
    return jnp.asarray(dynamic_map())[codes.astype(jnp.int32)]
