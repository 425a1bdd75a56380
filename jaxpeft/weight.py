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

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft import axes as digits
from jaxpeft._printing import fields_summary
from jaxpeft.axes import Dim
from jaxpeft.exporting import exportable, exportable_node
from jaxpeft.misuse import NotAnArray

T = TypeVar("T")

#: Roles of axes.
STACK, IN, OUT = "stack", "in", "out"


# --- Fields of a weight ------------------------------------------------------------------


def base() -> Any:
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


@dataclass_transform(frozen_default=True, field_specifiers=(base, axes, arrays, static))
def weight(cls: type[T]) -> type[T]:
    """Registers a `Weight` class: a frozen dataclass that is a JAX pytree."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
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
    is_matrix: ClassVar[bool] = True
    #: Whether it is right on a shard of `in` whose partial results are summed afterwards.
    local_in: ClassVar[bool] = False
    #: Whether it is right on a shard of `out`.
    local_out: ClassVar[bool] = False
    #: The field whose axes are (batch, time), those of its input, if there is one.
    per_position: ClassVar[str | None] = None
    #: Whether what it derives may stay in its place for good, as after training (`fold`).
    folds: ClassVar[bool] = False

    __array_ufunc__ = None  # numpy arrays leave `x @ weight` to us

    def __repr__(self) -> str:
        """Arrays print as their dtype and shape: `LowRank(w=float32[128,64], a=..., b=...)`."""
        return fields_summary(self)

    def grain(self, field: str, axis: str) -> tuple[int, int]:
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

    def changed(self, rows: jax.Array, ids: Any, change: jax.Array, site: "Site") -> jax.Array:
        """rows + change, for `lookup`: rows that the base serves beyond its table stay as they are.

        Args:
          rows: Those of the base at `ids`, (..., out).
          ids: (...).
          change: (..., out).
          site: Of any operand.
        """
        if self.extra_rows:
            change = jnp.where((ids < site.rows)[..., None], change, 0)
        return rows + change

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
    return next((f.name for f in _fields(w) if f.metadata.get("base")), None)


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


def _fields(w: Weight) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(w)  # type: ignore[arg-type]


# --- Operands: the fields of a weight at a site --------------------------------------------


class Site:
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

    def with_arrays(self, arrays: dict[str, jax.Array]) -> "Site":
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

    def __init__(self, array: jax.Array, roles: Sequence[str], rows: str, cols: str, site: Site):
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


def bind(w: Any, site: Site, base_roles: Sequence[str], cast: Any = None) -> Any:
    """The weight with its fields as operands of a site; stack axes are gone already."""
    if not isinstance(w, Weight):
        return BaseOperand(w if cast is None else w.astype(cast), base_roles, IN, OUT, site)
    bound: dict[str, Any] = {}
    for field in _fields(w):
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


# --- Views ---------------------------------------------------------------------------------


@exportable
@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the array that a view replaces."""

    size: int
    role: str


#: The axes that a dimension of a field runs over, and its grain (see `Weight.grain`).
Run = tuple[tuple[int, ...], tuple[int, int]]

_KEY = jax.tree_util.GetAttrKey("weight")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class View(NotAnArray):
    """A weight at the place of an array.

    Attributes:
      weight: The weight, or a plain array (on its way to becoming one, or to being trained).
        Fields lie as (*stack, *declared axes), the base as the program laid it out if
        `natural`, else as (*stack, in, out).
      axes: The axes of the replaced array, in its order.
      dims: What each dimension of the current value is made of, as digits of `axes`.
      dtype: Of the current value, as the program sees it.
      path: Name of the parameter, for messages.
      natural: Whether the base lies in the program's own layout.
      rounded_from: The dtypes from which the program has rounded it, one after the other, on
        its way to `dtype`.
    """

    weight: Any
    axes: tuple[Axis, ...]
    dims: tuple[Dim, ...]
    dtype: Any
    path: str = ""
    natural: bool = True
    rounded_from: tuple[Any, ...] = ()

    def tree_flatten(self) -> tuple:
        meta = (
            *(self.axes, self.dims, self.dtype),
            *(self.path, self.natural, self.rounded_from),
        )
        return (self.weight,), meta

    def tree_flatten_with_keys(self) -> tuple:
        (weight,), meta = self.tree_flatten()
        return ((_KEY, weight),), meta

    @classmethod
    def tree_unflatten(cls, meta: tuple, children: tuple) -> "View":
        return cls(children[0], *meta)

    def __repr__(self) -> str:
        """`View(LowRank(Codebook), shape=(128, 64), dtype=float32, path='w')`, outermost first."""
        kinds = [type(w).__name__ for w in chain_of(self.weight)]
        inner = innermost(self.weight)
        if not kinds or not isinstance(inner, (Weight, jax.Array, jax.ShapeDtypeStruct)):
            kinds.append(type(inner).__name__)
        nested = "(".join(kinds) + ")" * (len(kinds) - 1)
        return f"View({nested}, shape={self.shape}, dtype={self.dtype}, path={self.path!r})"

    def misuse(self, what: str) -> str:
        inside = jax.tree.leaves(self.weight, is_leaf=lambda x: isinstance(x, NotAnArray))
        if marks := [x for x in inside if isinstance(x, NotAnArray)]:
            return marks[0].misuse(what)
        return (
            f"{what} on the parameter '{self.path}', where a `{type(self.weight).__name__}` stands "
            "in the place of an array. Call the function through `lift`, which knows what to do "
            "with it: `jaxpeft.lift(fn)(tree, ...)`. Where arrays are needed, as for export, "
            "`jaxpeft.merge(tree)` makes them."
        )

    @classmethod
    def of(cls, array: Any, axes: Sequence[Axis], path: str = "") -> "View":
        """An array seen as a weight with these axes, which may be finer than the array's."""
        fine = tuple(axis.size for axis in axes)
        dims = digits.whole(0, fine)
        if fine != tuple(array.shape):
            dims = digits.reshape(dims, fine, array.shape)  # type: ignore[assignment]
        return cls(array, tuple(axes), dims, jnp.dtype(array.dtype), path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(d.size for d in dim) for dim in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def indices(self, role: str) -> list[int]:
        """Which axes have this role."""
        return [i for i, axis in enumerate(self.axes) if axis.role == role]

    def sizes(self, role: str) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes if axis.role == role)

    def size(self, role: str) -> int:
        return math.prod(self.sizes(role))

    @property
    def is_matrix(self) -> bool:
        return all(w.is_matrix for w in chain_of(self.weight))

    @property
    def is_vector(self) -> bool:
        """Whether it stands for a vector (or a stack of them), which is cheap to compute."""
        return not self.indices(IN)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What the program sees: an array of this shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def cast(self, dtype: Any) -> "View | None":
        """The view in another dtype, or `None` where its entries are needed for that.

        A weight that is rounded stays one for products in the dtype that it was rounded to, as
        in mixed precision: there the sum with a delta is as exact as that dtype. A wider dtype
        shows the rounding of the sum itself, which no sum of parts has.
        """
        if dtype == self.dtype:
            return self
        if not jnp.issubdtype(dtype, jnp.inexact):
            return None
        if jnp.issubdtype(self.dtype, jnp.complexfloating) > jnp.issubdtype(
            dtype, jnp.complexfloating
        ):
            return None
        rounded_from = self.rounded_from
        if rounded_from and not holds(self.dtype, dtype):
            return None
        if not holds(dtype, self.dtype):
            rounded_from = (*rounded_from, self.dtype)
        return dataclasses.replace(self, dtype=jnp.dtype(dtype), rounded_from=rounded_from)

    @property
    def exact(self) -> "View":
        """The view as it was before the program has rounded it."""
        first = (*self.rounded_from, self.dtype)[0]
        return dataclasses.replace(self, dtype=first, rounded_from=())

    def rounded(self, x: jax.Array) -> jax.Array:
        """Entries of the `exact` view, rounded as the program has done it.

        Raises:
          ValueError: The program's dtype does not hold entries of this kind.
        """
        for dtype in (*self.rounded_from, self.dtype):
            x = as_program(x, dtype, self.path)
        return x

    def canonical(self) -> Any:
        """The weight with its base as (*stack, in, out)."""
        if not self.natural:
            return self.weight
        order = [i for role in (STACK, IN, OUT) for i in self.indices(role)]
        shape = (*self.sizes(STACK), self.size(IN), self.size(OUT))
        sizes = [axis.size for axis in self.axes]
        return with_innermost(
            self.weight, lambda w: jnp.transpose(w.reshape(sizes), order).reshape(shape)
        )

    def in_canonical_layout(self) -> "View":
        """The same view over a base that lies as (*stack, in, out)."""
        return dataclasses.replace(self, weight=self.canonical(), natural=False)

    def materialize(self) -> jax.Array:
        """The array this stands for, in the shape and dtype that the program sees.

        Raises:
          ValueError: That dtype does not hold its entries, such as integers a sum with floats.
        """
        view = self.summable().unfolded().refined()
        plain = dataclasses.replace(view, weight=view.canonical(), natural=False)
        matrix = plain.over_stack(lambda w, _: dense(w), None)
        order = [i for role in (STACK, IN, OUT) for i in view.indices(role)]
        array = matrix.reshape([view.axes[i].size for i in order])
        where = {axis: position for position, axis in enumerate(order)}
        wanted = [d.axis for dim in view.dims for d in dim]
        # Axes of size 1 that a reshape has dropped from the dims.
        dropped = [axis for axis in where if axis not in wanted]
        array = jnp.transpose(array, [where[axis] for axis in wanted + dropped])
        return view.rounded(array.reshape(view.shape))

    def decoded(self) -> "View":
        """The same weight over the array that the codes at its bottom stand for."""
        codes = dataclasses.replace(self, weight=innermost(self.weight))
        matrix = codes.over_stack(lambda w, _: dense(w), None).astype(self.exact.dtype)
        weight = with_innermost(self.weight, lambda _: matrix)
        return dataclasses.replace(self, weight=weight, natural=False)

    def summable(self) -> "View":
        """The same view over an array with which JAX sums others, if it stands on one."""
        base = innermost(self.weight)
        if not isinstance(self.weight, Weight) or isinstance(base, Weight):
            return self
        if not jnp.issubdtype(base.dtype, jnp.inexact) or computing(base.dtype) == base.dtype:
            return self
        weight = with_innermost(self.weight, lambda w: w.astype(computing(w.dtype)))
        return dataclasses.replace(self, weight=weight)

    # Layout ------------------------------------------------------------------------------

    def unfolded(self) -> "View":
        """The same view with its base cut into axes, as every rule expects it."""
        base = innermost(self.weight)
        sizes = tuple(axis.size for axis in self.axes)
        if not self.natural or isinstance(base, Weight) or base.shape == sizes:
            return self
        return dataclasses.replace(
            self, weight=with_innermost(self.weight, lambda w: w.reshape(sizes))
        )

    def refined(self) -> "View":
        """The same view with axes cut so finely that every digit is a whole axis."""
        pieces = [digits.cuts(self.dims, i, a.size) for i, a in enumerate(self.axes)]
        if all(len(p) == 1 for p in pieces):
            return self
        new_index: dict[digits.Digit, int] = {}
        axes: list[Axis] = []
        for axis, piece in zip(self.axes, pieces, strict=True):
            for digit in piece:
                new_index[digit] = len(axes)
                axes.append(Axis(digit.size, axis.role))
        dims = tuple(
            tuple(digits.Digit(0, new_index[d], 1, d.size) for d in dim if d in new_index)
            for dim in self.dims
        )
        natural = [axis.size for axis in axes]
        stack = [axis.size for axis in axes if axis.role == STACK]
        old_stack = len(self.sizes(STACK))

        def split(leaf: Any, position: Any) -> Any:
            if position is None:
                return leaf
            if position == "base" and self.natural:
                return leaf.reshape(natural)
            return leaf.reshape(*stack, *leaf.shape[old_stack:])

        where = self._stack_marks()
        leaves, treedef = jax.tree.flatten(self.weight)
        weight = jax.tree.unflatten(
            treedef, [split(x, m) for x, m in zip(leaves, where, strict=True)]
        )
        return dataclasses.replace(self, weight=weight, axes=tuple(axes), dims=dims)

    def _stack_marks(self) -> list[str | None]:
        """Per leaf of the weight: "base", "field" (has the stack axes), or None (shared)."""
        marks: list[str | None] = []

        def visit(w: Any) -> None:
            if not isinstance(w, Weight):
                marks.extend(["base"] * len(jax.tree.leaves(w)))
                return
            for field in _fields(w):
                value = getattr(w, field.name)
                if field.metadata.get("static"):
                    continue
                if field.metadata.get("base"):
                    visit(value)
                else:
                    mark = None if field.metadata.get("shared") else "field"
                    marks.extend([mark] * len(jax.tree.leaves(value)))

        visit(self.weight)
        return marks

    def stack_positions(self, axis: int) -> list[int | None]:
        """Per leaf of the weight: the position of a stack axis, `None` where it is shared."""
        among = self.indices(STACK).index(axis)
        place = {"base": axis if self.natural else among, "field": among, None: None}
        return [place[mark] for mark in self._stack_marks()]

    def without(self, axis: int, weight: Any, dims: Sequence[Dim] = ()) -> "View":
        """The view of one slice along an axis; `dims` are those of the slice."""
        kept = tuple(
            tuple(d._replace(axis=d.axis - (d.axis > axis)) for d in dim if d.axis != axis)
            for dim in dims
        )
        axes = tuple(a for i, a in enumerate(self.axes) if i != axis)
        return dataclasses.replace(self, weight=weight, axes=axes, dims=kept)

    def over_stack(
        self, f: Callable[[Any, Any], Any], x: Any, along: Sequence[bool] | None = None
    ) -> Any:
        """f(weight, x), mapped over the stack axes of the weight and the leading axes of x.

        Args:
          f: What to map.
          x: The one operand.
          along: Which of the stack axes x leads with; `None` is all of them.
        """
        stack = self.indices(STACK)
        if not stack:
            return f(self.weight, x)
        leaves, treedef = jax.tree.flatten(self.weight)
        rest = self.without(stack[0], self.weight)

        def slice_of(leaves: list, x: Any) -> Any:
            one = dataclasses.replace(rest, weight=jax.tree.unflatten(treedef, leaves))
            return one.over_stack(f, x, rest_along)

        has_it, *rest_along = along or [x is not None] * len(stack)
        in_axes = (self.stack_positions(stack[0]), 0 if has_it else None)
        return jax.vmap(slice_of, in_axes=in_axes)(leaves, x)

    def over_each(self, f: Callable[["View"], Any]) -> Any:
        """f(view of one slice) for each slice of the stack in turn; results lead with the stack.

        One after the other, so that of a quantized stack one matrix at a time is decoded.
        """
        stack = self.indices(STACK)
        if not stack:
            return f(self)
        leaves, treedef = jax.tree.flatten(self.weight)
        at = self.stack_positions(stack[0])
        rest = self.without(stack[0], self.weight)

        def one(own: list) -> Any:
            slice_ = dataclasses.replace(rest, weight=jax.tree.unflatten(treedef, own))
            return slice_.over_each(f)

        if any(at):
            # A plain array whose stack lies further in; in front of a loop it would be copied.
            return jax.vmap(one, in_axes=(at,))(leaves)

        def step(moving: list) -> Any:
            slices = iter(moving)
            return one([x if p is None else next(slices) for x, p in zip(leaves, at, strict=True)])

        # All of them lead; a move to where they are keeps the order in which a program takes them,
        # and with it the programs that recorded runs were made with.
        moving = [jnp.moveaxis(x, p, 0) for x, p in zip(leaves, at, strict=True) if p is not None]
        return lax.map(step, moving)

    def derived(self) -> dict[str, jax.Array]:
        """What the weight derives from its fields, for the whole stack; `None` if nothing."""
        return self.over_each(_derived)

    def acting(self, call: Callable = lambda f, view: f(view)) -> "View":
        """The view with the weights that act in the place of those that derive something.

        Args:
          call: `call(f, view)` computes f(view), where shardings are part of the types.
        """

        def replaced(w: Any) -> Any:
            if not isinstance(w, Weight):
                return w
            if name := base_field(w):
                w = dataclasses.replace(w, **{name: replaced(getattr(w, name))})  # type: ignore
            if type(w).derived is Weight.derived:
                return w
            return w.acting(**call(View.derived, dataclasses.replace(self, weight=w)))

        return dataclasses.replace(self, weight=replaced(self.weight))

    def field_axes(self) -> list[list[tuple[int, ...]]]:
        """Per leaf of the weight, per dimension: the axes of the replaced array it runs over."""
        return [[axes for axes, _ in runs] for runs in self._runs()]

    def _runs(self) -> list[list[Run]]:
        """As `field_axes`, each with its grain."""
        fine = (1, 1)
        stack: list[Run] = [((i,), fine) for i in self.indices(STACK)]
        roles = {IN: tuple(self.indices(IN)), OUT: tuple(self.indices(OUT))}
        natural: list[Run] = [((i,), fine) for i in range(len(self.axes))]
        out: list[list[Run]] = []

        def visit(w: Any) -> None:
            if not isinstance(w, Weight):
                canonical = [*stack, (roles[IN], fine), (roles[OUT], fine)]
                out.extend([natural if self.natural else canonical] * len(jax.tree.leaves(w)))
                return
            for field in _fields(w):
                value = getattr(w, field.name)
                if field.metadata.get("base"):
                    visit(value)
                elif not field.metadata.get("static"):
                    own = [
                        (roles.get(name, ()), w.grain(field.name, name))
                        for name in field.metadata.get("axes", ())
                    ]
                    lead = [] if field.metadata.get("shared") else stack
                    out.extend([[*lead, *own]] * len(jax.tree.leaves(value)))

        visit(self.weight)
        return out

    def divides(self, axis: int, parts: int) -> bool:
        """Whether every field can be cut into this many equal parts along an axis."""
        return self.cut(axis, 0, self.axes[axis].size // parts, shapes_only=True) is not None

    def cut(self, axis: int, start: int, stop: int, shapes_only: bool = False) -> "View | None":
        """`start:stop` of an axis, or `None` where a field cannot be cut there.

        Where several axes of one role lie merged in a field, they are told apart.
        """
        out = []
        leaves, treedef = jax.tree.flatten(self.weight)
        for leaf, runs in zip(leaves, self._runs(), strict=True):
            at = next((p for p, (run, _) in enumerate(runs) if axis in run), None)
            if at is None:
                out.append(leaf)
                continue
            run, (entries, elements) = runs[at]
            before = math.prod(self.axes[i].size for i in run[: run.index(axis)])
            unit = math.prod(self.axes[i].size for i in run[run.index(axis) + 1 :])
            if entries == 0 or start * unit % entries or stop * unit % entries:
                return None
            if before > 1 and self.axes[axis].size * unit % entries:
                return None
            if shapes_only:
                continue
            first, last = (n * unit // entries * elements for n in (start, stop))
            if before == 1:
                out.append(lax.slice_in_dim(leaf, first, last, axis=at))
                continue
            split = leaf.reshape(*leaf.shape[:at], before, -1, *leaf.shape[at + 1 :])
            part = lax.slice_in_dim(split, first, last, axis=at + 1)
            out.append(part.reshape(*leaf.shape[:at], -1, *leaf.shape[at + 1 :]))
        if shapes_only:
            return self
        size = stop - start
        axes = tuple(
            dataclasses.replace(a, size=size) if i == axis else a for i, a in enumerate(self.axes)
        )
        dims = tuple(
            tuple(d._replace(size=size) if d.axis == axis else d for d in dim) for dim in self.dims
        )
        weight = jax.tree.unflatten(treedef, out)
        return dataclasses.replace(self, weight=weight, axes=axes, dims=dims)

    def redim(self, dims: Sequence[Dim | None]) -> "View | None":
        """The same weight with other dimensions, or `None` where one of them is unknown."""
        if any(dim is None for dim in dims):
            return None
        return dataclasses.replace(self, dims=tuple(dims))  # type: ignore[arg-type]


def _derived(view: View) -> dict[str, jax.Array]:
    roles = [axis.role for axis in view.axes] if view.natural else [IN, OUT]
    dtype = computing(view.dtype)
    return bind(view.weight, Site(dtype), roles, dtype).derived()


def is_view(x: Any) -> bool:
    """Whether a node of a tree is a structured weight."""
    return isinstance(x, View)


def roles_of(*roles: str) -> Callable[[Sequence[int]], tuple[Axis, ...]]:
    """Axes of a shape by role: `roles_of("in", "out")(w.shape)`."""
    return lambda shape: tuple(Axis(n, r) for n, r in zip(shape, roles, strict=True))


def map_views(f: Callable[[View], Any], tree: Any) -> Any:
    """The tree with `f(view)` at the place of each structured weight."""
    return jax.tree.map(lambda x: f(x) if is_view(x) else x, tree, is_leaf=is_view)
