"""Folding: networks that only help training leave plain arrays behind."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft._marks import Expected, Placeholder
from jaxpeft._tree import flatten, unflatten
from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, base_field


def drop_reparameterization(frozen: Any, adapter: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replaces what an encoder computes of trained arrays by what it has come to.

    A prompt or a prefix with an encoder becomes one without, with the same outputs to the last
    bit but rounding; the rest stays as it is. Training can go on from there, or from the adapter
    that is given, which stays as it was.

    Args:
      frozen: From `split`.
      adapter: `{path: array}`, of the same paths.

    Returns:
      A frozen tree and an adapter, those of the plain method: rows in the place of encoders.

    Raises:
      ValueError: Nothing in the tree can be folded.
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
        made = dataclasses.replace(view, weight=_filled(w, adapter)).derived()
        names = {field: f"{path}/{field}" for field in made}
        rows.update({names[field]: array for field, array in made.items()})
        expects = {
            field: Expected.like(array, "drop_reparameterization") for field, array in made.items()
        }
        holes = {field: Placeholder(name, expects=expects[field]) for field, name in names.items()}
        return w.acting(**holes)

    for path, leaf in flat.items():
        if is_view(leaf):
            weight = plain(leaf, leaf.weight, path)
            flat[path] = dataclasses.replace(leaf, weight=weight)
    if not rows:
        raise ValueError(
            "Nothing in this tree has an encoder that could be folded away. Prompts and prefixes "
            "have one where they were given it: `p_tuning(...)`, `prefix_tuning(hidden=...)`."
        )
    folded = unflatten(treedef, list(flat.values()))
    kept = {x.name for x in jax.tree.leaves(folded, is_leaf=_is_hole) if _is_hole(x)}
    return folded, {**{k: v for k, v in adapter.items() if k in kept}, **rows}


def _is_hole(x: Any) -> bool:
    return isinstance(x, Placeholder)


def _filled(w: Weight, adapter: Mapping[str, Any]) -> Any:
    """The weight with its trained arrays, and nothing where a call or the model gives something."""

    def value(x: Any) -> Any:
        if not _is_hole(x):
            return x
        return x.fill(adapter[x.name]) if x.name in adapter else None

    return jax.tree.map(value, w, is_leaf=_is_hole)
