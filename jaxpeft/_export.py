"""Makes trees with structured weights valid arguments of functions that `jax.export` stores.

Such a file holds the structure of the arguments: for each node its class and its static part. The
static part is stored as JSON of a few plain types, so that reading a file runs no code that the
file names.
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
    """Registers a dataclass or named tuple whose instances static fields may hold."""
    _RECORDS[cls.__name__] = cls
    return cls


def exportable_node(cls: T, names: Sequence[str] = ()) -> T:
    """Registers a class of nodes that is a JAX pytree already.

    Args:
      cls: A class whose static part is a tuple, or one that is static as a whole and
        `exportable`.
      names: Names of what the static part holds, for messages.
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
        # A class of this name is registered: the cell of a notebook was run again. JAX keeps the
        # first one, and refuses to export the new class as not registered.
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
        f"`{caller}` holds {value!r}, a {kind}, which has no place in an exported file. Static "
        "fields may hold numbers, strings, dtypes, and tuples of these."
    )


def _dtype(value: Any) -> Any:
    """The numeric or boolean dtype that this is, or whose class it is; `None` for all else."""
    if not isinstance(value, (np.dtype, type)):
        return None
    try:
        dtype = jnp.dtype(value)  # any other class becomes the dtype of objects
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
