"""Losses as sums and weights, so that batches of any size add up to the same mean.

A mean of means is wrong as soon as two microbatches, devices or batches hold different
numbers of target tokens. Everything here therefore returns a sum and the weight it stands
for; whoever has seen all of them divides, once.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum over tokens of `weight * (log(sum(exp(logits))) - logits[target])`, in nats.

    Computed in float32 (float64 for float64 logits) whatever the dtype of the logits, which
    are kept once, in their own dtype: the backward pass forms the softmax again instead of
    storing it. Reverse mode only.

    Args:
      logits: (..., vocabulary), any float dtype.
      targets: (...) integers. Where the weight is 0 any value will do, -100 too.
      weights: (...) of each target, or `None` for 1 everywhere.
    Returns:
      `(sum, count)`: the weighted sum of losses and the sum of weights, both scalars.
      The mean loss per token is `sum / count`.
    Raises:
      ValueError: where the shapes do not belong together.
    Example:
      >>> import jax.numpy as jnp
      >>> total, count = cross_entropy(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]]))
      >>> print(f"{total / count:.4f}")  # log(4)
      1.3863
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy needs logits of shape (*targets.shape, vocabulary), got logits "
            f"{logits.shape} and targets {targets.shape}."
        )
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(
            f"cross_entropy needs weights of the shape of the targets {targets.shape}, "
            f"got {weights.shape}."
        )
    losses = _token_losses(logits, targets)
    if weights is None:
        return jnp.sum(losses), jnp.asarray(losses.size, losses.dtype)
    weights = weights.astype(losses.dtype)
    return jnp.sum(losses * weights), jnp.sum(weights)


@jax.custom_vjp
def _token_losses(logits, targets):
    """logsumexp(logits) - logits[target] of each token."""
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    normalizer = jax.nn.logsumexp(wide, axis=-1)
    # A comparison and a sum instead of a gather: with a vocabulary sharded over devices each
    # one adds up its own part, and the scatter of a gather's backward pass is not needed.
    picked = jnp.sum(jnp.where(_is_target(logits, targets), wide, 0), axis=-1)
    return normalizer - picked, (logits, targets, normalizer)


def _backward(residuals, cotangent):
    """d loss / d logits = softmax(logits) - onehot(target)."""
    logits, targets, normalizer = residuals
    wide = logits.astype(normalizer.dtype)
    gradient = jnp.exp(wide - normalizer[..., None]) - _is_target(logits, targets)
    return (gradient * cotangent[..., None]).astype(logits.dtype), None


_token_losses.defvjp(_forward, _backward)


def _is_target(logits, targets):
    vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
    return jnp.expand_dims(targets, -1) == jnp.expand_dims(vocabulary, range(targets.ndim))


def next_token(
    tokens: jax.Array,
    weights: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of a language model: at each place, the token that follows.

    Args:
      tokens: (B, T) integers.
      weights: (B, T), how much it counts to predict *this* token (0 on a prompt and on
        padding). `None` for 1 everywhere.
      segment_ids: (B, T) of packed rows, 0 on padding: no token predicts the first token of
        the next segment, and nothing predicts padding.
    Returns:
      `(targets, weights)`, both (B, T). The last place of a row has no target: weight 0.
    Example:
      >>> import jax.numpy as jnp
      >>> targets, weights = next_token(jnp.array([[5, 6, 7]]))
      >>> targets.tolist(), weights.tolist()
      ([[6, 7, 0]], [[1.0, 1.0, 0.0]])
    """
    follow = [(0, 0)] * (tokens.ndim - 1) + [(0, 1)]
    targets = jnp.pad(tokens[..., 1:], follow)
    if weights is None:
        weights = jnp.ones(tokens.shape, jnp.float32)
    weights = jnp.pad(weights[..., 1:], follow)
    if segment_ids is not None:
        same = (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] != 0)
        weights = weights * jnp.pad(same, follow)
    return targets, weights
