"""Method: a function from parameters to parameters with structured weights; `chain`; the registry.

A method is a pure function from a key and a tree of parameters to a tree with structured
weights. Any such function will do. One that is a `Method` also has a name and options, so that
an adapter folder can describe itself (`_method_json`).
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
    """A fine-tuning method: a function `(key, params) -> tree` with its name and options.

    Calling it puts structured weights in the place of the selected arrays and marks what is
    trained. It changes nothing in `params`. `split` takes the tree apart.

    Attributes:
      name: The name of the function that made it, such as "lora" for `jaxpeft.lora`.
      options: The arguments of that function by name.
      apply: The function itself.

    Example:
      >>> import jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> method = jp.lora(2, sites.linear)
      >>> method.name, method.options["rank"]
      ('lora', 2)
      >>> tree = method(jax.random.key(0), params)
      >>> frozen, adapter = jp.split(tree)
    """

    name: str
    options: Mapping[str, Any]
    apply: Callable[[jax.Array, Any], Any] = dataclasses.field(repr=False)

    def __call__(self, key: jax.Array, tree: Any = _MISSING) -> Any:
        """The tree with this method's weights in it.

        Args:
          key: A PRNG key for initial values. Every weight folds its path into it, so that
            selecting more weights changes no other weight's initial values.
          tree: Parameters, or what another method returned.

        Raises:
          TypeError: The key is missing, is not a PRNG key, or was given after the tree.
        """
        caller = f"{self.name}(...)(key, params)"
        given = type(key).__name__
        if tree is _MISSING:
            raise TypeError(
                f"`{caller}`: a method takes a PRNG key and the params, "
                f"`method(jax.random.key(0), params)`; it was given a {given} alone."
            )
        if is_array(tree) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"`{caller}`: the key comes first; it was given a {given} and then a key."
            )
        check_key(key, caller)
        return self.apply(key, tree)


F = TypeVar("F", bound=Callable)


def takes_sites(factory: F) -> F:
    """Makes a function check its arguments that are annotated `Sites`.

    Such a function raises a TypeError if it is given something else, such as a path or a
    pattern. The message shows the argument and what to write instead.

    Args:
      factory: A function of which some arguments are annotated `Sites` or `Sites | None`.
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
                raise TypeError(_not_sites(factory.__name__, name, value))
        return factory(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _not_sites(caller: str, name: str, value: Any) -> str:
    """The message about an argument that should be a selection of sites."""
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


#: The functions that an adapter folder may name, each of which returns a `Method`.
FACTORIES: dict[str, Callable[..., Method]] = {}


def register_method(factory: F) -> F:
    """Registers a function that returns a `Method`, so that `io.load_adapter` finds it by name.

    An adapter folder stores the name of the method and its options. The module that registers
    the function has to be imported before such a folder is read. Arguments annotated `Sites`
    are checked as by `takes_sites`.

    Args:
      factory: The function. The `Method` that it returns has the function's name, and its
        options are the arguments by name.

    Raises:
      ValueError: Another function has this name. One that is defined again, as by a notebook's
        cell, replaces its former self.
    """
    name = factory.__name__
    known = FACTORIES.get(name)
    if known is not None and _home(known) != _home(factory):
        raise ValueError(
            f"`register_method`: '{name}' is registered already, by `{known.__module__}`. Give "
            "the function another name."
        )
    FACTORIES[name] = checked = takes_sites(factory)
    return checked


def _home(factory: Callable) -> tuple[str, str]:
    return factory.__module__, factory.__qualname__


@register_method
def chain(*methods: Callable[[jax.Array, Any], Any]) -> Method:
    """Several methods one after the other, each with its own key.

    A later method acts on what an earlier one made: LoRA on a quantized base is QLoRA, and
    `quantize` after `pissa` quantizes the residual.

    Args:
      methods: Functions `(key, tree) -> tree`, in the order in which they are applied.

    Example:
      >>> import jaxpeft as jp
      >>> qlora = lambda sites: jp.chain(jp.quantize("int8", sites), jp.lora(8, sites))
    """

    def apply(key: jax.Array, tree: Any) -> Any:
        for i, method in enumerate(methods):
            tree = method(jax.random.fold_in(key, i), tree)
        return tree

    return Method("chain", {"methods": list(methods)}, apply)
