"""AdaLoRA's rank allocation: the least important singular values of all matrices become zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.adapters._adalora import adalora_paths
from jaxpeft.optim._masking import check_params


class RankAllocatorState(NamedTuple):
    """The state of `rank_allocator`.

    Attributes:
      inner_state: State of the inner optimizer.
      count: Number of updates so far, int32[].
      sensitivity: Moving average of |p * g|, in the shape of each array of the triplets.
      uncertainty: Moving average of the absolute difference of |p * g| and `sensitivity`.
      kept: {path: bool (*stack, r), true where a singular value is kept}.
    """

    inner_state: Any
    count: Any  # jax.Array; Any, since tuples have a method `count`
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    kept: dict[str, jax.Array]


def rank_allocator(
    inner: optax.GradientTransformation,
    budget: int,
    *,
    total_steps: int,
    warmup_steps: int,
    final_steps: int,
    update_every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on AdaLoRA's triplets, with a budget of singular values that are not zero.

    An entry p with gradient g has the importance I * U, where I is the moving average of |p * g|
    (sensitivity) and U that of | |p * g| - I | (uncertainty). The importance of a triplet is that
    of its singular value, plus the means over its column of `a` and its row of `b`. At every
    `update_every`-th step t the b(t) most important triplets of all matrices together keep their
    singular values; the others become zero, and may be kept again later:

        b(t) = b_0                                              up to t = warmup_steps
        b(t) = B + (b_0 - B) (1 - (t - warmup_steps) / (total_steps - warmup_steps - final_steps))^3
        b(t) = B, with the same triplets kept                   from t = total_steps - final_steps

    where b_0 is the number of all triplets and B the budget. Other arrays are left to `inner`.

    Args:
      inner: The optimizer.
      budget: Number of singular values to keep in the end, r * matrices for an average rank r.
      total_steps: Number of steps of the whole training.
      warmup_steps: Number of steps before the first update of the ranks.
      final_steps: Number of steps after the last update of the ranks.
      update_every: Number of steps between updates of the ranks.
      beta1: Decay rate of I.
      beta2: Decay rate of U.

    Returns:
      A transformation of adapters {path: array} from `jaxpeft.adalora`. Its `update` needs the
      parameters.

    Raises:
      ValueError: Warmup and final steps leave no step between them, a number of steps or the
        budget is out of range, or a decay rate is outside [0, 1); from `init`, an adapter without
        triplets, or with fewer than the budget.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp, optax
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 8))}
      >>> method = jp.adalora(4, jp.sites(f, params, jnp.ones((1, 8))))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> tx = rank_allocator(optax.adam(1e-3), 2, total_steps=3, warmup_steps=0, final_steps=1,
      ...                     update_every=1)
      >>> state = tx.init(adapter)
      >>> for step in range(3):
      ...     grads = jax.tree.map(jnp.ones_like, adapter)
      ...     updates, state = tx.update(grads, state, adapter)
      ...     adapter = optax.apply_updates(adapter, updates)
      >>> int((adapter["w/values"] != 0).sum())
      2

    References:
      Zhang et al., AdaLoRA, 2023, sections 3.2 and 3.3, algorithm 1.
      https://arxiv.org/abs/2303.10512
    """
    if not (0 <= warmup_steps and 0 <= final_steps and warmup_steps + final_steps < total_steps):
        raise ValueError(
            f"`rank_allocator(total_steps={total_steps}, warmup_steps={warmup_steps}, "
            f"final_steps={final_steps})`: ranks are pruned between the warmup and the final "
            "steps, so these must be at least 0 and together less than `total_steps`."
        )
    if update_every < 1 or budget < 1:
        raise ValueError(
            f"`rank_allocator(budget={budget}, update_every={update_every})`: both must be at "
            "least 1."
        )
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(
                f"`rank_allocator({name}={beta})`: a decay rate must be in [0, 1), such as 0.85."
            )
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> RankAllocatorState:
        kept = {}
        for path in adalora_paths(params):
            kept[path] = jnp.ones(params[f"{path}/values"].shape, bool)
        total = sum(x.size for x in kept.values())
        if total < budget:
            raise ValueError(
                f"`rank_allocator(budget={budget})`: this adapter has {total} singular values in "
                f"{len(kept)} arrays. Give `adalora` a larger rank, or lower the budget."
            )
        zeros = {
            f"{path}/{name}": jnp.zeros_like(params[f"{path}/{name}"], dtype=jnp.float32)
            for path in kept
            for name in ("a", "values", "b")
        }
        uncertainty = jax.tree.map(jnp.copy, zeros)
        return RankAllocatorState(inner.init(params), jnp.int32(0), zeros, uncertainty, kept)

    def update(
        updates: Any, state: RankAllocatorState, params: Any = None, **extra_args: Any
    ) -> Any:
        check_params(params, "rank_allocator")
        sensitivity, uncertainty = {}, {}
        for path, old in state.sensitivity.items():
            product = jnp.abs(params[path] * updates[path]).astype(jnp.float32)
            mean = sensitivity[path] = beta1 * old + (1 - beta1) * product
            deviation = jnp.abs(product - mean)
            uncertainty[path] = beta2 * state.uncertainty[path] + (1 - beta2) * deviation
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = state.count + 1

        def allocate() -> dict[str, jax.Array]:
            importance = {k: sensitivity[k] * uncertainty[k] for k in sensitivity}
            scores = {path: _triplet_scores(importance, path) for path in state.kept}
            total = sum(x.size for x in scores.values())
            done = (count - warmup_steps) / (total_steps - warmup_steps - final_steps)
            excess = (1 - jnp.clip(done, 0, 1)) ** 3
            return _top_k(scores, (budget + (total - budget) * excess).astype(jnp.int32))

        is_final = count >= total_steps - final_steps
        # The last update, in which the budget is met, comes whatever `update_every` is.
        due = ((count % update_every == 0) & ~is_final) | (count == total_steps - final_steps)
        kept = jax.lax.cond(due & (count > warmup_steps), allocate, lambda: state.kept)
        result = dict(new)
        for path, mask in kept.items():
            name = f"{path}/values"
            # The updated value is v + (-v) = 0.
            masked = jnp.where(mask, new[name], -params[name])
            result[name] = jnp.where(due | is_final, masked, new[name]).astype(new[name].dtype)
        return result, RankAllocatorState(inner_state, count, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplet_scores(importance: dict[str, jax.Array], path: str) -> jax.Array:
    """The importance of each triplet of a weight, (*stack, r)."""
    a, values, b = (importance[f"{path}/{name}"] for name in ("a", "values", "b"))
    return values + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1)


def _top_k(scores: dict[str, jax.Array], k: jax.Array) -> dict[str, jax.Array]:
    """Masks of the `k` largest of all scores; of equal scores, the first."""
    flat = jnp.concatenate([x.reshape(-1) for x in scores.values()])
    rank = jnp.argsort(jnp.argsort(-flat, stable=True))
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    masks = iter(jnp.split(rank < k, ends))
    return {path: next(masks).reshape(x.shape) for path, x in scores.items()}
