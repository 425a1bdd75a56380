"""Ids of virtual tokens, and templates that place them among the tokens of a text."""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft._methods.prompt_tuning import extra_rows_of, tokenize
from jaxpeft._sites import Site
from jaxpeft._view import is_view
from jaxpeft._weight import IN


def virtual_token_ids(site: Site, length: int, start: int = 0) -> np.ndarray:
    """The ids of `length` virtual tokens of a table with V rows, V + start, V + start + 1, ...

    Args:
      site: The embedding table.
      length: Number of virtual tokens.
      start: The first of them, counted from 0.

    Returns:
      int32 (length,).

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> params = {"embed": jnp.ones((10, 4))}
      >>> table = jp.sites(lambda p, ids: p["embed"][ids], params, jnp.array([1]))["embed"]
      >>> virtual_token_ids(table, 3).tolist(), virtual_token_ids(table, 2, start=3).tolist()
      ([10, 11, 12], [13, 14])
    """
    return site.size(IN) + start + np.arange(length, dtype=np.int32)


def prompt_template(
    *pieces: str | Sequence[int] | np.ndarray, tokenizer: Any = None
) -> Callable[..., np.ndarray]:
    """A template of texts, inputs and virtual tokens in any order, as [h0 h1; e(x); h2; e(y)].

    Args:
      pieces: Each a sequence of token ids, virtual ones or not, or a text, in which `{name}`
        stands for an input.
      tokenizer: For texts: a `tokenizers.Tokenizer`, or a function from a text to ids.

    Returns:
      A function of the inputs by name, each ids or a text, that returns ids int32 (time,).

    Raises:
      ValueError: A text without a tokenizer. From the returned function: an input of the
        template is missing, or an argument is not an input of it.

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
                f"`prompt_template`: the text {piece!r} needs the model's tokenizer. Give "
                "`prompt_template(..., tokenizer=...)`, or the ids of the text."
            )
        return tokenize(tokenizer, piece)

    fixed = [part if isinstance(part, _Input) else ids_of(part) for part in parts]

    def fill(**inputs: Any) -> np.ndarray:
        if inputs.keys() != names:
            raise ValueError(
                f"This `prompt_template` takes the inputs {sorted(names)}, but was given "
                f"{sorted(inputs)}. Give each of its inputs by name."
            )
        ids = [ids_of(inputs[x.name]) if isinstance(x, _Input) else x for x in fixed]
        return np.concatenate([np.asarray(x, np.int32).reshape(-1) for x in ids])

    return fill


@dataclasses.dataclass(frozen=True)
class _Input:
    name: str


def _parts(piece: Any) -> list[Any]:
    """Texts, inputs and arrays of ids, in order."""
    if not isinstance(piece, str):
        return [np.asarray(piece, np.int32)]
    parts: list[Any] = []
    for text, name, _, _ in string.Formatter().parse(piece):
        parts += [text] * bool(text) + ([] if name is None else [_Input(name)])
    return parts


def check_token_ids(tree: Any, site: Site, ids: Any) -> None:
    """Checks that every id has a row in the table or is a virtual token.

    Args:
      tree: The parameters, with soft prompts or without, before `split` or after it.
      site: The embedding table.
      ids: Token ids of any shape, not traced.

    Raises:
      ValueError: An id is out of range; names it and the range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> params = {"embed": jnp.ones((10, 4))}
      >>> table = jp.sites(lambda p, ids: p["embed"][ids], params, jnp.array([1])).embedding
      >>> tree = jp.prompt_tuning(2, table)(jax.random.key(0), params)
      >>> check_token_ids(tree, table["embed"], [3, 10, 11])
    """
    views = (x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x))
    extra = next((extra_rows_of(view.weight) for view in views if view.path == site.path), 0)
    count = site.size(IN) + extra
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < count):
        wrong = int(ids.max() if ids.max() >= count else ids.min())
        raise ValueError(
            f"Token id {wrong} has no row: '{site.path}' has {site.size(IN)} rows and "
            f"{extra} virtual tokens, so ids are from 0 to {count - 1}."
        )
