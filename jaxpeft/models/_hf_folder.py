"""Between the parameters of a reference model and the tensors of a Hugging Face folder.

A model says with a table what each kind of array is called in a file; the rest follows from that.
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

#: One row per kind of array: pattern of our path, the tensor in the file (with `{}` where layers
#: that are stacked here have their number), and whether it is (out, in) there.
Table = tuple[tuple[str, str, bool], ...]


#: What a folder holds beside the model itself, for text to become tokens and back.
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
    """The parsed `config.json`, cleared of how bitsandbytes has quantized, and the tensors."""
    hf, tensors = safetensors.open_folder(folder)
    return bitsandbytes.without_configuration(hf), tensors


def plan(arrays: Params, table: Table) -> dict[str, Stack]:
    """What each array is made of, by path; the first row that matches a path counts."""
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
    """The parameters, read straight into stacked arrays and codes.

    Raises:
      ValueError: As `jaxpeft.io._stacked.assemble`, or a weight is quantized already, or `dtype` is
        of no floating-point numbers.
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
    """Writes `config.json` and the tensors; `Flat` weights in four bits as bitsandbytes does.

    Raises:
      FileNotFoundError: `tokenizer_from` holds no tokenizer.
      ValueError: The arrays are not those of the plan, or are weights that no such folder holds.
    """
    carried = [] if tokenizer_from is None else _tokenizer_files(Path(tokenizer_from))
    tensors = disassemble(params, plan)
    config = {**hf, **quantization_config(params, plan)}
    safetensors.write_folder(folder, config, tensors, shard_bytes=shard_bytes)
    if carried and Path(folder).resolve() != Path(tokenizer_from or "").resolve():
        # Files of two tokenizers do not fit together.
        for name in TOKENIZER_FILES:
            (Path(folder) / name).unlink(missing_ok=True)
        for file in carried:
            shutil.copyfile(file, Path(folder) / file.name)


def _tokenizer_files(source: Path) -> list[Path]:
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name not in ("generation_config.json",) for file in files):
        raise FileNotFoundError(
            f"`tokenizer_from`: {source} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}. "
            f"Name the folder that the model was loaded from, or leave it out."
        )
    return files
