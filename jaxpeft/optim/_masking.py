"""Trained weights under masks: what the pruning transformations share, and `fixed_mask`.

The weights are trained as a whole (`jaxpeft.unfreeze`), and the adapter holds them with their
zeros, so the model, its training step and its checkpoints need no change.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft._sites import Sites
from jaxpeft.extend._apply import check_whole


class PruningState(NamedTuple):
    """The state of `scheduled_pruning` and `rigl`.

    Attributes:
      inner_state: State of the inner optimizer.
      count: Number of updates so far, int32[].
      dense: {path: the weight, with the last value of each entry that is pruned now}.
      scores: {path: the score of each entry}; empty for magnitudes, which follow from `dense`.
      masks: {path: bool array, true where an entry is kept}.
      rewind: Parameters and inner state after step `rewind_step`; `None` without rewinding.
    """

    inner_state: Any
    count: Any  # jax.Array; Any, since tuples have a method `count`
    dense: dict[str, jax.Array]
    scores: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    rewind: Any


def fixed_mask(
    inner: optax.GradientTransformation, masks: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """`inner` on trained weights that are zero outside fixed masks.

    With the gradient g of a weight w and its mask m, `inner` gets g * m; the updated weight is
    (w + update) * m.

    Args:
      inner: The optimizer.
      masks: {path: bool array of the weight's shape}, from `sparsity.topk_mask`. Weights without
        a mask are updated by `inner` alone.

    Returns:
      A transformation of adapters {path: array}, to be the last of a chain. Its `update` needs
      the parameters.

    Raises:
      ValueError: From `init`, a mask of a weight that the adapter does not train as a whole.

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = fixed_mask(optax.sgd(1.0), {"w": jnp.array([True, False])})
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [0.0, 0.0]

    References:
      Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
      section 3.3. https://arxiv.org/abs/1506.02626
    """
    inner = optax.with_extra_args_support(inner)
    own = {path: jnp.asarray(mask, bool) for path, mask in masks.items()}

    def init(params: Any) -> Any:
        for path, mask in own.items():
            check_trained(params, path, mask.shape, "fixed_mask")
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        check_params(params, "fixed_mask")
        masked = {path: jnp.where(mask, updates[path], 0) for path, mask in own.items()}
        new, state = inner.update({**updates, **masked}, state, params, **extra_args)
        # Where an entry is pruned, the updated weight is w + (-w) = 0.
        zeroed = {path: jnp.where(mask, new[path], -params[path]) for path, mask in own.items()}
        return {**new, **zeroed}, state

    return optax.GradientTransformationExtraArgs(init, update)


def check_params(params: Any, caller: str) -> None:
    """Raises ValueError where `update` is called without the parameters."""
    if params is None:
        raise ValueError(
            f"`{caller}` needs the parameters: call `tx.update(grads, state, params)`."
        )


def check_sites(caller: str, sites: Sites) -> None:
    """Raises ValueError where nothing, or a part of a weight, is selected."""
    if not sites:
        raise ValueError(f"`{caller}` selects no weight. {sites.choices()}")
    check_whole(caller, sites)


def check_trained(params: Any, path: str, shape: tuple[int, ...], caller: str) -> None:
    """Raises ValueError where the adapter does not have this weight as a whole."""
    found = params.get(path)
    if getattr(found, "shape", None) != shape:
        has = "does not have it" if found is None else f"has an array of shape {found.shape} there"
        raise ValueError(
            f"`{caller}` prunes '{path}' of shape {shape}, but the adapter {has}. It trains "
            f"{sorted(params)[:20]}. Train the weight as a whole: `jp.unfreeze(sites)`."
        )


def copied_weights(params: Any, sites: Sites, caller: str) -> dict[str, jax.Array]:
    """Copies of the selected weights, since the step may be given the originals to overwrite."""
    for path, site in sites.items():
        check_trained(params, path, site.shape, caller)
    return {path: jnp.copy(params[path]) for path in sites}


def update_dense(
    caller: str, inner: Any, updates: Any, state: PruningState, params: Any, extra_args: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Any]:
    """An update of the dense weights by `inner`, in which pruned entries stay as they are.

    Returns:
      The updated parameters with dense weights, the updates, and the new inner state.
    """
    check_params(params, caller)
    masked = {path: jnp.where(mask, updates[path], 0) for path, mask in state.masks.items()}
    dense = {**params, **state.dense}
    new, inner_state = inner.update({**updates, **masked}, state.inner_state, dense, **extra_args)
    # Momentum and weight decay would move a pruned entry even without a gradient.
    fixed = {path: jnp.where(mask, new[path], 0) for path, mask in state.masks.items()}
    new = {**new, **fixed}
    return dict(optax.apply_updates(dense, new)), new, inner_state


def apply_masks(
    masks: dict[str, jax.Array],
    state: PruningState,
    params: Any,
    target: dict[str, jax.Array],
    updates: dict[str, jax.Array],
    rewinds: jax.Array,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The updates that bring the parameters to `target` under new masks, and the dense weights.

    Args:
      masks: The new masks.
      state: The state before the update.
      params: The parameters before the update.
      target: The parameters after the update, with dense weights.
      updates: From `update_dense`; what is kept before and after gets exactly these.
      rewinds: bool[], whether `target` is that of an earlier step.
    """
    result = jax.tree.map(lambda u, to, w: jnp.where(rewinds, to - w, u), updates, target, params)
    dense = {}
    for path, mask in masks.items():
        w = params[path]
        stays = mask & state.masks[path] & ~rewinds
        jump = (jnp.where(mask, target[path], 0) - w).astype(updates[path].dtype)
        result[path] = jnp.where(stays, updates[path], jump)
        # The dense value of a kept entry equals the parameter bit for bit.
        dense[path] = jnp.where(mask, optax.apply_updates(w, result[path]), target[path])
    return result, dense
