"""What a method is, how methods are chained, and how they say what they are.

A method is a pure function from a key and a tree of parameters to a tree with structured
weights. Any such function will do; one with a name and options can be written down, so that
an adapter folder describes itself.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft._marks import check_key, is_array
from jaxpeft._sites import Site, Sites

_MISSING: Any = object()


# Equal only to itself: `jax.jit` needs a hash, and options hold mappings and arrays.
@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A function `(key, tree) -> tree` with its name and options.

    Attributes:
      name: Of the factory that made it, as in `jaxpeft.lora`.
      options: Its arguments by name.
      apply: The method itself.
    """

    name: str
    options: Mapping[str, Any]
    apply: Callable[[jax.Array, Any], Any] = dataclasses.field(repr=False)

    def __call__(self, key: jax.Array, tree: Any = _MISSING) -> Any:
        """The tree with this method's weights in it.

        Raises:
          TypeError: The key is none, is missing, or stands in the place of the tree.
        """
        caller = f"{self.name}(...)(key, params)"
        if tree is _MISSING:
            raise TypeError(
                f"`{caller}`: a method takes a PRNG key and the params, "
                f"`method(jax.random.key(0), params)`; it was given a {type(key).__name__} alone."
            )
        if is_array(tree) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"`{caller}`: the key comes first; it was given a {type(key).__name__} and then a key."
            )
        check_key(key, caller)
        return self.apply(key, tree)


F = TypeVar("F", bound=Callable)


def takes_sites(factory: F) -> F:
    """A factory that says so where a selection of sites is something else, such as a path.

    Raises:
      TypeError: An argument annotated `Sites` is none; shows it and what to write.
    """
    signature = inspect.signature(factory)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is Sites or Sites in typing.get_args(parameter.annotation)
    ]

    @functools.wraps(factory)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = {}  # the call itself says what is missing or unknown
        for name in names:
            value = given.get(name)
            if value is not None and not isinstance(value, Sites):
                raise TypeError(_no_sites(factory.__name__, name, value))
        return factory(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _no_sites(caller: str, name: str, value: Any) -> str:
    patterns = [value] if isinstance(value, str) else value
    if isinstance(value, Site):
        patterns = [value.path]
    if isinstance(patterns, (list, tuple, set)) and all(isinstance(p, str) for p in patterns):
        way = f"sites.match({', '.join(map(repr, patterns))})"
    else:
        way = "sites.linear"
    shown = repr(value) if isinstance(value, (str, int, list, tuple)) else "..."
    return (
        f"`{caller}({name}={shown})`: give a selection of sites, not a {type(value).__name__}: "
        f"`{way}`, with `sites = jaxpeft.sites(fn, params, *inputs)`."
    )


#: The factories of this library by name, which an adapter folder may name.
FACTORIES: dict[str, Callable[..., Method]] = {}


def register_method(factory: F) -> F:
    """Registers a function that returns a `Method` under its name, for adapter folders.

    Arguments annotated `Sites` are checked as by `takes_sites`.

    Raises:
      ValueError: Another factory has this name.
    """
    name = factory.__name__
    if name in FACTORIES:
        raise ValueError(
            f"`register_method`: '{name}' is registered already, by "
            f"`{FACTORIES[name].__module__}`. Give the function another name."
        )
    FACTORIES[name] = checked = takes_sites(factory)
    return checked


@register_method
def chain(*methods: Callable[[jax.Array, Any], Any]) -> Method:
    """One method after the other, each with a key of its own.

    Example:
      >>> import jaxpeft as jp
      >>> qlora = lambda sites: jp.chain(jp.quantize("int8", sites), jp.lora(8, sites))
    """

    def apply(key: jax.Array, tree: Any) -> Any:
        for i, method in enumerate(methods):
            tree = method(jax.random.fold_in(key, i), tree)
        return tree

    return Method("chain", {"methods": list(methods)}, apply)
