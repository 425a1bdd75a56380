"""adapter.json: its fields, how they are written, and how they are checked when they are read.

A description is checked field by field before anything is built from it. From format 2 on it is
also checked against its own hash, so that every change but one of whitespace is noticed.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._schema import conform, conform_fields, shown
from jaxpeft._version import __version__
from jaxpeft.io._fingerprint import ENTRY

FORMAT = 2
ABOUT = "adapter.json"

_FIELDS: Mapping[str, Any] = {
    "format": int,
    "jaxpeft": str,
    "method": Mapping,
    "key": Mapping,
    "adapter": Mapping,
    "base": Mapping,
}
_FIELDS_2 = {**_FIELDS, "arrays": Mapping, "sha256": str}


class UncheckedAdapterWarning(UserWarning):
    """An adapter folder of format 1, in which a damaged number cannot be detected."""


_warned = False


def written(description: Mapping[str, Any]) -> str:
    """The text of a description, with one line for each field, array and parameter."""
    whole = {**description, "sha256": digest(description)}
    lines = []
    for name, value in whole.items():
        if name in ("adapter", "base") and value:
            rows = (f"  {json.dumps(k)}: {_compact(v)}" for k, v in value.items())
            lines.append(f' "{name}": {{\n' + ",\n".join(rows) + "\n }")
        else:
            lines.append(f' "{name}": {_compact(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def digest(description: Mapping[str, Any]) -> str:
    """The SHA-256 of all other fields of a description, whatever their order and whitespace."""
    rest = {name: value for name, value in description.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parsed(text: bytes, about: Path) -> dict[str, Any]:
    """The description that a file holds, with every field checked except the method.

    Raises:
      ValueError: The file holds no description, one of a newer version, or a damaged one; the error
        names the file and the field.
    """
    try:
        description = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{about}' does not describe an adapter: {error}.") from None
    try:
        _check(description)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{about}': {error}") from None
    if description["format"] == 1:
        _say_unchecked(about)
    return description


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check(description: Any) -> None:
    conform(description, Mapping[str, Any], "description")
    conform(description.get("format"), int, "format")
    version = description["format"]
    if version > FORMAT:
        raise ValueError(
            f"it has format {version}, written by jaxpeft {shown(description.get('jaxpeft'))}, "
            f"and this is jaxpeft {__version__}, which reads formats up to {FORMAT}. Install a "
            "newer version, unless the file is damaged."
        )
    if version < 1:
        raise ValueError(f"it has format {version}, but formats begin with 1.")
    if version == 1 and (newer := sorted(_FIELDS_2.keys() - _FIELDS.keys() & description.keys())):
        raise ValueError(f"it says format 1, but has {newer}, which exist only since format 2.")
    conform_fields(description, _FIELDS if version == 1 else _FIELDS_2, "description")
    for path, entry in description["adapter"].items():
        conform(entry, tuple[list[int], str], f"adapter.{path}")
        _check_array(entry[0], entry[1], f"adapter.{path}")
    for path, entry in description["base"].items():
        if version > 1:
            conform_fields(entry, ENTRY, f"base.{path}")
        else:
            conform(entry, tuple[list[int], str, str], f"base.{path}")
        shape, dtype = (entry["shape"], entry["dtype"]) if version > 1 else entry[:2]
        _check_array(shape, dtype, f"base.{path}")
    conform_fields(description["key"], {"impl": str, "data": list[int]}, "key")
    if version > 1:
        arrays = description["arrays"]
        conform_fields(arrays, {"file": str, "sha256": str}, "arrays")
        if not re.fullmatch("[0-9a-f]{64}", arrays["sha256"]):
            raise ValueError(f"`arrays.sha256` is not a SHA-256: {shown(arrays['sha256'])}.")
        if arrays["file"] != file_name(arrays["sha256"]):
            raise ValueError(
                f"`arrays.file` is {shown(arrays['file'])}, and by its hash should be "
                f"'{file_name(arrays['sha256'])}'."
            )
        if (found := digest(description)) != description["sha256"]:
            raise ValueError(
                f"its `sha256` is {shown(description['sha256'])}, but the hash of its fields is "
                f"'{found}', so that one of them has changed since it was written. Copy the folder "
                "again."
            )


def file_name(sha256: str) -> str:
    """The name of the file of arrays that has this hash."""
    return f"adapter-{sha256[:16]}.safetensors"


def _check_array(shape: Any, dtype: str, at: str) -> None:
    if min(shape, default=0) < 0:
        raise ValueError(f"`{at}` has the shape {shape}, with a negative size.")
    try:
        jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"`{at}` has an unknown dtype: {shown(dtype)}.") from None


def _say_unchecked(about: Path) -> None:
    """Warns, once in a process, that damage cannot be detected."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"'{about}' has format 1, which has no hash, so that a damaged number cannot be "
            "detected. Load the adapter and save it again. (This warning is given only once.)",
            UncheckedAdapterWarning,
            stacklevel=5,  # the caller of `load_adapter`
        )


#: Methods that ignored a selected part and acted on the whole weight while the format was 1. Today
#: they refuse a part.
_IGNORED_PARTS = (
    "loftq",
    "p_tuning",
    "prompt_tuning",
    "quantize",
    "trainable_tokens",
    "unfreeze",
    "unipelt",
)


def as_it_acted(method: Any, whole: bool = False) -> Any:
    """The method of a description of format 1, without the parts of weights that it ignored.

    Args:
      method: A method as JSON, with today's names, or a value in one. It is checked later.
      whole: Whether the value belongs to a method that ignored parts.
    """
    if isinstance(method, list):
        return [as_it_acted(item, whole) for item in method]
    if not isinstance(method, dict):
        return method
    whole = method.get("method") in _IGNORED_PARTS if "method" in method else whole
    return {
        name: None if whole and name == "part" else as_it_acted(item, whole)
        for name, item in method.items()
    }


def key_of(stored: Mapping[str, Any]) -> jax.Array:
    """The PRNG key that a description holds.

    Raises:
      ValueError: It is not a key.
    """
    try:
        data = jnp.asarray(stored["data"], jnp.uint32)
        key = jax.random.wrap_key_data(data, impl=stored["impl"])
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"`key` is not a PRNG key: {error}.") from None
    if key.shape or jax.random.key_data(key).tolist() != stored["data"]:
        raise ValueError(f"`key.data` is {shown(stored['data'])}, which is not one PRNG key.")
    return key
