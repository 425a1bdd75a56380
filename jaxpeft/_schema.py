"""Whether what was read from a file is what it should be, said with the name of the field."""

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import jax.numpy as jnp

#: Whole numbers in a file are smaller: sizes of arrays are, and a damaged one may not be.
LARGEST = 2**53


def conform(value: Any, kind: Any, at: str) -> None:
    """Raises ValueError unless a value is of a kind.

    Args:
      value: From JSON, or made of it.
      kind: A class, `None`, `Any`, or what `typing` builds of these: unions, `Literal`s,
        sequences and tuples of a length, mappings.
      at: Name of the field, for the message.

    Example:
      >>> conform({"up": 2}, int | Mapping[str, int], "rank")
      >>> conform("4", int | Mapping[str, int], "rank")
      Traceback (most recent call last):
      ValueError: `rank` should be int or Mapping[str, int], and is '4'.
    """
    if not _fits(value, kind):
        raise ValueError(f"`{at}` should be {_name(kind)}, and is {shown(value)}.")


def conform_fields(value: Any, fields: Mapping[str, Any], at: str) -> None:
    """Raises ValueError unless a JSON object has exactly these fields, each of its kind."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{at}` should be an object of JSON, and is {shown(value)}.")
    if value.keys() != fields.keys():
        lacks, more = sorted(fields.keys() - value.keys()), sorted(value.keys() - fields.keys())
        raise ValueError(
            f"`{at}` should have the fields {sorted(fields)}; it lacks {lacks or 'none'}, and has "
            f"besides {shown(more) if more else 'none'}."
        )
    for name, kind in fields.items():
        conform(value[name], kind, f"{at}.{name}")


def conform_arguments(options: Mapping[str, Any], function: Callable, at: str) -> None:
    """Raises ValueError unless a function takes these keyword arguments, by its annotations.

    Further ones, of a function that takes any, are plain values of JSON.
    """
    parameters = inspect.signature(function).parameters
    named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in options.items():
        if name not in named and not takes_any:
            raise ValueError(f"`{at}` has '{name}', which is none of its options {sorted(named)}.")
        kind = named[name].annotation if name in named else bool | int | float | str | None
        conform(value, kind, f"{at}.{name}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"`{at}` lacks '{name}'. It has {sorted(options)}.")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _fits(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin in (Union, types.UnionType):
        if any(_fits(value, one) for one in args):
            return True
        # By pattern of path there may be whatever may stand there alone.
        alone = [one for one in args if get_origin(one) is not Mapping]
        by_pattern = len(alone) < len(args) and isinstance(value, Mapping)
        return by_pattern and all(
            isinstance(k, str) and any(_fits(v, one) for one in alone) for k, v in value.items()
        )
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple and args[-1] is not Ellipsis:
        return _is_sequence(value) and len(value) == len(args) and all(map(_fits, value, args))
    if origin in (list, tuple, Sequence):
        return _is_sequence(value) and all(_fits(item, args[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    if kind is float:
        return _fits(value, int) or isinstance(value, float) and math.isfinite(value)
    return isinstance(value, kind)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _name(kind: Any) -> str:
    if kind is Any:
        return "anything"
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, args))
    if origin is Literal:
        return f"one of {list(args)}"
    if origin:
        return f"{origin.__name__}[{', '.join(map(_name, args))}]"
    return "null" if kind in (None, type(None)) else kind.__name__


def check_dtype_option(name: str, dtype: Any) -> None:
    """Raises ValueError where the option `name` is no dtype of real floating-point numbers.

    Weights of 0.02 would all be 0 in integers.
    """
    if dtype is None:
        return
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(
            f"`{name}={dtype!r}` is no dtype. Give one such as jnp.bfloat16."
        ) from None
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(
            f"`{name}={kind}` holds no weights: these are real floating-point "
            f"numbers. Give one such as jnp.float32 or jnp.bfloat16; integers come by "
            f"`quantize`, as in load(folder, quantize='int8')."
        )
