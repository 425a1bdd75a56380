"""Reads the parameters of a reference model from a Hugging Face folder, and writes them to one.

A model has a table of the names of its parameters in such a folder. With it, `plan` says which
tensors each parameter is made of, and `jaxpeft.io` reads and writes them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jaxpeft._schema import check_dtype_option
from jaxpeft.io import _bitsandbytes as bitsandbytes
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.io._stacked import Formats, Stack, assemble, disassemble, quantization_config

__all__ = ["TOKENIZER_FILES", "Table", "open", "plan", "read", "write"]

Params = dict[str, Any]

#: One row per kind of parameter: a pattern of its path, the name of the tensor in the file (with
#: `{}` for the number of the layer, where layers are stacked in the parameter), and whether it is
#: (out, in) there.
Table = tuple[tuple[str, str, bool], ...]

#: Files of a folder that turn text into tokens and back.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    # What tokenizer.json was made from: BPE, WordPiece, SentencePiece.
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def open(folder: str | Path) -> tuple[dict[str, Any], dict[str, safetensors.Tensor]]:
    """The parsed `config.json`, and the tensors by name; only headers are read.

    The entry of `config.json` about weights in four bits of bitsandbytes is left out, since the
    tensors say the same.

    Raises:
      FileNotFoundError, ValueError: As `jaxpeft.io._safetensors.open_folder`.
    """
    hf, tensors = safetensors.open_folder(folder)
    return bitsandbytes.without_configuration(hf), tensors


def plan(arrays: Params, table: Table) -> dict[str, Stack]:
    """What each parameter is made of, by path. The first row of the table that matches counts.

    Args:
      arrays: A nested dict of arrays, or of their shapes.
      table: Table of the model.
    """
    stacks = {}
    for path, array in flatten_dict(arrays, sep="/").items():
        pattern, name, transposed = next(row for row in table if re.fullmatch(row[0], path))
        name = re.sub(pattern, name, path)
        stacked = "{}" in name
        names = tuple(name.format(i) for i in range(array.shape[0])) if stacked else (name,)
        stacks[path] = Stack(array.shape, names, stacked, transposed)
    return stacks


def read(
    folder: str | Path,
    tensors: Mapping[str, safetensors.Tensor],
    plan: Mapping[str, Stack],
    *,
    dtype: Any,
    sharding: Any,
    quantize: Formats,
    ignore: Callable[[str], bool],
) -> Params:
    """Reads the parameters of a plan; see `jaxpeft.io._stacked.assemble` for how.

    Args:
      folder: The folder that the tensors are from.
      tensors: From `open`, possibly under other names.
      plan: From `plan`.
      dtype, sharding, quantize, ignore: As `assemble` takes them.
    Raises:
      ValueError: As `assemble`, or `dtype` is not a floating-point dtype.
    """
    del folder  # every tensor names its file
    check_dtype_option("dtype", dtype)
    return assemble(tensors, plan, dtype=dtype, sharding=sharding, quantize=quantize, ignore=ignore)


def write(
    folder: str | Path,
    hf: Mapping[str, Any],
    params: Params,
    plan: Mapping[str, Stack],
    *,
    shard_bytes: int,
    tokenizer_from: str | Path | None,
) -> None:
    """Writes a folder: `config.json`, the tensors, and on request the files of a tokenizer.

    Args:
      folder: The folder; it is created if it does not exist.
      hf: The contents of `config.json`.
      params: Arrays, and `Flat` weights in four bits, which are written as bitsandbytes has them.
      plan: From `plan`.
      shard_bytes: The most data per file, in bytes.
      tokenizer_from: The folder whose tokenizer is copied, in place of one that is there. `None`
        copies none.
    Raises:
      FileNotFoundError: `tokenizer_from` holds no tokenizer.
      ValueError: The parameters are not those of the plan, or are weights that no such folder can
        hold.
      OSError: The disk is full, or the folder cannot be written.
    """
    carried = [] if tokenizer_from is None else _tokenizer_files(Path(tokenizer_from))
    tensors = disassemble(params, plan)
    config = {**hf, **quantization_config(params, plan)}
    safetensors.write_folder(folder, config, tensors, shard_bytes=shard_bytes)
    if carried and Path(folder).resolve() != Path(tokenizer_from or "").resolve():
        # Files of two tokenizers must not be mixed.
        for name in TOKENIZER_FILES:
            (Path(folder) / name).unlink(missing_ok=True)
        for file in carried:
            shutil.copyfile(file, Path(folder) / file.name)


def _tokenizer_files(source: Path) -> list[Path]:
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name not in ("generation_config.json",) for file in files):
        raise FileNotFoundError(
            f"`tokenizer_from`: {source} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}. "
            "Give the folder that the model was loaded from, or leave `tokenizer_from` out."
        )
    return files
