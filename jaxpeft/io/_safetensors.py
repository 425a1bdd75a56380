"""Hugging Face model folders: `config.json` beside one or several safetensors files.

Opening a folder reads only the headers of its files. Tensors are then read one by one with plain
reads, never through a memory map, whose pages count as memory of the process. `_stacked.py` builds
parameters from them.

The format: 8 bytes with the length of a JSON header (little endian), the header, the data.
https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Lazy", "Tensor", "open_file", "open_folder", "read", "write_folder"]

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# The limit of the reference implementation. A file with a longer header is of another kind.
MAX_HEADER = 100_000_000
# A message lists at most this many faults, and says how many more there are.
MAX_FAULTS = 20


class Tensor(NamedTuple):
    """Where a tensor lies in a file; its values are not in memory."""

    file: Path
    start: int  # byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]


class Lazy(NamedTuple):
    """A tensor to be written, which is computed only when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]


# Reading -----------------------------------------------------------------------------------------


def open_file(file: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by name, from its header.

    Raises:
      ValueError: The file is truncated, longer than its header says, or not a safetensors file.
    """
    file = Path(file)
    size = file.stat().st_size
    with open(file, "rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER:
            raise ValueError(f"{file} is not a safetensors file: it has no header ({size} bytes).")
        if 8 + length > size:
            raise ValueError(_truncated(file, 8 + length, size))
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _entry(file, 8 + length, row) for name, row in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has a header that cannot be read: {error!r}.") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, _nbytes(item[1]))):
        if tensor.start != end:
            raise ValueError(
                f"{file} is damaged: tensor '{name}' starts at byte {tensor.start}, but the one "
                f"before it ends at {end}. Download the file again."
            )
        end += _nbytes(tensor)
    if end > size:
        raise ValueError(_truncated(file, end, size))
    if end < size:
        raise ValueError(
            f"{file} is damaged: its header describes {end} bytes, but it has {size}. Download it "
            "again."
        )
    return tensors


def open_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a Hugging Face folder; only headers are read.

    Args:
      folder: Holds `config.json` and either `model.safetensors` or
        `model.safetensors.index.json` with the files it names.
    Returns:
      The parsed `config.json`, and every tensor by its name.
    Raises:
      FileNotFoundError: There is no such folder, or it has no `config.json` or no safetensors
        files.
      ValueError: The index names a file outside the folder or disagrees with its files, or
        `open_file` refuses a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the path of a model folder.")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}, only {_listing(folder)}. Copy the model's {CONFIG} there, "
            "or save the model again if saving it was interrupted."
        )
    config = _json(folder / CONFIG)
    if (folder / SINGLE).is_file():
        return config, open_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}, only {_listing(folder)}. Weights in "
            "another format have to be saved as safetensors first."
        )
    return config, _open_shards(folder)


def read(tensor: Tensor, rows: slice | None = None) -> np.ndarray:
    """Reads the values of a tensor, or of a range of its rows, into a new array of its dtype."""
    rows = rows or slice(None)
    start, stop, _ = rows.indices(tensor.shape[0]) if tensor.shape else (0, 1, 1)
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    out = np.empty(shape, tensor.dtype)
    todo = out.reshape(-1).view(np.uint8).data
    row_bytes = _nbytes(tensor) // tensor.shape[0] if tensor.shape and tensor.shape[0] else 0
    with open(tensor.file, "rb", buffering=0) as f:
        f.seek(tensor.start + start * row_bytes)
        while todo:
            count = f.readinto(todo)
            if not count:
                raise ValueError(f"{tensor.file} became shorter while it was read.")
            todo = todo[count:]
    return out


def _open_shards(folder: Path) -> dict[str, Tensor]:
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no 'weight_map'. Download it again.")
    files: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        # Only names are checked: in the cache of the hub, the files are links to elsewhere.
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(
                f"{folder / INDEX} points outside its folder, to '{name}'. Only names of files "
                "beside it are followed. Do not use this folder unless you trust its source."
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks {name}, which its index names. Download it again."
            )
        files[name] = open_file(folder / name)
    tensors: dict[str, Tensor] = {}
    for file, held in files.items():
        for name, tensor in held.items():
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{folder / file} holds tensor '{name}', which the index places in "
                    f"{weight_map.get(name)}. Download the folder again."
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"{folder / INDEX} places tensor '{name}' in {file}, which does not hold it. "
                "Download the folder again."
            )
    return tensors


def _entry(file: Path, data: int, row: Mapping[str, Any]) -> Tensor:
    if row["dtype"] not in DTYPES:
        raise ValueError(f"{row['dtype']} is none of the types {', '.join(DTYPES)}")
    start, end = row["data_offsets"]
    shape = tuple(row["shape"])
    numbers = (start, end, *shape)
    whole = all(type(n) is int and 0 <= n < 2**63 for n in numbers)  # a JSON `true` is not a number
    tensor = Tensor(file, data + start if whole else 0, DTYPES[row["dtype"]], shape)
    if not whole or end - start != _nbytes(tensor):
        raise ValueError(f"the shape, dtype and offsets of {row} do not agree")
    return tensor


def _nbytes(tensor: Tensor | Lazy) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _truncated(file: Path, needed: int, size: int) -> str:
    return (
        f"{file} is truncated: its header describes {needed} bytes, but it has {size}. Download it "
        "again."
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, it holds a {type(value).__name__}.")
    return value


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:MAX_FAULTS]) or "nothing"


# Writing -----------------------------------------------------------------------------------------


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder: weights, index where there are several files, `config.json`.

    All files are first written to a temporary folder inside this one, and then moved, `config.json`
    last: a folder whose save was interrupted has none, and is refused. Other files in the folder
    (a tokenizer) stay; weights of an earlier save are removed.

    Args:
      folder: The folder; it is created if it does not exist.
      config: The contents of `config.json`.
      tensors: The tensors by name, in the order in which files hold them.
      shard_bytes: The most data per file, in bytes, unless one tensor alone is larger.
    Raises:
      ValueError: `shard_bytes` is not positive.
      OSError: The disk is full, or the folder cannot be written; it is then unchanged.
    """
    if shard_bytes < 1:
        raise ValueError(f"`shard_bytes` must be positive, got {shard_bytes}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_file(draft / name, shard)
        if len(shards) > 1:
            total = sum(map(_nbytes, tensors.values()))
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            _write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
            names.append(INDEX)
        _write_json(draft / CONFIG, config)
        (folder / CONFIG).unlink(missing_ok=True)
        for old in (folder / INDEX, *folder.glob("model*.safetensors")):
            old.unlink(missing_ok=True)
        for name in (*names, CONFIG):
            os.replace(draft / name, folder / name)
    except OSError as error:
        needed = sum(map(_nbytes, tensors.values()))
        raise OSError(
            error.errno,
            f"Could not save {needed} bytes to {folder}: {error.strerror}. Free some space there",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _split(tensors: Mapping[str, Lazy], shard_bytes: int) -> list[dict[str, Lazy]]:
    shards: list[dict[str, Lazy]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if _nbytes(tensor) > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= _nbytes(tensor)
    return shards


def _write_file(file: Path, tensors: Mapping[str, Lazy]) -> None:
    # transformers requires this entry, whichever library wrote the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _nbytes(tensor)
        row = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
        header[name] = row
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The data is aligned to 8 bytes, as the format recommends.
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = np.asarray(tensor.value(), order="C")
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype), name
            f.write(value.reshape(-1).view(np.uint8).data)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
