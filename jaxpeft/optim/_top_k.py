"""The largest of many scores, found by counting: no sort, no copy of them all in one array.

Which of n scores are the k largest does not ask for their order. A float's bits, read as an integer
(with the sign's bit turned, and all of them for negative ones), are ordered as the floats are; so
the threshold is found bit by bit, 32 counts of float32. A count is a sum, which a sharded array
does where it lies.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def largest_of_rows(scores: jax.Array, count: jax.Array | int) -> jax.Array:
    """Whether each score (rows, n) is one of its row's `count` largest; of equal ones, the first.

    Args:
      scores: Floats; NaN is the smallest.
      count: int[], or int[rows, 1].

    Returns:
      bool[rows, n].
    """
    keys = _ordered(scores)
    at_least = lambda bound: jnp.sum(keys >= bound, axis=1, keepdims=True, dtype=jnp.int32)  # noqa: E731
    bound = _bound(lambda bound: at_least(bound) > count, keys.dtype, (len(keys), 1))
    more, same = keys > bound, keys == bound
    left = count - jnp.sum(more, axis=1, keepdims=True, dtype=jnp.int32)
    return more | (same & (jnp.cumsum(same, axis=1, dtype=jnp.int32) <= left))


def largest_within(
    scores: Mapping[str, jax.Array], sizes: Mapping[str, int], budget: jax.Array | int
) -> dict[str, jax.Array]:
    """Which scores, from the largest of all arrays on, fit into a budget.

    Args:
      scores: {name: floats}; NaN is the smallest.
      sizes: {name: what each score of this array takes of the budget}.
      budget: int[]; together with the sum of sizes below 2^31.

    Returns:
      {name: bools}: the longest beginning of the order that fits; equal ones in the order of names
      and places.
    """
    wide = jnp.result_type(*scores.values())
    keys = {name: _ordered(x.astype(wide)) for name, x in scores.items()}

    def size(chosen: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return sum(
            (sizes[name] * jnp.sum(chosen(x), dtype=jnp.int32) for name, x in keys.items()),
            jnp.int32(0),
        )

    bound = _bound(lambda bound: size(lambda x: x >= bound) > budget, _bits(wide), ())
    left = budget - size(lambda x: x > bound)
    found = {}
    for name, x in keys.items():
        same, room = x == bound, left // sizes[name]
        place = jnp.cumsum(same.ravel(), dtype=jnp.int32).reshape(x.shape)
        found[name] = (x > bound) | (same & (place <= room))
        among = jnp.sum(same, dtype=jnp.int32)
        # After one that does not fit none is taken, however small.
        left = jnp.where(among > room, 0, left - sizes[name] * among)
    return found


def _bound(too_many: Callable[[jax.Array], jax.Array], bits: jnp.dtype, shape: tuple) -> jax.Array:
    """The largest key from which on there are too many, bit by bit; 0 if there never are."""
    width = jnp.iinfo(bits).bits

    def next_bit(i: jax.Array, bound: jax.Array) -> jax.Array:
        further = bound | jnp.left_shift(jnp.ones((), bits), (width - 1 - i).astype(bits))
        return jnp.where(too_many(further), further, bound)

    return jax.lax.fori_loop(0, width, next_bit, jnp.zeros(shape, bits))


def _ordered(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats, above 0; both zeros are one."""
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0, 0, x))
    bits = jax.lax.bitcast_convert_type(x, _bits(x.dtype))
    sign = jnp.left_shift(jnp.ones((), bits.dtype), jnp.iinfo(bits.dtype).bits - 1)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _bits(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
