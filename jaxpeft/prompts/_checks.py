"""Checks that a model and a loss do not depend on the placeholders at virtual positions.

A prefix replaces keys and values at virtual positions, where the input of the model has
placeholder tokens. A model that also reads a placeholder elsewhere (a pooler of position 0, a
mean over all positions, a convolution over time, time before batch) gives wrong outputs and no
error, so the checks replace the placeholders by other tokens and compare the outputs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._argument_order import check_loss_order, check_order
from jaxpeft._lift import lift
from jaxpeft._methods.prefix_tuning import EncodedPrefix, Prefix
from jaxpeft._methods.prompt_tuning import SoftPrompt, embeddings
from jaxpeft._methods.unipelt import GatedBottleneck, GatedLowRank, GatedPrefix
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, Weight, base_field, chain_of
from jaxpeft.extend._apply import apply_to_sites
from jaxpeft.prompts._virtual import replaced_placeholders


def check_prompt(fn: Callable, params: Any, site: Site, tokens: Any, *args: Any) -> None:
    """Checks a model for soft prompts: a virtual token that copies a real one must act like it.

    Runs `fn(params, tokens, *args)` twice, once with the first token replaced by a virtual token
    with the same embedding. The outputs may differ by rounding, eps ** (3/4) of the largest output
    with eps that of the coarsest dtype of the parameters. Where they differ by more, the model
    does more with ids than look them up (it clamps or masks them, or has a second table), and
    virtual tokens would be silently wrong.

    Args:
      fn: The model.
      params: Its parameters.
      site: The embedding table.
      tokens: Real ids (..., time), at least one.
      args: Other arguments of the model.

    Raises:
      ValueError: The outputs differ.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> model = lambda p, ids: jnp.tanh(p["embed"][ids])
      >>> params, ids = {"embed": jnp.ones((10, 4))}, jnp.array([[1, 2, 3]])
      >>> check_prompt(model, params, jp.sites(model, params, ids)["embed"], ids)
    """
    tokens = jnp.asarray(tokens)
    first = (0,) * tokens.ndim

    def with_copy(key: jax.Array, site: Site, view: View) -> View:
        row = embeddings(view, tokens[first])[None]
        return dataclasses.replace(view, weight=SoftPrompt(view.weight, row))

    table = Sites({site.path: site})
    tree = apply_to_sites(jax.random.key(0), params, table, with_copy, caller="check_prompt")
    run = jax.jit(lift(fn))
    # Not bit for bit: two programs of the same sums may round differently.
    floats = [x.dtype for x in jax.tree.leaves(params, is_leaf=is_view)]
    floats = [dtype for dtype in floats if jnp.issubdtype(dtype, jnp.inexact)]
    eps = max((float(jnp.finfo(dtype).eps) for dtype in floats), default=None)
    real = run(tree, tokens, *args)
    virtual = run(tree, tokens.at[first].set(site.size(IN)), *args)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(virtual), strict=True):
        if difference(a, b, eps).any():
            raise ValueError(
                f"`check_prompt`: a virtual token with the embedding of token {int(tokens[first])} "
                "gives other outputs than that token: the model does more with ids than look them "
                f"up in '{site.path}' (it clamps or masks them, or reads a second table), so soft "
                "prompts would be silently wrong. Make the model only look up its ids, or use "
                "`prefix_tuning`."
            )


def difference(a: Any, b: Any, eps: float | None = None) -> np.ndarray:
    """Where two results differ by more than rounding: eps ** (3/4) of the largest in `a`.

    Args:
      a, b: Arrays of one shape. Integers and bools must be equal.
      eps: Machine epsilon of the computation. `None` means that of their dtype.
    """
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return np.asarray(a != b)
    eps = float(jnp.finfo(a.dtype).eps) if eps is None else eps
    wide = [np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (a, b)]
    largest = np.max(np.abs(wide[0]), initial=0, where=np.isfinite(wide[0]))
    # Written so that a NaN in one of them differs.
    return ~((np.abs(wide[0] - wide[1]) <= eps**0.75 * largest) | (wide[0] == wide[1]))


def check_prefix(
    fn: Callable, tree: Any, tokens: Any, virtual_positions: Any, *args: Any, **kwargs: Any
) -> None:
    """Checks a model for prefixes: placeholders must not matter, and the prefix must.

    Runs `fn(tree, tokens, *args, **kwargs)` with other placeholders, which may change only the
    outputs at virtual positions; and with other rows of each layer's prefix, which must change the
    outputs at all real positions. Where they do not, a mask, another example of a packed row or
    a sliding window hides the prefix. `jaxpeft.train.fit` runs the first check on its own, if
    the loss calls `prepend_virtual_tokens` or `prepend_prefixes`.

    Args:
      fn: The model, or any function of it. Outputs whose first axes are (batch, time) are
        compared at real positions, all others as a whole.
      tree: The parameters with the prefix, `combine(frozen, adapter, virtual_positions=...)`.
      tokens: Ids (batch, time) behind placeholders, without padding, as
        `prepend_virtual_tokens` returns them.
      virtual_positions: As given to `combine`.
      args, kwargs: Other arguments of the model.

    Raises:
      ValueError: An output depends on a placeholder, or does not depend on the prefix; names the
        output and the position. Or the tree has no prefix at these positions.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> p = {"table": jnp.eye(5), "k": jnp.ones((5, 2))}
      >>> def model(p, ids):  # each output depends on all tokens up to its own
      ...     return jnp.cumsum(p["table"][ids] @ p["k"], axis=1)
      >>> ids, positions = jp.prompts.prepend_virtual_tokens(jnp.array([[1, 2], [3, 4]]), 1)
      >>> keys = jp.sites(model, p, ids).match("k")
      >>> frozen, adapter = jp.split(jp.prefix_tuning(1, keys, keys - keys)(jax.random.key(0), p))
      >>> tree = jp.combine(frozen, adapter, virtual_positions=positions)
      >>> check_prefix(model, tree, ids, positions)
    """
    tokens, positions = jnp.asarray(tokens), np.asarray(virtual_positions)
    virtual = positions >= 0
    paths = _prefix_paths(tree, positions)
    if tokens.shape != positions.shape or not virtual.any() or not paths:
        raise ValueError(
            f"`check_prefix`: tokens of shape {tokens.shape}, virtual positions of shape "
            f"{positions.shape}, {int(virtual.sum())} of them virtual, and a tree in which "
            f"{paths or 'no weights'} have a prefix at these positions. Give the tokens and the "
            "positions that `prepend_virtual_tokens` returns, and the tree of `combine(frozen, "
            "adapter, virtual_positions=positions)`."
        )
    run = jax.jit(lambda tree, tokens: jax.tree.leaves(lift(fn)(tree, tokens, *args, **kwargs)))
    outputs = run(tree, tokens)
    old, new = _another_placeholder(tokens, virtual)
    replaced = run(tree, jnp.where(virtual, new, tokens))
    for i, (a, b) in enumerate(zip(outputs, replaced, strict=True)):
        wrong = difference(a, b) & _at_real_positions(a.shape, virtual)
        if wrong.any():
            at = tuple(int(x[0]) for x in np.nonzero(wrong))
            raise ValueError(
                f"`check_prefix`: output {i} of shape {a.shape} depends on a placeholder: with "
                f"token {new} instead of {old} at virtual positions, its entry {at} is {b[at]} "
                f"instead of {a[at]}. " + _WAY_OUT
            )
    for path in paths:
        other = run(_with_other_rows(tree, path, positions), tokens)
        _check_rows_matter(path, outputs, other, virtual)


_WAY_OUT = (
    "The model pools, shifts or convolves over virtual positions, computes its mask or positions "
    "from ids, or has time before batch. Keep virtual positions out of it (with a mask, or "
    "`drop_virtual_positions` before a pooler), or lift it over one example and use `jax.vmap`."
)


def _prefix_paths(tree: Any, positions: np.ndarray) -> list[str]:
    """The paths of the weights that have a prefix at these virtual positions."""
    views = [x for x in jax.tree.leaves(tree, is_leaf=is_view) if is_view(x)]
    return [
        view.path
        for view in views
        if any(_is_prefix_at(w, positions) for w in chain_of(view.weight))
    ]


def _is_prefix_at(w: Weight, positions: np.ndarray) -> bool:
    if not isinstance(w, (Prefix, EncodedPrefix)):
        return False
    return np.array_equal(w.virtual_positions, positions)


def _another_placeholder(tokens: jax.Array, virtual: np.ndarray) -> tuple[int, int]:
    """The placeholder, and another id of the table."""
    old = int(tokens[np.nonzero(virtual)[0][0], np.nonzero(virtual)[1][0]])
    others = np.asarray(tokens)[np.asarray(tokens) != old]
    return old, int(others[0]) if others.size else old + 1


def _at_real_positions(shape: tuple[int, ...], virtual: np.ndarray) -> np.ndarray:
    """Which entries of an output are not at virtual positions."""
    for mask in (virtual, virtual.T):
        if shape[:2] == mask.shape:
            return ~mask.reshape(*mask.shape, *[1] * (len(shape) - 2))
    return np.ones((1,) * len(shape), bool)


def _with_other_rows(tree: Any, path: str, positions: np.ndarray) -> Any:
    """The tree with other rows in the last layer of one weight's stack.

    Rows of an earlier layer would reach every token through the tokens that attend to them.
    """

    def noisy(x: jax.Array, stack: int) -> jax.Array:
        size = 1 + jnp.max(jnp.abs(x))
        noise = size * jax.random.normal(jax.random.key(0), x.shape[stack:], x.dtype)
        return x.at[(-1,) * stack].add(noise)

    def replaced(w: Any, stack: int) -> Any:
        if not isinstance(w, Weight) or (name := base_field(w)) is None:
            return w
        if _is_prefix_at(w, positions):
            field = "rows" if isinstance(w, Prefix) else "up_bias"
            return dataclasses.replace(w, **{field: noisy(getattr(w, field), stack)})  # type: ignore
        return dataclasses.replace(w, **{name: replaced(getattr(w, name), stack)})  # type: ignore

    def at_path(x: Any) -> Any:
        if not isinstance(x, View) or x.path != path:
            return x
        return dataclasses.replace(x, weight=replaced(x.weight, len(x.sizes("stack"))))

    return jax.tree.map(at_path, tree, is_leaf=is_view)


def _check_rows_matter(path: str, outputs: list, other: list, virtual: np.ndarray) -> None:
    """Raises where no output of a position, or of an example, depends on the rows of a weight.

    Args:
      path: Path of the weight.
      outputs, other: Outputs with its rows, and with other rows.
      virtual: bool (batch, time), true at virtual positions.
    """
    by_position = np.zeros(virtual.shape, bool)
    by_example = np.zeros(len(virtual), bool)
    for a, b in zip(outputs, other, strict=True):
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
            f"`check_prefix`: the output at {where}, one of {int(missing.sum())}, does not depend "
            f"on the prefix at '{path}'. A mask hides virtual positions, the row is packed, or a "
            "sliding window ends before them. For `jaxpeft.models.decoder`, give "
            "`prepend_virtual_tokens` the `segment_ids`; for another model, give each example "
            "virtual positions of its own (`jaxpeft.data.Batches(..., virtual_tokens=...)`). Check "
            "with tokens without padding."
        )


def check_loss(loss_fn: Callable, frozen: Any, adapter: Any, batch: Any, key: Any) -> None:
    """Checks a loss for prefixes and soft prompts: it must not depend on placeholders.

    Runs the loss once more with other placeholders. For packed rows, each example must attend to
    its virtual tokens: where the batch is a mapping with `segment_ids`, as those of
    `jaxpeft.data.Batches` are, the loss must pass them to `prepend_virtual_tokens`.

    Args:
      loss_fn: `loss_fn(frozen, adapter, batch, key)`, which calls `prepend_virtual_tokens` or
        `prepend_prefixes`. A loss that is given their results is not checked.
      frozen, adapter: From `split`.
      batch, key: As the loss takes them.

    Raises:
      ValueError: The loss depends on a placeholder, or it ignores that rows are packed; or
        the frozen tree and the adapter are swapped.
    """
    check_order("check_loss(loss_fn, frozen, adapter, batch, key)", adapter)
    check_loss_order(loss_fn)
    views = [x for x in jax.tree.leaves(frozen, is_leaf=is_view) if is_view(x)]
    weights = [w for view in views for w in chain_of(view.weight)]
    has_prefix = any(isinstance(w, (Prefix, EncodedPrefix)) for w in weights)
    if not has_prefix and not any(type(w).extra_rows is not Weight.extra_rows for w in weights):
        return
    while hasattr(loss_fn, "lower") and hasattr(loss_fn, "__wrapped__"):
        loss_fn = loss_fn.__wrapped__  # a jitted loss would use its cached trace
    packed = _packed(batch)
    if packed and any(isinstance(w, (GatedLowRank, GatedPrefix, GatedBottleneck)) for w in weights):
        raise ValueError(
            f"Row {packed[0]} of the batch packs {packed[1]} examples, but a gate of `unipelt` is "
            "one number per row, the mean over all of its positions. Give each example a row of "
            "its own: `jaxpeft.data.Batches(..., pack=False)`."
        )
    if packed:
        with replaced_placeholders() as told:
            jax.eval_shape(lambda *given: loss_fn(*given), frozen, adapter, batch, key)
        if not all(told):
            row, count = packed
            raise ValueError(
                f"Row {row} of the batch packs {count} examples, but the loss puts virtual tokens "
                "in front of the first. Pass the `segment_ids` to `prepend_virtual_tokens` (or "
                "`prepend_prefixes`) where the model is `jaxpeft.models.decoder`; for another "
                "model, give each example virtual tokens of its own: "
                "`Batches(..., virtual_tokens=...)`."
            )
    if not has_prefix:
        return
    plain = jax.jit(lambda *given: loss_fn(*given))(frozen, adapter, batch, key)
    with replaced_placeholders():
        other = jax.jit(lambda *given: loss_fn(*given))(frozen, adapter, batch, key)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        if difference(jnp.asarray(a), jnp.asarray(b)).any():
            raise ValueError(
                "The loss depends on a placeholder: with another token at virtual positions, it is "
                f"{b} instead of {a}. {_WAY_OUT} `jp.prompts.check_prefix` names the output."
            )


def _packed(batch: Any) -> tuple[int, int] | None:
    """The index of the first row of a batch with several examples, and their number."""
    ids = batch.get("segment_ids") if isinstance(batch, Mapping) else None
    if ids is None or isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return None
    counts = [len(np.unique(row[row > 0])) for row in np.asarray(ids)]
    return next(((row, count) for row, count in enumerate(counts) if count > 1), None)
