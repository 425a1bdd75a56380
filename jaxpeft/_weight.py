"""Weight and View: what stands in the tree at the place of an array. Start reading here.

A *weight* says what happens at the place of a matrix, in canonical form: inputs have shape
(..., in), outputs (..., out), and the maths is one line, `x @ self.w + x @ self.a @ self.b`.
It knows nothing of layouts, stacks of layers, experts, convolutions or devices.

A *view* is what sits in the tree: a weight, the axes of the array it replaces with their
roles, and where each dimension of the current value came from. The rules for transpose,
reshape, slice and scan touch views only.

Where a view meets a product, `lift` *binds* the weight: its fields become `Operand`s, and
`x @ self.a` is then whatever that site makes of a product, dense, batched over experts,
ragged, or a convolution.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable_node

T = TypeVar("T")

#: Roles of axes.
STACK, IN, OUT = "stack", "in", "out"


# --- Fields of a weight ------------------------------------------------------------------


def base_weight() -> Any:
    """Declares the field that holds what the weight acts on: an array or another weight."""
    return dataclasses.field(metadata={"base": True})


def axes(*names: str, shared: bool = False, optional: bool = False) -> Any:
    """Declares an array field and what its axes are.

    Args:
      names: "in" and "out" for the two sides of the matrix, any other name for axes of the
        method's own ("rank"). Axes of the stack come before these and are not declared.
      shared: One array for the whole stack, without stack axes.
      optional: May be `None`.
    """
    metadata = {"axes": names, "shared": shared}
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def arrays() -> Any:
    """Declares a field that holds any tree of arrays, one for the whole stack."""
    return dataclasses.field(metadata={"shared": True})


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field that is part of the program, not of the data."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(base_weight, axes, arrays, static))
def weight(cls: type[T]) -> type[T]:
    """Registers a `Weight` class: a frozen dataclass that is a JAX pytree."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if f.name not in meta]
    return exportable_node(
        jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta), meta
    )


class Weight:
    """What happens at the place of a matrix `W` of shape (in, out).

    The laws, for a weight that is a matrix:

        forward(x)     == x @ materialize()           x (..., in)
        transposed(y)  == y @ materialize().T         y (..., out)
        lookup(ids)    == materialize()[ids]          ids (...)

    In these three, `self.w` and the other fields are bound to the site, so that `x @ self.w`,
    `y @ self.w.T` and `self.w[ids]` work whether the base is an array or a weight; in
    `materialize`, fields are plain arrays without stack axes, and `dense(self.w)` is the base.

    A class may hold anything in its fields, since JAX rebuilds trees with shapes, shardings
    and masks in the place of arrays; checks belong in the functions that make weights.
    """

    #: Whether the weight is a matrix. If not, it cannot be materialized or merged.
    is_mergeable: ClassVar[bool] = True
    #: Whether it is right on a shard of `in` whose partial results are summed afterwards.
    local_in: ClassVar[bool] = False
    #: Whether it is right on a shard of `out`.
    local_out: ClassVar[bool] = False
    #: The field whose axes are (batch, time), those of its input, if there is one.
    per_position: ClassVar[str | None] = None
    #: Whether what it derives may stay in its place for good, as after training (`fold`).
    is_reparameterized: ClassVar[bool] = False

    __array_ufunc__ = None  # numpy arrays leave `x @ weight` to us

    def granularity(self, field: str, axis: str) -> tuple[int, int]:
        """(entries, elements): how an axis of a field may be cut, for fields coarser than it.

        Each run of `entries` along the matrix's `axis` lies in `elements` of the field, such
        as a block of 64 codes in 32 bytes. (0, 0): the axis cannot be cut there.
        """
        del field, axis
        return 1, 1

    def derived(self) -> dict[str, jax.Array] | None:
        """Arrays that follow from the fields alone, computed once before the program runs.

        Fields are bound to an ordinary product, one slice of the stack at a time. `None` for a
        weight that acts as it is.
        """
        return None

    def acting(self, **derived: jax.Array) -> "Weight":
        """The weight that acts in this one's place; it has what `derived` gave, by stack."""
        raise NotImplementedError(f"{type(self).__name__} derives nothing")

    @property
    def extra_rows(self) -> int:
        """Rows that `lookup` serves beyond those of the table."""
        inner = base_of(self)
        return inner.extra_rows if isinstance(inner, Weight) else 0

    def with_delta(self, rows: jax.Array, ids: Any, delta: jax.Array, table_rows: int) -> jax.Array:
        """rows + delta, for `lookup`; rows that the base serves beyond its table stay as they are.

        Args:
          rows: Those of the base at `ids`, (..., out).
          ids: (...).
          delta: (..., out).
          table_rows: The number of rows of the table, `site.rows` of any operand.
        """
        if self.extra_rows:
            delta = jnp.where((ids < table_rows)[..., None], delta, 0)
        return rows + delta

    def materialize(self) -> jax.Array:
        """The matrix (in, out)."""
        raise NotImplementedError(f"{type(self).__name__} is no matrix")

    def forward(self, x: Any) -> Any:
        """x (..., in) to (..., out)."""
        raise Unsupported("a product with its input")

    def transposed(self, y: Any) -> Any:
        """y (..., out) to (..., in), the use of a tied head."""
        raise Unsupported("a product with its output")

    def lookup(self, ids: Any) -> Any:
        """ids (...) to rows (..., out), the use of an embedding."""
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
    """Raised by a weight or an operand where a site asks for what it cannot do."""


class PositionsError(ValueError):
    """Raised by a weight whose input does not have the axes (batch, time) that it is told of."""


def dense(w: Any) -> jax.Array:
    """The matrix of an array or a weight, for use in `Weight.materialize`."""
    return w.materialize() if isinstance(w, Weight) else w


def base_field(w: Weight) -> str | None:
    """The name of the field that holds what the weight acts on, if it acts on something."""
    return next((f.name for f in weight_fields(w) if f.metadata.get("base")), None)


def base_of(w: Weight) -> Any:
    """What the weight acts on, or `None` where it acts on nothing (codes of a quantized array)."""
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
