"""Whether the numbers of a tree are finite, and still finite after an update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """bool[]: no number of any array is NaN or infinite."""
    return _every(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))


def stays_finite(old: Any, new: Any) -> jax.Array:
    """bool[]: what was finite is finite. Some optimizers' states begin with infinities.

    Args:
      old, new: Trees of one structure. Integers and random keys in them are finite.
    """
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return _every(
        jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))
        for o, n in pairs
        if jnp.issubdtype(jax.typeof(n).dtype, jnp.inexact)
    )


def _every(found):
    return functools.reduce(jnp.logical_and, found, jnp.asarray(True))
