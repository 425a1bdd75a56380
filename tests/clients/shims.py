"""What transformers 4.49 expects of JAX and JAX no longer has, put there during its calls."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp

_clip = jnp.clip


def clip(arr, min=None, max=None, *, a_min=None, a_max=None):
    """jnp.clip with the names of its bounds in NumPy, which it had until 0.4.27."""
    return _clip(arr, a_min if min is None else min, a_max if max is None else max)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    with mock.patch.object(jnp, "clip", clip):
        yield
