"""Ids of virtual tokens, and prompts that put them among the tokens of a text."""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft._methods.prompt_tuning import encoded_text, extra_rows_of
from jaxpeft._sites import Site
from jaxpeft._view import is_view
from jaxpeft._weight import (
    IN,
)

# --- Ids with virtual tokens among them ------------------------------------------------------


def virtual_token_ids(site: Site, length: int, start: int = 0) -> np.ndarray:
    """Ids (length,) of the virtual tokens `start`, `start` + 1, ... of a table."""
    return site.size(IN) + start + np.arange(length, dtype=np.int32)


def prompt_template(
    *pieces: str | Sequence[int] | np.ndarray, tokenizer: Any = None
) -> Callable[..., np.ndarray]:
    """Sequences of text, inputs and virtual tokens in any order, such as [h0 h1; e(x); h2; e(y)].

    Args:
      pieces: Ids (virtual ones, or any), or a text; in a text, `{name}` stands for an input.
      tokenizer: For text: a `tokenizers.Tokenizer`, or a function from a text to ids.

    Returns:
      A function of the inputs by name, ids or text each, that gives the ids (time,).

    Raises:
      ValueError: A text without a tokenizer. When called: an input is missing, or has no place.

    Example:
      >>> fill = prompt_template([100, 101], "{x}", [102], "{y}")
      >>> fill(x=[1, 2, 3], y=[4]).tolist()
      [100, 101, 1, 2, 3, 102, 4]
    """
    parts = [part for piece in pieces for part in _parts(piece)]
    names = {part.name for part in parts if isinstance(part, _Input)}

    def ids_of(piece: Any) -> Sequence[int]:
        if not isinstance(piece, str):
            return piece
        if tokenizer is None:
            raise ValueError(
                f"The text {piece!r} of a `template` needs the model's tokenizer: "
                "`prompt_template(..., tokenizer=...)`. Or give its ids."
            )
        return tokenizer(piece) if callable(tokenizer) else encoded_text(tokenizer, piece)

    fixed = [part if isinstance(part, _Input) else ids_of(part) for part in parts]

    def fill(**inputs: Any) -> np.ndarray:
        if inputs.keys() != names:
            raise ValueError(
                f"This `template` takes the inputs {sorted(names)}, but got {sorted(inputs)}."
            )
        ids = [ids_of(inputs[x.name]) if isinstance(x, _Input) else x for x in fixed]
        return np.concatenate([np.asarray(x, np.int32).reshape(-1) for x in ids])

    return fill


@dataclasses.dataclass(frozen=True)
class _Input:
    name: str


def _parts(piece: Any) -> list[Any]:
    if not isinstance(piece, str):
        return [np.asarray(piece, np.int32)]
    parts: list[Any] = []
    for text, name, _, _ in string.Formatter().parse(piece):
        parts += [text] * bool(text) + ([] if name is None else [_Input(name)])
    return parts


def check_token_ids(tree: Any, site: Site, ids: Any) -> None:
    """Says whether every id has a row or a prompt behind it. Needs concrete ids.

    Raises:
      ValueError: An id is out of range; names it and what there is.
    """
    views = (x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x))
    extra = next((extra_rows_of(view.weight) for view in views if view.path == site.path), 0)
    count = site.size(IN) + extra
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < count):
        wrong = int(ids.max() if ids.max() >= count else ids.min())
        raise ValueError(
            f"Token id {wrong} has no row: '{site.path}' has {site.size(IN)} rows and "
            f"{extra} virtual tokens, so ids go up to {count - 1}."
        )
