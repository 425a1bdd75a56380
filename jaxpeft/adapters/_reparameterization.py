"""Removes reparameterizations: networks that are needed for training only."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft._marks import Expected, Placeholder
from jaxpeft._tree import flatten, unflatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, base_field


def drop_reparameterization(frozen: Any, adapter: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replaces each prompt or prefix encoder by the rows that it computes.

    `p_tuning`, and `prefix_tuning` with an encoder, compute the rows of their prompts from other
    trainable arrays. This function computes the rows once: the result is a prompt or a prefix
    without an encoder, with the same outputs up to rounding. All other weights stay as they are.
    Training can go on from the result. The arguments are not changed.

    Args:
      frozen: The frozen tree from `split`.
      adapter: The trained adapter {path: array} of this tree.

    Returns:
      `(frozen, adapter)` of the methods without encoders.

    Raises:
      ValueError: The tree has no encoder.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, ids: p["table"][ids], {"table": jnp.ones((6, 4))}
      >>> sites = jp.sites(fn, params, jnp.zeros((1, 3), int))
      >>> method = jp.p_tuning(2, sites.embedding)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> frozen, adapter = jp.adapters.drop_reparameterization(frozen, adapter)
      >>> {path: array.shape for path, array in adapter.items()}
      {'table/rows': (2, 4)}
    """
    flat, treedef = flatten(frozen, is_leaf=is_view)
    rows: dict[str, Any] = {}

    def plain(view: View, w: Any, path: str) -> Any:
        if not isinstance(w, Weight):
            return w
        if name := base_field(w):
            inner = plain(view, getattr(w, name), f"{path}/{name}")
            w = dataclasses.replace(w, **{name: inner})  # type: ignore[type-var]
        if not w.is_reparameterized:
            return w
        derived = dataclasses.replace(view, weight=_filled(w, adapter)).derived()
        placeholders = {}
        for field, array in derived.items():
            name = f"{path}/{field}"
            rows[name] = array
            expects = Expected.like(array, "drop_reparameterization")
            placeholders[field] = Placeholder(name, expects=expects)
        return w.acting(**placeholders)

    for path, leaf in flat.items():
        if is_view(leaf):
            weight = plain(leaf, leaf.weight, path)
            flat[path] = dataclasses.replace(leaf, weight=weight)
    if not rows:
        raise ValueError(
            "`drop_reparameterization`: no prompt or prefix in this tree has an encoder. Methods "
            "with one are `p_tuning(...)` and `prefix_tuning(hidden=...)`."
        )
    plain_tree = unflatten(treedef, list(flat.values()))
    leaves = jax.tree.leaves(plain_tree, is_leaf=_is_placeholder)
    kept = {x.name for x in leaves if _is_placeholder(x)}
    return plain_tree, {**{k: v for k, v in adapter.items() if k in kept}, **rows}


def _is_placeholder(x: Any) -> bool:
    return isinstance(x, Placeholder)


def _filled(w: Weight, adapter: Mapping[str, Any]) -> Any:
    """The weight with the arrays of the adapter, and `None` for arrays of a call or the model."""

    def value(x: Any) -> Any:
        if not _is_placeholder(x):
            return x
        return x.fill(adapter[x.name]) if x.name in adapter else None

    return jax.tree.map(value, w, is_leaf=_is_placeholder)
