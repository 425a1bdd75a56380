"""Dropout inside an adapter: every weight, layer and place of use draws its own mask."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder
from jaxpeft._sites import Site
from jaxpeft._view import View


def dropped(x: jax.Array, key: Any, rate: float) -> jax.Array:
    """x with entries dropped and the rest scaled up, where this call has a key.

    Args:
      x: Activations.
      key: The operand of a field that `dropout_key` has filled, or `None`.
      rate: Probability with which an entry is dropped.
    """
    if key is None or not rate:
        return x
    # Two uses of one weight draw two masks.
    mask = jax.random.bernoulli(jax.random.fold_in(key.array, key.site.salt), 1 - rate, x.shape)
    return jnp.where(mask, x / (1 - rate), 0).astype(x.dtype)


def dropout_key(site: Site, view: View, rate: float) -> Placeholder | None:
    """What fills the key of a weight in `combine(frozen, adapter, dropout=key)`."""
    if not rate:
        return None
    fold = zlib.crc32(site.path.encode())
    return Placeholder("dropout", optional=True, fold=fold, stack=view.sizes("stack"))


def check_rate(caller: str, rate: float) -> None:
    """Raises ValueError where the rate is no probability below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"`{caller}(dropout={rate})`: a probability in [0, 1) is needed.")
