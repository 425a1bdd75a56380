"""Marks in a tree of parameters: which arrays are trained, which values come from elsewhere.

A method wraps each array that is to be trained in `Trainable`, and leaves a `Placeholder` for
each value that it does not have, such as a dropout key. `split` turns the first into the second,
and `combine` fills these.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable, exportable_node
from jaxpeft._misuse import NotAnArray
from jaxpeft._printing import fields_summary
from jaxpeft._view import Axis, View
from jaxpeft._weight import OUT

VALUE_KEY = jax.tree_util.GetAttrKey("trained")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainable(NotAnArray):
    """Marks an array as trainable, from the method that returns it to `split`.

    Attributes:
      value: The initial value of the array.
      fresh: Whether the method made the array. If it belongs to the caller's params instead,
        `split` copies it.
      name: The array's name in the adapter; `None` for its path in the tree. An array that
        other places share by a `Placeholder` needs one, since its path changes when another
        method wraps the weight.
      method, path: Which method trains it and at which parameter, for messages.
        `apply_to_sites` fills them in.

    Example:
      A method may be any function that marks arrays.

      >>> import jaxpeft as jp
      >>> def train_bias(key, params):
      ...     return {**params, "bias": Trainable(params["bias"], fresh=False)}
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> frozen, adapter = jp.split(train_bias(jax.random.key(0), params))
      >>> list(adapter)
      ['bias']
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
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.value.dtype

    def __repr__(self) -> str:
        return fields_summary(self)

    def misuse(self, what: str) -> str:
        by = f"`{self.method}` trains at '{self.path}'" if self.path else "is trained"
        return (
            f"{what} on an array that {by}: this is the tree that a method returned. Take it "
            "apart, `frozen, adapter = jaxpeft.split(tree)`, and put it together where it is used, "
            "`jaxpeft.combine(frozen, adapter)`: that is the argument of `jaxpeft.lift(fn)`."
        )


@exportable
@dataclasses.dataclass(frozen=True)
class Expected:
    """Which array of an adapter a `Placeholder` takes.

    Attributes:
      shape: The shape of the array; under `jax.vmap`, that of one example.
      kind: "floating", "complex" and so on. An adapter may be stored in any dtype of its kind.
      dtype: The dtype that the array was made in, for messages.
      method: The method that made it, for messages.
      way: What to do about another shape, for messages; `None` for the general advice.
    """

    shape: tuple[int, ...]
    kind: str
    # Two trees that differ in these alone are one program, and may be mapped over together.
    dtype: Any = dataclasses.field(default=None, compare=False)
    method: str | None = dataclasses.field(default=None, compare=False)
    way: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def like(cls, array: Any, method: str | None = None) -> "Expected | None":
        """What fits where this array was; `None` if it is not an array but, say, a sharding."""
        if not is_array(array):
            return None
        return cls(tuple(array.shape), kind_of(array.dtype), array.dtype, method)

    def fits(self, x: Any) -> bool:
        """Whether x may stand here."""
        try:
            return x.shape == self.shape and kind_of(x.dtype) == self.kind
        except AttributeError:
            # JAX rebuilds trees with shardings, masks and labels in the place of arrays.
            return not isinstance(x, (int, float, complex, list, tuple, dict))

    def check(self, name: str, x: Any) -> None:
        """Raises ValueError if x may not stand here.

        Args:
          name: Name of the placeholder, for messages.
          x: What the adapter has under this name.
        """
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
                "and no other. Convert the array with `.astype`."
            )
        more = len(shape) - len(self.shape)
        if more > 0 and shape[more:] == self.shape:
            way = (
                f"It looks like a stack of {shape[0]} adapters. Map over them with `jax.vmap`, so "
                "that each call gets one: `jax.vmap(lambda adapter: ... combine(frozen, adapter))`."
            )
        else:
            way = self.way or (
                "The adapter belongs to a method with other options, or to other params. Give the "
                "one that `split` returned with this frozen tree, or apply the method with the "
                "adapter's options."
            )
        raise ValueError(
            f"`combine`: '{name}' has shape {shape}, where {by} trains an array of shape "
            f"{self.shape}. {way}"
        )


@functools.cache
def kind_of(dtype: Any) -> str:
    """ "floating", "complex", "integer" or "boolean"; the dtype's own name for any other."""
    for kind in ("floating", "complexfloating", "integer", "bool_"):
        if jnp.issubdtype(dtype, getattr(jnp, kind)):
            return {"complexfloating": "complex", "bool_": "boolean"}.get(kind, kind)
    return str(dtype)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array, or the shape and dtype of one. Any other leaf is static."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Placeholder(NotAnArray):
    """A place of a tree that `combine` fills with a value by name.

    The value is looked up in the adapter, among the values of the call
    (`combine(frozen, adapter, dropout=key)`), and in the frozen tree, in this order.

    Attributes:
      name: Path of an array of the adapter or of the frozen tree, or name of a value of the
        call.
      optional: Whether `None` is filled in if nobody gives the value. If not, that is an error.
      fold: For a PRNG key: the integer that is folded in, so that every weight has its own key.
      stack: For a PRNG key: the shape of the stack, each slice of which gets its own key.
      axes: For a bias or scale of the model: its axes as the program lays it out. The value is
        filled in as fields of the weight lie, (*stack, out).
      expects: For an array of the adapter: which shape and kind of dtype it has.

    Example:
      >>> frozen = {"w": Placeholder("w"), "key": Placeholder("dropout", optional=True)}
      >>> import jaxpeft as jp
      >>> jp.combine(frozen, {"w": 1.0})
      {'key': None, 'w': 1.0}
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
            f"{what} on '{self.name}', a placeholder that nothing has filled yet. Put the tree "
            f"together first, `tree = jaxpeft.combine(frozen, adapter{value})`, and give it to "
            "`jaxpeft.lift(fn)` or `jaxpeft.merge`."
        )

    def fill(self, value: Any) -> Any:
        """What goes into the tree when the name has this value.

        Args:
          value: The value by this name, or `None`.
        """
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
    """Raises TypeError if something is not a PRNG key, typed or as raw `uint32`.

    Args:
      key: What was given.
      caller: The call as the user wrote it, for messages.
    """
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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Concatenated(NotAnArray):
    """An array of which only the end of one axis is trained. `combine` concatenates the parts.

    Attributes:
      frozen: The first part.
      trained: The last part, a `Trainable` or `Placeholder`.
      axis: The axis along which they are concatenated.
    """

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
        """The shape of the whole array."""
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


def is_mark(x: Any) -> bool:
    """Whether a node of a tree is a mark, which `split` or `combine` replaces."""
    return isinstance(x, (Trainable, Placeholder))


def is_concatenated(x: Any) -> bool:
    """Whether a node of a tree is an array of which a part is trained."""
    return isinstance(x, Concatenated)
