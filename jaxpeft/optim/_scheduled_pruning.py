"""Pruning during training: fewer and fewer entries are kept, on a schedule of the density."""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxpeft._sites import Sites
from jaxpeft.optim._masking import (
    PruningState,
    apply_masks,
    check_sites,
    copied_weights,
    update_dense,
)
from jaxpeft.optim._top_k import top_k_of_rows, top_k_within_budget
from jaxpeft.sparsity._masks import Structure, block_of, expand_groups, group_means

Criterion = Literal["magnitude", "movement", "taylor"]
_CRITERIA = ("magnitude", "movement", "taylor")


def scheduled_pruning(
    inner: optax.GradientTransformation,
    sites: Sites,
    density: float | optax.Schedule,
    *,
    criterion: Criterion = "magnitude",
    structure: Structure = "entry",
    scope: Literal["all", "matrix"] = "all",
    update_every: int = 10,
    decay: float = 0.9,
    rewind_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on trained weights that are pruned during training to a scheduled density.

    A weight of the model is w = theta * m with a mask m. With the gradient g of w, `inner` gets
    g * m and updates the kept entries of theta. A pruned entry of theta keeps its value, and may
    be kept again later. At every `update_every`-th step t, m becomes true for the fraction
    `density(t)` of the entries that have the largest scores:

        magnitude   |theta|
        movement    S, where S -= theta * g in each step: the accumulated straight-through
                    gradient of the scores. An entry with theta * g > 0 moves towards zero, and
                    loses score. A learning rate of S would not change the order. Entries that
                    are pruned together lie along one gradient, so lower the density in small
                    steps.
        taylor      the moving average of (theta * g)^2

    The usual schedules are in Optax: `polynomial_schedule(1.0, 0.1, power=3, ...)` is the cubic one
    (Zhu and Gupta 2017), and `piecewise_constant_schedule(1.0, {300: 0.8, 600: 0.8})` prunes a
    fifth of the rest each time, with training in between. With `rewind_step=k`, each time
    the density falls all parameters and the inner state return to their values after step k, under
    the new masks: lottery tickets (Frankle et al. 2020).

    The best group of each matrix is always kept.

    Args:
      inner: The optimizer.
      sites: The weights, each trained as a whole.
      density: Fraction of all entries to keep, 1 - sparsity, in (0, 1]: a number, or a schedule
        of the step.
      criterion: The score of an entry: "magnitude", "movement" or "taylor".
      structure: The groups that are kept or pruned together, as for `sparsity.topk_mask`. The
        score of a group is the mean over its entries.
      scope: "all" ranks the groups of all matrices together, "matrix" those of each on its own.
      update_every: Number of steps between updates of the masks.
      decay: Decay rate of the moving average.
      rewind_step: The step to rewind to; 0 is the start. `None` does not rewind.

    Returns:
      A transformation of adapters {path: array}, to be the last of a chain. Its `update` needs
      the parameters. Its state holds a copy of the weights, a second array of scores for
      "movement" and "taylor", and with `rewind_step` the parameters and state of that step.

    Raises:
      ValueError: An option out of range, no weight selected, 2^31 entries or more, or blocks that
        do not divide a weight; from `init`, a weight that the adapter does not train as a whole.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp, optax
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> sites = jp.sites(f, params, jnp.ones((1, 2)))
      >>> frozen, adapter = jp.split(jp.unfreeze(sites)(jax.random.key(0), params))
      >>> tx = scheduled_pruning(optax.sgd(0.1), sites, 0.5, update_every=1)
      >>> grads = jax.tree.map(jnp.zeros_like, adapter)
      >>> updates, state = tx.update(grads, tx.init(adapter), adapter)
      >>> optax.apply_updates(adapter, updates)["w"].tolist()
      [[0.0, -4.0], [3.0, 0.0]]

    References:
      Zhu and Gupta, To prune, or not to prune, 2017, section 3. https://arxiv.org/abs/1710.01878
      Sanh et al., Movement Pruning, 2020, sections 3 and 4. https://arxiv.org/abs/2005.07683
      Lagunas et al., Block Pruning For Faster Transformers, 2021, section 3.
      https://arxiv.org/abs/2109.04838
      Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, 2020, section 5.
      https://arxiv.org/abs/1912.05671
    """
    _check_options(density, criterion, scope, update_every, decay, rewind_step)
    check_sites("scheduled_pruning", sites)
    blocks = {path: block_of(structure, site) for path, site in sites.items()}
    if (total := sum(math.prod(site.shape) for site in sites.values())) >= 2**31:
        raise ValueError(
            f"`scheduled_pruning`: {total:,} entries are ranked together, but there must be fewer "
            "than 2^31. Prune parts of the weights in transformations of their own."
        )
    schedule = density if callable(density) else lambda count: density
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> PruningState:
        dense = copied_weights(params, sites, "scheduled_pruning")
        scores = {path: jnp.zeros(w.shape, _float32_or_wider(w)) for path, w in dense.items()}
        masks = {path: jnp.ones(w.shape, bool) for path, w in dense.items()}
        state = inner.init(params)
        rewind = None if rewind_step is None else jax.tree.map(jnp.copy, (params, state))
        own = {} if criterion == "magnitude" else scores
        return PruningState(state, jnp.int32(0), dense, own, masks, rewind)

    def updated_scores(state: PruningState, gradients: Any) -> dict[str, jax.Array]:
        new = {}
        for path, old in state.scores.items():
            product = (state.dense[path] * gradients[path]).astype(old.dtype)
            average = decay * old + (1 - decay) * product**2
            new[path] = old - product if criterion == "movement" else average
        return new

    def update(updates: Any, state: PruningState, params: Any = None, **extra_args: Any) -> Any:
        target, new, inner_state = update_dense(
            "scheduled_pruning", inner, updates, state, params, extra_args
        )
        scores, count = updated_scores(state, updates), state.count + 1

        def new_masks() -> dict[str, jax.Array]:
            of_entries = scores or {path: jnp.abs(target[path]) for path in sites}
            means = {
                path: group_means(of_entries[path], site, structure) for path, site in sites.items()
            }
            kept = _best_groups(means, blocks, schedule(count), scope)
            return {path: expand_groups(x, sites[path], structure) for path, x in kept.items()}

        masks = jax.lax.cond(count % update_every == 0, new_masks, lambda: state.masks)
        rewind, rewinds = state.rewind, jnp.bool_(False)
        if rewind_step is not None:
            rewinds = (_size(masks) < _size(state.masks)) & (count > rewind_step)
            rewind = _select(count == rewind_step, (target, inner_state), rewind)
            target, inner_state = _select(rewinds, rewind, (target, inner_state))
        new, dense = apply_masks(masks, state, params, target, new, rewinds)
        return new, PruningState(inner_state, count, dense, scores, masks, rewind)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_options(
    density: Any, criterion: str, scope: str, update_every: int, decay: float, rewind_step: Any
) -> None:
    call = "scheduled_pruning"
    if criterion not in _CRITERIA:
        raise ValueError(
            f"`{call}(criterion='{criterion}')`: the criterion must be one of "
            f"{', '.join(_CRITERIA)}."
        )
    if scope not in ("all", "matrix"):
        raise ValueError(f"`{call}(scope='{scope}')`: `scope` must be 'all' or 'matrix'.")
    if not callable(density) and not 0 < density <= 1:
        raise ValueError(
            f"`{call}(density={density})`: `density` must be in (0, 1], the fraction of entries to "
            "keep, or a schedule."
        )
    if update_every < 1:
        raise ValueError(
            f"`{call}(update_every={update_every})`: `update_every` must be at least 1, the number "
            "of steps between updates of the masks."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"`{call}(decay={decay})`: `decay` must be in [0, 1), such as 0.9.")
    if rewind_step is not None and rewind_step < 0:
        raise ValueError(
            f"`{call}(rewind_step={rewind_step})`: `rewind_step` must be at least 0, the start, or "
            "None."
        )


def _best_groups(
    scores: Mapping[str, jax.Array],
    blocks: Mapping[str, tuple[int, int]],
    density: Any,
    scope: str,
) -> dict[str, jax.Array]:
    """The groups (stack, rows, columns) to keep: the best one of each matrix, and the best of all.

    Args:
      scores: {path: (stack, rows, columns)} of groups.
      blocks: {path: rows and columns of a group}.
      density: Fraction of all entries to keep.
      scope: "all" or "matrix".
    """
    flat = {path: x.reshape(len(x), -1) for path, x in scores.items()}
    if scope == "matrix":
        kept = {
            path: top_k_of_rows(x, jnp.maximum(_fraction_of(density, x.shape[1]), 1))
            for path, x in flat.items()
        }
        return {path: x.reshape(scores[path].shape) for path, x in kept.items()}
    size = {path: math.prod(block) for path, block in blocks.items()}
    best = {
        path: jnp.arange(x.shape[1]) == jnp.argmax(x, 1, keepdims=True) for path, x in flat.items()
    }
    others = {path: jnp.where(best[path], -jnp.inf, x) for path, x in flat.items()}
    budget = _fraction_of(density, sum(size[path] * x.size for path, x in flat.items()))
    budget = budget - sum(size[path] * len(x) for path, x in flat.items())
    kept = top_k_within_budget(others, size, jnp.maximum(budget, 0))
    return {path: (kept[path] | best[path]).reshape(x.shape) for path, x in scores.items()}


def _fraction_of(density: Any, count: int) -> jax.Array:
    """floor(density * count); 0.7 of 10 is 7, however 0.7 is rounded in float32."""
    return jnp.floor(density * count * (1 + 1e-6)).astype(jnp.int32)


def _size(masks: Mapping[str, jax.Array]) -> jax.Array:
    """The number of kept entries."""
    counts = (jnp.sum(mask, dtype=jnp.int32) for mask in masks.values())
    return functools.reduce(jnp.add, counts)


def _select(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)


def _float32_or_wider(w: jax.Array) -> Any:
    return jnp.promote_types(w.dtype, jnp.float32)
