"""What a method is, how methods are chained, and how they say what they are.

A method is a pure function from a key and a tree of parameters to a tree with structured
weights. Any such function will do; one with a name and options can be written down, so that
an adapter folder describes itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.sites import Sites


@dataclasses.dataclass(frozen=True)
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

    def __call__(self, key: jax.Array, tree: Any) -> Any:
        return self.apply(key, tree)


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


def to_json(method: Any) -> dict:
    """A method as JSON: its name and options, selections of parameters included.

    Raises:
      ValueError: It is a plain function, or one of its options has no JSON form.
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"{method!r} is a plain function and cannot be described. Build it from the "
            "library's methods, or store the adapter without a description."
        )
    return {
        "method": method.name,
        "options": {k: _encode(k, v) for k, v in method.options.items()},
    }


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, Sites):
        return {"sites": value.to_json()}
    if isinstance(value, Method):
        return to_json(value)
    if isinstance(value, (list, tuple)):
        return [_encode(name, v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"mapping": {k: _encode(name, v) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return {"dtype": jnp.dtype(value).name}
    except TypeError:
        raise ValueError(
            f"The option {name}={value!r} cannot be written to a file. "
            "Use a value of JSON, a dtype, or a selection of sites."
        ) from None


def from_json(description: Mapping[str, Any], factories: Mapping[str, Callable]) -> Any:
    """The method that `to_json` described.

    Raises:
      ValueError: No factory has this name; names those there are.
    """
    name = description["method"]
    if name not in factories:
        raise ValueError(
            f"This library knows no method '{name}'; it knows {sorted(factories)}. "
            "The adapter may come from a newer version."
        )
    options = {k: _decode(v, factories) for k, v in description["options"].items()}
    if name == "chain":
        return factories[name](*options["methods"])
    return factories[name](**options)


def _decode(value: Any, factories: Mapping[str, Callable]) -> Any:
    if isinstance(value, list):
        return [_decode(v, factories) for v in value]
    if not isinstance(value, Mapping):
        return value
    if "sites" in value:
        return Sites.from_json(value["sites"])
    if "method" in value:
        return from_json(value, factories)
    if "dtype" in value:
        return jnp.dtype(value["dtype"])
    return {k: _decode(v, factories) for k, v in value["mapping"].items()}
