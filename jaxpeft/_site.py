"""Site: one parameter, and what a program does with it."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft._export import exportable
from jaxpeft._lift import Materialized
from jaxpeft._tracing.values import Use
from jaxpeft._view import Axis, View
from jaxpeft._weight import IN, OUT, STACK

Pattern = str | re.Pattern | Callable[["Site"], bool]


@exportable
@dataclasses.dataclass(frozen=True)
class OutputSlice:
    """A part of the output axis: block `index` of `of` equal ones, in each of `groups` groups.

    The value third of a fused qkv kernel is `OutputSlice(2, 3)`; interleaved by heads, where every
    head has its own q, k and v side by side, it is `OutputSlice(2, 3, groups=heads)`.
    """

    index: int
    of: int
    groups: int = 1

    def size(self, out: int) -> int:
        """How many of `out` columns belong to the part."""
        return out // self.of

    def spread(self, y: jax.Array, rest: float) -> jax.Array:
        """Columns y (..., size) of the part at their places among all, the others `rest`."""
        fill, size = jax.numpy.asarray(rest, y.dtype), y.shape[-1]
        if self.groups == 1:  # without a reshape, which no mesh with Explicit axes follows
            ends = (self.index * size, (self.of - self.index - 1) * size, 0)
            return jax.lax.pad(y, fill, [*[(0, 0, 0)] * (y.ndim - 1), ends])
        blocks = y.reshape(*y.shape[:-1], self.groups, 1, -1)
        pad = [(0, 0, 0)] * blocks.ndim
        pad[-2] = (self.index, self.of - self.index - 1, 0)
        return jax.lax.pad(blocks, fill, pad).reshape(*y.shape[:-1], size * self.of)


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter and what the program does with it.

    Attributes:
      path: Its name in the tree.
      shape, dtype: Of the array.
      axes: Its axes with their roles; finer than `shape` where the program cuts an axis.
      uses: Every use, one for each kind and place.
      bias: Path of the bias that is added to its product, if there is exactly one.
      unlike: What the program does instead of adding one bias as it is to each product of this
        weight, and where; empty where it does not.
      of: For a bias or scale: paths of the weights whose product it acts on.
      materialized: Where `lift` would have to turn it into a dense array.
      part: The part of the output axis that a method is to act on; `None` for all of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[Axis, ...] = ()
    uses: tuple[Use, ...] = ()
    bias: str | None = None
    of: tuple[str, ...] = ()
    materialized: tuple[Materialized, ...] = ()
    part: OutputSlice | None = None
    unlike: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """What it is: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", ..."""
        return frozenset(use.kind for use in self.uses)

    @property
    def is_matrix(self) -> bool:
        """Whether it has an input and an output side, so that a delta or a scale can act."""
        roles = {axis.role for axis in self.axes}
        return bool(self.kinds & {"linear", "embedding", "conv"}) and {IN, OUT} <= roles

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector, or a stack of them."""
        return sum(axis.role != STACK and axis.size > 1 for axis in self.axes) <= 1

    def size(self, role: str) -> int:
        """Length of a side: the product of the axes with this role."""
        size = 1
        for axis in self.axes:
            size *= axis.size if axis.role == role else 1
        return size

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return tuple(axis.size for axis in self.axes if axis.role == STACK)

    def view(self, leaf: Any) -> View:
        """The leaf of the tree at this path as a view."""
        return leaf if isinstance(leaf, View) else View.of(leaf, self.axes, self.path)

    def matrices(self, array: jax.Array) -> jax.Array:
        """(*stack, in, out) of an array as the program lays this parameter out."""
        return View.of(array, self.axes).canonical()

    def array(self, matrices: jax.Array) -> jax.Array:
        """The other way round."""
        like = View.of(jax.ShapeDtypeStruct(self.shape, matrices.dtype), self.axes)
        return dataclasses.replace(like, weight=matrices, natural=False).materialize()


def matches(pattern: Pattern, site: Site) -> bool:
    """Whether a glob, a regular expression or a predicate holds for a site."""
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(site.path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(site.path) is not None
    return bool(pattern(site))
