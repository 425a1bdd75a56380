"""Trees of parameters: what is trained, what is frozen, and how the two are taken apart.

A method marks trained arrays with `Train` and leaves `Hole`s where a value comes from
somewhere else. `split` takes such a tree apart, `combine` puts it together again. Both
exist once for the whole library.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft._marks import (
    VALUE_KEY,
    Expected,
    Placeholder,
    Trainable,
    is_array,
    is_concatenated,
    is_mark,
)
from jaxpeft._misuse import NotAnArray
from jaxpeft._view import WEIGHT_KEY, View, map_views
from jaxpeft._weight import Weight, innermost


def path_name(path: tuple) -> str:
    """`a/b/c` of a key path; the nodes of this library leave no trace in it."""
    keys = [k for k in path if k is not WEIGHT_KEY and k is not VALUE_KEY]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """{path: leaf} in the order of the tree, and its structure.

    Raises:
      ValueError: Two leaves have one path (`{"a/b": x, "a": {"b": y}}`).
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    flat: dict[str, Any] = {}
    for path, leaf in pairs:
        name = path_name(path)
        if name in flat:
            raise ValueError(
                f"Two leaves of the tree have the path '{name}'. Rename one: paths are the "
                "names under which adapters are stored."
            )
        flat[name] = leaf
    return flat, treedef


def unflatten(treedef: Any, leaves: Sequence[Any]) -> Any:
    """`jax.tree.unflatten`, for leaves that are not all arrays.

    Raises:
      TypeError: A node of the tree takes arrays only; names its class.
    """
    try:
        return jax.tree.unflatten(treedef, leaves)
    except Exception as error:
        kind, inside = _refusing(treedef, list(leaves))
        marks = [x for x in inside if isinstance(x, NotAnArray)]
        if kind is None or not marks:
            raise
        raise TypeError(
            f"The tree has a node of class `{kind.__name__}` that does not take a "
            f"`{type(marks[0]).__name__}` in the place of an array: {type(error).__name__}: {error}"
            "\nJAX builds trees with other things than arrays in them: let what is no array pass "
            f"the checks of `{kind.__name__}`, or keep its arrays in a dict and build it inside "
            "the function that is lifted."
        ) from error


def _refusing(treedef: Any, leaves: list) -> tuple[Any, list]:
    """The class of the innermost node that cannot be built, and the leaves under it."""
    start = 0
    for child in treedef.children():
        own = leaves[start : start + child.num_leaves]
        start += child.num_leaves
        try:
            jax.tree.unflatten(child, own)
        except Exception:
            return _refusing(child, own)
    data = treedef.node_data()
    return data and data[0], leaves


def arrays_of(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and the tree as a function of them; its other leaves are static."""
    leaves, treedef = jax.tree.flatten(tree)
    at = [i for i, x in enumerate(leaves) if is_array(x)]

    def rebuilt(arrays: Sequence[Any]) -> Any:
        values = list(leaves)
        for i, x in zip(at, arrays, strict=True):
            values[i] = x
        return jax.tree.unflatten(treedef, values)

    return [leaves[i] for i in at], rebuilt


def key_for_path(key: jax.Array, path: str) -> jax.Array:
    """A key for a path, whatever else the tree holds: selecting more changes no other init."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split(tree: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Takes a tree apart into what is frozen and what is trained.

    Trained arrays that belong to the caller's params are copied, so that donating the
    adapter to a jitted step cannot delete them.

    Returns:
      The frozen tree, with holes, and `{path: array}` of the trained arrays and nothing else.

    Raises:
      ValueError: Nothing is trained, or the tree was taken apart already.
      TypeError: A node of the tree takes arrays only; names its class.
    """
    flat, treedef = flatten(tree, is_leaf=is_mark)
    names = {path: x.name or path for path, x in flat.items() if isinstance(x, Trainable)}
    if len(twice := set(names.values())) < len(names):
        raise ValueError(
            f"The trained arrays at {list(names)} have only the names {sorted(twice)}: two "
            "methods, each of which shares arrays among its weights, were given the same weights."
        )
    adapter = {name: _own(flat[path]) for path, name in names.items()}
    if not adapter:
        if places := [x.name for x in flat.values() if isinstance(x, Placeholder) and x.expects]:
            raise ValueError(
                f"`split`: this tree was taken apart already; it has places for {places[:10]}. It "
                "is the frozen tree: `combine(frozen, adapter)` puts it together."
            )
        raise ValueError(
            "Nothing in this tree is trained. Apply a method first: "
            "`frozen, adapter = split(method(key, params))`."
        )
    frozen = [
        Placeholder(names[path], expects=Expected.like(x.value, x.method)) if path in names else x
        for path, x in flat.items()
    ]
    return unflatten(treedef, frozen), adapter


def _own(x: Trainable) -> Any:
    copy = not x.fresh and isinstance(x.value, jax.Array)
    return jnp.array(x.value, copy=True) if copy else x.value


class _Plan(NamedTuple):
    """What `combine` needs to know of the structure of a frozen tree."""

    treedef: Any  # with holes as leaves
    holes: tuple[Placeholder | None, ...]  # per leaf; `None` for what is there already
    wanted: frozenset[str]
    paths: dict[str, int]  # of what is there: which of the leaves without holes it is
    has_parts: bool  # whether an array is trained in part


#: By structure, so that a loop outside `jit` derives it once.
_plans: dict[Any, _Plan] = {}
_PLANS = 32


def _planned(frozen: Any, treedef: Any) -> _Plan:
    try:
        known = _plans.get(treedef)
    except Exception:  # A node's static part has no hash, or no equality that is a truth value.
        return _plan(frozen)
    if known is None:
        known = _plan(frozen)
        while len(_plans) >= _PLANS:
            _plans.pop(next(iter(_plans)), None)
        _plans[treedef] = known
    return known


def _plan(frozen: Any) -> _Plan:
    flat, treedef = flatten(frozen, is_leaf=is_mark)
    for x in flat.values():
        if isinstance(x, Trainable):
            raise ValueError(x.misuse("`combine`"))
    holes = tuple(x if isinstance(x, Placeholder) else None for x in flat.values())
    there = [path for path, hole in zip(flat, holes, strict=True) if hole is None]
    parts = jax.tree.leaves(frozen, is_leaf=is_concatenated)
    return _Plan(
        treedef,
        holes,
        frozenset(hole.name for hole in holes if hole is not None),
        {path: i for i, path in enumerate(there)},
        any(map(is_concatenated, parts)),
    )


def combine(frozen: Any, adapter: Mapping[str, Any], **call: Any) -> Any:
    """Puts a tree together again: the argument of a lifted function.

    Args:
      frozen: From `split`.
      adapter: `{path: array}`, of the same paths and shapes, in any dtype of the same kind.
      call: Values of this call by name, such as `dropout=key` or `virtual_positions=positions`. A
        dropout key is folded by path and split over stacks, so that every layer has its own.

    Raises:
      KeyError: A trained array is missing from the adapter, or one has no place in the tree.
      ValueError: An array of the adapter has another shape than the method gave it, or a dtype
        of another kind; names both and the method. Or the tree was not taken apart yet.
      TypeError: The adapter is no mapping, or a value that should be a PRNG key is none.
    """
    leaves, treedef = jax.tree.flatten(frozen)
    plan = _planned(frozen, treedef)
    wanted = plan.wanted
    if not isinstance(adapter, Mapping):
        raise TypeError(
            f"`combine(frozen, adapter)`: the adapter is a {type(adapter).__name__}, and should be "
            "the dict of paths and arrays that `split` returned beside the frozen tree."
        )
    if unknown := sorted(set(adapter) - wanted):
        raise KeyError(_without_place(unknown, adapter, wanted))
    if unknown := sorted(set(call) - wanted):
        raise KeyError(
            f"This tree takes no value called {unknown}. "
            f"It takes {sorted(wanted - set(adapter) - set(plan.paths)) or 'none'}."
        )

    def value(hole: Placeholder) -> Any:
        found = adapter.get(hole.name)
        if found is None:
            found = call.get(hole.name)
        if found is None and (at := plan.paths.get(hole.name)) is not None:
            found = leaves[at]
        if found is not None:
            if hole.expects is not None:
                hole.expects.check(hole.name, found)
            return hole.fill(found)
        if hole.optional:
            return None
        raise KeyError(
            f"Nothing is given for '{hole.name}'. If it is trained, it is missing from the "
            f"adapter, which has {sorted(adapter)}; if it is a value of the call, give it: "
            f"`combine(frozen, adapter, {hole.name}=...)`."
        )

    there = iter(leaves)
    filled = [next(there) if hole is None else value(hole) for hole in plan.holes]
    tree = unflatten(plan.treedef, filled)
    if not plan.has_parts:
        return tree
    return jax.tree.map(
        lambda x: x.array() if is_concatenated(x) else x, tree, is_leaf=is_concatenated
    )


def _without_place(unknown: list[str], adapter: Mapping[str, Any], wanted: frozenset[str]) -> str:
    """What is said of trained arrays that a tree has no place for."""
    inside = jax.tree.leaves(dict(adapter), is_leaf=lambda x: isinstance(x, NotAnArray))
    if any(isinstance(x, NotAnArray) for x in inside):
        return (
            f"`combine(frozen, adapter)`: what was given as the adapter, with {unknown}, is a tree "
            "with structured weights. Is it the frozen tree? It comes first."
        )
    if not wanted:
        return (
            f"The adapter has {unknown}, and this tree has no place at all: it is none that "
            "`split` returned. Give the frozen tree, not the params: "
            "`frozen, adapter = split(method(key, params))`."
        )
    return (
        f"The adapter has {unknown}, for which the tree has no place. "
        f"It has places for {sorted(wanted)}."
    )


def base_params(tree: Any) -> Any:
    """Plain arrays of what the structured weights act on, without what the methods added."""

    def one(view: View) -> Any:
        inner = innermost(view.weight)
        if not isinstance(inner, Weight) and view.natural:
            return inner
        return dataclasses.replace(view, weight=inner).materialize()

    done = map_views(one, combine(*split(tree)) if _has_marks(tree) else tree)
    check_filled(done, "base_params")
    return done


def check_filled(tree: Any, caller: str) -> None:
    """Raises ValueError where something of a tree waits for `split` or `combine`; names it."""
    if mark := next((x for x in jax.tree.leaves(tree, is_leaf=_is_open) if _is_open(x)), None):
        raise ValueError(mark.misuse(f"`{caller}`"))


def _is_open(x: Any) -> bool:
    return isinstance(x, NotAnArray) and not isinstance(x, View)


def _has_marks(tree: Any) -> bool:
    return any(isinstance(x, Trainable) for x in jax.tree.leaves(tree, is_leaf=is_mark))
