"""Checks that conversions of adapters share: the method's options, and the method's arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method


def options_of(method: Any, names: Sequence[str], caller: str) -> Mapping[str, Any]:
    """The options of a method that one of the named factories returned.

    Args:
      method: The argument of the user.
      names: Names of the factories, such as "pissa".
      caller: Name of the function that the user called, for error messages.

    Raises:
      ValueError: It is another method, a chain, or a plain function.
    """
    name = method.name if isinstance(method, Method) else repr(method)
    if name not in names:
        *rest, last = (f"`{name}`" for name in names)
        wanted = f"{', '.join(rest)} or {last}" if rest else last
        raise ValueError(
            f"`{caller}` takes a method from {wanted}, but got one from '{name}'. From a `chain`, "
            "give that method in it, with the whole adapter."
        )
    return method.options


def own_and_other_arrays(
    adapter: Mapping[str, Any], names: Iterable[str], caller: str, what: str = "adapter"
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arrays of an adapter that belong to a method, and all other arrays.

    Args:
      adapter: The argument of the user.
      names: Paths of the method's arrays.
      caller, what: Name of the function that the user called, and of the argument, for error
        messages.

    Raises:
      ValueError: Some of the method's arrays are missing; the message lists them.
    """
    names = list(names)
    if missing := sorted(set(names) - set(adapter)):
        raise ValueError(
            f"`{caller}`: the {what} lacks {missing}, which are arrays of the method; it has "
            f"{sorted(adapter)}. Give all arrays of the adapter that `split` returned for this "
            "method, trained or at their start."
        )
    own = {name: jnp.asarray(adapter[name]) for name in names}
    return own, {name: x for name, x in adapter.items() if name not in own}
