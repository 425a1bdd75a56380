"""The JSON form of a method, with which an adapter folder describes itself."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._method import Method
from jaxpeft._schema import conform, conform_arguments, conform_fields, shown
from jaxpeft._sites import Sites


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
_LOOPS = ("factors", "layers", "steps", "terms", "turns")


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
