"""What is made anew of a trained adapter starts here: its method's options, and its own arrays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method


def options_of(method: Any, names: Sequence[str], caller: str) -> Mapping[str, Any]:
    """The options of a method that one of these factories made.

    Args:
      method: What the user gave.
      names: Of the factories.
      caller: For messages.

    Raises:
      ValueError: It is another method, a chain, or a plain function.
    """
    name = method.name if isinstance(method, Method) else repr(method)
    if name not in names:
        *rest, last = (f"`{name}`" for name in names)
        made = f"{', '.join(rest)} or {last}" if rest else last
        raise ValueError(
            f"`{caller}` takes the method that {made} made; this one is of '{name}'. Of a chain, give "
            "that method in it, with the whole adapter."
        )
    return method.options


def own_and_other_arrays(
    adapter: Mapping[str, Any], names: Iterable[str], caller: str, what: str = "adapter"
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arrays of an adapter with these names, and all others as they are.

    Args:
      adapter: What the user gave.
      names: Paths of the arrays that the method made.
      caller, what: For messages.

    Raises:
      ValueError: Some are missing; lists them.
    """
    names = list(names)
    if missing := sorted(set(names) - set(adapter)):
        raise ValueError(
            f"`{caller}`: the {what} lacks {missing}, which the method made; it has "
            f"{sorted(adapter)}. Give the {what} of this method, whole: what `split` called the "
            "adapter, trained or at its start."
        )
    own = {name: jnp.asarray(adapter[name]) for name in names}
    return own, {name: x for name, x in adapter.items() if name not in own}
