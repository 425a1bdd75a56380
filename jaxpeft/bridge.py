"""Flax modules as plain functions of their parameters: `from_linen` and `from_nnx`.

A module's variables are taken apart into `params`, the trainable parameters, and `rest`, which a
call may read and update: batch statistics, caches, counters of random keys. Both are nested dicts
of arrays. `jaxpeft.lift(fn)` takes a tree of structured weights in the place of `params`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
from flax import nnx

__all__ = ["NNX", "Linen", "from_linen", "from_nnx"]


class Linen(NamedTuple):
    """A linen module as a function, from `from_linen`.

    Attributes:
      fn: `fn(params, rest, *args, **kwargs)`.
      params: The collection "params".
      rest: All other collections.
    """

    fn: Callable[..., Any]
    params: dict[str, Any]
    rest: dict[str, Any]


class NNX(NamedTuple):
    """An nnx module as a function, from `from_nnx`.

    Attributes:
      fn: `fn(params, rest, *args, **kwargs)`, which returns `(output, rest)`.
      params: The `nnx.Param`s.
      rest: All other variables and arrays.
      to_module: `to_module(params, rest)` is a new module.
    """

    fn: Callable[..., tuple[Any, Any]]
    params: dict[Any, Any]
    rest: dict[Any, Any]
    to_module: Callable[[Any, Any], Any]


def from_linen(module: nn.Module, variables: Mapping[str, Any]) -> Linen:
    """A linen module as a function of its params: `module.apply` with "params" on its own.

    Args:
      module: Any linen module. It is not changed.
      variables: What `module.init` returned, or what was loaded in its place.

    Returns:
      `(fn, params, rest)`. `rest` holds the other collections, {} if there are none.
      `fn(params, rest, *args, rngs=None, mutable=False, **kwargs)` calls the module and returns
      its output. If collections are `mutable` (a name, several, or `True` for all but the
      params), it returns `(output, rest)` with the updated rest. Other keywords go to
      `module.apply`: `method`, and those of the module.

    Raises:
      ValueError: `variables` has no collection "params". In a call: `mutable` includes "params".

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxpeft as jp
      >>> module, x = nn.Dense(3), jnp.ones((2, 5))
      >>> fn, params, rest = from_linen(module, module.init(jax.random.key(0), x))
      >>> fn(params, rest, x).shape
      (2, 3)
      >>> list(jp.sites(fn, params, rest, x).linear)
      ['kernel']
    """
    if "params" not in variables:
        raise ValueError(
            "`from_linen(module, variables)` needs what `module.init` returns, a mapping with "
            f"'params'; got one with {sorted(map(str, variables))}. If these are the parameters "
            "themselves, write `from_linen(module, {'params': ...})`."
        )
    rest = {name: _plain(tree) for name, tree in variables.items() if name != "params"}

    def fn(params: Any, rest: Any, *args: Any, rngs: Any = None, mutable: Any = False, **kw: Any):
        # If the params were mutable, linen would return them as well, as dense arrays.
        mutable = flax.core.DenyList("params") if mutable is True else mutable
        if mutable is not False and flax.core.scope.in_filter(mutable, "params"):
            raise ValueError(
                f"`mutable={mutable!r}` includes 'params', which a call must not change. Name "
                "the other collections, or give True for all of them."
            )
        out = module.apply({"params": params, **rest}, *args, rngs=rngs, mutable=mutable, **kw)
        if mutable is False:
            return out
        out, updated = out
        return out, {**rest, **{name: _plain(tree) for name, tree in updated.items()}}

    return Linen(fn, _plain(variables["params"]), rest)


def _plain(tree: Any) -> Any:
    """The same tree with plain dicts in the place of flax's frozen ones."""
    return flax.core.unfreeze(tree) if isinstance(tree, dict | flax.core.FrozenDict) else tree


def from_nnx(module: nnx.Module) -> NNX:
    """An nnx module as a function of its params, which returns what a call updates.

    Args:
      module: Any nnx module, in the mode (train or eval) in which it is to run. It is not
        changed, and its arrays are shared, not copied.

    Returns:
      `(fn, params, rest, to_module)`. `params` are the `nnx.Param`s, `rest` all other variables
      and arrays. `fn(params, rest, *args, method=None, **kwargs)` calls the module, its method
      of this name, or the function `method(module, *args, **kwargs)`. It returns
      `(output, rest)` with the updated rest in the same structure. Variables that a call adds,
      such as those that it sows, are not in it; return them from `method` instead.
      `to_module(params, rest)` is a new module with these arrays.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> from flax import nnx
      >>> fn, params, rest, to_module = from_nnx(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
      >>> out, rest = fn(params, rest, jnp.ones((2, 5)))
      >>> list(jp.sites(fn, params, rest, jnp.ones((2, 5))).linear)
      ['kernel']
      >>> to_module(params, rest)(jnp.ones((2, 5))).shape
      (2, 3)
    """
    # Variables that earlier calls have sown would grow with every call, so they are removed: from
    # a copy of the module that shares its arrays, since the caller's module must not change.
    copy = nnx.merge(*nnx.split(module))
    nnx.pop(copy, nnx.Intermediate)
    parts: Any = nnx.split(copy, nnx.Param, ...)
    graphdef, params, rest = parts

    def to_module(params: Any, rest: Any) -> Any:
        return nnx.merge(graphdef, params, rest)

    def fn(params: Any, rest: Any, *args: Any, method: Any = None, **kwargs: Any):
        module = to_module(params, rest)
        call = getattr(type(module), method) if isinstance(method, str) else method
        out = module(*args, **kwargs) if call is None else call(module, *args, **kwargs)
        parts: Any = nnx.split(module, nnx.Param, ...)
        return out, _like(rest, nnx.to_pure_dict(parts[2]))

    return NNX(fn, nnx.to_pure_dict(params), nnx.to_pure_dict(rest), to_module)


def _like(old: Any, new: Any) -> Any:
    """The values of `new` in the structure of `old`."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {name: _like(value, new.get(name, value)) for name, value in old.items()}
