"""The frozen tree comes before the adapter in every call; the other order is an error."""

import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft._marks import Placeholder


def check_order(caller: str, adapter: Any) -> None:
    """Raises ValueError where the frozen tree was given as the adapter.

    The two differ in kind: a frozen tree has placeholders where the trainable arrays were, and an
    adapter has arrays alone.

    Args:
      caller: The call as the user writes it, `evaluate(loss_fn, frozen, adapter, ...)`.
      adapter: What was given as the adapter.
    """
    for x in jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, Placeholder)):
        if isinstance(x, Placeholder):
            raise ValueError(
                f"`{caller}`: the adapter has a placeholder for '{x.name}', so it is the frozen "
                "tree. Give the two in the order in which `split` returns them, `frozen, adapter`."
            )


def check_loss_order(loss_fn: Callable) -> None:
    """Raises ValueError where a loss function names its parameters in the other order."""
    try:
        names = list(inspect.signature(loss_fn).parameters)[:2]
    except (TypeError, ValueError):  # some callables have no signature
        return
    if names[:1] == ["adapter"] or names[1:] == ["frozen"]:
        name = getattr(loss_fn, "__name__", "loss_fn")
        raise ValueError(
            f"`{name}({', '.join(names)}, ...)` takes the adapter first. A loss function takes the "
            f"frozen tree first: define it as `{name}(frozen, adapter, ...)`."
        )
