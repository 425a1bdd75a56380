"""Prompt tuning and P-tuning: trained rows beyond those of the embedding table."""

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.lift import lift
from jaxpeft.method import Method
from jaxpeft.methods.encoders import ENCODERS, encode, init_encoder
from jaxpeft.methods.placeholders import off
from jaxpeft.methods.placing import at_its_start, place, takes_sites
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import (
    IN,
    OUT,
    View,
    Weight,
    arrays,
    axes,
    base,
    base_field,
    dense,
    is_view,
    static,
    weight,
)


@weight
class SoftPrompt(Weight):
    """An embedding table with more rows: ids from `in` on are virtual tokens."""

    w: Any = base()
    rows: Any = axes("virtual", "out")

    is_matrix = False

    @property
    def extra_rows(self) -> int:
        """Virtual tokens on top of those that the base serves."""
        return _extra(self.w) + self.rows.shape[-2]

    def forward(self, x):
        """A product over the real rows."""
        return x @ self.w

    def transposed(self, y):
        """A tied head keeps its own vocabulary: no logits for virtual tokens."""
        return y @ self.w.T

    def lookup(self, ids):
        """Rows of the table, or of the prompt for ids beyond it."""
        first = self.rows.site.rows + _extra(self.w)
        real = self.w[jnp.minimum(ids, first - 1)]
        virtual = self.rows[jnp.clip(ids - first, 0, self.rows.shape[-2] - 1)]
        return jnp.where((ids >= first)[..., None], virtual.astype(real.dtype), real)


@weight
class EncodedPrompt(Weight):
    """A prompt whose rows a network makes of trained ones, those of each task by themselves."""

    w: Any = base()
    rows: Any = axes("virtual", "embed")
    encoder: Any = arrays()
    kind: str = static("lstm")
    lengths: tuple[int, ...] = static(())

    is_matrix = False
    folds = True

    @property
    def extra_rows(self) -> int:
        """Virtual tokens on top of those that the base serves."""
        return _extra(self.w) + self.rows.shape[-2]

    def derived(self):
        return {"rows": encode(self.kind, self.encoder, self.rows.array, self.lengths)}

    def acting(self, **derived):
        return SoftPrompt(self.w, **derived)


def _extra(w: Any) -> int:
    return w.extra_rows if isinstance(w, Weight) else 0


@takes_sites
def prompt(
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
        raise ValueError(f"`prompt(length={length})`: at least one virtual token is needed.")
    start: Any = init if text is None else _text_ids(text, tokenizer, init)
    if isinstance(start, str) and start not in ("random", "vocabulary"):
        raise ValueError(
            f"`prompt(init='{start}')`: rows start at 'random', at 'vocabulary', at a sequence of "
            "ids, or at a text, `text='...'` with its `tokenizer`."
        )
    if not isinstance(start, str):
        start = [int(i) for i in start]
        if not start:
            raise ValueError("`prompt(init=...)` is told of no token to start at.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        _check_table("prompt", site)
        shape, rows = (length, site.size(OUT)), site.size(IN)
        if start == "random":
            values = std * jax.random.normal(key, shape, dtype)
        elif start == "vocabulary":
            values = embeddings(view, jax.random.randint(key, (length,), 0, rows))
        else:
            if not 0 <= min(start) <= max(start) < rows:
                raise ValueError(
                    f"`prompt(init={start[:10]}...)` starts at ids that '{site.path}' with its "
                    f"{rows} rows does not have. Is it the tokenizer of this model?"
                )
            values = embeddings(view, jnp.resize(jnp.asarray(start), (length,)))
        weight = SoftPrompt(view.weight, Train(values.astype(dtype)))
        return dataclasses.replace(view, weight=weight)

    options = {"length": length, "sites": sites, "init": start, "std": std, "dtype": dtype}
    return Method("prompt", options, lambda key, tree: place(key, tree, sites, make, who="prompt"))


@takes_sites
def p_tuning(
    length: int | Sequence[int],
    sites: Sites,
    *,
    encoder: Literal["lstm", "mlp"] = "lstm",
    hidden: int | None = None,
    layers: int = 2,
    embed: int | None = None,
    std: float = 0.02,
    dtype: Any = jnp.float32,
) -> Method:
    """P-tuning: virtual tokens whose embeddings a small network makes of trained ones.

    With "lstm", h = MLP([LSTM forward, LSTM backward](e)), where the LSTM has `layers` layers of
    `hidden` units in each direction and the MLP is Linear(2 hidden, 2 hidden), ReLU,
    Linear(2 hidden, width); with "mlp", Linear(embed, hidden), ReLU, Linear(hidden, hidden),
    ReLU, Linear(hidden, width). An LSTM layer has both of PyTorch's bias vectors.

    Tasks have a table each and share the network. After training, `fold` leaves plain rows, those
    of `prompt`; until then encoder and tables are the adapter, so training can be resumed. Virtual
    tokens stand anywhere among real ones: see `template`.

    Args:
      length: Virtual tokens, or those of each task; their ids follow each other.
      sites: The embedding table that token ids are looked up in.
      encoder: "lstm" or "mlp".
      hidden: Units of the network. `None` takes the width of the model.
      layers: Of the LSTM.
      embed: Width of the trained embeddings. `None` takes that of the model.
      std: Embeddings start at Normal(0, std ** 2).
      dtype: Of what is trained.

    Returns:
      A method with length * embed trained numbers, and those of the network.

    Raises:
      ValueError: A length or width is not positive, an unknown encoder, or a table as for
        `prompt`.

    References:
      Liu et al., GPT Understands, Too, 2021, sections 3.1 and 3.2.
      https://arxiv.org/abs/2103.10385
    """
    lengths = (length,) if isinstance(length, int) else tuple(length)
    given = [n for n in (hidden, embed) if n is not None]
    if not lengths or min(*lengths, layers, *given, 1) < 1:
        raise ValueError(
            f"`p_tuning(length={length}, hidden={hidden}, layers={layers}, embed={embed})`: all of "
            "them are positive."
        )
    if encoder not in ENCODERS:
        raise ValueError(f"`p_tuning(encoder='{encoder}')`: choose of {list(ENCODERS)}.")

    def make(key: jax.Array, site: Site, view: View) -> View:
        _check_table("p_tuning", site)
        width = site.size(OUT)
        first, second = jax.random.split(key)
        sizes = dict(embed=embed or width, hidden=hidden or width, width=width, layers=layers)
        rows = std * jax.random.normal(first, (sum(lengths), sizes["embed"]), dtype)
        network = jax.tree.map(Train, init_encoder(second, encoder, dtype=dtype, **sizes))
        weight = EncodedPrompt(view.weight, Train(rows), network, encoder, lengths)
        return dataclasses.replace(view, weight=weight)

    options = dict(
        length=length if isinstance(length, int) else list(lengths),
        sites=sites,
        encoder=encoder,
        hidden=hidden,
        layers=layers,
        embed=embed,
        std=std,
        dtype=dtype,
    )
    return Method(
        "p_tuning", options, lambda key, tree: place(key, tree, sites, make, who="p_tuning")
    )


def _check_table(who: str, site: Site) -> None:
    if site.kinds & {"one-hot", "other"} or "embedding" not in site.kinds:
        raise ValueError(
            f"`{who}`: the model uses '{site.path}' as {', '.join(sorted(site.kinds))}. A "
            "virtual token exists only for a table that is read by id; a one-hot product "
            "would see zeros."
        )
    if site.stack:
        raise ValueError(f"`{who}`: '{site.path}' is a stack of tables {site.stack}.")


def embeddings(view: View, ids: Any) -> jax.Array:
    """Rows of the table as the model has them now, whatever other methods stand there already."""
    view = at_its_start(view)
    real = dataclasses.replace(view, weight=_real(view.weight))
    return jnp.take(dense(real.canonical()), ids, axis=0)


def _real(w: Any) -> Any:
    """The weight without prompts, which have no part in the matrix of real rows."""
    if not isinstance(w, Weight) or (name := base_field(w)) is None:
        return w
    below = _real(getattr(w, name))
    if isinstance(w, (SoftPrompt, EncodedPrompt)):
        return below
    return dataclasses.replace(w, **{name: below})  # type: ignore[type-var]


def _text_ids(text: str, tokenizer: Any, init: Any) -> list[int]:
    if init != "random":
        raise ValueError(f"`prompt(text=..., init={init!r})`: rows start at a text or elsewhere.")
    if tokenizer is None:
        raise ValueError(
            f"`prompt(text={text!r})` needs the model's tokenizer to know the ids of the text: "
            "give `tokenizer=tokenizers.Tokenizer.from_file(...)`, or the ids as `init=`."
        )
    ids = tokenizer(text) if callable(tokenizer) else _encoded(tokenizer, text)
    if not len(ids):
        raise ValueError(f"`prompt(text={text!r})`: the tokenizer makes no token of it.")
    return list(ids)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# --- Ids with virtual tokens among them ------------------------------------------------------


def virtual_ids(site: Site, length: int, start: int = 0) -> np.ndarray:
    """Ids (length,) of the virtual tokens `start`, `start` + 1, ... of a table.

    Args:
      site: The embedding table.
      length: How many ids.
      start: The first of the table's virtual tokens; the second prompt of length 8 starts at 8.
    """
    return site.size(IN) + start + np.arange(length, dtype=np.int32)


def template(
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
      >>> fill = template([100, 101], "{x}", [102], "{y}")
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
                "`template(..., tokenizer=...)`. Or give its ids."
            )
        return tokenizer(piece) if callable(tokenizer) else _encoded(tokenizer, piece)

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


def check_ids(tree: Any, site: Site, ids: Any) -> None:
    """Says whether every id has a row or a prompt behind it. Needs concrete ids.

    Args:
      tree: Params under the methods, before `split`, after it or combined again.
      site: The embedding table.
      ids: Integers of any shape, as the model is given them.

    Raises:
      ValueError: An id is out of range; names it and what there is.
    """
    views = (x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x))
    extra = next((_extra(view.weight) for view in views if view.path == site.path), 0)
    count = site.size(IN) + extra
    ids = np.asarray(ids)
    if ids.size and not (0 <= ids.min() and ids.max() < count):
        wrong = int(ids.max() if ids.max() >= count else ids.min())
        raise ValueError(
            f"Token id {wrong} has no row: '{site.path}' has {site.size(IN)} rows and "
            f"{extra} virtual tokens, so ids go up to {count - 1}."
        )


def check_prompt(fn: Callable, params: Any, site: Site, tokens: Any, *args: Any) -> None:
    """Runs `fn(params, tokens, *args)` with a virtual token that copies a real one.

    Nothing may change but by rounding (eps ** (3/4) of the largest output, in the coarsest dtype of
    the parameters); where something does, the model does more with ids than look them up
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
        row = embeddings(view, tokens[first])[None]
        return dataclasses.replace(view, weight=SoftPrompt(view.weight, row))

    table = Sites({site.path: site})
    tree = place(jax.random.key(0), params, table, copied, who="check_prompt")
    run = jax.jit(lift(fn))
    # Not to the bit: the sums of two programs that are one may differ by their rounding.
    floats = [x.dtype for x in jax.tree.leaves(params, is_leaf=is_view)]
    floats = [dtype for dtype in floats if jnp.issubdtype(dtype, jnp.inexact)]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in floats), default=None)
    real = run(tree, tokens, *args)
    virtual = run(tree, tokens.at[first].set(site.size(IN)), *args)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(virtual), strict=True):
        if off(a, b, eps).any():
            raise ValueError(
                f"A virtual token with the embedding of token {int(tokens[first])} does not act "
                f"like that token: the model does more with ids than look them up in "
                f"'{site.path}' (it clamps or masks them, or reads a second table). Prompts "
                "would go silently wrong in it."
            )
