"""How structured weights and the marks of a tree print: by shapes, never by their contents."""

import dataclasses
from typing import Any

import jax
import numpy as np


class _Text(str):
    """Prints without quotes, inside of a dict or a list too."""

    def __repr__(self) -> str:
        return str(self)


def summary(x: Any) -> str:
    """`float32[128,64]` of an array, of each array of a tree, and `repr` of anything else.

    Example:
      >>> summary({"w": np.zeros((2, 3), "float32"), "rank": 2})
      "{'rank': 2, 'w': float32[2,3]}"
    """
    return repr(jax.tree.map(_of_leaf, x, is_leaf=dataclasses.is_dataclass))


def _of_leaf(x: Any) -> _Text:
    if isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return _Text(f"{x.dtype}[{','.join(map(str, x.shape))}]")
    return _Text(repr(x))


def fields_summary(x: Any) -> str:
    """`Class(field=value, ...)` of a dataclass, without the fields that have their default."""
    shown = [
        f"{field.name}={summary(value)}"
        for field in dataclasses.fields(x)
        if not _is_default(value := getattr(x, field.name), field.default)
    ]
    return f"{type(x).__name__}({', '.join(shown)})"


def _is_default(value: Any, default: Any) -> bool:
    # An array is never compared: that would take time, and has no single answer.
    plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
    return plain and type(value) is type(default) and value == default
