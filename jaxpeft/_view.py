"""View: a weight at the place of an array, in the layout of the program."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft import _axes as digits
from jaxpeft._axes import Dim
from jaxpeft._export import exportable, exportable_node
from jaxpeft._misuse import NotAnArray
from jaxpeft._operand import CallSite, as_program, bind, computing, holds
from jaxpeft._weight import (
    IN,
    OUT,
    STACK,
    Weight,
    base_field,
    chain_of,
    dense,
    innermost,
    weight_fields,
    with_innermost,
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# --- Views ---------------------------------------------------------------------------------


@exportable
@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the array that a view replaces."""

    size: int
    role: str


#: The axes that a dimension of a field runs over, and its grain (see `Weight.grain`).
Run = tuple[tuple[int, ...], tuple[int, int]]

WEIGHT_KEY = jax.tree_util.GetAttrKey("weight")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
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
        return ((WEIGHT_KEY, weight),), meta

    @classmethod
    def tree_unflatten(cls, meta: tuple, children: tuple) -> "View":
        return cls(children[0], *meta)

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
    def is_mergeable(self) -> bool:
        return all(w.is_mergeable for w in chain_of(self.weight))

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
            for field in weight_fields(w):
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
            for field in weight_fields(w):
                value = getattr(w, field.name)
                if field.metadata.get("base"):
                    visit(value)
                elif not field.metadata.get("static"):
                    own = [
                        (roles.get(name, ()), w.granularity(field.name, name))
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
        dims = digits.with_axis_size(self.dims, axis, size)
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
    return bind(view.weight, CallSite(dtype), roles, dtype).derived()


def is_view(x: Any) -> "TypeIs[View]":
    """Whether a node of a tree is a structured weight."""
    return isinstance(x, View)


def roles_of(*roles: str) -> Callable[[Sequence[int]], tuple[Axis, ...]]:
    """Axes of a shape by role: `roles_of("in", "out")(w.shape)`."""
    return lambda shape: tuple(Axis(n, r) for n, r in zip(shape, roles, strict=True))


def map_views(f: Callable[[View], Any], tree: Any) -> Any:
    """The tree with `f(view)` at the place of each structured weight."""
    return jax.tree.map(lambda x: f(x) if is_view(x) else x, tree, is_leaf=is_view)
