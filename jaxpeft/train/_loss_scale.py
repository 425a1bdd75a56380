"""Dynamic loss scaling, which keeps gradients in the range of float16.

The smallest number of float16 is 6e-8: most gradients of an activation are below it, and would
become zeros. The loss is multiplied by a large scale before it is differentiated, and the gradient
of the adapter, in float32, divided by it again. A scale that is too large makes the gradient
overflow; it is then halved and the step left out. After many steps without overflow it is doubled.

`flax.training.dynamic_scale.DynamicScale` does the same around one gradient. Here the gradient of
a step is a sum over microbatches and devices, of which the scale is to change once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SMALLEST, LARGEST = 1.0, 2.0**32


class LossScaleState(NamedTuple):
    """The scale, and the state of the optimizer that it is put around."""

    scale: jax.Array  # float32[], a power of two
    finite_steps: jax.Array  # int32[], since the scale has changed
    inner: Any

    def after_overflow(self) -> "LossScaleState":
        """The state for the next step, where the gradient of this one has overflowed."""
        scale = jnp.maximum(self.scale / 2, SMALLEST)
        return LossScaleState(scale, jnp.zeros_like(self.finite_steps), self.inner)


def loss_scaled(
    tx: optax.GradientTransformation, *, init_scale: float = 2.0**16, growth_interval: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """`tx` for training in float16: `train_step` and `fit` scale the loss as its state says.

    The optimizer sees gradients that are unscaled again. A step whose gradient overflows is not
    taken, halves the scale, and is flagged in `Metrics.overflow`; it is no fault unless the scale
    has reached 1. After `growth_interval` steps without overflow the scale is doubled. The scale
    is part of the state, so a checkpoint holds it.

        tx = train.loss_scaled(optax.adamw(1e-4))
        step = train.train_step(loss_fn, tx, compute_dtype=jnp.float16)

    Keep the adapter in float32, which holds small updates; `compute_dtype` casts it. This goes
    outermost, around `optax.chain` and everything else.

    Args:
      tx: Any optax transformation.
      init_scale: The first scale, a power of two from 1 to 2**32.
      growth_interval: Steps without overflow after which the scale is doubled.
    Returns:
      A transformation with a `LossScaleState`. Its `update` takes unscaled gradients.
    Raises:
      ValueError: for an option out of its range.
    Example:
      >>> tx = loss_scaled(optax.sgd(0.1))
      >>> float(tx.init({"w": jnp.zeros(3)}).scale)
      65536.0

    References:
      Micikevicius et al., Mixed Precision Training, 2018, section 3.2.
      https://arxiv.org/abs/1710.03740
    """
    powers = [2.0**i for i in range(33)]
    if init_scale not in powers:
        raise ValueError(f"`init_scale` is a power of two from 1 to 2**32, got {init_scale}.")
    if growth_interval < 1:
        raise ValueError(f"`growth_interval` counts steps, at least 1; got {growth_interval}.")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        scale = jnp.asarray(init_scale, jnp.float32)
        return LossScaleState(scale, jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra):
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        steps = state.finite_steps + 1
        grows = steps >= growth_interval
        scale = jnp.where(grows, jnp.minimum(2 * state.scale, LARGEST), state.scale)
        return updates, LossScaleState(scale, jnp.where(grows, 0, steps), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_of(opt_state: Any) -> jax.Array | None:
    """The scale of the loss, or `None` where there is none.

    Raises:
      ValueError: where `loss_scaled` stands inside another transformation.
    """
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    found = jax.tree_util.tree_leaves_with_path(
        opt_state, is_leaf=lambda x: isinstance(x, LossScaleState)
    )
    for path, x in found:
        if isinstance(x, LossScaleState):
            raise ValueError(
                f"`loss_scaled` must be the outermost transformation, but its state is at "
                f"opt_state{jax.tree_util.keystr(path)}. Put it around the whole: "
                f"loss_scaled(optax.chain(...))."
            )
    return None
