"""Trees of parameters: what is trained, what is frozen, and how the two are taken apart.

A method marks trained arrays with `Train` and leaves `Hole`s where a value comes from
somewhere else. `split` takes such a tree apart, `combine` puts it together again. Both
exist once for the whole library.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.weight import _KEY, OUT, Axis, View, Weight, innermost, map_views

_VALUE = jax.tree_util.GetAttrKey("trained")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """Marks an array as trained, between a method and `split`.

    Attributes:
      value: The array, its initial value.
      fresh: Whether the method made it, so that nobody else holds it.
      name: What the adapter calls it; `None` for its path. An array that other places share by
        a `Hole` needs one, since a path grows when another method is put on top.
    """

    value: Any
    fresh: bool = True
    name: str | None = None

    def tree_flatten_with_keys(self) -> tuple:
        return ((_VALUE, self.value),), (self.fresh, self.name)

    @classmethod
    def tree_unflatten(cls, meta: tuple, children: tuple) -> "Train":
        return cls(children[0], *meta)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """A place that `combine` fills.

    Attributes:
      name: Path of a trained or frozen array of the tree, or name of a value of the call.
      optional: `None` goes in where nobody gives the value.
      fold: For a PRNG key: what is folded in, so that every weight has a key of its own.
      stack: For a PRNG key: one key for each slice of this stack.
      axes: For the bias of a weight: the axes of the bias as the program lays it out. It goes
        in as the weight's own fields lie, (*stack, out).
    """

    name: str
    optional: bool = False
    fold: int | None = None
    stack: tuple[int, ...] = ()
    axes: tuple[Axis, ...] = ()

    def fill(self, value: Any) -> Any:
        """What goes into the hole when its name has this value."""
        if self.axes:
            return self._laid_out(value)
        if self.fold is None or value is None:
            return value
        key = jax.random.fold_in(value, self.fold)
        return jax.random.split(key, self.stack) if self.stack else key

    def _laid_out(self, bias: Any) -> Any:
        out = math.prod(axis.size for axis in self.axes if axis.role == OUT)
        if bias.shape == (*self.stack, out):
            return bias
        rows = jnp.squeeze(View.of(bias, self.axes).canonical(), -2)  # of the (1, out) matrix
        return jnp.broadcast_to(rows, (*self.stack, out))


_PARTS = tuple(jax.tree_util.GetAttrKey(name) for name in ("frozen", "trained_part"))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """An array of which only the end of one axis is trained; `combine` joins the parts."""

    frozen: Any
    trained: Any
    axis: int

    def tree_flatten_with_keys(self) -> tuple:
        return tuple(zip(_PARTS, (self.frozen, self.trained), strict=True)), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, children: tuple) -> "Joined":
        return cls(children[0], children[1], axis)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.frozen.shape)
        shape[self.axis] += self.trained.shape[self.axis]
        return tuple(shape)

    def array(self) -> jax.Array:
        """The whole array."""
        return jnp.concatenate([self.frozen, self.trained], self.axis)


def _is_mark(x: Any) -> bool:
    return isinstance(x, (Train, Hole))


def path_name(path: tuple) -> str:
    """`a/b/c` of a key path; the nodes of this library leave no trace in it."""
    keys = [k for k in path if k is not _KEY and k is not _VALUE]
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


def fold(key: jax.Array, path: str) -> jax.Array:
    """A key for a path, whatever else the tree holds: selecting more changes no other init."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split(tree: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Takes a tree apart into what is frozen and what is trained.

    Trained arrays that belong to the caller's params are copied, so that donating the
    adapter to a jitted step cannot delete them.

    Returns:
      The frozen tree, with holes, and `{path: array}` of the trained arrays and nothing else.

    Raises:
      ValueError: Nothing is trained.
    """
    flat, treedef = flatten(tree, is_leaf=_is_mark)
    names = {path: x.name or path for path, x in flat.items() if isinstance(x, Train)}
    if len(twice := set(names.values())) < len(names):
        raise ValueError(
            f"The trained arrays at {list(names)} have only the names {sorted(twice)}: two "
            "methods, each of which shares arrays among its weights, were given the same weights."
        )
    adapter = {name: _own(flat[path]) for path, name in names.items()}
    if not adapter:
        raise ValueError(
            "Nothing in this tree is trained. Apply a method first: "
            "`frozen, adapter = split(method(key, params))`."
        )
    frozen = [Hole(names[path]) if path in names else x for path, x in flat.items()]
    return jax.tree.unflatten(treedef, frozen), adapter


def _is_joined(x: Any) -> bool:
    return isinstance(x, Joined)


def _own(x: Train) -> Any:
    copy = not x.fresh and isinstance(x.value, jax.Array)
    return jnp.array(x.value, copy=True) if copy else x.value


def combine(frozen: Any, adapter: Mapping[str, Any], **call: Any) -> Any:
    """Puts a tree together again: the argument of a lifted function.

    Args:
      frozen: From `split`.
      adapter: `{path: array}`, of the same paths.
      call: Values of this call by name, such as `dropout=key` or `virtual=slots`. A dropout
        key is folded by path and split over stacks, so that every layer has its own.

    Raises:
      KeyError: A trained array is missing from the adapter, or one has no place in the tree.
    """
    flat, treedef = flatten(frozen, is_leaf=_is_mark)
    wanted = {x.name for x in flat.values() if isinstance(x, Hole)}
    if unknown := sorted(set(adapter) - wanted):
        raise KeyError(
            f"The adapter has {unknown}, for which the tree has no place. "
            f"It has places for {sorted(wanted)}."
        )
    if unknown := sorted(set(call) - wanted):
        raise KeyError(
            f"This tree takes no value called {unknown}. "
            f"It takes {sorted(wanted - set(adapter) - set(flat)) or 'none'}."
        )

    def value(hole: Hole) -> Any:
        for source in (adapter, call, flat):
            found = source.get(hole.name)
            if found is not None and not isinstance(found, Hole):
                return hole.fill(found)
        if hole.optional:
            return None
        raise KeyError(
            f"Nothing is given for '{hole.name}'. If it is trained, it is missing from the "
            f"adapter, which has {sorted(adapter)}; if it is a value of the call, give it: "
            f"`combine(frozen, adapter, {hole.name}=...)`."
        )

    filled = [value(x) if isinstance(x, Hole) else x for x in flat.values()]
    return jax.tree.map(
        lambda x: x.array() if isinstance(x, Joined) else x,
        jax.tree.unflatten(treedef, filled),
        is_leaf=_is_joined,
    )


def base(tree: Any) -> Any:
    """Plain arrays of what the structured weights act on, without what the methods added."""

    def one(view: View) -> Any:
        inner = innermost(view.weight)
        if not isinstance(inner, Weight) and view.natural:
            return inner
        return dataclasses.replace(view, weight=inner).materialize()

    return map_views(one, combine(*split(tree)) if _has_marks(tree) else tree)


def _has_marks(tree: Any) -> bool:
    return any(isinstance(x, Train) for x in jax.tree.leaves(tree, is_leaf=_is_mark))


# --- For those who keep one tree and mask the optimizer -------------------------------------


def mask(tree: Any) -> Any:
    """True where an array is trained, in the structure of `combine(*split(tree))`.

    Args:
      tree: What a method returned, with its marks.

    Raises:
      ValueError: One trained array stands at several places, which this form cannot say.
    """
    return labels(tree, True, False)


def labels(tree: Any, train: Any = "train", freeze: Any = "freeze") -> Any:
    """Labels for `optax.partition`, in the structure of `combine(*split(tree))`.

    Example:
      >>> import optax
      >>> tx = lambda tree: optax.partition(
      ...     {"train": optax.adamw(1e-4), "freeze": optax.set_to_zero()}, labels(tree))
    """
    frozen, adapter = split(tree)
    if any(isinstance(x, Joined) for x in jax.tree.leaves(frozen, is_leaf=_is_joined)):
        raise ValueError(
            "An array of this tree is trained in part, which a mask over arrays cannot say. Use "
            "`split` and `combine`."
        )
    holes = [x.name for x in jax.tree.leaves(frozen, is_leaf=_is_mark) if isinstance(x, Hole)]
    if twice := sorted({name for name in holes if name in adapter and holes.count(name) > 1}):
        raise ValueError(
            f"{twice} are trained and stand at several places of the tree. Use "
            "`split` and `combine`, where a trained array exists once."
        )

    def label(x: Any) -> Any:
        if not isinstance(x, Hole):
            return freeze
        if x.name in adapter:
            return train
        return None if x.optional else freeze

    return jax.tree.map(label, frozen, is_leaf=lambda x: isinstance(x, Hole))


# --- Counting -------------------------------------------------------------------------------


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many numbers and bytes a tree holds.

    Attributes:
      trainable: Trained numbers.
      frozen: Numbers of the frozen arrays (codes and scales of quantized weights count as
        the numbers they are).
      total: Numbers of the dense model that the tree stands for, plus what methods added.
      trainable_bytes, frozen_bytes: Bytes of these arrays.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return (
            f"trainable {self.trainable:,} of {self.total:,} ({share:.4f} %), "
            f"{self.trainable_bytes:,} bytes; frozen {self.frozen_bytes:,} bytes"
        )


def count(frozen: Any, adapter: Mapping[str, Any]) -> Counts:
    """Numbers and bytes of both parts of a tree; shapes alone will do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, a = jnp.ones((4, 4), "float32"), jnp.ones((4, 1), "float32")
      >>> str(count({"w": w}, {"a": a}))
      'trainable 4 of 20 (20.0000 %), 16 bytes; frozen 64 bytes'
    """
    arrays = [x for x in jax.tree.leaves(frozen) if hasattr(x, "shape")]
    trained = list(adapter.values())
    return Counts(
        sum(math.prod(x.shape) for x in trained),
        sum(math.prod(x.shape) for x in arrays),
        sum(map(_bytes, trained)),
        sum(map(_bytes, arrays)),
    )
