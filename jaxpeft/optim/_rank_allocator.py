"""AdaLoRA's budget: the least important singular values of all matrices are set to zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.adapters._adalora import adalora_paths


class RankAllocatorState(NamedTuple):
    """What an update leaves for the next.

    Attributes:
      inner: State of the optimizer.
      step: How many updates there were, int[].
      sensitivity: Moving average of |p * g|, shaped as the arrays of triplets.
      uncertainty: Moving average of how far |p * g| is from that.
      kept: {path: which values stay, bool (*stack, r)}.
    """

    inner: Any
    step: jax.Array
    sensitivity: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]
    kept: dict[str, jax.Array]


def rank_allocator(
    inner: optax.GradientTransformation,
    budget: int,
    *,
    steps: int,
    warmup: int,
    final: int,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, after whose updates at most a budget of singular values is not zero.

    An entry p with gradient g has the importance I * U, I the moving average of |p * g| and U
    that of | |p * g| - I |. A triplet's is that of its value plus the means over its column of
    `a` and its row of `b`. At every `every`-th step the b(t) most important triplets of all
    matrices together keep their values, the others are set to zero, and may come back later;

        b(t) = B + (b0 - B) (1 - (t - warmup) / (steps - warmup - final))^3

    between all b0 of them, up to step `warmup`, and the budget B, from step `steps - final` on:
    from there, the triplets that are kept stay the same. Other arrays are left to `inner`.

    Args:
      inner: The optimizer.
      budget: Values that are kept in the end: of r per matrix on average, r * matrices.
      steps: Of the whole training.
      warmup, final: Steps before the first and after the last decision.
      every: See above.
      beta1, beta2: Of the moving averages of I and U.

    Returns:
      A transformation of adapters `{path: array}` from `jaxpeft.adalora`, whose `update` needs
      the parameters.

    Raises:
      ValueError: Steps out of order, a decay outside [0, 1); from `init`, an adapter without
        triplets, or with fewer than the budget.

    References:
      Zhang et al., AdaLoRA, 2023, sections 3.2 and 3.3, algorithm 1.
      https://arxiv.org/abs/2303.10512
    """
    if not (0 <= warmup and 0 <= final and warmup + final < steps):
        raise ValueError(
            f"`rank_allocator(steps={steps}, warmup={warmup}, final={final})`: ranks are given up "
            "between the two, so together they must be fewer than all steps."
        )
    if every < 1 or budget < 1:
        raise ValueError(f"`rank_allocator(every={every}, budget={budget})`: both are at least 1.")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"`rank_allocator({name}={beta})`: a decay in [0, 1) is needed.")
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
        none_yet = jax.tree.map(jnp.copy, zeros)
        return RankAllocatorState(inner.init(params), jnp.int32(0), zeros, none_yet, kept)

    def update(updates: Any, state: RankAllocatorState, params: Any = None, **more: Any) -> Any:
        if params is None:
            raise ValueError(
                "`rank_allocator` needs the parameters: tx.update(grads, state, params)."
            )
        sensitivity, uncertainty = {}, {}
        for path, before in state.sensitivity.items():
            now = jnp.abs(params[path] * updates[path]).astype(jnp.float32)
            mean = sensitivity[path] = beta1 * before + (1 - beta1) * now
            spread = jnp.abs(now - mean)
            uncertainty[path] = beta2 * state.uncertainty[path] + (1 - beta2) * spread
        moved, inner_state = inner.update(updates, state.inner, params, **more)
        step = state.step + 1

        def decide() -> dict[str, jax.Array]:
            importance = {k: sensitivity[k] * uncertainty[k] for k in sensitivity}
            scores = {path: _score(importance, path) for path in state.kept}
            total = sum(x.size for x in scores.values())
            done = (step - warmup) / (steps - warmup - final)
            share = (1 - jnp.clip(done, 0, 1)) ** 3
            allowed = (budget + (total - budget) * share).astype(jnp.int32)
            return _most(scores, allowed)

        ends = step >= steps - final
        # Decisions are made every so often, and a last time where the budget is met.
        now = ((step % every == 0) & ~ends) | (step == steps - final)
        kept = jax.lax.cond(now & (step > warmup), decide, lambda: state.kept)
        applied = now | ends
        result = dict(moved)
        for path, mask in kept.items():
            name = f"{path}/values"
            # The value after the update is zero.
            zeroed = jnp.where(mask, moved[name], -params[name])
            result[name] = jnp.where(applied, zeroed, moved[name]).astype(moved[name].dtype)
        return result, RankAllocatorState(inner_state, step, sensitivity, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _score(importance: dict[str, jax.Array], path: str) -> jax.Array:
    """Of each triplet of a path, (*stack, r)."""
    a, values, b = (importance[f"{path}/{name}"] for name in ("a", "values", "b"))
    return values + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1)


def _most(scores: dict[str, jax.Array], allowed: jax.Array) -> dict[str, jax.Array]:
    """Which scores are among the largest `allowed` of all; of equal ones, the first."""
    flat = jnp.concatenate([x.reshape(-1) for x in scores.values()])
    place = jnp.argsort(jnp.argsort(-flat, stable=True))
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    chosen = iter(jnp.split(place < allowed, ends))
    return {path: next(chosen).reshape(x.shape) for path, x in scores.items()}
