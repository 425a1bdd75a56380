"""Trees of parameters: `split` takes them apart into frozen and trained, `combine` joins them.

A method marks what is trained with `Trainable` and leaves a `Placeholder` where a value comes
from somewhere else. That is all that `split` and `combine` need, so that they exist once for the
whole library.
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
    """`a/b/c` of a key path, without the keys of this library's own nodes."""
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
      TypeError: A node of the tree accepts nothing but arrays; names its class.
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
            "\nJAX builds trees with other things than arrays in them. Let these pass the checks "
            f"of `{kind.__name__}`, or keep its arrays in a dict and build it inside the function "
            "that is lifted."
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
    """The arrays of a tree, and the tree as a function of them. Its other leaves are static."""
    leaves, treedef = jax.tree.flatten(tree)
    at = [i for i, x in enumerate(leaves) if is_array(x)]

    def rebuilt(arrays: Sequence[Any]) -> Any:
        values = list(leaves)
        for i, x in zip(at, arrays, strict=True):
            values[i] = x
        return jax.tree.unflatten(treedef, values)

    return [leaves[i] for i in at], rebuilt


def key_for_path(key: jax.Array, path: str) -> jax.Array:
    """A key for a path that depends on nothing else, so that selecting more weights changes no
    other weight's initial values."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split(tree: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Takes a tree apart into what is frozen and what is trained.

    Trained arrays that belong to the caller's params are copied, so that donating the
    adapter to a jitted step cannot delete them.

    Args:
      tree: What a method returned.

    Returns:
      `(frozen, adapter)`. The frozen tree has a `Placeholder` for each trained array; the
      adapter is `{path: array}` of the trained arrays and nothing else.

    Raises:
      ValueError: Nothing is trained, or the tree was taken apart already.
      TypeError: A node of the tree accepts nothing but arrays; names its class.

    Example:
      >>> import jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.lora(2, sites.linear)(jax.random.key(0), params))
      >>> loss = lambda adapter, x: jnp.sum(jp.lift(fn)(jp.combine(frozen, adapter), x))
      >>> list(jax.grad(loss)(adapter, jnp.ones((1, 8))))
      ['w/a', 'w/b']
    """
    flat, treedef = flatten(tree, is_leaf=is_mark)
    names = {path: x.name or path for path, x in flat.items() if isinstance(x, Trainable)}
    if len(twice := set(names.values())) < len(names):
        raise ValueError(
            f"`split`: the trained arrays at {list(names)} have only the names {sorted(twice)}. "
            "Two methods that share arrays among their weights were given the same weights. Give "
            "each method sites of its own."
        )
    adapter = {name: _own(flat[path]) for path, name in names.items()}
    if not adapter:
        if places := [x.name for x in flat.values() if isinstance(x, Placeholder) and x.expects]:
            raise ValueError(
                "`split`: this tree was taken apart already; it has placeholders for "
                f"{places[:10]}. Put it together with `combine(frozen, adapter)`: it is frozen."
            )
        raise ValueError(
            "`split`: nothing in this tree is trainable. Apply a method first, "
            "`tree = method(key, params)`, and give that tree."
        )
    frozen = [
        Placeholder(names[path], expects=Expected.like(x.value, x.method)) if path in names else x
        for path, x in flat.items()
    ]
    return unflatten(treedef, frozen), adapter


def _own(x: Trainable) -> Any:
    # An array of the caller's params must survive the donation of the adapter.
    copy = not x.fresh and isinstance(x.value, jax.Array)
    return jnp.array(x.value, copy=True) if copy else x.value


class _Plan(NamedTuple):
    """What `combine` needs to know of the structure of a frozen tree."""

    treedef: Any  # with placeholders as leaves
    places: tuple[Placeholder | None, ...]  # for each leaf; `None` if the tree has its value
    wanted: frozenset[str]  # names of the placeholders
    paths: dict[str, int]  # of the values that the tree has: which of them each one is
    has_parts: bool  # whether of some array only a part is trained


#: By structure of the tree, so that a loop outside `jit` makes each plan once.
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
    places = tuple(x if isinstance(x, Placeholder) else None for x in flat.values())
    there = [path for path, place in zip(flat, places, strict=True) if place is None]
    parts = jax.tree.leaves(frozen, is_leaf=is_concatenated)
    return _Plan(
        treedef,
        places,
        frozenset(place.name for place in places if place is not None),
        {path: i for i, path in enumerate(there)},
        any(map(is_concatenated, parts)),
    )


def combine(frozen: Any, adapter: Mapping[str, Any], **call: Any) -> Any:
    """Puts a tree together again, as the argument of a lifted function.

    Args:
      frozen: The frozen tree that `split` returned.
      adapter: `{path: array}` with the paths and shapes that `split` returned, in any dtype of
        the same kind.
      call: Values of this call by name, such as `dropout=key` or `virtual_positions=positions`. A
        dropout key is folded by path and split over stacks, so that every layer draws its own mask.

    Returns:
      The tree with structured weights: what `lift(fn)` and `merge` take.

    Raises:
      KeyError: A trained array is missing from the adapter, the adapter or the call has a name
        that the tree does not have, or a value of the call is missing.
      ValueError: An array of the adapter has another shape than the method gave it, or a dtype
        of another kind; names both and the method. Or the tree was not taken apart yet.
      TypeError: The adapter is not a mapping, or a value is not the PRNG key that it should be.
    """
    leaves, treedef = jax.tree.flatten(frozen)
    plan = _planned(frozen, treedef)
    wanted = plan.wanted
    if not isinstance(adapter, Mapping):
        raise TypeError(
            f"`combine(frozen, adapter)`: the adapter is a {type(adapter).__name__}, and should be "
            "the dict of paths and arrays that `split` returned with the frozen tree."
        )
    if unknown := sorted(set(adapter) - wanted):
        raise KeyError(_without_place(unknown, adapter, wanted))
    if unknown := sorted(set(call) - wanted):
        raise KeyError(
            f"`combine`: this tree takes no value called {unknown}. "
            f"It takes {sorted(wanted - set(adapter) - set(plan.paths)) or 'none'}."
        )

    def value(place: Placeholder) -> Any:
        found = adapter.get(place.name)
        if found is None:
            found = call.get(place.name)
        if found is None and (at := plan.paths.get(place.name)) is not None:
            found = leaves[at]
        if found is not None:
            if place.expects is not None:
                place.expects.check(place.name, found)
            return place.fill(found)
        if place.optional:
            return None
        raise KeyError(
            f"Nothing is given for '{place.name}'. If it is a trained array, it is "
            f"missing from the adapter, which has {sorted(adapter)}. If it is a value of the call, "
            f"give it: `combine(frozen, adapter, {place.name}=...)`."
        )

    there = iter(leaves)
    filled = [next(there) if place is None else value(place) for place in plan.places]
    tree = unflatten(plan.treedef, filled)
    if not plan.has_parts:
        return tree
    return jax.tree.map(
        lambda x: x.array() if is_concatenated(x) else x, tree, is_leaf=is_concatenated
    )


def _without_place(unknown: list[str], adapter: Mapping[str, Any], wanted: frozenset[str]) -> str:
    """The message about arrays of an adapter for which a tree has no placeholder."""
    inside = jax.tree.leaves(dict(adapter), is_leaf=lambda x: isinstance(x, NotAnArray))
    if any(isinstance(x, NotAnArray) for x in inside):
        return (
            f"`combine(frozen, adapter)`: what was given as the adapter, with {unknown}, is a tree "
            "with structured weights. Is it the frozen tree? That comes first."
        )
    if not wanted:
        return (
            f"`combine(frozen, adapter)`: the adapter has {unknown}, and the tree has no "
            "placeholder at all, so `split` did not return it. Give the frozen tree, not the "
            "params: `frozen, adapter = split(method(key, params))`."
        )
    return (
        f"`combine(frozen, adapter)`: the adapter has {unknown}, for which the tree has no "
        f"placeholder. It has placeholders for {sorted(wanted)}."
    )


def base_params(tree: Any) -> Any:
    """The params that the methods act on, as plain arrays without what the methods added.

    A quantized base is dequantized.

    Args:
      tree: What `combine` or a method returned.

    Raises:
      ValueError: The tree was taken apart and not put together; use `combine`.
    """

    def one(view: View) -> Any:
        inner = innermost(view.weight)
        if not isinstance(inner, Weight) and view.natural:
            return inner
        return dataclasses.replace(view, weight=inner).materialize()

    done = map_views(one, combine(*split(tree)) if _has_marks(tree) else tree)
    check_filled(done, "base_params")
    return done


def check_filled(tree: Any, caller: str) -> None:
    """Raises ValueError if something in a tree waits for `split` or `combine`; names it."""
    if mark := next((x for x in jax.tree.leaves(tree, is_leaf=_is_open) if _is_open(x)), None):
        raise ValueError(mark.misuse(f"`{caller}`"))


def _is_open(x: Any) -> bool:
    return isinstance(x, NotAnArray) and not isinstance(x, View)


def _has_marks(tree: Any) -> bool:
    return any(isinstance(x, Trainable) for x in jax.tree.leaves(tree, is_leaf=is_mark))
