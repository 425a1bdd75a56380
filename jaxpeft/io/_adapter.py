"""Adapter folders: the trained arrays, and everything that is needed to use them again.

adapter-<hash>.safetensors   {path: array}, under a name with the hash of the file
adapter.json                 method with all options and targets, key, versions, hashes, and a
                             fingerprint of the base that the adapter was trained on

The description names the file of the arrays, so that replacing the description replaces the
adapter. In format 1 that file was `adapter.safetensors`, without a hash.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from jaxpeft._method import FACTORIES, Method, chain
from jaxpeft._method_json import from_json, to_json
from jaxpeft._tree import split
from jaxpeft._version import __version__
from jaxpeft.io import _replacing as replacing
from jaxpeft.io._aliases import current_arrays, current_method
from jaxpeft.io._description import (
    ABOUT,
    FORMAT,
    UncheckedAdapterWarning,
    as_it_acted,
    file_name,
    key_of,
    parsed,
    written,
)
from jaxpeft.io._fingerprint import (
    STARTS,
    Base,
    check_base,
    fingerprint,
    of_leaves,
    replaced_by,
    steps,
)
from jaxpeft.io._foreign import refuse_foreign
from jaxpeft.quant._quantize import quantize

__all__ = ["Loaded", "UncheckedAdapterWarning", "load_adapter", "save_adapter"]

_ARRAYS_1 = "adapter.safetensors"
_AS_SAVED = "as saved"
# A folder that is replaced while it is read is read again, this many times at most.
_ATTEMPTS = 10


class Loaded(NamedTuple):
    """What `load_adapter` returns: `combine(frozen, adapter)` is the tree of the model."""

    method: Method
    frozen: Any
    adapter: dict[str, jax.Array]


# Writing ------------------------------------------------------------------------------------------


def save_adapter(
    folder: str | Path,
    adapter: Mapping[str, jax.Array],
    method: Method,
    params: Any,
    *,
    key: jax.Array,
) -> None:
    """Writes an adapter folder completely or not at all, and replaces an adapter that is there.

    A process that reads the folder meanwhile, or after this one was killed, finds either the old
    adapter or the new one. Of several processes that write at once, the last one wins.

    Args:
      folder: The folder; it is created if it does not exist.
      adapter: The trained adapter, as `split` returned it.
      method: The method that made the adapter; one of the library's.
      params: The base that the adapter was trained on, as it was given to the method.
      key: The PRNG key that was given to the method. Frozen random arrays are made from it again.

    Raises:
      ValueError: The method cannot be described, because it is a plain function, is not one of the
        library's, or has arrays among its options, as `corda` and `lora_ga` do (of these, save
        what `to_lora` returns); or an array has infinite or NaN entries. Nothing is written.
      OSError: The folder cannot be written. An adapter that was there is unchanged.
    """
    folder = Path(folder)
    adapter = {path: jnp.asarray(x) for path, x in adapter.items()}
    _check_finite(adapter)
    trained = {path: [list(x.shape), jnp.dtype(x.dtype).name] for path, x in adapter.items()}
    description = {
        "format": FORMAT,
        "jaxpeft": __version__,
        "method": to_json(method),
        "key": {"impl": str(jax.random.key_impl(key)), "data": jax.random.key_data(key).tolist()},
        "adapter": trained,
        "base": fingerprint(params, replaced_by(method, trained)),
    }
    # A description that could not be read again is not written.
    from_json(json.loads(json.dumps(description["method"])), FACTORIES)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing.alone(folder) as locked:
        before = _arrays_of(folder)
        with replacing.draft(folder, lambda path: save_file(adapter, path)) as arrays:
            sha256 = _sha256(arrays)
            name = file_name(sha256)
            text = written({**description, "arrays": {"file": name, "sha256": sha256}})
            with replacing.draft(folder, lambda path: path.write_text(text)) as about:
                os.replace(arrays, folder / name)
                replacing.on_disk(folder)
                os.replace(about, folder / ABOUT)  # from here on, the folder holds the new adapter
        replacing.on_disk(folder)
        # Without a lock, files of another writer cannot be told from files that nobody needs.
        for path in (_leftover(folder) if locked else before) - {folder / name}:
            replacing.remove(path)


def _check_finite(adapter: Mapping[str, jax.Array]) -> None:
    counts = {path: int(jnp.sum(~jnp.isfinite(x))) for path, x in adapter.items()}
    if bad := {path: n for path, n in counts.items() if n}:
        path, n = next(iter(bad.items()))
        more = f" (other arrays with such entries: {len(bad) - 1})" if len(bad) > 1 else ""
        raise ValueError(
            f"The adapter's '{path}' has {n} entries of {adapter[path].size} that are infinite or "
            f"NaN{more}. The training has diverged: save the adapter of an earlier step, and "
            "continue from there with a lower learning rate."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arrays_of(folder: Path) -> set[Path]:
    """The file of arrays that the folder's description names, if it can be read."""
    try:
        return {folder / json.loads((folder / ABOUT).read_text())["arrays"]["file"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {folder / _ARRAYS_1}


def _leftover(folder: Path) -> set[Path]:
    """Files of arrays of any adapter, and files that killed writers left behind."""
    mine = re.compile(rf"adapter(-[0-9a-f]{{16}})?\.safetensors|{re.escape(replacing.DRAFT)}.*")
    return {path for path in folder.iterdir() if mine.fullmatch(path.name)}


# Reading ------------------------------------------------------------------------------------------


def load_adapter(
    folder: str | Path, params: Any, *, base: Base = "same", quantize: str | None = "as saved"
) -> Loaded:
    """Rebuilds the method and the adapter from a folder and the base's params.

    On the base that it was trained on, the loaded adapter computes exactly what it computed in
    training. `base` allows other bases:

    - `base="any precision"`: the same weights in another dtype, or quantized where they were dense
      or dense where they were quantized. Paths, shapes and eight values of each array are checked;
      values may differ by the rounding of the coarser dtype, or of bfloat16. Values of quantized
      weights, and all values in folders of format 1, cannot be checked.
    - `base="any values"`: any weights with the same paths and shapes, such as a base that was
      trained further.

    Values that the adapter replaces are never compared: arrays that it trains as a whole, layers of
    `last_layers`, rows of `trainable_tokens`. `pissa`, `olora` and `loftq` can only be loaded on
    the base that they were trained on, because they subtract from it what they compute from its
    values.

    Args:
      folder: A folder that `save_adapter` has written, with this version or an earlier one.
      params: The base that the adapter was trained on.
      base: Which other bases are allowed.
      quantize: What the `quantize` steps of the method do. "as saved" keeps them; `None` leaves
        them out, so that `params` are used as they are, dense or already quantized; the name of
        a format, such as "int8", quantizes the same weights in that format.
    Returns:
      The method, its frozen parameters and the adapter.

    Raises:
      FileNotFoundError: The folder holds no adapter, or lacks its arrays.
      ValueError: The base differs (the error names the first difference and the option that would
        allow it), a file is damaged (it names the file and the field), the adapter was written by
        a newer version, or the folder is one of Hugging Face PEFT.
    """
    folder = Path(folder)
    description, adapter = _read(folder)
    about = folder / ABOUT
    try:
        key = key_of(description["key"])
        made = current_method(description["method"], FACTORIES)
        method = from_json(as_it_acted(made) if description["format"] == 1 else made, FACTORIES)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{about}': {error}") from error
    trained = description["adapter"]
    if quantize != _AS_SAVED:
        method = _requantized(method, quantize, about)
    if description["format"] == 1:
        stored, found = of_leaves(description["base"], params)
    else:
        stored = description["base"]
        found = fingerprint(params, replaced_by(method, trained))
    try:
        same = check_base(stored, found, method, trained, base)
    except ValueError as error:
        raise ValueError(
            f"The adapter in '{folder}' was trained on another base: {error}"
        ) from None
    if same:
        _check_dtypes(adapter, trained, about)
    fresh = _shapes(method, key, params, about)
    names = current_arrays(adapter, fresh, (step.name for step in steps(method)))
    adapter = {names[path]: x for path, x in adapter.items()}
    for path in sorted(set(fresh) | set(adapter)):
        have, want = adapter.get(path), fresh.get(path)
        if have is None or want is None or have.shape != want.shape:
            raise ValueError(
                f"'{about}': '{path}' has shape {None if have is None else have.shape} in the "
                f"file of arrays, but the method needs {None if want is None else want.shape}. "
                "The two files of the folder do not belong together."
            )
    frozen, _ = split(method(key, params))
    if not same:  # an array that is trained as a whole has the dtype of the base that it is part of
        adapter = {path: x.astype(fresh[path].dtype) for path, x in adapter.items()}
    return Loaded(method, frozen, adapter)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The description and its arrays, both of one adapter even if the folder is being replaced."""
    about = folder / ABOUT
    for _ in range(_ATTEMPTS):
        if not about.exists():
            refuse_foreign(folder)
        text = _bytes(about)
        description = parsed(text, about)
        name = description["arrays"]["file"] if description["format"] > 1 else _ARRAYS_1
        try:
            return description, _arrays(folder / name, description, about)
        except FileNotFoundError:
            if _bytes(about) == text:
                raise FileNotFoundError(
                    f"'{folder / name}' is missing, which '{about}' names. Copy the folder again."
                ) from None
    raise ValueError(
        f"'{folder}' was replaced {_ATTEMPTS} times while it was read. Wait until nothing writes "
        "to it any more."
    )


def _bytes(about: Path) -> bytes:
    try:
        return about.read_bytes()
    except IsADirectoryError:
        raise ValueError(f"'{about}' does not describe an adapter: it is a folder.") from None


def _arrays(path: Path, description: Mapping[str, Any], about: Path) -> dict[str, jax.Array]:
    """The arrays of a file, checked against the description.

    Raises:
      FileNotFoundError: The file does not exist.
      ValueError: The file cannot be read, or its arrays are not those of the description.
    """
    broken = "It was damaged or truncated. Copy the folder again."
    try:
        if description["format"] > 1:
            want, found = description["arrays"]["sha256"], _sha256(path)
            if want != found:
                raise ValueError(f"its SHA-256 is {found}, and '{about}' says {want}")
        arrays = load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). {broken}") from None
    trained = description["adapter"]
    for name in sorted({*arrays, *trained}):
        have = list(arrays[name].shape) if name in arrays else None
        want = trained[name][0] if name in trained else None
        if have != want:
            raise ValueError(
                f"'{path}': '{name}' has shape {have}, and '{about}' says {want}. The two files "
                "of the folder do not belong together."
            )
    return arrays


def _check_dtypes(
    adapter: Mapping[str, jax.Array], trained: Mapping[str, Any], about: Path
) -> None:
    for path, x in adapter.items():
        if (dtype := trained[path][1]) != x.dtype.name:
            raise ValueError(
                f"'{about}': '{path}' was loaded as {x.dtype}, but was saved as {dtype}. If that "
                "has 64 bits, set `jax.config.update('jax_enable_x64', True)`; otherwise the two "
                "files of the folder do not belong together."
            )


def _requantized(method: Method, format: str | None, about: Path) -> Method:
    """The method with its `quantize` steps in another format, or without them."""
    names = {step.name for step in steps(method)}
    if starts := sorted(names & set(STARTS)):
        raise ValueError(
            f"`load_adapter(quantize={format!r})`: '{about}' holds `{starts[0]}`, which subtracts "
            "from the base what it computes from the quantized values. Load it as it was saved, "
            "without `quantize`."
        )
    if format is not None and "quantize" not in names:
        raise ValueError(
            f"`load_adapter(quantize={format!r})`: the method of '{about}' quantizes nothing. "
            "Quantize `params`, and load the adapter with `base='any precision'`."
        )

    def one(method: Method) -> Method:
        if method.name == "chain":
            return chain(*map(one, method.options["methods"]))
        if method.name != "quantize":
            return method
        # An empty chain takes its place: the keys of the other steps depend on their positions.
        return quantize(format, method.options["sites"]) if format else chain()

    return one(method)


def _shapes(
    method: Method, key: jax.Array, params: Any, about: Path
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the method trains, found before any array of such a shape is made.

    Raises:
      ValueError: The method cannot be applied to these params.
    """
    leaves, treedef = jax.tree.flatten(params)
    at = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray))]

    def trained(key: jax.Array, arrays: list) -> dict[str, jax.Array]:
        whole = list(leaves)
        for i, x in zip(at, arrays, strict=True):
            whole[i] = x
        return split(method(key, jax.tree.unflatten(treedef, whole)))[1]

    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in at]
    try:
        return jax.eval_shape(trained, key, shapes)
    except Exception as error:  # a description that this library did not write may do anything
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"'{about}': its method cannot be applied to these params: {said}"
        ) from error
