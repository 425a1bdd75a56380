"""Dynamic loss scaling, which keeps gradients in the range of float16.

The smallest number of float16 is 6e-8. Many gradients of activations are smaller, and would be
rounded to zero. So the loss is multiplied by a large scale before it is differentiated, and the
gradient of the adapter, in float32, is divided by it. A scale that is too large makes the gradient
overflow: the step is skipped and the scale is halved. After many steps without overflow the scale
is doubled.

`flax.training.dynamic_scale.DynamicScale` does the same for one gradient. Here the gradient of a
step is a sum over microbatches and devices, and the scale is to change once per step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SMALLEST, LARGEST = 1.0, 2.0**32


class LossScaleState(NamedTuple):
    """The scale, and the state of the wrapped optimizer."""

    scale: jax.Array  # float32[], a power of two
    finite_steps: jax.Array  # int32[], steps without overflow since the last change of the scale
    inner: Any

    def after_overflow(self) -> "LossScaleState":
        """The state for the next step, after a step in which the gradient overflowed."""
        scale = jnp.maximum(self.scale / 2, SMALLEST)
        return LossScaleState(scale, jnp.zeros_like(self.finite_steps), self.inner)


def loss_scaled(
    tx: optax.GradientTransformation, *, init_scale: float = 2.0**16, growth_interval: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer for training in float16: `train_step` and `fit` then scale the loss.

    The optimizer sees unscaled gradients. A step whose gradient overflows is skipped, halves the
    scale, and is flagged in `Metrics.overflow`; it is not an error unless the scale is 1 already.
    After `growth_interval` steps without overflow the scale is doubled. The scale is part of the
    state, so it is saved in checkpoints.

        tx = train.loss_scaled(optax.adamw(1e-4))
        step = train.train_step(loss_fn, tx, compute_dtype=jnp.float16)

    Keep the adapter in float32, in which small updates are not lost; `compute_dtype` casts it.
    `loss_scaled` must be the outermost transformation, around `optax.chain` and all others.

    Args:
      tx: Any optax transformation.
      init_scale: The initial scale, a power of two from 1 to 2**32.
      growth_interval: Number of steps without overflow after which the scale is doubled.
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
        raise ValueError(f"`init_scale` must be a power of two from 1 to 2**32, got {init_scale}.")
    if growth_interval < 1:
        raise ValueError(
            f"`growth_interval` is a number of steps, at least 1; got {growth_interval}."
        )
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
    """The scale in the state of `loss_scaled`, or `None` for another optimizer's state.

    Raises:
      ValueError: where `loss_scaled` is inside another transformation.
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
                f"opt_state{jax.tree_util.keystr(path)}. Put it around all others: "
                f"loss_scaled(optax.chain(...))."
            )
    return None
