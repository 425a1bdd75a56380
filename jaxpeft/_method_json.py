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

    Scalars of NumPy and JAX become numbers of Python.

    Args:
      method: A `Method`, or something else, which is refused.

    Raises:
      ValueError: It is a plain function, or one of its options has no JSON form, such as an
        array (names the method and the option).
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"{method!r} is a plain function, which has no description for a file. Build it from "
            "the library's methods, write a function with `jaxpeft.extend.register_method`, or "
            "store the adapter without a description."
        )
    return {
        "method": method.name,
        "options": {k: _encode(method.name, k, v) for k, v in method.options.items()},
    }


def _encode(caller: str, name: str, value: Any) -> Any:
    """The value of an option as JSON.

    Args:
      caller: The method's name, for messages.
      name: The option's name, for messages.
      value: The value, or an item of it.
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
        return _python_number(caller, name, value)
    if _is_dtype(value):
        return {"dtype": jnp.dtype(value).name}
    raise ValueError(
        f"`{caller}({name}={value!r})` cannot be written to a file. "
        "Use a value of JSON, a dtype, or a selection of sites."
    )


def _python_number(caller: str, name: str, x: Any) -> bool | int | float:
    """A scalar array as a number of Python.

    Raises:
      ValueError: It is traced, has axes, or is not a real number.
    """
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"`{caller}({name}=...)` is a traced {x.dtype} of shape {x.shape}, whose value is not "
            "known yet and cannot be written to a file. Build the method outside of `jit`."
        )
    if x.ndim == 0:
        kinds = (jnp.bool_, bool), (jnp.integer, int), (jnp.floating, float)
        for kind, python in kinds:
            if jnp.issubdtype(x.dtype, kind):
                return python(x)
    raise ValueError(
        f"`{caller}({name}=...)` holds an array, {x.dtype} of shape {x.shape}, and the description "
        "of a method cannot hold arrays. A method that starts from data (`corda`, `lora_ga`) is "
        "stored as plain LoRA over the same params: save the method and the adapter that "
        "`adapters.to_lora` returns. For any other option give a number, or a list of numbers."
    )


def _is_dtype(value: Any) -> bool:
    """Whether it is a numeric or boolean dtype, or a class that stands for one.

    `np.dtype` accepts any array, and any class at all, so that it alone does not tell.
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
      description: A value read from JSON, which is checked.
      factories: The functions that it may name, each of which returns a `Method`.
      at: Name of the field of the file, for messages.

    Raises:
      ValueError: No function has the method's name (lists those there are), or an option is not
        what the function takes (names the field).
    """
    conform_fields(description, {"method": str, "options": Mapping}, at)
    name = description["method"]
    if name not in factories:
        raise ValueError(
            f"This library knows no method '{name}'; it knows {sorted(factories)}. Either a newer "
            "version wrote the file, or the method is not of this library: import the module that "
            "registers it (`jaxpeft.extend.register_method`) first."
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
    except Exception as error:  # a damaged file may hold a value that fails in any way
        raise ValueError(f"`{at}` cannot be built: {_message(error)}") from error


#: Options that count the iterations of a loop, which a damaged file could make endless.
_LOOPS = ("layers", "n_butterfly_factors", "n_iter", "neumann_terms", "steps")


def _check_sizes(options: Mapping[str, Any], at: str) -> None:
    """Refuses sizes that no array has and counts that no loop has."""
    for name, value in options.items():
        most = 1000 if name in _LOOPS else 2**31 - 1
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"`{at}.{name}` is {number}, and may be {most} at most.")
        if name == "dtype" and not _is_inexact(value):
            raise ValueError(f"`{at}.dtype` should be a floating-point dtype, and is {value}.")


def _is_inexact(value: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    except TypeError:
        return False


def _message(error: Exception) -> str:
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
            raise ValueError(f"`{at}.dtype` is not a dtype: {shown(value['dtype'])}.") from None
    if value.keys() == {"mapping"}:
        conform(value["mapping"], Mapping[str, Any], f"{at}.mapping")
        return {k: _decode(v, factories, f"{at}.{k}") for k, v in value["mapping"].items()}
    return from_json(value, factories, at)
