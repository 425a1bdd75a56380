"""Trees of parameters: what is trained, what is frozen, and how the two are taken apart.

A method marks trained arrays with `Train` and leaves `Hole`s where a value comes from
somewhere else. `split` takes such a tree apart, `combine` puts it together again. Both
exist once for the whole library.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft._printing import fields_summary
from jaxpeft.exporting import exportable, exportable_node
from jaxpeft.misuse import NotAnArray
from jaxpeft.weight import _KEY, OUT, Axis, View, Weight, innermost, map_views, with_innermost

_VALUE = jax.tree_util.GetAttrKey("trained")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Train(NotAnArray):
    """Marks an array as trained, between a method and `split`.

    Attributes:
      value: The array, its initial value.
      fresh: Whether the method made it, so that nobody else holds it.
      name: What the adapter calls it; `None` for its path. An array that other places share by
        a `Hole` needs one, since a path grows when another method is put on top.
      method, path: Which method trains it and at which parameter, for messages.
    """

    value: Any
    fresh: bool = True
    name: str | None = None
    method: str | None = None
    path: str | None = None

    def tree_flatten_with_keys(self) -> tuple:
        return ((_VALUE, self.value),), (self.fresh, self.name, self.method, self.path)

    @classmethod
    def tree_unflatten(cls, meta: tuple, children: tuple) -> "Train":
        return cls(children[0], *meta)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def __repr__(self) -> str:
        return fields_summary(self)

    def misuse(self, what: str) -> str:
        by = f"`{self.method}` trains at '{self.path}'" if self.path else "is trained"
        return (
            f"{what} on an array that {by}: this is a tree as a method returns it. Take it apart, "
            "`frozen, adapter = jaxpeft.split(tree)`, and put it together where it is used, "
            "`jaxpeft.combine(frozen, adapter)`: that is the argument of `jaxpeft.lift(fn)`."
        )


@exportable
@dataclasses.dataclass(frozen=True)
class Expected:
    """What goes into a `Hole`, of one call: under `jax.vmap` it is the shape of one example.

    Attributes:
      shape: Of the array.
      kind: "floating", "complex", ...: an adapter may be stored in another width of its kind.
      dtype: That it was made in, for messages.
      method: That made it, for messages.
      way: What to do about another shape, for messages; `None` for what to do as a rule.
    """

    shape: tuple[int, ...]
    kind: str
    # Two trees that differ in these alone are one program, and may be mapped over together.
    dtype: Any = dataclasses.field(default=None, compare=False)
    method: str | None = dataclasses.field(default=None, compare=False)
    way: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def like(cls, array: Any, method: str | None = None) -> "Expected | None":
        """What fits where this array was; `None` for what is no array, such as a sharding."""
        if not is_array(array):
            return None
        return cls(tuple(array.shape), _kind(array.dtype), array.dtype, method)

    def fits(self, x: Any) -> bool:
        """Whether x may go in: another width of its kind may, and what is not of an array."""
        try:
            return x.shape == self.shape and _kind(x.dtype) == self.kind
        except AttributeError:
            # JAX rebuilds trees with shardings, masks and labels in the place of arrays.
            return not isinstance(x, (int, float, complex, list, tuple, dict))

    def check(self, name: str, x: Any) -> None:
        """Raises ValueError where x does not fit."""
        if self.fits(x):
            return
        by = f"`{self.method}`" if self.method else "its method"
        if not is_array(x):
            raise ValueError(
                f"`combine`: '{name}' is a {type(x).__name__}, where {by} trains an array of shape "
                f"{self.shape}. Give an array: `jnp.asarray(...)`."
            )
        shape = tuple(x.shape)
        if _kind(x.dtype) != self.kind:
            raise ValueError(
                f"`combine`: '{name}' is {x.dtype} of shape {shape}, where {by} trains "
                f"{self.dtype or self.kind} of shape {self.shape}. Any {self.kind} dtype will do, "
                "and no other: convert what was stored in another one with `.astype`."
            )
        more = len(shape) - len(self.shape)
        if more > 0 and shape[more:] == self.shape:
            way = (
                f"It looks like a stack of {shape[0]} adapters. Map over them with `jax.vmap`, so "
                "that each call has one: `jax.vmap(lambda adapter: ... combine(frozen, adapter))`."
            )
        else:
            way = self.way or (
                "The adapter is of a method with other options, or of other params: give the one "
                "that `split` returned with this frozen tree, or make the tree with its options."
            )
        raise ValueError(
            f"`combine`: '{name}' has shape {shape}, where {by} trains an array of shape "
            f"{self.shape}. {way}"
        )


@functools.cache
def _kind(dtype: Any) -> str:
    for kind in ("floating", "complexfloating", "integer", "bool_"):
        if jnp.issubdtype(dtype, getattr(jnp, kind)):
            return {"complexfloating": "complex", "bool_": "boolean"}.get(kind, kind)
    return str(dtype)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array, or the shape and dtype of one; all others are static."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Hole(NotAnArray):
    """A place that `combine` fills.

    Attributes:
      name: Path of a trained or frozen array of the tree, or name of a value of the call.
      optional: `None` goes in where nobody gives the value.
      fold: For a PRNG key: what is folded in, so that every weight has a key of its own.
      stack: For a PRNG key: one key for each slice of this stack.
      axes: For the bias of a weight: the axes of the bias as the program lays it out. It goes
        in as the weight's own fields lie, (*stack, out).
      expects: What fits, where it is an array of the adapter.
    """

    name: str
    optional: bool = False
    fold: int | None = None
    stack: tuple[int, ...] = ()
    axes: tuple[Axis, ...] = ()
    expects: Expected | None = None

    def __repr__(self) -> str:
        return fields_summary(self)

    def misuse(self, what: str) -> str:
        value = "" if self.expects or not self.name.isidentifier() else f", {self.name}=..."
        return (
            f"{what} on '{self.name}', a place of the frozen tree that nothing fills. Put the tree "
            f"together first, `tree = jaxpeft.combine(frozen, adapter{value})`, and give it to "
            "`jaxpeft.lift(fn)` or `jaxpeft.merge`."
        )

    def fill(self, value: Any) -> Any:
        """What goes into the hole when its name has this value."""
        if self.axes:
            return self._laid_out(value)
        if self.fold is None or value is None:
            return value
        check_key(value, f"combine({self.name}=...)")
        key = jax.random.fold_in(value, self.fold)
        return jax.random.split(key, self.stack) if self.stack else key

    def _laid_out(self, bias: Any) -> Any:
        out = math.prod(axis.size for axis in self.axes if axis.role == OUT)
        if bias.shape == (*self.stack, out):
            return bias
        rows = jnp.squeeze(View.of(bias, self.axes).canonical(), -2)  # of the (1, out) matrix
        return jnp.broadcast_to(rows, (*self.stack, out))


def check_key(key: Any, who: str) -> None:
    """Raises TypeError where something is no PRNG key, of the new form or the old."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    if dtype != jnp.uint32 or not key.ndim:
        what = type(key).__name__ if dtype is None else f"{dtype} of shape {tuple(key.shape)}"
        raise TypeError(
            f"`{who}` needs a PRNG key, such as `jax.random.key(0)`, and was given {what}."
        )


_PARTS = tuple(jax.tree_util.GetAttrKey(name) for name in ("frozen", "trained_part"))


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Joined(NotAnArray):
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

    def __repr__(self) -> str:
        return fields_summary(self)

    def misuse(self, what: str) -> str:
        return self.trained.misuse(what)

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


def fold(key: jax.Array, path: str) -> jax.Array:
    """A key for a path, whatever else the tree holds: selecting more changes no other init."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def split(tree: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Takes a tree apart into what is frozen and what is trained.

    Trained arrays that belong to the caller's params are copied, so that donating the
    adapter to a jitted step cannot delete them.

    Args:
      tree: What a method returned: params with weights and trained arrays in them.

    Returns:
      The frozen tree, with holes, and `{path: array}` of the trained arrays and nothing else.

    Raises:
      ValueError: Nothing is trained, or the tree was taken apart already.
      TypeError: A node of the tree takes arrays only; names its class.
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
        if places := [x.name for x in flat.values() if isinstance(x, Hole) and x.expects]:
            raise ValueError(
                f"`split`: this tree was taken apart already; it has places for {places[:10]}. It "
                "is the frozen tree: `combine(frozen, adapter)` puts it together."
            )
        raise ValueError(
            "Nothing in this tree is trained. Apply a method first: "
            "`frozen, adapter = split(method(key, params))`."
        )
    frozen = [
        Hole(names[path], expects=Expected.like(x.value, x.method)) if path in names else x
        for path, x in flat.items()
    ]
    return unflatten(treedef, frozen), adapter


def _is_joined(x: Any) -> bool:
    return isinstance(x, Joined)


def _own(x: Train) -> Any:
    copy = not x.fresh and isinstance(x.value, jax.Array)
    return jnp.array(x.value, copy=True) if copy else x.value


class _Plan(NamedTuple):
    """What `combine` needs to know of the structure of a frozen tree."""

    treedef: Any  # with holes as leaves
    holes: tuple[Hole | None, ...]  # per leaf; `None` for what is there already
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
    flat, treedef = flatten(frozen, is_leaf=_is_mark)
    for x in flat.values():
        if isinstance(x, Train):
            raise ValueError(x.misuse("`combine`"))
    holes = tuple(x if isinstance(x, Hole) else None for x in flat.values())
    there = [path for path, hole in zip(flat, holes, strict=True) if hole is None]
    parts = jax.tree.leaves(frozen, is_leaf=_is_joined)
    return _Plan(
        treedef,
        holes,
        frozenset(hole.name for hole in holes if hole is not None),
        {path: i for i, path in enumerate(there)},
        any(map(_is_joined, parts)),
    )


def combine(frozen: Any, adapter: Mapping[str, Any], **call: Any) -> Any:
    """Puts a tree together again: the argument of a lifted function.

    Args:
      frozen: From `split`.
      adapter: `{path: array}`, of the same paths and shapes, in any dtype of the same kind.
      call: Values of this call by name, such as `dropout=key` or `virtual=slots`. A dropout
        key is folded by path and split over stacks, so that every layer has its own.

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

    def value(hole: Hole) -> Any:
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
    return jax.tree.map(lambda x: x.array() if _is_joined(x) else x, tree, is_leaf=_is_joined)


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


def base(tree: Any) -> Any:
    """Plain arrays of what the structured weights act on, without what the methods added.

    Args:
      tree: What a method returned, or what `combine` put together.
    """

    def one(view: View) -> Any:
        inner = innermost(view.weight)
        if not isinstance(inner, Weight) and view.natural:
            return inner
        return dataclasses.replace(view, weight=inner).materialize()

    done = map_views(one, combine(*split(tree)) if _has_marks(tree) else tree)
    check_filled(done, "base")
    return done


def check_filled(tree: Any, who: str) -> None:
    """Raises ValueError where something of a tree waits for `split` or `combine`; names it."""
    if mark := next((x for x in jax.tree.leaves(tree, is_leaf=_is_open) if _is_open(x)), None):
        raise ValueError(mark.misuse(f"`{who}`"))


def _is_open(x: Any) -> bool:
    return isinstance(x, NotAnArray) and not isinstance(x, View)


def _has_marks(tree: Any) -> bool:
    return any(isinstance(x, Train) for x in jax.tree.leaves(tree, is_leaf=_is_mark))


# --- Counting -------------------------------------------------------------------------------


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many parameters a tree has, and the bytes of the arrays that hold them.

    Attributes:
      trainable: Trainable parameters.
      frozen: Frozen parameters. A quantized weight has as many as the array that it stands for,
        whatever its format stores: packed values and scales are not counted.
      total: Parameters of the dense model that the tree stands for, plus what methods added.
      trainable_bytes, frozen_bytes: Bytes of the arrays as they are stored, so those of packed
        values and scales for a quantized weight.
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
    """Counts the parameters and bytes of both parts of a tree; shapes are enough.

    Args:
      frozen, adapter: From `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, a = jnp.ones((4, 4), "float32"), jnp.ones((4, 1), "float32")
      >>> str(count({"w": w}, {"a": a}))
      'trainable 4 of 20 (20.0000 %), 16 bytes; frozen 64 bytes'
    """
    arrays = [x for x in jax.tree.leaves(frozen) if hasattr(x, "shape")]
    nodes = jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, View))
    trained = list(adapter.values())
    return Counts(
        sum(math.prod(x.shape) for x in trained),
        sum(map(_parameters, nodes)),
        sum(map(_bytes, trained)),
        sum(map(_bytes, arrays)),
    )


def _parameters(node: Any) -> int:
    """Parameters of a frozen array, or of all that stands in the place of one."""
    if not isinstance(node, View):
        return math.prod(node.shape) if hasattr(node, "shape") else 0
    whole = jax.ShapeDtypeStruct([axis.size for axis in node.axes], node.dtype)
    # A weight that acts on nothing is quantized: its fields stand for the whole array.
    weight = with_innermost(node.weight, lambda x: whole if isinstance(x, Weight) else x)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(weight) if hasattr(x, "shape"))
