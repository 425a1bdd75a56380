"""Site: one parameter, and what a program does with it."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft._export import exportable
from jaxpeft._interpreter import Materialized
from jaxpeft._tracing.values import Use
from jaxpeft._view import Axis, View
from jaxpeft._weight import IN, OUT, STACK

#: What selects parameters: a glob on the path, a compiled regular expression, or a predicate.
Pattern = str | re.Pattern | Callable[["Site"], bool]


@exportable
@dataclasses.dataclass(frozen=True)
class OutputSlice:
    """A slice of the outputs of a matrix, such as the values of a fused qkv kernel.

    The outputs are cut into `groups * of` equal blocks. The slice is block number `index` of
    the `of` blocks in each group. `Sites.output_slice` selects it, and `lora` and `ia3` then act on
    it alone.

    Attributes:
      index: Which block, from 0.
      of: How many blocks a group has.
      groups: How many groups there are.

    Example:
      With queries, keys and values one after the other, the values are the last of three blocks.
      Where each of two heads has its own q, k and v side by side, they are the last of three in
      each of two groups.

      >>> import jax.numpy as jnp
      >>> OutputSlice(2, 3).spread(jnp.ones(4), 0).astype(int).tolist()
      [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
      >>> OutputSlice(2, 3, groups=2).spread(jnp.ones(4), 0).astype(int).tolist()
      [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    """

    index: int
    of: int
    groups: int = 1

    def size(self, out: int) -> int:
        """How many outputs the slice has.

        Args:
          out: How many outputs the matrix has.
        """
        return out // self.of

    def spread(self, y: jax.Array, rest: float) -> jax.Array:
        """The slice at its place among all outputs, (..., size) to (..., out).

        Args:
          y: (..., size), outputs of the slice.
          rest: The value of all other outputs.
        """
        fill, size = jax.numpy.asarray(rest, y.dtype), y.shape[-1]
        if self.groups == 1:  # a pad alone: shardings of Explicit axes do not follow a reshape
            ends = (self.index * size, (self.of - self.index - 1) * size, 0)
            return jax.lax.pad(y, fill, [*[(0, 0, 0)] * (y.ndim - 1), ends])
        blocks = y.reshape(*y.shape[:-1], self.groups, 1, -1)
        pad = [(0, 0, 0)] * blocks.ndim
        pad[-2] = (self.index, self.of - self.index - 1, 0)
        return jax.lax.pad(blocks, fill, pad).reshape(*y.shape[:-1], size * self.of)


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter, and what the program does with it.

    `jaxpeft.sites` finds it, and a method reads it to know the shapes of what it adds.

    Attributes:
      path: The parameter's name in the tree.
      shape: The shape of the array.
      dtype: The dtype of the array; `None` if the site was read from a file.
      axes: Its axes with their roles. They are finer than `shape` where the program uses parts
        of an axis differently.
      uses: Each kind of use, with the place in the program.
      bias: Path of the bias that is added to its product, if there is exactly one.
      bias_mismatch: What the program does instead of adding one bias, unscaled, to each product
        of this weight, such as "subtracts or scales 'b' (model.py:12)". Empty if it does not.
      of: For a bias or a scale: paths of the weights on whose product it acts.
      materialized: The places where `lift` would turn a weight here into a dense array.
      part: The slice of the outputs that a method is to act on; `None` for all outputs.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["kernel"]) + p["bias"]
      >>> params = {"kernel": jnp.ones((8, 2, 3)), "bias": jnp.ones((2, 3))}
      >>> site = jp.sites(fn, params, jnp.ones((4, 8)))["kernel"]
      >>> site.shape, site.size("in"), site.size("out"), sorted(site.kinds), site.bias
      ((8, 2, 3), 8, 6, ['linear'], 'bias')
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
    bias_mismatch: str = ""

    @property
    def kinds(self) -> frozenset[str]:
        """How it is used: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", ..."""
        return frozenset(use.kind for use in self.uses)

    @property
    def is_matrix(self) -> bool:
        """Whether it has inputs and outputs, so that a method may put a weight in its place."""
        roles = {axis.role for axis in self.axes}
        return bool(self.kinds & {"linear", "embedding", "conv"}) and {IN, OUT} <= roles

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector, or a stack of vectors."""
        return sum(axis.role != STACK and axis.size > 1 for axis in self.axes) <= 1

    def size(self, role: str) -> int:
        """Product of the lengths of the axes that have a role.

        Args:
          role: "in", "out" or "stack".
        """
        size = 1
        for axis in self.axes:
            size *= axis.size if axis.role == role else 1
        return size

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return tuple(axis.size for axis in self.axes if axis.role == STACK)

    def view(self, leaf: Any) -> View:
        """The leaf of a tree at this path, as a view.

        Args:
          leaf: An array, or a view with another method's weight, which is returned as it is.
        """
        return leaf if isinstance(leaf, View) else View.of(leaf, self.axes, self.path)

    def matrices(self, array: jax.Array) -> jax.Array:
        """An array of this parameter's shape as matrices (*stack, in, out).

        Args:
          array: An array of the shape `shape`.
        """
        return View.of(array, self.axes).canonical()

    def array(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`: an array of the shape `shape`.

        Args:
          matrices: (*stack, in, out).
        """
        like = View.of(jax.ShapeDtypeStruct(self.shape, matrices.dtype), self.axes)
        return dataclasses.replace(like, weight=matrices, natural=False).materialize()


def matches(pattern: Pattern, site: Site) -> bool:
    """Whether a pattern selects a site.

    Args:
      pattern: A glob on the whole path, a compiled regular expression that is searched in the
        path, or a predicate of the site.
      site: The site.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(site.path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(site.path) is not None
    return bool(pattern(site))
