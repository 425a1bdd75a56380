"""Masks and labels for optax, for programs that keep trained and frozen arrays in one tree."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Concatenated, Placeholder
from jaxpeft._tree import split


def trainable_mask(tree: Any) -> Any:
    """True for each trained array, False for each frozen one, as `optax.masked` takes it.

    `optax.masked(optimizer, mask)` alone trains the base too: where the mask is False it passes
    gradients on as if they were updates. `trainable_only` leaves the base as it is.

    Args:
      tree: What a method returned, before `split`.

    Returns:
      A tree in the structure of `combine(*split(tree))`.

    Raises:
      ValueError: A trained array has several places in the tree, or is only a part of an array;
        a mask cannot express that.

    Example:
      >>> import operator, optax
      >>> def safe(optimizer, tree):
      ...     trained = trainable_mask(tree)
      ...     frozen = jax.tree.map(operator.not_, trained)
      ...     return optax.chain(optax.masked(optimizer, trained),
      ...                        optax.masked(optax.set_to_zero(), frozen))
    """
    return param_labels(tree, True, False)


def param_labels(tree: Any, train: Any = "train", freeze: Any = "freeze") -> Any:
    """A label for each array, trained or frozen, as `optax.partition` takes them.

    Over a quantized base use `trainable_only`: the gradient of integers has the dtype float0,
    which `optax.set_to_zero` does not take.

    Args:
      tree: What a method returned, before `split`.
      train, freeze: The labels.

    Returns:
      A tree in the structure of `combine(*split(tree))`.

    Raises:
      ValueError: A trained array has several places in the tree, or is only a part of an array;
        labels cannot express that.

    Example:
      >>> import optax
      >>> tx = lambda tree: optax.partition(
      ...     {"train": optax.adamw(1e-4), "freeze": optax.set_to_zero()}, param_labels(tree))
    """
    frozen, adapter = split(tree)
    if any(isinstance(x, Concatenated) for x in jax.tree.leaves(frozen, is_leaf=_is_concatenated)):
        raise ValueError(
            "An array of this tree is trained in part, which a mask over arrays cannot express. "
            "Use `split` and `combine`."
        )
    leaves = jax.tree.leaves(frozen, is_leaf=_is_placeholder)
    names = [x.name for x in leaves if _is_placeholder(x)]
    if twice := sorted({name for name in names if name in adapter and names.count(name) > 1}):
        raise ValueError(
            f"{twice} are trained and have several places in the tree. Use `split` and "
            "`combine`, where a trained array exists once."
        )

    def label(x: Any) -> Any:
        if not isinstance(x, Placeholder):
            return freeze
        if x.name in adapter:
            return train
        return None if x.optional else freeze

    return jax.tree.map(label, frozen, is_leaf=_is_placeholder)


def trainable_only(optimizer: Any, tree: Any) -> Any:
    """An optimizer for one tree: it updates what a method trains, and no bit of anything else.

    Args:
      optimizer: An optax transformation. It sees the trained arrays only, and has state for them
        only.
      tree: What a method returned, before `split`.

    Returns:
      An optax transformation over trees such as `combine(*split(tree))`. Over a quantized base
      take gradients with `jax.grad(..., allow_int=True)`, and give `update` the params.

    Raises:
      ValueError: A trained array has several places in the tree, or is only a part of an array.
        In `update`: there are gradients of integers and no params.

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
    import optax  # here, so that `import jaxpeft` does not load it

    def zero_updates(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(_zero_update, updates, updates if params is None else params), state

    frozen = optax.GradientTransformation(lambda params: optax.EmptyState(), zero_updates)
    return optax.partition({"train": optimizer, "freeze": frozen}, param_labels(tree))


def _zero_update(update: Any, param: Any) -> Any:
    """The update that changes no bit of a parameter: -0.0, since -0.0 + 0.0 would be 0.0."""
    dtype = param.dtype
    if dtype == jax.dtypes.float0:
        raise ValueError(
            f"`trainable_only`: the tree has integers of shape {param.shape}, as a quantized base "
            "has, and an update of zero needs their dtype. Give the params: "
            "`tx.update(grads, state, params)`."
        )
    del update
    return jnp.full(param.shape, -0.0 if jnp.issubdtype(dtype, jnp.inexact) else 0, dtype)


def _is_placeholder(x: Any) -> bool:
    return isinstance(x, Placeholder)


def _is_concatenated(x: Any) -> bool:
    return isinstance(x, Concatenated)
