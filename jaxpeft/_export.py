"""Lets trees with structured weights be arguments of what `jax.export` writes to a file.

A file holds the structure of the arguments: for each node its name and its static part, here as
JSON of a few plain kinds of value, so that reading a file runs no code that it names.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import export

T = TypeVar("T", bound=type)

_RECORDS: dict[str, type] = {}


def exportable(cls: T) -> T:
    """Lets static fields hold records of this class, a dataclass or a named tuple."""
    _RECORDS[cls.__name__] = cls
    return cls


def exportable_node(cls: T, names: Sequence[str] = ()) -> T:
    """Registers a class of nodes that JAX knows already.

    Args:
      cls: Its static part is a tuple, or it is registered as static itself and `exportable`.
      names: What the static part holds, for messages.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"

    def written(static: Any) -> bytes:
        return json.dumps(_encode(static, name, names)).encode()

    def read(text: bytes | bytearray) -> Any:
        return _decode(json.loads(bytes(text)))

    try:
        export.register_pytree_node_serialization(
            cls, serialized_name=name, serialize_auxdata=written, deserialize_auxdata=read
        )
    except ValueError:
        # A class of this name is known: the cell of a notebook was run again. JAX forgets none,
        # and says of the new class that it is not registered where it is to be written.
        pass
    return cls


def _encode(value: Any, caller: str, names: Sequence[str] = ()) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    if isinstance(value, np.generic):
        return _encode(value.item(), caller)
    if (dtype := _dtype(value)) is not None:
        return {"dtype": dtype.name}
    if _RECORDS.get(kind) is type(value):
        return {kind: [_encode(x, caller) for x in _parts(value)]}
    if type(value) in (list, tuple):
        whose = [f"{caller}.{name}" for name in names] or [caller] * len(value)
        return {kind: [_encode(x, owner) for x, owner in zip(value, whose, strict=True)]}
    raise ValueError(
        f"`{caller}` holds {value!r}, a {kind}, which has no place in an exported file. Static fields "
        "may hold numbers, strings, dtypes, and tuples of these."
    )


def _dtype(value: Any) -> Any:
    """The dtype of numbers that this is, or whose class it is; `None` for all else."""
    if not isinstance(value, (np.dtype, type)):
        return None
    try:
        dtype = jnp.dtype(value)  # takes any class for a dtype, if of objects
    except TypeError:
        return None
    known = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    return dtype if known else None


def _parts(record: Any) -> list[Any]:
    if dataclasses.is_dataclass(record):
        return [getattr(record, field.name) for field in dataclasses.fields(record)]
    return list(record)


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    if kind == "dtype":
        return jnp.dtype(parts)
    decoded = [_decode(x) for x in parts]
    if kind in ("list", "tuple"):
        return decoded if kind == "list" else tuple(decoded)
    return _RECORDS[kind](*decoded)
