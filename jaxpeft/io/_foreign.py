"""Errors for what may be given in place of an adapter folder, each with its own way out."""

import json
import re
from pathlib import Path
from typing import NoReturn

_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Options of PEFT's LoRA with which its two matrices are not all there is to copy.
_MORE_THAN_FACTORS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias")
# A message lists at most this many files.
_LISTED = 10


def refuse_foreign(given: str | Path) -> NoReturn:
    """Raises an error that says what is given instead of an adapter folder.

    Args:
      given: A path at which there is no adapter.json.

    Raises:
      ValueError: It is a folder of Hugging Face PEFT.
      FileNotFoundError: It is a file, a folder with other contents, a name on the Hugging Face
        hub, or does not exist.
    """
    folder = Path(given)
    if (folder / _CONFIG).is_file() or any(folder.glob("adapter_model.*")):
        raise ValueError(_of_peft(folder))
    start = f"'{given}' holds no adapter.json, so it is not an adapter folder"
    if folder.is_file():
        raise FileNotFoundError(
            f"{start}: it is a file. Give the folder that `save_adapter` has written."
        )
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        model = " It is the folder of a model: load it with the `load` of that model." * (
            "config.json" in names
        )
        raise FileNotFoundError(f"{start}. It holds {names[:_LISTED] or 'nothing'}{more}.{model}")
    if _HUB_NAME.fullmatch(str(given)):
        raise FileNotFoundError(
            f"{start}: there is no such folder. If it is a name on the Hugging Face hub, download "
            "it first, and give the path that "
            f"`huggingface_hub.snapshot_download('{given}')` returns; `load_adapter` downloads "
            "nothing."
        )
    raise FileNotFoundError(f"{start}: there is no such folder.")


def _of_peft(folder: Path) -> str:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        config, kind = {}, "unknown"
    base = config.get("base_model_name_or_path")
    text = (
        f"'{folder}' is a folder of Hugging Face PEFT, type {kind}"
        + (f", for the base '{base}'" if base else "")
        + ", which `load_adapter` does not read. Merge it with PEFT "
        "(`model.merge_and_unload()`, then `save_pretrained`), and load the merged model as a base."
    )
    special = any(
        config.get(key) not in (None, False, "none", {}, []) for key in _MORE_THAN_FACTORS
    )
    if kind == "LORA" and not special:
        scaling = ", scaling='alpha/sqrt(r)'" * bool(config.get("use_rslora"))
        text += (
            f" Or copy its matrices into the adapter of `lora({config.get('r')}, sites, "
            f"alpha={config.get('lora_alpha')}{scaling})`: `a` is the transpose of lora_A.weight, "
            "and `b` that of lora_B.weight."
        )
    return text
