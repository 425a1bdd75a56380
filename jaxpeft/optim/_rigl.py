"""RigL: sparse training at a fixed density, where drop-and-grow changes the masks."""

from collections.abc import Mapping
from typing import Any

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
from jaxpeft.optim._top_k import top_k_of_rows
from jaxpeft.sparsity._masks import expand_groups, group_means, unpack_mask


def rigl(
    inner: optax.GradientTransformation,
    sites: Sites,
    masks: Mapping[str, Any],
    *,
    end_step: int,
    update_every: int = 100,
    drop_fraction: float = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on sparse weights at a fixed density, with drop-and-grow: the rigged lottery.

    At every `update_every`-th step t < end_step, each matrix drops the fraction

        drop_fraction / 2 * (1 + cos(pi * t / end_step))

    of its kept entries, those with the smallest magnitude, and grows the same number among all
    other entries, those with the largest gradient magnitude. A grown entry starts at zero.
    `inner` updates only kept entries.

    Args:
      inner: The optimizer.
      sites: The weights, each trained as a whole.
      masks: {path: bool array of the weight's shape}, the first masks, from
        `sparsity.topk_mask`.
      end_step: The step from which on the masks are fixed.
      update_every: Number of steps between drop-and-grow updates; 100 in the paper.
      drop_fraction: Fraction of the kept entries to drop at first; 0.3 in the paper.

    Returns:
      A transformation of adapters {path: array}, to be the last of a chain. Its `update` needs
      the parameters. Its state holds a copy of the weights.

    Raises:
      ValueError: An option out of range, or no weight selected; from `init`, a mask that is
        missing, has another shape or leaves a matrix without entries, or a weight that the
        adapter does not train as a whole.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp, optax
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> sites = jp.sites(f, params, jnp.ones((1, 2)))
      >>> masks = {"w": jnp.array([[True, True], [False, False]])}
      >>> tx = rigl(optax.sgd(0.1), sites, masks, end_step=100, update_every=1, drop_fraction=0.6)
      >>> frozen, adapter = jp.split(jp.unfreeze(sites)(jax.random.key(0), params))
      >>> grads = {"w": jnp.array([[0.0, 0.0], [5.0, 1.0]])}
      >>> _, state = tx.update(grads, tx.init(adapter), adapter)
      >>> state.masks["w"].tolist()
      [[False, True], [True, False]]

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020, section 3.
      https://arxiv.org/abs/1911.11134
    """
    if update_every < 1 or end_step < 1:
        raise ValueError(
            f"`rigl(end_step={end_step}, update_every={update_every})`: both must be at least 1, "
            "numbers of steps."
        )
    if not 0 < drop_fraction < 1:
        raise ValueError(
            f"`rigl(drop_fraction={drop_fraction})`: `drop_fraction` must be in (0, 1), such as "
            "0.3."
        )
    check_sites("rigl", sites)
    inner = optax.with_extra_args_support(inner)
    schedule = optax.cosine_decay_schedule(drop_fraction, end_step)

    def init(params: Any) -> PruningState:
        own = {path: unpack_mask(masks.get(path), site, "rigl") for path, site in sites.items()}
        for path, mask in own.items():
            if not jnp.all(jnp.any(sites[path].matrices(mask), axis=(-2, -1))):
                raise ValueError(
                    f"`rigl`: the mask of '{path}' leaves a matrix without entries, and since as "
                    "many entries grow as are dropped, it would stay empty. Keep more of it, or "
                    "leave the weight out of the sites and `prune` it."
                )
        weights = copied_weights(params, sites, "rigl")
        dense = {path: jnp.where(own[path], w, 0) for path, w in weights.items()}
        return PruningState(inner.init(params), jnp.int32(0), dense, {}, own, None)

    def update(updates: Any, state: PruningState, params: Any = None, **extra_args: Any) -> Any:
        target, new, inner_state = update_dense("rigl", inner, updates, state, params, extra_args)
        count = state.count + 1

        def drop_and_grow() -> dict[str, jax.Array]:
            masks = {}
            for path, site in sites.items():
                arrays = (target[path], updates[path], state.masks[path])
                w, g, mask = (group_means(x, site, "entry") for x in arrays)
                shape, active = w.shape, mask.reshape(len(mask), -1) > 0
                w, g = (jnp.abs(x.reshape(active.shape)) for x in (w, g))
                kept = jnp.sum(active, 1, keepdims=True)
                number = jnp.floor(schedule(count) * kept).astype(jnp.int32)
                dropped = top_k_of_rows(jnp.where(active, -w, -jnp.inf), number)
                stays = active & ~dropped
                grown = top_k_of_rows(jnp.where(stays, -jnp.inf, g), number)
                masks[path] = expand_groups((stays | grown).reshape(shape), site, "entry")
            return masks

        due = (count % update_every == 0) & (count < end_step)
        new_masks = jax.lax.cond(due, drop_and_grow, lambda: state.masks)
        for path, mask in new_masks.items():
            target[path] = jnp.where(mask & ~state.masks[path], 0, target[path])
        new, dense = apply_masks(new_masks, state, params, target, new, jnp.bool_(False))
        return new, PruningState(inner_state, count, dense, {}, new_masks, None)

    return optax.GradientTransformationExtraArgs(init, update)
