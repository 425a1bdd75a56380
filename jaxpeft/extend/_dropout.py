"""Dropout inside an adapter: every weight, layer and use of it draws its own mask."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder
from jaxpeft._sites import Site
from jaxpeft._view import View


def dropped(x: jax.Array, key: Any, rate: float) -> jax.Array:
    """x with dropout, if this call has a key: entries are 0, or divided by 1 - rate.

    Args:
      x: Activations.
      key: The field of the weight that `dropout_key` filled, as its `forward` sees it; `None`
        in a call without dropout.
      rate: Probability with which an entry is dropped.
    """
    if key is None or not rate:
        return x
    # Two uses of one weight draw two masks.
    mask = jax.random.bernoulli(jax.random.fold_in(key.array, key.site.salt), 1 - rate, x.shape)
    return jnp.where(mask, x / (1 - rate), 0).astype(x.dtype)


def dropout_key(site: Site, view: View, rate: float) -> Placeholder | None:
    """What a method puts into the key field of its weight, declared `axes(optional=True)`.

    `combine(frozen, adapter, dropout=key)` fills it.

    Args:
      site: The weight, by whose path the key is folded.
      view: What the tree has there; each slice of its stack gets its own key.
      rate: Probability with which an entry is dropped; 0 needs no key.
    """
    if not rate:
        return None
    fold = zlib.crc32(site.path.encode())
    return Placeholder("dropout", optional=True, fold=fold, stack=view.sizes("stack"))


def check_rate(caller: str, rate: float) -> None:
    """Raises ValueError unless a dropout rate is in [0, 1).

    Args:
      caller: Name of the method as the user calls it.
      rate: The rate.
    """
    if not 0 <= rate < 1:
        raise ValueError(
            f"`{caller}(dropout={rate})`: the rate is a probability in [0, 1), with which an entry "
            "is dropped."
        )
