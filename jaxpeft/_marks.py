"""Marks in a tree: which arrays are trained, and which values come from elsewhere.

A method marks trained arrays with `Trainable` and leaves a `Placeholder` where a value comes from
somewhere else.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable, exportable_node
from jaxpeft._misuse import NotAnArray
from jaxpeft._view import Axis, View
from jaxpeft._weight import OUT

VALUE_KEY = jax.tree_util.GetAttrKey("trained")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Trainable(NotAnArray):
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
        return ((VALUE_KEY, self.value),), (self.fresh, self.name, self.method, self.path)

    @classmethod
    def tree_unflatten(cls, meta: tuple, children: tuple) -> "Trainable":
        return cls(children[0], *meta)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

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
        return cls(tuple(array.shape), kind_of(array.dtype), array.dtype, method)

    def fits(self, x: Any) -> bool:
        """Whether x may go in: another width of its kind may, and what is not of an array."""
        try:
            return x.shape == self.shape and kind_of(x.dtype) == self.kind
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
        if kind_of(x.dtype) != self.kind:
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
def kind_of(dtype: Any) -> str:
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
@dataclasses.dataclass(frozen=True)
class Placeholder(NotAnArray):
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


def check_key(key: Any, caller: str) -> None:
    """Raises TypeError where something is no PRNG key, of the new form or the old."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    if dtype != jnp.uint32 or not key.ndim:
        what = type(key).__name__ if dtype is None else f"{dtype} of shape {tuple(key.shape)}"
        raise TypeError(
            f"`{caller}` needs a PRNG key, such as `jax.random.key(0)`, and was given {what}."
        )


_PARTS = tuple(jax.tree_util.GetAttrKey(name) for name in ("frozen", "trained_part"))


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Concatenated(NotAnArray):
    """An array of which only the end of one axis is trained; `combine` joins the parts."""

    frozen: Any
    trained: Any
    axis: int

    def tree_flatten_with_keys(self) -> tuple:
        return tuple(zip(_PARTS, (self.frozen, self.trained), strict=True)), self.axis

    @classmethod
    def tree_unflatten(cls, axis: int, children: tuple) -> "Concatenated":
        return cls(children[0], children[1], axis)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.frozen.shape)
        shape[self.axis] += self.trained.shape[self.axis]
        return tuple(shape)

    def misuse(self, what: str) -> str:
        return self.trained.misuse(what)

    def array(self) -> jax.Array:
        """The whole array."""
        return jnp.concatenate([self.frozen, self.trained], self.axis)


def is_mark(x: Any) -> bool:
    """Whether a node of a tree is a mark, which `split` or `combine` replaces."""
    return isinstance(x, (Trainable, Placeholder))


def is_concatenated(x: Any) -> bool:
    """Whether a node of a tree is an array that is trained in part."""
    return isinstance(x, Concatenated)
