"""Operands: the fields of a weight where the program uses it.

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

from jaxpeft._weight import (
    IN,
    OUT,
    STACK,
    Unsupported,
    Weight,
    weight_fields,
)

# --- Operands: the fields of a weight at a site --------------------------------------------


class CallSite:
    """How one place in the program multiplies: the ordinary product. Subclasses do others.

    Args:
      dtype: What the program multiplies in at this place. Inputs come in it, as the program's
        own product would promote them, and so does the base.
      precision: As in `jax.lax.dot_general`.
      preferred: `preferred_element_type` of the program's own product, for the base only.
      where: `file:line` of the program, for messages.
      salt: Number of this place, so that two uses of a weight draw different dropout masks.
      taps: Where weights of one program meet each other, by name; `None` where they cannot.
      residual: Finds what the program adds to this product, given the numbers of one row where
        it adds a bias too; `None` where it has no such place.
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
        self.rows = 0  # of the table, at a lookup
        self.arrays: dict[str, jax.Array] = {}  # what a product depends on beside its factors

    def residual(self, y: jax.Array, bias: "Operand | None") -> jax.Array:
        """The stream that the program adds to its product y here, and to the bias, if it has one.

        Raises:
          ValueError: There is none, or it cannot be found; says why.
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
        """The same site with its arrays traced elsewhere."""
        site = copy.copy(self)
        site.arrays = arrays
        return site

    def product(self, x: jax.Array, op: "Operand") -> jax.Array:
        """x (..., rows) times op (rows, cols)."""
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
        """A field without rows, ready to meet an activation (..., cols) elementwise."""
        return op.matrix

    def pick(self, op: "Operand", ids: jax.Array) -> jax.Array:
        """Rows of op (rows, cols)."""
        at = op.roles.index(op.rows)
        y = jnp.take(op.array, ids, axis=at, mode="clip")
        y = jnp.moveaxis(y, range(at, at + ids.ndim), range(ids.ndim))
        return refold(y, (*ids.shape, math.prod(y.shape[ids.ndim :])))

    def matrix(self, op: "Operand") -> jax.Array:
        """The operand in canonical form (rows, cols), as a plain array."""
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
    """A field of a weight, bound to a site: `x @ op`, `op[ids]`, `y * op`, `op.T`."""

    __array_ufunc__ = None

    def __init__(
        self, array: jax.Array, roles: Sequence[str], rows: str, cols: str, site: CallSite
    ):
        self.array, self.roles, self.rows, self.cols = array, tuple(roles), rows, cols
        self.site = site

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array as it lies, not of the canonical form."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def matrix(self) -> jax.Array:
        """The canonical array, for maths that no operator here covers."""
        return self.site.matrix(self)

    @property
    def T(self) -> "Operand":
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
    """Whether a dtype of real or complex numbers has every value of another dtype.

    Integers count as held: a program that makes floats of them means the floats.
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
    """The dtype in which sums with an array of this dtype are taken: itself, if JAX promotes it.

    float32 for integers and for floats of 8 bits or fewer, with which JAX mixes nothing.
    """
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits > 8:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)


def as_program(x: jax.Array, dtype: Any, path: str) -> jax.Array:
    """x in the dtype that the program has in its place.

    Raises:
      ValueError: That would drop imaginary parts, or fractions; names the weight.
    """
    kinds = (jnp.complexfloating, "imaginary parts"), (jnp.inexact, "fractions")
    for kind, what in kinds:
        if jnp.issubdtype(x.dtype, kind) and not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"What stands at '{path}' gives {x.dtype} where the program has {dtype}, which "
                f"would drop the {what}. Cast the parameter before the method is applied, or "
                "give `merge` a dtype that holds the sum."
            )
    return x.astype(dtype)


def bind(w: Any, site: CallSite, base_roles: Sequence[str], cast: Any = None) -> Any:
    """The weight with its fields as operands of a site; stack axes are gone already."""
    if not isinstance(w, Weight):
        return BaseOperand(w if cast is None else w.astype(cast), base_roles, IN, OUT, site)
    bound: dict[str, Any] = {}
    for field in weight_fields(w):
        value = getattr(w, field.name)
        if field.metadata.get("base"):
            bound[field.name] = bind(value, site, base_roles, cast)
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
