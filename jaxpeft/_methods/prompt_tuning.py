"""Prompt tuning: trainable rows beyond those of the embedding table."""

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
        """The number of virtual tokens, those of the base included."""
        return extra_rows_of(self.w) + self.rows.shape[-2]

    def forward(self, x):
        """x @ w, a product over the rows of real tokens."""
        return x @ self.w

    def transposed(self, y):
        """y @ w.T: a tied head has no logits for virtual tokens."""
        return y @ self.w.T

    def lookup(self, ids):
        """Rows of the table, or of the prompt for ids beyond the table."""
        first = self.rows.site.rows + extra_rows_of(self.w)
        real = self.w[jnp.minimum(ids, first - 1)]
        virtual = self.rows[jnp.clip(ids - first, 0, self.rows.shape[-2] - 1)]
        return jnp.where((ids >= first)[..., None], virtual.astype(real.dtype), real)


def extra_rows_of(w: Any) -> int:
    """The number of virtual tokens of a weight; none for an array."""
    return w.extra_rows if isinstance(w, Weight) else 0


@register_method
def prompt_tuning(
    length: int,
    sites: Sites,
    *,
    init: Literal["random", "vocabulary"] | Sequence[int] = "random",
    init_text: str | None = None,
    tokenizer: Any = None,
    init_std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """Prompt tuning: only the embeddings of `length` virtual tokens are trained.

    The embedding table E of V rows becomes [E; P] with a trainable P of `length` rows. Virtual
    token j has the id V + j, which `prompts.virtual_token_ids` returns; prompts of several tasks
    may be mixed in one batch by their ids. A tied head gives no logits for virtual tokens. The
    logits at virtual positions predict nothing: drop them.

    An id that has neither a row in the table nor a virtual token gives NaN.

    Args:
      length: Number of virtual tokens, for all tasks together.
      sites: The embedding table that the model looks token ids up in.
      init: Where P starts. "random" draws from Normal(0, init_std ** 2); "vocabulary" takes the
        embeddings of random tokens of the table; a sequence of ids takes the embeddings of
        these tokens, repeated or truncated to `length`.
      init_text: Instead of `init`: P starts at the embeddings of the tokens of this text.
      tokenizer: For `init_text`: a `tokenizers.Tokenizer`, or a function from a text to ids.
      init_std: Standard deviation for "random".
      dtype: Dtype of P.

    Returns:
      A method with length * width trainable parameters.

    Raises:
      ValueError: `length` is less than 1; the model also uses the table in a way that virtual
        tokens cannot follow (a one-hot product, or an unsupported use); `init_text` without a
        tokenizer, or together with `init`; or an initial id that the table does not have.
        `prompts.check_prompt` finds what tracing cannot see, such as ids that the model clamps.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, ids: p["embed"][ids], {"embed": jnp.ones((10, 4))}
      >>> table = jp.sites(f, params, jnp.array([1])).embedding
      >>> frozen, adapter = jp.split(jp.prompt_tuning(2, table)(jax.random.key(0), params))
      >>> adapter["embed/rows"].shape, jp.prompts.virtual_token_ids(table["embed"], 2).tolist()
      ((2, 4), [10, 11])

    References:
      Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021, sections 2
      and 3.2. https://arxiv.org/abs/2104.08691
    """
    if length < 1:
        raise ValueError(
            f"`prompt_tuning(length={length})`: `length` must be at least 1, the number of virtual "
            "tokens."
        )
    start: Any = init if init_text is None else _ids_of_text(init_text, tokenizer, init)
    if isinstance(start, str) and start not in ("random", "vocabulary"):
        raise ValueError(
            f"`prompt_tuning(init='{start}')`: `init` must be 'random', 'vocabulary' or a sequence "
            "of token ids. To start at a text, give `init_text='...'` and its `tokenizer`."
        )
    if not isinstance(start, str):
        start = [int(i) for i in start]
        if not start:
            raise ValueError(
                "`prompt_tuning(init=[])`: `init` must contain at least one token id. Give the ids "
                "of some tokens, or init='random'."
            )

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_table("prompt_tuning", site)
        shape, rows = (length, site.size(OUT)), site.size(IN)
        if start == "random":
            values = init_std * jax.random.normal(key, shape, dtype)
        elif start == "vocabulary":
            values = embeddings(view, jax.random.randint(key, (length,), 0, rows))
        else:
            if not 0 <= min(start) <= max(start) < rows:
                raise ValueError(
                    f"`prompt_tuning(init={_shortened(start)})` has ids out of range: "
                    f"'{site.path}' has {rows} rows, so ids are from 0 to {rows - 1}. Use the "
                    "tokenizer of this model."
                )
            values = embeddings(view, jnp.resize(jnp.asarray(start), (length,)))
        weight = SoftPrompt(view.weight, Trainable(values.astype(dtype)))
        return dataclasses.replace(view, weight=weight)

    options = {
        "length": length,
        "sites": sites,
        "init": start,
        "init_std": init_std,
        "dtype": dtype,
    }
    return Method(
        "prompt_tuning",
        options,
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="prompt_tuning"),
    )


def _shortened(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 10 else f"[{', '.join(map(str, ids[:10]))}, ...]"


def check_table(caller: str, site: Site) -> None:
    """Raises ValueError where a weight is not one table that is only looked up by id."""
    if site.kinds & {"one-hot", "other"} or "embedding" not in site.kinds:
        raise ValueError(
            f"`{caller}`: the model uses '{site.path}' as {', '.join(sorted(site.kinds))}. Virtual "
            "tokens need a table that the model only looks up by id; a one-hot product would see "
            "zeros instead of them. Select the embedding table, `sites.embedding`, or make the "
            "model index its table."
        )
    if site.stack:
        raise ValueError(
            f"`{caller}`: '{site.path}' is a stack of tables {site.stack}, but virtual tokens need "
            "a single one. Store the tables as arrays of their own."
        )


def embeddings(view: View, ids: Any) -> jax.Array:
    """Rows of the table as the model has them now, with the other methods that act on it."""
    view = at_its_start(view)
    real = dataclasses.replace(view, weight=without_prompts(view.weight))
    return jnp.take(dense(real.canonical()), ids, axis=0)


def without_prompts(w: Any) -> Any:
    """The weight without its prompts, which are not part of the matrix of real rows."""
    if not isinstance(w, Weight) or (name := base_field(w)) is None:
        return w
    below = without_prompts(getattr(w, name))
    if type(w).extra_rows is not Weight.extra_rows:  # A prompt, however its rows are computed.
        return below
    return dataclasses.replace(w, **{name: below})  # type: ignore[type-var]


def _ids_of_text(text: str, tokenizer: Any, init: Any) -> list[int]:
    if init != "random":
        raise ValueError(
            f"`prompt_tuning(init={init!r}, init_text={text!r})`: give either `init` or "
            "`init_text`, not both."
        )
    if tokenizer is None:
        raise ValueError(
            f"`prompt_tuning(init_text={text!r})` needs the model's tokenizer: give "
            "`tokenizer=tokenizers.Tokenizer.from_file(...)`, or the token ids as `init`."
        )
    ids = tokenize(tokenizer, text)
    if not len(ids):
        raise ValueError(
            f"`prompt_tuning(init_text={text!r})`: the tokenizer gives no token for this text. "
            "Give a longer text, or init='random'."
        )
    return list(ids)


def tokenize(tokenizer: Any, text: str) -> Sequence[int]:
    """Ids of a text without special tokens.

    Args:
      tokenizer: A `tokenizers.Tokenizer`, or a function from a text to ids.
      text: The text.
    """
    if callable(tokenizer):
        return tokenizer(text)
    return tokenizer.encode(text, add_special_tokens=False).ids
