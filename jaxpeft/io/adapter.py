"""Adapter folders: the trained arrays, and everything needed to put them to use again.

adapter.safetensors   {path: array}
adapter.json          method with all options and targets, key, versions, and a
                      fingerprint of the base that the adapter was trained on
"""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

import jaxpeft as jp
from jaxpeft.method import Method, from_json, to_json
from jaxpeft.tree import flatten

_FORMAT = 1
_SAMPLE = 64


class Loaded(NamedTuple):
    """What an adapter folder and a base give: `combine(frozen, adapter)` is the model's tree."""

    method: Method
    frozen: Any
    adapter: dict[str, jax.Array]


def factories() -> dict[str, Callable[..., Method]]:
    """The methods that a description may name: all functions of the package that return one."""
    public = {name: getattr(jp, name) for name in jp.__all__}
    return {
        name: f
        for name, f in public.items()
        if inspect.isfunction(f) and inspect.signature(f).return_annotation is Method
    }


def fingerprint(params: Any) -> dict[str, list]:
    """{path: [shape, dtype, hash of up to 64 values spread over the array]} of a base."""
    flat, _ = flatten(params)
    return {path: [list(x.shape), jnp.dtype(x.dtype).name, _hash(x)] for path, x in flat.items()}


def _hash(x: Any) -> str:
    count = min(_SAMPLE, int(np.prod(x.shape)))
    at = np.linspace(0, max(np.prod(x.shape) - 1, 0), count).astype(np.int64)
    where = np.unravel_index(at, x.shape) if x.ndim else ()
    values = np.asarray(x[where] if count else np.zeros(0))
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def save_adapter(
    folder: str | Path,
    adapter: Mapping[str, jax.Array],
    method: Method,
    params: Any,
    *,
    key: jax.Array,
) -> None:
    """Writes an adapter folder, whole or not at all.

    Args:
      folder: Made if it is not there.
      adapter: From `split`, trained.
      method: That made it, from the library's factories.
      params: The base it was trained on, as given to the method.
      key: As given to the method, from which everything frozen that is random follows.

    Raises:
      ValueError: The method cannot be described: a plain function, one that is not the library's,
        or one whose options hold arrays, as those of `corda` and `lora_ga` do; of these, save
        what `as_lora` returns. Nothing is written.
      OSError: The folder cannot be written; nothing half-written is left in its place.
    """
    folder = Path(folder)
    description = {
        "format": _FORMAT,
        "jaxpeft": jp.__version__,
        "method": to_json(method),
        "key": {"impl": str(jax.random.key_impl(key)), "data": jax.random.key_data(key).tolist()},
        "adapter": {p: [list(x.shape), jnp.dtype(x.dtype).name] for p, x in adapter.items()},
        "base": fingerprint(params),
    }
    text = json.dumps(description, indent=1) + "\n"
    from_json(json.loads(text)["method"], factories())  # what cannot be read is not written
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        arrays, about = Path(scratch) / "adapter.safetensors", Path(scratch) / "adapter.json"
        save_file({p: jnp.asarray(x) for p, x in adapter.items()}, arrays)
        about.write_text(text)
        for path in (arrays, about):  # the description last: without it the folder is no adapter
            os.replace(path, folder / path.name)


def load_adapter(folder: str | Path, params: Any) -> Loaded:
    """Rebuilds the method and the adapter from a folder and the base's params.

    Args:
      folder: Written by `save_adapter`.
      params: The base that the adapter was trained on.

    Raises:
      FileNotFoundError: The folder holds no adapter.
      ValueError: The base differs (names the first difference), the file is damaged, or the
        adapter comes from a newer version.
    """
    folder = Path(folder)
    about = folder / "adapter.json"
    if not about.exists():
        raise FileNotFoundError(f"'{folder}' holds no adapter.json, so it is no adapter folder.")
    try:
        description = json.loads(about.read_text())
        version = description["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"'{about}' is no description of an adapter: {error}.") from None
    if version > _FORMAT:
        raise ValueError(
            f"'{about}' has format {version}, written by jaxpeft {description['jaxpeft']}; this is "
            f"jaxpeft {jp.__version__}, which reads up to {_FORMAT}. Install a newer version."
        )
    _same_base(description["base"], fingerprint(params), folder, description["adapter"])
    method = from_json(description["method"], factories())
    stored = description["key"]
    key = jax.random.wrap_key_data(jnp.asarray(stored["data"], jnp.uint32), impl=stored["impl"])
    frozen, fresh = jp.split(method(key, params))
    try:
        adapter = load_file(folder / "adapter.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{folder / 'adapter.safetensors'}' cannot be read ({error}). It is missing or was "
            "cut short; copy the folder again."
        ) from None
    for path in sorted(set(fresh) | set(adapter)):
        have, want = adapter.get(path), fresh.get(path)
        if have is None or want is None or have.shape != want.shape:
            raise ValueError(
                f"'{folder}': '{path}' has shape {None if have is None else have.shape} in the "
                f"file, but the method needs {None if want is None else want.shape}. "
                "The folder's two files do not belong together."
            )
    return Loaded(method, frozen, adapter)


def _same_base(
    stored: Mapping[str, list],
    found: Mapping[str, list],
    folder: Path,
    trained: Mapping[str, list],
) -> None:
    for path in [*stored, *(p for p in found if p not in stored)]:
        before, now = stored.get(path), found.get(path)
        # An array that is trained itself (a new head) comes whole from the adapter.
        whole = before if path in trained else None
        if before == now or (whole and now and whole[:2] == now[:2]):
            continue
        if before is None or now is None:
            what = "only the given base has" if before is None else "the given base lacks"
            what = f"{what} '{path}'"
        else:
            names = ("shape", "dtype", "values")
            name, a, b = next(
                (n, x, y) for n, x, y in zip(names, before, now, strict=True) if x != y
            )
            what = f"the {name} of '{path}' differ: trained on {a}, given {b}"
        way_out = "Give the params it was trained on, in the same dtype."
        if whole:
            way_out = (
                f"Give one of shape {whole[0]} in {whole[1]}, with any values: the adapter "
                "brings its own."
            )
        raise ValueError(
            f"The adapter in '{folder}' was trained on another base: {what}. {way_out}"
        )
