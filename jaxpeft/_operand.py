"""Operands: the fields of a weight at one place of the program where it acts.

Where a view meets a product, `lift` binds the weight: each field becomes an `Operand`, and
`x @ self.a` is then whatever that call site makes of a product.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft._weight import IN, OUT, STACK, Unsupported, Weight, weight_fields


class CallSite:
    """One place of the program where a weight acts, and how the program multiplies there.

    This class is the ordinary product; subclasses are batched and ragged products and
    convolutions. A weight reaches it through any of its operands: `self.a.site`.

    Args:
      dtype: The dtype that the program multiplies in. The input and the base come in it, as
        the program's own product would promote them.
      precision: As in `jax.lax.dot_general`.
      preferred: `preferred_element_type` of the program's own product, for the base only.
      where: `file:line` of the program, for messages.
      salt: Number of this place, so that two uses of a weight draw different dropout masks.
      taps: Values that weights of one program leave for each other, by name; `None` where
        they cannot.
      residual: Finds what the program adds to this product. It is given the length of a row
        if the program adds a bias too, else `None`. `None` where the program has no such
        addition.

    Attributes:
      rows: Number of rows of the table, at a lookup.
      arrays: Arrays that a product depends on beside its factors, such as the sizes of groups.
    """

    def __init__(
        self,
        dtype: Any,
        *,
        precision: Any = None,
        preferred: Any = None,
        where: str = "",
        salt: int = 0,
        taps: dict[str, Any] | None = None,
        residual: Callable[[int | None], list[jax.Array]] | None = None,
    ):
        self.dtype, self.precision, self.preferred = dtype, precision, preferred
        self._residual, self.where = residual, where
        self.salt, self.taps = salt, taps
        self.rows = 0
        self.arrays: dict[str, jax.Array] = {}

    def residual(self, y: jax.Array, bias: "Operand | None") -> jax.Array:
        """The residual stream that the program adds to its product here.

        Args:
          y: The product (..., out).
          bias: The bias that the program adds too, or `None`.

        Raises:
          Unsupported: This is not a place where a residual stream could be added.
          ValueError: It cannot be found; says why.
        """
        if self._residual is None:
            raise Unsupported("a residual stream beside its product")
        found = self._residual(None if bias is None else y.shape[-1])
        first, last = (refold(found[i], y.shape) for i in (0, -1))
        if bias is None or len(found) == 1:
            return first
        # One of the two is the bias, in whichever precision the program adds it.
        off = [jnp.sum(jnp.abs(x - bias.matrix)) for x in (first, last)]
        return jnp.where(off[0] < off[1], last, first)

    def with_arrays(self, arrays: dict[str, jax.Array]) -> "CallSite":
        """The same call site with other `arrays`, such as those that an inner trace binds.

        Args:
          arrays: By the same names.
        """
        site = copy.copy(self)
        site.arrays = arrays
        return site

    def product(self, x: jax.Array, op: "Operand") -> jax.Array:
        """`x @ op`, of shape (..., cols).

        Args:
          x: (..., rows).
          op: (rows, cols).
        """
        rows = [i for i, role in enumerate(op.roles) if role == op.rows]
        cols = [n for n, role in zip(op.array.shape, op.roles, strict=True) if role != op.rows]
        x = refold(x, (*x.shape[:-1], *(op.array.shape[i] for i in rows)))
        lead = x.ndim - len(rows)
        same = x.dtype == op.array.dtype == self.dtype
        y = lax.dot_general(
            x,
            op.array,
            ((tuple(range(lead, x.ndim)), tuple(rows)), ((), ())),
            precision=self.precision,
            preferred_element_type=self.preferred if same else None,
        )
        return refold(y, (*y.shape[:lead], math.prod(cols)))

    def spread(self, op: "Operand") -> jax.Array:
        """A field of one axis as an array that broadcasts with an activation (..., cols).

        Args:
          op: (cols,).
        """
        return op.matrix

    def pick(self, op: "Operand", ids: jax.Array) -> jax.Array:
        """`op[ids]`, of shape (..., cols).

        Args:
          op: (rows, cols).
          ids: (...) integers.
        """
        at = op.roles.index(op.rows)
        y = jnp.take(op.array, ids, axis=at, mode="clip")
        y = jnp.moveaxis(y, range(at, at + ids.ndim), range(ids.ndim))
        return refold(y, (*ids.shape, math.prod(y.shape[ids.ndim :])))

    def matrix(self, op: "Operand") -> jax.Array:
        """An operand in canonical form (rows, cols), as a plain array.

        Args:
          op: The operand.

        Raises:
          Unsupported: It has axes other than these.
        """
        sides = [role for role in dict.fromkeys((op.rows, op.cols)) if role in op.roles]
        order = [i for role in sides for i, r in enumerate(op.roles) if r == role]
        if len(order) != op.array.ndim:
            raise Unsupported("a field with axes beside its two sides")
        shape = [
            math.prod(n for n, r in zip(op.array.shape, op.roles, strict=True) if r == role)
            for role in sides
        ]
        return refold(permute(op.array, order), tuple(shape))


class Operand:
    """A field of a weight at a call site, which gives it the operators that maths needs.

    A weight's `forward`, `transposed` and `lookup` see their fields as operands:

        x @ op       product along the first declared axis, (..., rows) to (..., cols)
        y @ op.T     product along the last one
        op[ids]      rows
        y * op       elementwise, for a field of one axis; also `y + op`
        op.matrix    the plain array (rows, cols), for any other maths

    Attributes:
      array: As the program laid it out, cast where the call site asks for it.
      roles: What each axis of `array` is: a name that the field declares, or "stack".
      rows, cols: The names of the two sides.
      site: The `CallSite`.
    """

    __array_ufunc__ = None

    def __init__(
        self, array: jax.Array, roles: Sequence[str], rows: str, cols: str, site: CallSite
    ):
        self.array, self.roles, self.rows, self.cols = array, tuple(roles), rows, cols
        self.site = site

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array`, which may differ from (rows, cols)."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def matrix(self) -> jax.Array:
        """The plain array (rows, cols), for maths that no operator here covers."""
        return self.site.matrix(self)

    @property
    def T(self) -> "Operand":
        """The transposed operand: rows and cols change places."""
        return Operand(self.array, self.roles, self.cols, self.rows, self.site)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        array = self.array
        dtype = jnp.promote_types(x.dtype, array.dtype)
        op = Operand(array.astype(dtype), self.roles, self.rows, self.cols, self.site)
        return self.site.product(x.astype(dtype), op)

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        return self.site.pick(self, ids)

    def __rmul__(self, y: jax.Array) -> jax.Array:
        return y * self.site.spread(self)

    def __radd__(self, y: jax.Array) -> jax.Array:
        return y + self.site.spread(self)

    __mul__, __add__ = __rmul__, __radd__


class BaseOperand(Operand):
    """The program's own array. Its product keeps the dtype that the program gave it."""

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.site.product(x.astype(self.array.dtype), self)


def holds(wide: Any, narrow: Any) -> bool:
    """Whether a real or complex dtype represents every value of another dtype.

    Integers count as represented: a program that makes floats of them means the floats.
    """
    if jnp.issubdtype(narrow, jnp.complexfloating) and not jnp.issubdtype(
        wide, jnp.complexfloating
    ):
        return False
    if not jnp.issubdtype(narrow, jnp.inexact):
        return True
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


def computing(dtype: Any) -> Any:
    """The dtype in which sums with an array of this dtype are computed.

    This is the dtype itself if JAX promotes it with others. It is float32 for integers and for
    floats of 8 bits or fewer, which JAX does not promote.
    """
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits > 8:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)


def as_program(x: jax.Array, dtype: Any, path: str) -> jax.Array:
    """x in the dtype that the program sees in its place.

    Raises:
      ValueError: The cast would drop imaginary parts or fractions. The message names the weight.
    """
    kinds = (jnp.complexfloating, "imaginary parts"), (jnp.inexact, "fractions")
    for kind, what in kinds:
        if jnp.issubdtype(x.dtype, kind) and not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"The weight at '{path}' gives {x.dtype} where the program has {dtype}, and a cast "
                f"would drop the {what}. Cast the parameter before the method is applied, or "
                "give `merge` a dtype that holds the sum."
            )
    return x.astype(dtype)


def bind_weight(w: Any, site: CallSite, base_roles: Sequence[str], cast: Any = None) -> Any:
    """The weight with its fields as operands of a call site; stack axes are gone already."""
    if not isinstance(w, Weight):
        return BaseOperand(w if cast is None else w.astype(cast), base_roles, IN, OUT, site)
    bound: dict[str, Any] = {}
    for field in weight_fields(w):
        value = getattr(w, field.name)
        if field.metadata.get("base"):
            bound[field.name] = bind_weight(value, site, base_roles, cast)
        elif "axes" in field.metadata and value is not None:
            names = field.metadata["axes"]
            rows, cols = (names[0], names[-1]) if names else ("", "")
            # A field with a stack of its own (a ragged site) leads with it.
            roles = (STACK,) * (value.ndim - len(names)) + names
            bound[field.name] = Operand(value, roles, rows, cols, site)
    return dataclasses.replace(w, **bound)  # type: ignore[type-var]


def permute(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Transpose, or nothing where nothing moves."""
    return x if list(order) == list(range(x.ndim)) else lax.transpose(x, tuple(order))


def refold(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Reshape, or nothing where nothing changes."""
    return x if x.shape == tuple(shape) else lax.reshape(x, tuple(shape))
