"""Prompt tuning: trained rows beyond those of the embedding table."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.lift import lift
from jaxpeft.method import Method
from jaxpeft.methods.placing import place
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import IN, OUT, View, Weight, axes, base, is_view, weight


@weight
class SoftPrompt(Weight):
    """An embedding table with more rows: ids from `in` on are virtual tokens."""

    w: Any = base()
    rows: Any = axes("virtual", "out")

    is_matrix = False

    @property
    def extra_rows(self) -> int:
        """Virtual tokens on top of those that the base serves."""
        inner = self.w.extra_rows if isinstance(self.w, Weight) else 0
        return inner + self.rows.shape[-2]

    def forward(self, x):
        """A product over the real rows."""
        return x @ self.w

    def transposed(self, y):
        """A tied head keeps its own vocabulary: no logits for virtual tokens."""
        return y @ self.w.T

    def lookup(self, ids):
        """Rows of the table, or of the prompt for ids beyond it."""
        first = self.rows.site.rows + (self.w.extra_rows if isinstance(self.w, Weight) else 0)
        real = self.w[jnp.minimum(ids, first - 1)]
        virtual = self.rows[jnp.clip(ids - first, 0, self.rows.shape[-2] - 1)]
        return jnp.where((ids >= first)[..., None], virtual.astype(real.dtype), real)


def prompt(length: int, sites: Sites, *, std: float = 0.02, dtype: Any = jnp.float32) -> Method:
    """Prompt tuning: `length` virtual tokens, whose embeddings are all that is trained.

    Virtual token j is the id V + j of a table with V rows; `virtual_ids` hands them out, and
    prompts of several tasks mix in one batch by their ids. A tied head gives no logits for
    them. Drop the logits at virtual positions, which predict nothing.

    An id for which there is neither a row nor a prompt gives NaN instead of another row.

    Args:
      length: How many virtual tokens, for all tasks together.
      sites: The embedding table that token ids are looked up in.
      std: Rows start at Normal(0, std ** 2).
      dtype: Of the rows.

    Returns:
      A method with length * width trained numbers.

    Raises:
      ValueError: The model also reads the table in a way that virtual tokens cannot follow
        (a one-hot product, something no rule covers); `check_prompt` finds what tracing
        cannot see, such as ids that the model clamps.

    References:
      Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, section 2.
      https://arxiv.org/abs/2104.08691
    """
    if length < 1:
        raise ValueError(f"`prompt(length={length})`: at least one virtual token is needed.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        if site.kinds & {"one-hot", "other"} or "embedding" not in site.kinds:
            raise ValueError(
                f"`prompt`: the model uses '{site.path}' as {', '.join(sorted(site.kinds))}. A "
                "virtual token exists only for a table that is read by id; a one-hot product "
                "would see zeros."
            )
        if site.stack:
            raise ValueError(f"`prompt`: '{site.path}' is a stack of tables {site.stack}.")
        rows = std * jax.random.normal(key, (length, site.size(OUT)), dtype)
        return dataclasses.replace(view, weight=SoftPrompt(view.weight, Train(rows)))

    return Method(
        "prompt",
        {"length": length, "sites": sites, "std": std, "dtype": dtype},
        lambda key, tree: place(key, tree, sites, make, who="prompt"),
    )


def virtual_ids(site: Site, length: int, start: int = 0) -> np.ndarray:
    """Ids (length,) of the virtual tokens `start`, `start` + 1, ... of a table."""
    return site.size(IN) + start + np.arange(length, dtype=np.int32)


def check_ids(tree: Any, site: Site, ids: Any) -> None:
    """Says whether every id has a row or a prompt behind it. Needs concrete ids.

    Raises:
      ValueError: An id is out of range; names it and what there is.
    """
    views = (x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x))
    found = next(view for view in views if view.path == site.path)
    count = site.size(IN) + found.weight.extra_rows
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < count):
        wrong = int(ids.max() if ids.max() >= count else ids.min())
        raise ValueError(
            f"Token id {wrong} has no row: '{site.path}' has {site.size(IN)} rows and "
            f"{found.weight.extra_rows} virtual tokens, so ids go up to {count - 1}."
        )


def check_prompt(fn: Callable, params: Any, site: Site, tokens: Any, *args: Any) -> None:
    """Runs `fn(params, tokens, *args)` with a virtual token that copies a real one.

    Nothing may change; where something does, the model does more with ids than look them up
    (it clamps or masks them, or has a second table) and would treat virtual tokens wrongly.

    Args:
      fn: The model.
      params: Its parameters.
      site: The embedding table.
      tokens: Real ids (..., time), at least one; the first is exchanged.
      args: What else the model takes.

    Raises:
      ValueError: Something changes.
    """
    tokens = jnp.asarray(tokens)
    first = (0,) * tokens.ndim

    def copied(key: jax.Array, site: Site, view: View) -> View:
        row = view.canonical()[tokens[first]][None]
        return dataclasses.replace(view, weight=SoftPrompt(view.weight, row))

    table = Sites({site.path: site})
    tree = place(jax.random.key(0), params, table, copied, who="check_prompt")
    run = jax.jit(lift(fn))
    real = run(tree, tokens, *args)
    virtual = run(tree, tokens.at[first].set(site.size(IN)), *args)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(virtual), strict=True):
        if not jnp.array_equal(a, b):
            raise ValueError(
                f"A virtual token with the embedding of token {int(tokens[first])} does not act "
                f"like that token: the model does more with ids than look them up in "
                f"'{site.path}' (it clamps or masks them, or reads a second table). Prompts "
                "would go silently wrong in it."
            )
