"""Checks that the arrays of a tree are finite, and stay finite in an update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """bool[]: whether no array of a tree has a NaN or an infinity."""
    return _all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))


def stays_finite(old: Any, new: Any) -> jax.Array:
    """bool[]: whether every entry that was finite still is.

    Some optimizer states start with infinities, which may stay.

    Args:
      old, new: Trees of one structure. Integers and PRNG keys count as finite.
    """
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return _all(
        jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))
        for o, n in pairs
        if jnp.issubdtype(jax.typeof(n).dtype, jnp.inexact)
    )


def _all(found):
    return functools.reduce(jnp.logical_and, found, jnp.asarray(True))
