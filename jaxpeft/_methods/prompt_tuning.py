"""Prompt tuning and P-tuning: trained rows beyond those of the embedding table."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import (
    IN,
    OUT,
    Weight,
    axes,
    base_field,
    base_weight,
    dense,
    weight,
)
from jaxpeft.extend._apply import apply_to_sites, at_its_start


@weight
class SoftPrompt(Weight):
    """An embedding table with more rows: ids from `in` on are virtual tokens."""

    w: Any = base_weight()
    rows: Any = axes("virtual", "out")

    is_mergeable = False

    @property
    def extra_rows(self) -> int:
        """Virtual tokens on top of those that the base serves."""
        return extra_rows_of(self.w) + self.rows.shape[-2]

    def forward(self, x):
        """A product over the real rows."""
        return x @ self.w

    def transposed(self, y):
        """A tied head keeps its own vocabulary: no logits for virtual tokens."""
        return y @ self.w.T

    def lookup(self, ids):
        """Rows of the table, or of the prompt for ids beyond it."""
        first = self.rows.site.rows + extra_rows_of(self.w)
        real = self.w[jnp.minimum(ids, first - 1)]
        virtual = self.rows[jnp.clip(ids - first, 0, self.rows.shape[-2] - 1)]
        return jnp.where((ids >= first)[..., None], virtual.astype(real.dtype), real)


def extra_rows_of(w: Any) -> int:
    """The rows that a weight or an array serves beyond those of its table."""
    return w.extra_rows if isinstance(w, Weight) else 0


@register_method
def prompt_tuning(
    length: int,
    sites: Sites,
    *,
    init: Literal["random", "vocabulary"] | Sequence[int] = "random",
    text: str | None = None,
    tokenizer: Any = None,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Prompt tuning: `length` virtual tokens, whose embeddings are all that is trained.

    Virtual token j is the id V + j of a table with V rows; `virtual_ids` hands them out, and
    prompts of several tasks mix in one batch by their ids. A tied head gives no logits for
    them. Drop the logits at virtual positions, which predict nothing.

    An id for which there is neither a row nor a prompt gives NaN instead of another row.

    Args:
      length: How many virtual tokens, for all tasks together.
      sites: The embedding table that token ids are looked up in.
      init: Where the rows start: "random" is Normal(0, std ** 2), "vocabulary" the embeddings of
        tokens drawn from the table, a sequence of ids those of these tokens, repeated or cut to
        `length`.
      text: In the place of `init`: a text whose tokens the rows start at.
      tokenizer: For `text`: a `tokenizers.Tokenizer`, or a function from a text to ids.
      std: For "random".
      dtype: Of the rows.

    Returns:
      A method with length * width trained numbers.

    Raises:
      ValueError: The model also reads the table in a way that virtual tokens cannot follow
        (a one-hot product, something no rule covers); `check_prompt` finds what tracing
        cannot see, such as ids that the model clamps. A text without a tokenizer, or an initial
        id that the table does not have.

    References:
      Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, sections 2
      and 3.2. https://arxiv.org/abs/2104.08691
    """
    if length < 1:
        raise ValueError(f"`prompt_tuning(length={length})`: at least one virtual token is needed.")
    start: Any = init if text is None else _text_ids(text, tokenizer, init)
    if isinstance(start, str) and start not in ("random", "vocabulary"):
        raise ValueError(
            f"`prompt_tuning(init='{start}')`: rows start at 'random', at 'vocabulary', at a sequence of "
            "ids, or at a text, `text='...'` with its `tokenizer`."
        )
    if not isinstance(start, str):
        start = [int(i) for i in start]
        if not start:
            raise ValueError("`prompt_tuning(init=...)` is told of no token to start at.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_table("prompt_tuning", site)
        shape, rows = (length, site.size(OUT)), site.size(IN)
        if start == "random":
            values = std * jax.random.normal(key, shape, dtype)
        elif start == "vocabulary":
            values = embeddings(view, jax.random.randint(key, (length,), 0, rows))
        else:
            if not 0 <= min(start) <= max(start) < rows:
                raise ValueError(
                    f"`prompt_tuning(init={start[:10]}...)` starts at ids that '{site.path}' with its "
                    f"{rows} rows does not have. Is it the tokenizer of this model?"
                )
            values = embeddings(view, jnp.resize(jnp.asarray(start), (length,)))
        weight = SoftPrompt(view.weight, Trainable(values.astype(dtype)))
        return dataclasses.replace(view, weight=weight)

    options = {"length": length, "sites": sites, "init": start, "std": std, "dtype": dtype}
    return Method(
        "prompt_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="prompt_tuning"),
    )


def check_table(caller: str, site: Site) -> None:
    """Raises ValueError where a selected weight is no embedding table; names it."""
    if site.kinds & {"one-hot", "other"} or "embedding" not in site.kinds:
        raise ValueError(
            f"`{caller}`: the model uses '{site.path}' as {', '.join(sorted(site.kinds))}. A "
            "virtual token exists only for a table that is read by id; a one-hot product "
            "would see zeros."
        )
    if site.stack:
        raise ValueError(f"`{caller}`: '{site.path}' is a stack of tables {site.stack}.")


def embeddings(view: View, ids: Any) -> jax.Array:
    """Rows of the table as the model has them now, whatever other methods stand there already."""
    view = at_its_start(view)
    real = dataclasses.replace(view, weight=real_table(view.weight))
    return jnp.take(dense(real.canonical()), ids, axis=0)


def real_table(w: Any) -> Any:
    """The weight without prompts, which have no part in the matrix of real rows."""
    if not isinstance(w, Weight) or (name := base_field(w)) is None:
        return w
    below = real_table(getattr(w, name))
    if type(w).extra_rows is not Weight.extra_rows:  # a prompt, however its rows are made
        return below
    return dataclasses.replace(w, **{name: below})  # type: ignore[type-var]


def _text_ids(text: str, tokenizer: Any, init: Any) -> list[int]:
    if init != "random":
        raise ValueError(
            f"`prompt_tuning(text=..., init={init!r})`: rows start at a text or elsewhere."
        )
    if tokenizer is None:
        raise ValueError(
            f"`prompt_tuning(text={text!r})` needs the model's tokenizer to know the ids of the text: "
            "give `tokenizer=tokenizers.Tokenizer.from_file(...)`, or the ids as `init=`."
        )
    ids = tokenizer(text) if callable(tokenizer) else encoded_text(tokenizer, text)
    if not len(ids):
        raise ValueError(f"`prompt_tuning(text={text!r})`: the tokenizer makes no token of it.")
    return list(ids)


def encoded_text(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
