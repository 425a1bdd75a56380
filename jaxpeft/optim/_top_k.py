"""Top-k masks of large arrays by a radix search for the threshold, without a sort or a copy.

The bits of floats, read as unsigned integers (with the sign bit flipped, and all bits for negative
floats), have the order of the floats. So the threshold of the k largest scores is found bit by
bit, with 32 counts of scores above a bound for float32. A count is a sum, which needs no gather of
a sharded array.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def top_k_of_rows(scores: jax.Array, k: jax.Array | int) -> jax.Array:
    """A mask of the `k` largest scores of each row; of equal scores, the first.

    Args:
      scores: Floats (rows, n). NaN is smaller than any other.
      k: int[], or int[rows, 1].

    Returns:
      bool[rows, n].

    Example:
      >>> top_k_of_rows(jnp.array([[3.0, 1.0, 4.0], [1.0, 5.0, 9.0]]), 1).tolist()
      [[False, False, True], [False, False, True]]
    """
    keys = _ordered(scores)
    at_least = lambda bound: jnp.sum(keys >= bound, axis=1, keepdims=True, dtype=jnp.int32)  # noqa: E731
    bound = _bound(lambda bound: at_least(bound) > k, keys.dtype, (len(keys), 1))
    above, equal = keys > bound, keys == bound
    rest = k - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= rest))


def top_k_within_budget(
    scores: Mapping[str, jax.Array], sizes: Mapping[str, int], budget: jax.Array | int
) -> dict[str, jax.Array]:
    """Masks of the largest scores of several arrays whose sizes together fit into a budget.

    All scores are ranked together, and the longest prefix of the ranking that fits is taken.
    Equal scores are ranked in the order of the names and of their positions.

    Args:
      scores: {name: array of floats}. NaN is smaller than any other.
      sizes: {name: the size of each score of this array}.
      budget: int[]. The sum of all sizes and the budget must be less than 2^31.

    Returns:
      {name: bool array}.

    Example:
      >>> scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 4.0])}
      >>> masks = top_k_within_budget(scores, {"a": 1, "b": 2}, 3)
      >>> {name: mask.tolist() for name, mask in masks.items()}
      {'a': [True, False], 'b': [False, True]}
    """
    wide = jnp.result_type(*scores.values())
    keys = {name: _ordered(x.astype(wide)) for name, x in scores.items()}

    def size(taken: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return sum(
            (sizes[name] * jnp.sum(taken(x), dtype=jnp.int32) for name, x in keys.items()),
            jnp.int32(0),
        )

    bound = _bound(lambda bound: size(lambda x: x >= bound) > budget, _bits(wide), ())
    rest = budget - size(lambda x: x > bound)
    masks = {}
    for name, x in keys.items():
        equal, room = x == bound, rest // sizes[name]
        rank = jnp.cumsum(equal.ravel(), dtype=jnp.int32).reshape(x.shape)
        masks[name] = (x > bound) | (equal & (rank <= room))
        count = jnp.sum(equal, dtype=jnp.int32)
        # After the first score that does not fit, none is taken, even if it would fit.
        rest = jnp.where(count > room, 0, rest - sizes[name] * count)
    return masks


def _bound(too_many: Callable[[jax.Array], jax.Array], bits: jnp.dtype, shape: tuple) -> jax.Array:
    """The largest key b with `too_many(b)`, found bit by bit; 0 if there is none."""
    width = jnp.iinfo(bits).bits

    def next_bit(i: jax.Array, bound: jax.Array) -> jax.Array:
        higher = bound | jnp.left_shift(jnp.ones((), bits), (width - 1 - i).astype(bits))
        return jnp.where(too_many(higher), higher, bound)

    return jax.lax.fori_loop(0, width, next_bit, jnp.zeros(shape, bits))


def _ordered(x: jax.Array) -> jax.Array:
    """Unsigned integers above 0 in the order of the floats; -0.0 and 0.0 are equal."""
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0, 0, x))
    bits = jax.lax.bitcast_convert_type(x, _bits(x.dtype))
    sign = jnp.left_shift(jnp.ones((), bits.dtype), jnp.iinfo(bits.dtype).bits - 1)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _bits(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
