"""Pruning while training: which entries of trained weights are zero, as optax transformations.

The weights are trained as a whole (`jaxpeft.unfreeze`), and an adapter holds them with their
zeros, so that the model, its step and its checkpoints know nothing of it.

pruned           fewer and fewer entries are kept, by magnitude, movement or Taylor scores
rigl             as many all the time, but not the same ones
masked_entries   the same ones all the time
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft._sites import Sites
from jaxpeft.extend._apply import check_whole
from jaxpeft.optim._top_k import largest_of_rows, largest_within
from jaxpeft.sparsity._masks import Structure, block_of, group_means, spread, unpacked

Rule = Literal["magnitude", "movement", "taylor"]
_RULES = ("magnitude", "movement", "taylor")


class PrunedState(NamedTuple):
    """What an update leaves for the next.

    Attributes:
      inner: State of the optimizer.
      step: How many updates there were, int[].
      dense: {path: the weight with its values of before where it is zero now}.
      scores: {path: of each entry}; empty for magnitudes, which follow from `dense`.
      masks: {path: which entries are kept, bool}.
      early: Parameters and the optimizer's state after step `rewind`; `None` without.
    """

    inner: Any
    step: jax.Array
    dense: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    early: Any


def scheduled_pruning(
    inner: optax.GradientTransformation,
    sites: Sites,
    density: float | optax.Schedule,
    *,
    rule: Rule = "magnitude",
    structure: Structure = "entry",
    scope: Literal["all", "matrix"] = "all",
    every: int = 10,
    decay: float = 0.9,
    rewind: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on trained weights of which only the best entries are not zero.

    A weight w of the model is `theta` where its mask is true and 0 elsewhere. The gradient g is
    that of w; `inner` moves theta by g * mask, and what is given up not at all, so that it stays
    what it was, and may come back. After every `every`-th update t, the share `density(t)` of
    entries with the largest scores is kept:

        magnitude   |theta|
        movement    S, after S -= theta * g in each update: the straight-through gradient of a
                    score that decides by its size. An entry whose w * g is positive moves to
                    zero, and goes; a rate would change no order. What goes together lies along
                    one gradient, so give up little at a time.
        taylor      a moving average of (theta * g)^2

    The usual schedules are optax's: `polynomial_schedule(1.0, 0.1, power=3, ...)` is the cubic one
    (Zhu and Gupta 2017), `piecewise_constant_schedule(1.0, {300: 0.8, 600: 0.8})` prunes a fifth
    of what is left each time, with training in between. With `rewind=k`, each time the density
    falls all parameters and the optimizer go back to where they were after step k, under the new
    mask: lottery tickets (Frankle et al. 2020).

    The best group of each matrix is always kept.

    Args:
      inner: The optimizer.
      sites: The weights, each trained as a whole.
      density: Share of all entries that is kept, 1 - sparsity, in (0, 1]; by step, or one number.
      rule: See above.
      structure: What is kept or given up together, see `jaxpeft.sparsity._masks.Structure`. The score
        of a group is the mean of its entries'.
      scope: Whether all matrices compete, or entries of one matrix with each other.
      every: See above.
      decay: Of the moving average.
      rewind: See above; 0 is the start.

    Returns:
      A transformation of adapters `{path: array}`, the last of a chain, whose `update` needs the
      parameters. Its state holds the weights once more, for movement and taylor twice, and what
      `rewind` returns to.

    Raises:
      ValueError: An option out of range, no weight selected or 2^31 entries, blocks that do not
        divide one; from `init`, a weight that the adapter does not train as a whole.

    References:
      Zhu and Gupta, To prune, or not to prune, 2017, section 3. https://arxiv.org/abs/1710.01878
      Sanh et al., Movement Pruning, 2020, sections 3 and 4. https://arxiv.org/abs/2005.07683
      Lagunas et al., Block Pruning For Faster Transformers, 2021. https://arxiv.org/abs/2109.04838
      Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020, section 5.
      https://arxiv.org/abs/1912.05671
    """
    if rule not in _RULES:
        raise ValueError(f"`scheduled_pruning(rule='{rule}')`: choose one of {', '.join(_RULES)}.")
    if scope not in ("all", "matrix"):
        raise ValueError(f"`scheduled_pruning(scope='{scope}')`: choose 'all' or 'matrix'.")
    if not callable(density) and not 0 < density <= 1:
        raise ValueError(f"`scheduled_pruning(density={density})`: a share in (0, 1] is needed.")
    if every < 1 or not 0 <= decay < 1 or (rewind is not None and rewind < 0):
        raise ValueError(
            f"`scheduled_pruning(every={every}, decay={decay}, rewind={rewind})`: at least 1, in [0, 1), and "
            "at least 0 or None."
        )
    _check_sites("scheduled_pruning", sites)
    sizes = {path: block_of(structure, site) for path, site in sites.items()}
    if (total := sum(math.prod(site.shape) for site in sites.values())) >= 2**31:
        raise ValueError(
            f"`pruned`: {total:,} entries are ordered together, and 2^31 are too many. Prune parts "
            "of the weights in transformations of their own."
        )
    share = density if callable(density) else lambda step: density
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PrunedState:
        dense = _weights(params, sites, "scheduled_pruning")
        scores = {path: jnp.zeros(w.shape, _wide(w)) for path, w in dense.items()}
        masks = {path: jnp.ones(w.shape, bool) for path, w in dense.items()}
        state = inner.init(params)
        early = None if rewind is None else jax.tree.map(jnp.copy, (params, state))
        none = rule == "magnitude"
        return PrunedState(state, jnp.int32(0), dense, {} if none else scores, masks, early)

    def scored(state: PrunedState, gradients: Any) -> dict[str, jax.Array]:
        found = {}
        for path, before in state.scores.items():
            slope = (state.dense[path] * gradients[path]).astype(before.dtype)
            average = decay * before + (1 - decay) * slope**2
            found[path] = before - slope if rule == "movement" else average
        return found

    def update(updates: Any, state: PrunedState, params: Any = None, **more: Any) -> Any:
        target, moves, inner_state = _moved(
            "scheduled_pruning", inner, updates, state, params, more
        )
        scores, step = scored(state, updates), state.step + 1

        def decide() -> dict[str, jax.Array]:
            of_entries = scores or {path: jnp.abs(target[path]) for path in sites}
            means = {
                path: group_means(of_entries[path], site, structure) for path, site in sites.items()
            }
            kept = _largest(means, sizes, share(step), scope)
            return {path: spread(x, sites[path], structure) for path, x in kept.items()}

        masks = jax.lax.cond(step % every == 0, decide, lambda: state.masks)
        early, back = state.early, jnp.bool_(False)
        if rewind is not None:
            back = (_count(masks) < _count(state.masks)) & (step > rewind)
            early = _select(step == rewind, (target, inner_state), early)
            target, inner_state = _select(back, early, (target, inner_state))
        moves, dense = _under(masks, state, params, target, moves, back)
        return moves, PrunedState(inner_state, step, dense, scores, masks, early)

    return optax.GradientTransformationExtraArgs(init, update)


def rigl(
    inner: optax.GradientTransformation,
    sites: Sites,
    masks: Mapping[str, Any],
    *,
    until: int,
    every: int = 100,
    fraction: float = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on sparse weights whose entries take turns: the rigged lottery.

    After every `every`-th update t < until, each matrix gives up the share

        fraction / 2 * (1 + cos(pi * t / until))

    of its entries, the smallest, and takes as many in, those with the largest gradients among all
    that are zero. What is taken in starts at zero; the optimizer moves nothing else.

    Args:
      inner: The optimizer.
      sites: The weights, each trained as a whole.
      masks: {path: bools of the weight's shape} to start with, from `jaxpeft.sparsity.topk_mask`.
      until: Step from which the masks stay.
      every, fraction: See above, 100 and 0.3 in the paper.

    Returns:
      A transformation of adapters `{path: array}`, the last of a chain, whose `update` needs the
      parameters. Its state holds the weights once more.

    Raises:
      ValueError: An option out of range, no weight selected; from `init`, a mask that is missing
        or of another shape, or that leaves a matrix without entries, or a weight that
        the adapter does not train as a whole.

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020, section 3.
      https://arxiv.org/abs/1911.11134
    """
    if every < 1 or until < 1 or not 0 < fraction < 1:
        raise ValueError(
            f"`rigl(every={every}, until={until}, fraction={fraction})`: at least 1, at least 1, "
            "and a share in (0, 1) are needed."
        )
    _check_sites("rigl", sites)
    inner = optax.with_extra_args_support(inner)
    share = optax.cosine_decay_schedule(fraction, until)

    def init(params: Any) -> PrunedState:
        own = {path: unpacked(masks.get(path), site, "rigl") for path, site in sites.items()}
        for path, mask in own.items():
            if not jnp.all(jnp.any(sites[path].matrices(mask), axis=(-2, -1))):
                raise ValueError(
                    f"`rigl`: the mask of '{path}' leaves a matrix without entries, and as many "
                    "are taken in as given up, so that it would stay empty. Keep more of it, or "
                    "leave the weight out of the sites and prune it."
                )
        weights = _weights(params, sites, "rigl")
        dense = {path: jnp.where(own[path], w, 0) for path, w in weights.items()}
        return PrunedState(inner.init(params), jnp.int32(0), dense, {}, own, None)

    def update(updates: Any, state: PrunedState, params: Any = None, **more: Any) -> Any:
        target, moves, inner_state = _moved("rigl", inner, updates, state, params, more)
        step = state.step + 1

        def turn() -> dict[str, jax.Array]:
            found = {}
            for path, site in sites.items():
                arrays = (target[path], updates[path], state.masks[path])
                w, g, mask = (group_means(x, site, "entry") for x in arrays)
                shape, active = w.shape, mask.reshape(len(mask), -1) > 0
                w, g = (jnp.abs(x.reshape(active.shape)) for x in (w, g))
                count = jnp.floor(share(step) * jnp.sum(active, 1, keepdims=True)).astype(jnp.int32)
                worst = largest_of_rows(jnp.where(active, -w, -jnp.inf), count)
                stays = active & ~worst
                best = largest_of_rows(jnp.where(stays, -jnp.inf, g), count)
                found[path] = spread((stays | best).reshape(shape), site, "entry")
            return found

        now = (step % every == 0) & (step < until)
        new = jax.lax.cond(now, turn, lambda: state.masks)
        for path, mask in new.items():
            target[path] = jnp.where(mask & ~state.masks[path], 0, target[path])
        moves, dense = _under(new, state, params, target, moves, jnp.bool_(False))
        return moves, PrunedState(inner_state, step, dense, {}, new, None)

    return optax.GradientTransformationExtraArgs(init, update)


def fixed_mask(
    inner: optax.GradientTransformation, masks: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """`inner` on trained weights whose entries outside the masks are zero, and stay so.

    Args:
      inner: The optimizer.
      masks: {path: bools of the weight's shape}, from `jaxpeft.sparsity.topk_mask`; weights without one are
        left to `inner`.

    Returns:
      A transformation of adapters `{path: array}`, the last of a chain, whose `update` needs the
      parameters.

    Raises:
      ValueError: From `init`, a mask of a weight that the adapter does not train as a whole.
    """
    inner = optax.with_extra_args_support(inner)
    own = {path: jnp.asarray(mask, bool) for path, mask in masks.items()}

    def init(params: Any) -> Any:
        for path, mask in own.items():
            _check_trained(params, path, mask.shape, "fixed_mask")
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> Any:
        if params is None:
            raise ValueError("`fixed_mask` needs the parameters: tx.update(grads, state, params).")
        of_kept = {path: jnp.where(mask, updates[path], 0) for path, mask in own.items()}
        moves, state = inner.update({**updates, **of_kept}, state, params, **more)
        zeros = {path: jnp.where(mask, moves[path], -params[path]) for path, mask in own.items()}
        return {**moves, **zeros}, state

    return optax.GradientTransformationExtraArgs(init, update)


# What the three share ----------------------------------------------------------------------------


def _check_sites(caller: str, sites: Sites) -> None:
    if not sites:
        raise ValueError(f"`{caller}` selects no weight. {sites.what_there_is()}")
    check_whole(caller, sites)


def _check_trained(params: Any, path: str, shape: tuple[int, ...], caller: str) -> None:
    found = params.get(path)
    if getattr(found, "shape", None) != shape:
        has = "does not have it" if found is None else f"has an array of shape {found.shape} there"
        raise ValueError(
            f"`{caller}` prunes '{path}' of shape {shape}, but the adapter {has}. It trains "
            f"{sorted(params)[:20]}. Train the weight as a whole: `jp.unfreeze(sites)`."
        )


def _weights(params: Any, sites: Sites, caller: str) -> dict[str, jax.Array]:
    """Copies of the selected weights, which the step may be given to overwrite."""
    for path, site in sites.items():
        _check_trained(params, path, site.shape, caller)
    return {path: jnp.copy(params[path]) for path in sites}


def _moved(
    caller: str, inner: Any, updates: Any, state: PrunedState, params: Any, more: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Any]:
    """Where the optimizer moves the parameters, how, and its state; what is given up stays."""
    if params is None:
        raise ValueError(f"`{caller}` needs the parameters: tx.update(grads, state, params).")
    of_kept = {path: jnp.where(mask, updates[path], 0) for path, mask in state.masks.items()}
    dense = {**params, **state.dense}
    moves, inner_state = inner.update({**updates, **of_kept}, state.inner, dense, **more)
    # Without a gradient, momentum and weight decay would still move it.
    still = {path: jnp.where(mask, moves[path], 0) for path, mask in state.masks.items()}
    moves = {**moves, **still}
    return dict(optax.apply_updates(dense, moves)), moves, inner_state


def _under(
    masks: dict[str, jax.Array],
    state: PrunedState,
    params: Any,
    target: dict[str, jax.Array],
    moves: dict[str, jax.Array],
    jumps: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The updates that bring the parameters to `target` under the masks, and the dense weights."""
    updates = jax.tree.map(lambda u, to, w: jnp.where(jumps, to - w, u), moves, target, params)
    dense = {}
    for path, mask in masks.items():
        w = params[path]
        stays = mask & state.masks[path] & ~jumps
        jump = (jnp.where(mask, target[path], 0) - w).astype(moves[path].dtype)
        updates[path] = jnp.where(stays, moves[path], jump)
        # What is kept is the parameter itself, to the last bit.
        dense[path] = jnp.where(mask, optax.apply_updates(w, updates[path]), target[path])
    return updates, dense


def _largest(
    scores: Mapping[str, jax.Array],
    sizes: Mapping[str, tuple[int, int]],
    density: Any,
    scope: str,
) -> dict[str, jax.Array]:
    """Which groups (stack, rows, columns) are kept: the best of each matrix, and the best."""
    flat = {path: x.reshape(len(x), -1) for path, x in scores.items()}
    if scope == "matrix":
        kept = {
            path: largest_of_rows(x, jnp.maximum(_share(density, x.shape[1]), 1))
            for path, x in flat.items()
        }
        return {path: x.reshape(scores[path].shape) for path, x in kept.items()}
    size = {path: math.prod(sides) for path, sides in sizes.items()}
    best = {
        path: jnp.arange(x.shape[1]) == jnp.argmax(x, 1, keepdims=True) for path, x in flat.items()
    }
    others = {path: jnp.where(best[path], -jnp.inf, x) for path, x in flat.items()}
    budget = _share(density, sum(size[path] * x.size for path, x in flat.items()))
    budget = budget - sum(size[path] * len(x) for path, x in flat.items())
    kept = largest_within(others, size, jnp.maximum(budget, 0))
    return {path: (kept[path] | best[path]).reshape(x.shape) for path, x in scores.items()}


def _share(density: Any, count: int) -> jax.Array:
    """How many of `count` this is; 0.7 of 10 is 7, however it is rounded in float32."""
    return jnp.floor(density * count * (1 + 1e-6)).astype(jnp.int32)


def _count(masks: Mapping[str, jax.Array]) -> jax.Array:
    counts = (jnp.sum(mask, dtype=jnp.int32) for mask in masks.values())
    return functools.reduce(jnp.add, counts)


def _select(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)


def _wide(w: jax.Array) -> Any:
    return jnp.promote_types(w.dtype, jnp.float32)
