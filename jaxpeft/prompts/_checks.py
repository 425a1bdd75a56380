"""What stands at virtual positions must not matter: checks of a model and of a loss.

A prefix gives keys and values at virtual positions, where the model has placeholders. A model
that reads a placeholder in another way (a pooler of position 0, a mean over all positions, a
convolution over time, batch and time that have changed places) is wrong without an error, so the
checks exchange the placeholders and look whether anything changes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._lift import lift
from jaxpeft._methods.prefix_tuning import EncodedPrefix, Prefix
from jaxpeft._methods.prompt_tuning import SoftPrompt, embeddings
from jaxpeft._methods.unipelt import GatedBottleneck, GatedLowRank, GatedPrefix
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, Weight, base_field, chain_of
from jaxpeft.extend._apply import apply_to_sites
from jaxpeft.prompts._virtual import exchanged_placeholders


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
    tree = apply_to_sites(jax.random.key(0), params, table, copied, caller="check_prompt")
    run = jax.jit(lift(fn))
    # Not to the bit: the sums of two programs that are one may differ by their rounding.
    floats = [x.dtype for x in jax.tree.leaves(params, is_leaf=is_view)]
    floats = [dtype for dtype in floats if jnp.issubdtype(dtype, jnp.inexact)]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in floats), default=None)
    real = run(tree, tokens, *args)
    virtual = run(tree, tokens.at[first].set(site.size(IN)), *args)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(virtual), strict=True):
        if difference(a, b, eps).any():
            raise ValueError(
                f"A virtual token with the embedding of token {int(tokens[first])} does not act "
                f"like that token: the model does more with ids than look them up in "
                f"'{site.path}' (it clamps or masks them, or reads a second table). Prompts "
                "would go silently wrong in it."
            )


def difference(a: Any, b: Any, eps: float | None = None) -> np.ndarray:
    """Where two results differ by more than rounding: eps ** (3/4) of the largest in `a`.

    Args:
      a, b: Arrays of one shape; those of no floats are to be equal.
      eps: Of the arithmetic behind them; `None` takes that of their dtype.
    """
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return np.asarray(a != b)
    eps = float(jnp.finfo(a.dtype).eps) if eps is None else eps
    wide = [np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (a, b)]
    largest = np.max(np.abs(wide[0]), initial=0, where=np.isfinite(wide[0]))
    # Written so that a NaN in one of them differs.
    return ~((np.abs(wide[0] - wide[1]) <= eps**0.75 * largest) | (wide[0] == wide[1]))


def check_prefix(
    fn: Callable, tree: Any, tokens: Any, slots: Any, *args: Any, **kwargs: Any
) -> None:
    """Runs `fn(tree, tokens, *args, **kwargs)` with other placeholders, and with other rows.

    What the placeholders are must change nothing but outputs at virtual positions. What the rows
    of a layer are must change the outputs at all others: else a mask, another example of a packed
    row, or a sliding window hides the prefix there. `jaxpeft.train.fit` looks at the first of the
    two by itself, where the loss calls `prepend_virtual_tokens` or `prepend_prefixes`.

    Args:
      fn: The model, or any function of it; outputs whose first axes are (batch, time) are looked
        at where there are real tokens, all others as a whole.
      tree: The parameters with the prefix, `combine(frozen, adapter, virtual=slots)`.
      tokens: Ids (batch, time) behind placeholders, without padding, as `prepend_virtual_tokens` gives them.
      slots: As `combine` was given them.
      args, kwargs: What else the model takes.

    Raises:
      ValueError: A placeholder is read, or a prefix is not; names where. The tree has no prefix at
        these slots.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> p = {"table": jnp.eye(5), "k": jnp.ones((5, 2))}
      >>> def model(p, ids):  # each token has the sum of what those up to it give
      ...     return jnp.cumsum(p["table"][ids] @ p["k"], axis=1)
      >>> ids, slots = jp.prompts.prepend_virtual_tokens(jnp.array([[1, 2], [3, 4]]), 1)
      >>> keys = jp.sites(model, p, ids).match("k")
      >>> frozen, adapter = jp.split(jp.prefix_tuning(1, keys, keys - keys)(jax.random.key(0), p))
      >>> check_prefix(model, jp.combine(frozen, adapter, virtual=slots), ids, slots)
    """
    tokens, slots = jnp.asarray(tokens), np.asarray(slots)
    virtual = slots >= 0
    paths = _paths(tree, slots)
    if tokens.shape != slots.shape or not virtual.any() or not paths:
        raise ValueError(
            f"`check_prefix` is given tokens {tokens.shape} and slots {slots.shape}, "
            f"{int(virtual.sum())} of which are virtual, with a tree in which "
            f"{paths or 'no weights'} have them. Give the tokens and slots of `prepend_virtual_tokens`, and "
            "the tree that `combine(frozen, adapter, virtual=slots)` makes."
        )
    run = jax.jit(lambda tree, tokens: jax.tree.leaves(lift(fn)(tree, tokens, *args, **kwargs)))
    outputs = run(tree, tokens)
    old, new = _another(tokens, virtual)
    for i, (a, b) in enumerate(
        zip(outputs, run(tree, jnp.where(virtual, new, tokens)), strict=True)
    ):
        wrong = difference(a, b) & _real(a.shape, virtual)
        if wrong.any():
            at = tuple(int(x[0]) for x in np.nonzero(wrong))
            raise ValueError(
                f"Output {i} of shape {a.shape} reads a placeholder: with token {new} in the place "
                f"of {old} at virtual positions, it changes at {at} from {a[at]} to {b[at]}. "
                + _WAY_OUT
            )
    for path in paths:
        changed = run(_with_other_rows(tree, path, slots), tokens)
        _check_felt(path, outputs, changed, virtual)


_WAY_OUT = (
    "The model pools, shifts or convolves over virtual positions, takes its mask or positions from "
    "ids, or has time before batch. Keep virtual positions out of it (a mask, `drop_virtual_positions` "
    "before a pooler), or lift it over one example and use `jax.vmap`."
)


def _paths(tree: Any, slots: np.ndarray) -> list[str]:
    """The paths of the weights that have a prefix at these slots."""
    views = [x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x)]
    return [view.path for view in views if any(_has(w, slots) for w in chain_of(view.weight))]


def _has(w: Weight, slots: np.ndarray) -> bool:
    return isinstance(w, (Prefix, EncodedPrefix)) and np.array_equal(w.slots, slots)


def _another(tokens: jax.Array, virtual: np.ndarray) -> tuple[int, int]:
    """The placeholder, and another id that the table has."""
    old = int(tokens[np.nonzero(virtual)[0][0], np.nonzero(virtual)[1][0]])
    others = np.asarray(tokens)[np.asarray(tokens) != old]
    return old, int(others[0]) if others.size else old + 1


def _real(shape: tuple[int, ...], virtual: np.ndarray) -> np.ndarray:
    """Which entries of an output are not at virtual positions."""
    for where in (virtual, virtual.T):
        if shape[:2] == where.shape:
            return ~where.reshape(*where.shape, *[1] * (len(shape) - 2))
    return np.ones((1,) * len(shape), bool)


def _with_other_rows(tree: Any, path: str, slots: np.ndarray) -> Any:
    """The tree with other rows in the last layer of one weight's stack.

    Of a layer further down, what one token has seen reaches the others.
    """

    def other(x: jax.Array, stack: int) -> jax.Array:
        size = 1 + jnp.max(jnp.abs(x))
        noise = size * jax.random.normal(jax.random.key(0), x.shape[stack:], x.dtype)
        return x.at[(-1,) * stack].add(noise)

    def changed(w: Any, stack: int) -> Any:
        if not isinstance(w, Weight) or (name := base_field(w)) is None:
            return w
        if _has(w, slots):
            field = "rows" if isinstance(w, Prefix) else "up_bias"
            return dataclasses.replace(w, **{field: other(getattr(w, field), stack)})  # type: ignore
        return dataclasses.replace(w, **{name: changed(getattr(w, name), stack)})  # type: ignore

    def one(x: Any) -> Any:
        if not isinstance(x, View) or x.path != path:
            return x
        return dataclasses.replace(x, weight=changed(x.weight, len(x.sizes("stack"))))

    return jax.tree.map(one, tree, is_leaf=is_view)


def _check_felt(path: str, outputs: list, changed: list, virtual: np.ndarray) -> None:
    """Raises where no output depends on the rows of a weight, by position or by example."""
    by_position = np.zeros(virtual.shape, bool)
    by_example = np.zeros(len(virtual), bool)
    for a, b in zip(outputs, changed, strict=True):
        differs = np.asarray(a != b)
        if a.shape[:2] == virtual.shape:
            by_position |= differs.reshape(*virtual.shape, -1).any(-1)
        elif a.ndim and len(a) == len(virtual):
            by_example |= differs.reshape(len(a), -1).any(-1)
        else:
            by_example |= differs.any()
    positions = any(a.shape[:2] == virtual.shape for a in outputs)
    missing = ~by_position & ~virtual & ~by_example[:, None] if positions else ~by_example[:, None]
    if missing.any():
        example, time = (int(x[0]) for x in np.nonzero(missing))
        where = f"example {example}" + (f", position {time}" if positions else "")
        raise ValueError(
            f"The prefix at '{path}' is not seen from {where}, one of {int(missing.sum())}: its "
            "rows change nothing there. A mask leaves virtual positions out, the row is packed, or "
            "a sliding window ends before them. Give `prepend_virtual_tokens` the `segment_ids` where the "
            "model is `jaxpeft.models.decoder`, or each example virtual positions of its own "
            "(`jaxpeft.data.Batches(..., virtual=...)`), and tokens without padding."
        )


def check_loss(loss_fn: Callable, adapter: Any, frozen: Any, batch: Any, key: Any) -> None:
    """Runs a loss once more with other placeholders, where it has a prefix or a prompt.

    Of packed rows, each example has to see its virtual tokens: where the batch is a mapping with
    `segment_ids`, as those of `jaxpeft.data.Batches` are, `prepend_virtual_tokens` has to be told of them.

    Args:
      loss_fn: `loss_fn(adapter, frozen, batch, key)`, which calls `prepend_virtual_tokens` or
        `prepend_prefixes`; of one that is given their results, nothing can be exchanged.
      adapter, frozen: From `split`.
      batch, key: As the loss takes them.

    Raises:
      ValueError: The loss changes, or rows are packed and it does not mind.
    """
    views = [x for x in jax.tree.leaves(frozen, is_leaf=is_view) if is_view(x)]
    weights = [w for view in views for w in chain_of(view.weight)]
    has_prefix = any(isinstance(w, (Prefix, EncodedPrefix)) for w in weights)
    if not has_prefix and not any(type(w).extra_rows is not Weight.extra_rows for w in weights):
        return
    while hasattr(loss_fn, "lower") and hasattr(loss_fn, "__wrapped__"):
        loss_fn = loss_fn.__wrapped__  # of a jitted loss: its trace keeps the placeholders
    packed = _packed(batch)
    if packed and any(isinstance(w, (GatedLowRank, GatedPrefix, GatedBottleneck)) for w in weights):
        raise ValueError(
            f"Row {packed[0]} of the batch packs {packed[1]} examples, but a gate of `unipelt` is "
            "one number for each row, the mean over all of its positions. Give each example a row "
            "of its own: `Batches(..., pack=False)`."
        )
    if packed:
        with exchanged_placeholders() as told:
            jax.eval_shape(lambda *given: loss_fn(*given), adapter, frozen, batch, key)
        if not all(told):
            row, count = packed
            raise ValueError(
                f"Row {row} of the batch packs {count} examples, but the loss puts virtual tokens "
                "in front of the first alone. Give `prepend_virtual_tokens` (or `prepend_prefixes`) the "
                "`segment_ids` where the model is `jaxpeft.models.decoder`; for another model, "
                "give each example virtual tokens of its own: `Batches(..., virtual=...)`."
            )
    if not has_prefix:
        return
    plain = jax.jit(lambda *given: loss_fn(*given))(adapter, frozen, batch, key)
    with exchanged_placeholders():
        other = jax.jit(lambda *given: loss_fn(*given))(adapter, frozen, batch, key)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        if difference(jnp.asarray(a), jnp.asarray(b)).any():
            raise ValueError(
                f"The loss reads a placeholder: with another token at virtual positions, it is {b} "
                f"instead of {a}. {_WAY_OUT} `jp.prompts.check_prefix` says at which output."
            )


def _packed(batch: Any) -> tuple[int, int] | None:
    """The first row of a batch that holds several examples, and how many."""
    ids = batch.get("segment_ids") if isinstance(batch, Mapping) else None
    if ids is None or isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return None
    counts = [len(np.unique(row[row > 0])) for row in np.asarray(ids)]
    return next(((row, count) for row, count in enumerate(counts) if count > 1), None)
