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
import numpy as np

from jaxpeft._marks import check_key, is_array
from jaxpeft._schema import conform, conform_arguments, conform_fields, shown
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


def to_json(method: Any) -> dict:
    """A method as JSON: its name and options, selections of parameters included.

    A number of NumPy or JAX becomes one of Python.

    Raises:
      ValueError: It is a plain function, or one of its options has no JSON form, such as an
        array (names the method and the option).
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"{method!r} is a plain function and cannot be described. Build it from the "
            "library's methods, or store the adapter without a description."
        )
    return {
        "method": method.name,
        "options": {k: _encode(method.name, k, v) for k, v in method.options.items()},
    }


def _encode(caller: str, name: str, value: Any) -> Any:
    """An option as JSON.

    Args:
      caller: The method that has it.
      name: Of the option.
      value: Of the option, or what is in it.
    """
    if isinstance(value, Sites):
        return {"sites": value.to_json()}
    if isinstance(value, Method):
        return to_json(value)
    if isinstance(value, (list, tuple)):
        return [_encode(caller, name, v) for v in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {"mapping": {k: _encode(caller, name, v) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _number(caller, name, value)
    if _is_dtype(value):
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(
        f"`{caller}({name}={value!r})` cannot be written to a file. "
        "Use a value of JSON, a dtype, or a selection of sites."
    )


def _number(caller: str, name: str, x: Any) -> bool | int | float:
    """The number of Python that an array of no axes holds.

    Raises:
      ValueError: It is traced, has axes, or holds no real number.
    """
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"`{caller}({name}=...)` is a traced {x.dtype} of shape {x.shape}, whose value is not "
            "known here and cannot be written to a file. Build the method outside of `jit`."
        )
    if x.ndim == 0:
        kinds = (jnp.bool_, bool), (jnp.integer, int), (jnp.floating, float)
        for kind, python in kinds:
            if jnp.issubdtype(x.dtype, kind):
                return python(x)
    raise ValueError(
        f"`{caller}({name}=...)` holds an array, {x.dtype} of shape {x.shape}, and the description "
        "of a method has no place for arrays. What starts from data (`corda`, `lora_ga`) is "
        "stored as plain LoRA over the same params: save the method and the adapter that "
        "`to_lora` returns. Elsewhere give numbers, or lists of them."
    )


def _is_dtype(value: Any) -> bool:
    """Whether it is a dtype of numbers, or a class that stands for one.

    NumPy takes any array, and any class at all, for a dtype.
    """
    if not isinstance(value, (np.dtype, type)):
        return False
    try:
        dtype = np.dtype(value)
    except TypeError:  # an abstract class, such as `np.generic`
        return False
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def from_json(description: Any, factories: Mapping[str, Callable], at: str = "method") -> Any:
    """The method that `to_json` described.

    Args:
      description: Of JSON.
      factories: The functions that may be named, each of which returns a `Method`.
      at: Name of the field that it stands in, for messages.

    Raises:
      ValueError: No factory has this name (names those there are), or an option is not what its
        factory takes (names the field).
    """
    conform_fields(description, {"method": str, "options": Mapping}, at)
    name = description["method"]
    if name not in factories:
        raise ValueError(
            f"This library knows no method '{name}'; it knows {sorted(factories)}. It is of a "
            "newer version, or it was made by hand, which a file cannot describe."
        )
    factory, stored = factories[name], description["options"]
    options = {k: _decode(v, factories, f"{at}.options.{k}") for k, v in stored.items()}
    if name == "chain":
        conform_fields(options, {"methods": list[Method]}, f"{at}.options")
        return factory(*options["methods"])
    conform_arguments(options, factory, f"{at}.options")
    _check_sizes(options, f"{at}.options")
    try:
        return factory(**options)
    except Exception as error:  # whatever a value does that no file of this library has
        raise ValueError(f"`{at}` cannot be built: {_said(error)}") from error


#: What a loop counts, so that a large number is a loop without end.
_LOOPS = ("layers", "n_butterfly_factors", "n_iter", "neumann_terms", "steps")


def _check_sizes(options: Mapping[str, Any], at: str) -> None:
    """Refuses numbers that no array and no loop has."""
    for name, value in options.items():
        most = 1000 if name in _LOOPS else 2**31 - 1
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"`{at}.{name}` is {number}, and may be {most} at most.")
        if name == "dtype" and not _is_inexact(value):
            raise ValueError(f"`{at}.dtype` should be a dtype of real numbers, and is {value}.")


def _is_inexact(value: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    except TypeError:
        return False


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _decode(value: Any, factories: Mapping[str, Callable], at: str) -> Any:
    if isinstance(value, list):
        return [_decode(v, factories, f"{at}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"sites"}:
        return Sites.from_json(value["sites"], f"{at}.sites")
    if value.keys() == {"dtype"}:
        conform(value["dtype"], str, f"{at}.dtype")
        try:
            return jnp.dtype(value["dtype"])
        except TypeError:
            raise ValueError(f"`{at}.dtype` is no dtype: {shown(value['dtype'])}.") from None
    if value.keys() == {"mapping"}:
        conform(value["mapping"], Mapping[str, Any], f"{at}.mapping")
        return {k: _decode(v, factories, f"{at}.{k}") for k, v in value["mapping"].items()}
    return from_json(value, factories, at)
