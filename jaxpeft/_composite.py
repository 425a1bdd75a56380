"""Arrays that a program makes of weights before it uses them, kept as their parts.

A program may concatenate kernels, repeat them, or scale them along a side. The result is a
`Composite`, which is not formed. Its product is computed as products of the parts, each of which
follows the rule of its own weight.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft import _axes as digits
from jaxpeft._axes import Digit, Dim
from jaxpeft._layout import Axis, owners
from jaxpeft._operand import permute, refold
from jaxpeft._view import View, is_view
from jaxpeft._weight import STACK

if TYPE_CHECKING:
    from typing_extensions import TypeIs

T = TypeVar("T")


class Composite:
    """An array made of weights: its `parts`, and how `array` computes it from theirs.

    Parts are views, composites, or plain arrays; every view among them is mergeable.
    """

    #: Names of the fields that hold the parts.
    names: ClassVar[tuple[str, ...]]

    @property
    def parts(self) -> tuple[Any, ...]:
        found: list[Any] = []
        for name in self.names:
            value = getattr(self, name)
            found.extend(value if isinstance(value, tuple) else [value])
        return tuple(found)

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(*(part.dtype for part in self.parts))

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What the program sees: an array of this shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def array(self, *parts: jax.Array) -> jax.Array:
        """The array that the composite stands for, from those that its parts stand for."""
        raise NotImplementedError


@dataclass_transform(frozen_default=True)
def _node(cls: type[T]) -> type[T]:
    """Registers a composite class as a JAX pytree whose data are its parts."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    names: tuple[str, ...] = cls.names  # type: ignore[attr-defined]
    meta = [f.name for f in dataclasses.fields(cls) if f.name not in names]  # type: ignore
    return jax.tree_util.register_dataclass(cls, data_fields=list(names), meta_fields=meta)


@_node
class Concatenation(Composite):
    """Pieces end to end along one dimension; a stack has pieces of length 1."""

    names = ("pieces",)

    pieces: tuple[Any, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.pieces[0].shape)
        shape[self.dim] = sum(self.lengths)
        return tuple(shape)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each piece along the dimension."""
        return tuple(piece.shape[self.dim] for piece in self.pieces)

    def array(self, *parts: jax.Array) -> jax.Array:
        return lax.concatenate(parts, self.dim)

    def stacked(self) -> View | None:
        """Pieces of length 1 as one weight with a stack axis; `None` if they are not alike."""
        first = self.pieces[0]
        if not all(is_view(p) and p.shape[self.dim] == 1 for p in self.pieces):
            return None
        nameless = [dataclasses.replace(p.unfolded(), path="") for p in self.pieces]
        rows = [jax.tree.leaves(p) for p in nameless]
        kinds = {
            (jax.tree.structure(p), *map(_type, r)) for p, r in zip(nameless, rows, strict=True)
        }
        if len(kinds) > 1:
            return None
        stacked = []
        for owner, *leaves in zip(owners(nameless[0].weight), *rows, strict=True):
            if owner == "shared" and any(leaf is not leaves[0] for leaf in leaves):
                return None  # a shared field is one array for a whole stack, but these differ
            stacked.append(leaves[0] if owner == "shared" else jnp.stack(leaves))
        count = len(self.pieces)
        dims: list[Dim] = [
            tuple(d._replace(axis=d.axis + 1) for d in dim) for dim in nameless[0].dims
        ]
        dims[self.dim] = (Digit(0, 0, 1, count),)
        weight = jax.tree.unflatten(jax.tree.structure(nameless[0].weight), stacked)
        axes = (Axis(count, STACK), *nameless[0].axes)
        paths = ", ".join(dict.fromkeys(p.path for p in self.pieces))
        return dataclasses.replace(first, weight=weight, axes=axes, dims=tuple(dims), path=paths)


@_node
class Scaling(Composite):
    """A weight times a factor that is constant along some of its dimensions.

    Attributes:
      weight: A view or a composite.
      factor: An array of the same rank, of length 1 along the dimensions where it is constant.
    """

    names = ("weight", "factor")

    weight: Any
    factor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def array(self, *parts: jax.Array) -> jax.Array:
        weight, factor = parts
        return weight * factor


@_node
class Repetition(Composite):
    """A weight with repeated entries, in any layout.

    Attributes:
      weight: A view or a composite.
      dims: What each dimension is made of: digits of the weight's own dimensions, and of further
        ones that count copies.
    """

    names = ("weight",)

    weight: Any
    dims: tuple[Dim, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(d.size for d in dim) for dim in self.dims)

    @property
    def cuts(self) -> list[Digit]:
        """The digits into which `dims` cut the weight, in the order of its own dimensions."""
        found = [d for dim in self.dims for d in digits.significant(dim) if not self.is_copy(d)]
        return sorted(found, key=lambda d: (d.axis, -d.stride))

    def is_copy(self, digit: Digit) -> bool:
        """Whether a digit counts copies."""
        return digit.axis >= len(self.weight.shape)

    def array(self, *parts: jax.Array) -> jax.Array:
        (weight,) = parts
        order = [d for dim in self.dims for d in digits.significant(dim)]
        own = self.cuts
        weight = refold(weight, [d.size for d in own])
        weight = permute(weight, [own.index(d) for d in order if not self.is_copy(d)])
        kept = [i for i, d in enumerate(order) if not self.is_copy(d)]
        return refold(lax.broadcast_in_dim(weight, [d.size for d in order], kept), self.shape)


def _type(x: Any) -> tuple:
    return tuple(x.shape), x.dtype


def is_composite(x: Any) -> "TypeIs[Composite]":
    """Whether it stands for an array that is made of weights."""
    return isinstance(x, Composite)


def is_structured(x: Any) -> "TypeIs[View | Composite]":
    """Whether it is a weight or made of weights, and not an array."""
    return isinstance(x, (View, Composite))
