"""Weight: what acts in the place of a matrix of parameters. Start reading here.

A *weight* says what happens where the model multiplies by a matrix, in canonical form: inputs
have shape (..., in), outputs (..., out), and the maths is one line, `x @ self.w + x @ self.a @
self.b`. It knows nothing of layouts, stacks of layers, experts, convolutions or devices.

A *view* (`_view`) is the node that stands in the tree: a weight, the axes of the array that it
replaces with their roles, and where each dimension of the current value came from. The rules for
transpose, reshape, slice and scan touch views only.

Where a view meets a product, `lift` *binds* the weight: its fields become operands (`_operand`),
and `x @ self.a` is then whatever that call site makes of a product: dense, batched over experts,
ragged, or a convolution.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable_node
from jaxpeft._printing import fields_summary

T = TypeVar("T")

#: Roles of axes.
STACK, IN, OUT = "stack", "in", "out"


# --- Fields of a weight ------------------------------------------------------------------


def base_weight() -> Any:
    """Declares the field that holds what the weight acts on: an array or another weight."""
    return dataclasses.field(metadata={"base": True})


def axes(*names: str, shared: bool = False, optional: bool = False) -> Any:
    """Declares a field that holds an array, and says what its axes are.

    Args:
      names: "in" and "out" for the two sides of the matrix, any other name for an axis of the
        method's own ("rank"). Where matrices are stacked, the axes of the stack come before
        these and are not declared.
      shared: The whole stack has one array, without stack axes.
      optional: The field may be `None`, which is then its default.
    """
    metadata = {"axes": names, "shared": shared}
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def arrays() -> Any:
    """Declares a field that holds any tree of arrays, one tree for the whole stack."""
    return dataclasses.field(metadata={"shared": True})


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field that is part of the program, such as a scale or a flag, not an array.

    Args:
      default: Its value where none is given; without it, the field is required.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(base_weight, axes, arrays, static))
def weight(cls: type[T]) -> type[T]:
    """Makes a subclass of `Weight` a frozen dataclass that is a JAX pytree.

    Args:
      cls: The class. Each of its fields is declared by `base_weight`, `axes`, `arrays` or
        `static`.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if f.name not in meta]
    return exportable_node(
        jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta), meta
    )


class Weight:
    """What acts in the place of a matrix `W` of shape (in, out). Methods subclass it.

    A subclass says what the model's three uses of a matrix become. These laws hold for a
    weight that is mergeable:

        forward(x)     == x @ materialize()           x (..., in) to (..., out)
        transposed(y)  == y @ materialize().T         y (..., out) to (..., in), a tied head
        lookup(ids)    == materialize()[ids]          ids (...) to (..., out), an embedding

    In these three, fields are bound to the call site: `x @ self.w`, `y @ self.w.T` and
    `self.w[ids]` work whether the base is an array or another weight, and `y * self.scale` and
    `y + self.shift` do for a field of one axis. In `materialize`, fields are plain arrays
    without stack axes, and `dense(self.w)` is the matrix of the base. A use that a subclass
    does not define materializes the weight, with a warning, or is an error if it is not
    mergeable.

    A class may hold anything in its fields, since JAX rebuilds trees with shapes, shardings
    and masks in the place of arrays. Checks belong in the functions that make weights.

    Attributes:
      is_mergeable: Whether the weight equals a dense matrix. If not, it has no `materialize`,
        and `merge` refuses it.
      local_in: Whether `forward` is right on a shard of the inputs whose partial results are
        summed over devices afterwards, as that of every linear map is.
      local_out: Whether `forward` is right on a shard of the outputs.
      per_position: The field whose axes are (batch, time), those of the weight's input, if
        there is one.
      is_reparameterized: Whether what the weight derives (`derived`) may replace its trained
        fields for good once training is over, as `adapters.drop_reparameterization` does.

    Example:
      A scale for each output. `jaxpeft.extend` shows the method that puts it into a tree.

      >>> import jaxpeft as jp
      >>> from typing import Any
      >>> from jaxpeft.extend import axes, base_weight, dense, weight
      >>> @weight
      ... class Scaled(jp.Weight):
      ...     w: Any = base_weight()
      ...     scale: Any = axes("out")
      ...     def forward(self, x):
      ...         return (x @ self.w) * self.scale
      ...     def materialize(self):
      ...         return dense(self.w) * self.scale
      >>> Scaled(jnp.ones((2, 3)), jnp.arange(3)).materialize().tolist()
      [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    """

    is_mergeable: ClassVar[bool] = True
    local_in: ClassVar[bool] = False
    local_out: ClassVar[bool] = False
    per_position: ClassVar[str | None] = None
    is_reparameterized: ClassVar[bool] = False

    def __repr__(self) -> str:
        """Arrays print as their dtype and shape: `LowRank(w=float32[128,64], a=..., b=...)`."""
        return fields_summary(self)

    __array_ufunc__ = None  # so that NumPy leaves `x @ weight` to `__rmatmul__`

    def granularity(self, field: str, axis: str) -> tuple[int, int]:
        """(entries, elements): in which steps an axis of a field may be cut.

        Each run of `entries` along the matrix's `axis` lies in `elements` of the field, such
        as a block of 64 quantized values in 32 bytes. (0, 0) says that the axis cannot be cut
        there.

        Args:
          field: Name of the field.
          axis: "in" or "out", one of the axes that the field declares.
        """
        del field, axis
        return 1, 1

    def derived(self) -> dict[str, jax.Array] | None:
        """Arrays that follow from the fields alone, computed once before the program runs.

        An example is the norm of each column that DoRA divides by. Fields are bound to an
        ordinary product, one slice of the stack at a time. `None` says that the weight acts as
        it is.
        """
        return None

    def acting(self, **derived: jax.Array) -> "Weight":
        """The weight that acts in this one's place during a call.

        Args:
          derived: What `derived` returned, with the axes of the stack in front.
        """
        raise NotImplementedError(f"{type(self).__name__} derives nothing")

    @property
    def extra_rows(self) -> int:
        """Rows that `lookup` serves beyond those of the table, such as virtual tokens."""
        inner = base_of(self)
        return inner.extra_rows if isinstance(inner, Weight) else 0

    def with_delta(self, rows: jax.Array, ids: Any, delta: jax.Array, table_rows: int) -> jax.Array:
        """rows + delta, for `lookup`; rows beyond the table (`extra_rows`) stay as they are.

        Args:
          rows: What the base gives at `ids`, (..., out).
          ids: (...).
          delta: (..., out).
          table_rows: The number of rows of the table, `site.rows` of any operand.
        """
        if self.extra_rows:
            delta = jnp.where((ids < table_rows)[..., None], delta, 0)
        return rows + delta

    def materialize(self) -> jax.Array:
        """The dense matrix (in, out) that the weight equals."""
        raise NotImplementedError(f"{type(self).__name__} has no dense equivalent")

    def forward(self, x: Any) -> Any:
        """The product with the matrix.

        Args:
          x: (..., in).

        Returns:
          (..., out).
        """
        raise Unsupported("a product with its input")

    def transposed(self, y: Any) -> Any:
        """The product with the transposed matrix, as in a tied head.

        Args:
          y: (..., out).

        Returns:
          (..., in).
        """
        raise Unsupported("a product with its output")

    def lookup(self, ids: Any) -> Any:
        """Rows of the matrix, as in an embedding.

        Args:
          ids: (...) integers.

        Returns:
          (..., out).
        """
        raise Unsupported("a lookup of rows")

    def __rmatmul__(self, x: Any) -> Any:
        return self.forward(x)

    def __getitem__(self, ids: Any) -> Any:
        return self.lookup(ids)

    @property
    def T(self) -> "_Transposed":
        """`y @ self.T` is `self.transposed(y)`."""
        return _Transposed(self)


@dataclasses.dataclass(frozen=True)
class _Transposed:
    weight: Weight
    __array_ufunc__ = None

    def __rmatmul__(self, y: Any) -> Any:
        return self.weight.transposed(y)


class Unsupported(Exception):
    """Raised by a weight or an operand for a use that it does not define.

    `lift` then materializes the weight, or raises `NotMergeableError`.
    """


class PositionsError(ValueError):
    """Raised by a weight whose input has other axes than (batch, time), as its field has them."""


def dense(w: Any) -> jax.Array:
    """The matrix of the base, for use in `Weight.materialize`.

    Args:
      w: The field declared by `base_weight`: an array or another weight.
    """
    return w.materialize() if isinstance(w, Weight) else w


def base_field(w: Weight) -> str | None:
    """The name of the field that holds what the weight acts on; `None` if it acts on nothing."""
    return next((f.name for f in weight_fields(w) if f.metadata.get("base")), None)


def base_of(w: Weight) -> Any:
    """What the weight acts on; `None` if it acts on nothing, as quantized values do."""
    return getattr(w, name) if (name := base_field(w)) else None


def chain_of(w: Any) -> Iterator[Weight]:
    """The weight, its base, the base of that, as long as they are weights."""
    while isinstance(w, Weight):
        yield w
        w = base_of(w)


def innermost(w: Any) -> Any:
    """The array at the bottom, or the weight there that acts on nothing."""
    while isinstance(w, Weight) and (inner := base_of(w)) is not None:
        w = inner
    return w


def with_innermost(w: Any, f: Callable[[Any], Any]) -> Any:
    """The same weight over `f(innermost)`."""
    if not isinstance(w, Weight) or (name := base_field(w)) is None:
        return f(w)
    return dataclasses.replace(w, **{name: with_innermost(getattr(w, name), f)})  # type: ignore


def weight_fields(w: Weight) -> tuple[dataclasses.Field, ...]:
    """The fields of a weight, with what they declare."""
    return dataclasses.fields(w)  # type: ignore[arg-type]
