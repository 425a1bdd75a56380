"""For those who keep one tree, with what is trained and what is frozen in it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Concatenated, Placeholder
from jaxpeft._tree import split


def trainable_mask(tree: Any) -> Any:
    """True where an array is trained, in the structure of `combine(*split(tree))`.

    `optax.masked(optimizer, mask)` alone trains the base too: where the mask is False it hands
    gradients on as if they were updates. `trainable_only` leaves the base as it is.

    Args:
      tree: What a method returned, with its marks.

    Raises:
      ValueError: One trained array stands at several places, which this form cannot say.

    Example:
      >>> import operator, optax
      >>> def safe(optimizer, tree):
      ...     trained = mask(tree)
      ...     frozen = jax.tree.map(operator.not_, trained)
      ...     return optax.chain(optax.masked(optimizer, trained),
      ...                        optax.masked(optax.set_to_zero(), frozen))
    """
    return param_labels(tree, True, False)


def param_labels(tree: Any, train: Any = "train", freeze: Any = "freeze") -> Any:
    """Labels for `optax.partition`, in the structure of `combine(*split(tree))`.

    Over a quantized base use `trainable_only`: the gradient of integers has the dtype float0,
    which `optax.set_to_zero` does not take.

    Args:
      tree: What a method returned, with its marks.
      train, freeze: The labels.

    Raises:
      ValueError: One trained array stands at several places, or is a part of an array.

    Example:
      >>> import optax
      >>> tx = lambda tree: optax.partition(
      ...     {"train": optax.adamw(1e-4), "freeze": optax.set_to_zero()}, labels(tree))
    """
    frozen, adapter = split(tree)
    if any(isinstance(x, Concatenated) for x in jax.tree.leaves(frozen, is_leaf=_is_joined)):
        raise ValueError(
            "An array of this tree is trained in part, which a mask over arrays cannot say. Use "
            "`split` and `combine`."
        )
    holes = [x.name for x in jax.tree.leaves(frozen, is_leaf=_is_hole) if _is_hole(x)]
    if twice := sorted({name for name in holes if name in adapter and holes.count(name) > 1}):
        raise ValueError(
            f"{twice} are trained and stand at several places of the tree. Use "
            "`split` and `combine`, where a trained array exists once."
        )

    def label(x: Any) -> Any:
        if not isinstance(x, Placeholder):
            return freeze
        if x.name in adapter:
            return train
        return None if x.optional else freeze

    return jax.tree.map(label, frozen, is_leaf=_is_hole)


def trainable_only(optimizer: Any, tree: Any) -> Any:
    """An optimizer for one tree: it trains what a method trains and leaves the rest bit for bit.

    Args:
      optimizer: An optax transformation; it sees the trained arrays alone, and keeps a state for
        them alone.
      tree: What a method returned, with its marks.

    Returns:
      An optax transformation over trees such as `combine(*split(tree))`. Over a quantized base
      take gradients with `jax.grad(..., allow_int=True)`, and give `update` the params.

    Raises:
      ValueError: One trained array stands at several places, or is a part of an array. In
        `update`, there are gradients of integers and no params.

    Example:
      >>> import jaxpeft as jp, optax
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(f, params, jnp.ones((1, 8)))
      >>> method = jp.chain(jp.quantize("int8", sites.linear), jp.lora(2, sites.linear))
      >>> marked = method(jax.random.key(0), params)
      >>> tree, tx = jp.combine(*jp.split(marked)), trainable_only(optax.sgd(1.0), marked)
      >>> loss = lambda tree: jnp.sum(jp.lift(f)(tree, jnp.ones((1, 8))) ** 2)
      >>> grads = jax.grad(loss, allow_int=True)(tree)
      >>> updates, _ = tx.update(grads, tx.init(tree), tree)
      >>> after = optax.apply_updates(tree, updates)
      >>> bool((jp.base_params(after)["w"] == jp.base_params(tree)["w"]).all())
      True
    """
    import optax  # `import jaxpeft` does without it

    def kept(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(_nothing, updates, updates if params is None else params), state

    still = optax.GradientTransformation(lambda params: optax.EmptyState(), kept)
    return optax.partition({"train": optimizer, "freeze": still}, param_labels(tree))


def _nothing(update: Any, param: Any) -> Any:
    """What changes no bit of a parameter when it is added: -0.0, since -0.0 + 0.0 is 0.0."""
    dtype = param.dtype
    if dtype == jax.dtypes.float0:
        raise ValueError(
            f"`trainable_only`: the tree has integers of shape {param.shape}, as a quantized base "
            "has, and what leaves them as they are depends on their dtype. Give the params: "
            "`tx.update(grads, state, params)`."
        )
    del update
    return jnp.full(param.shape, -0.0 if jnp.issubdtype(dtype, jnp.inexact) else 0, dtype)


def _is_hole(x: Any) -> bool:
    return isinstance(x, Placeholder)


def _is_joined(x: Any) -> bool:
    return isinstance(x, Concatenated)
