"""View: the node of a tree that stands in the place of an array.

A view gives a weight the layout of the program: it knows which axes of the replaced array are
inputs, outputs or a stack of matrices, and what has become of them on the way to a product.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft import _axes as digits
from jaxpeft import _layout as layout
from jaxpeft._axes import Dim
from jaxpeft._export import exportable_node
from jaxpeft._layout import Axis
from jaxpeft._misuse import NotAnArray
from jaxpeft._operand import CallSite, as_program, bind_weight, computing, holds
from jaxpeft._weight import (
    IN,
    OUT,
    STACK,
    Weight,
    base_field,
    chain_of,
    dense,
    innermost,
    with_innermost,
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

WEIGHT_KEY = jax.tree_util.GetAttrKey("weight")


@exportable_node
@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class View(NotAnArray):
    """A weight in the place of an array of a tree: what methods put there and `lift` meets.

    A method gets views from `jaxpeft.extend.apply_to_sites` and returns them with another
    weight, `dataclasses.replace(view, weight=...)`. Every other field follows from the array
    and its site, and stays as it is.

    Attributes:
      weight: The weight, or the plain array where no method has put a weight yet. Fields of a
        weight lie as (*stack, *declared axes). The base lies as the program laid it out if
        `natural`, else as (*stack, in, out).
      axes: The axes of the replaced array with their roles, in its order. They are finer than
        its shape where the program uses parts of an axis differently, such as (heads, size of
        a head).
      dims: What each dimension of the current value is made of, as digits of `axes`: a
        transpose permutes them, a reshape cuts and joins them.
      dtype: The dtype of the current value, as the program sees it.
      path: Name of the parameter, for messages.
      natural: Whether the base lies in the program's own layout.
      rounded_from: The dtypes from which the program has rounded the value, one after the
        other, on its way to `dtype`.

    Example:
      >>> import jaxpeft as jp
      >>> params = {"kernel": jnp.ones((8, 2, 3), "float32")}  # (in, heads, size of a head)
      >>> fn = lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["kernel"])
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> view = jp.lora(2, sites.linear)(jax.random.key(0), params)["kernel"]
      >>> type(view.weight).__name__, view.shape, view.size("in"), view.size("out")
      ('LowRank', (8, 2, 3), 8, 6)
      >>> [axis.role for axis in view.axes]
      ['in', 'out', 'out']
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
            "in the place of an array. Call the function through `lift`, which applies it: "
            "`jaxpeft.lift(fn)(tree, ...)`. Where arrays are needed, as for export, "
            "`jaxpeft.merge(tree)` makes them."
        )

    @classmethod
    def of(cls, array: Any, axes: Sequence[Axis], path: str = "") -> "View":
        """The view of a plain array.

        Args:
          array: An array, or its shape and dtype.
          axes: Its axes with their roles, which may be finer than its shape.
          path: Name of the parameter, for messages.
        """
        fine = tuple(axis.size for axis in axes)
        dims = digits.whole(0, fine)
        if fine != tuple(array.shape):
            dims = digits.reshape(dims, fine, array.shape)  # type: ignore[assignment]
        return cls(array, tuple(axes), dims, jnp.dtype(array.dtype), path)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the current value, as the program sees it."""
        return tuple(math.prod(d.size for d in dim) for dim in self.dims)

    @property
    def ndim(self) -> int:
        """How many dimensions the current value has."""
        return len(self.dims)

    def indices(self, role: str) -> list[int]:
        """Positions of the axes that have a role.

        Args:
          role: "in", "out" or "stack".
        """
        return layout.axes_with_role(self.axes, role)

    def sizes(self, role: str) -> tuple[int, ...]:
        """Lengths of the axes that have a role.

        Args:
          role: "in", "out" or "stack".
        """
        return tuple(axis.size for axis in self.axes if axis.role == role)

    def size(self, role: str) -> int:
        """Product of the lengths of the axes that have a role.

        Args:
          role: "in", "out" or "stack".
        """
        return math.prod(self.sizes(role))

    @property
    def is_mergeable(self) -> bool:
        """Whether the weight and everything that it acts on equal a dense matrix."""
        return all(w.is_mergeable for w in chain_of(self.weight))

    @property
    def is_vector(self) -> bool:
        """Whether it stands for a vector or a stack of vectors, which are cheap to materialize."""
        return not self.indices(IN)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """What the program sees: an array of this shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def cast(self, dtype: Any) -> "View | None":
        """The view in another dtype, or `None` if only a dense array can be cast so.

        Products in a narrower dtype, as in mixed precision, need no dense array: the sum of
        base and delta is as exact there as the dtype. A cast back to a wider dtype needs it,
        since it shows how the sum itself was rounded.

        Args:
          dtype: The dtype to cast to.
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
        """The view as it was before the program rounded it."""
        first = (*self.rounded_from, self.dtype)[0]
        return dataclasses.replace(self, dtype=first, rounded_from=())

    def rounded(self, x: jax.Array) -> jax.Array:
        """Entries of the `exact` view, rounded as the program rounds them.

        Args:
          x: The entries.

        Raises:
          ValueError: The program's dtype cannot represent entries of this kind.
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
        """The dense array that the view equals, in the shape and dtype that the program sees.

        Raises:
          ValueError: That dtype cannot represent the entries, such as integers a sum with floats.
          NotImplementedError: The weight is not mergeable.
        """
        view = self._promoted().unfolded().refined()
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

    def dequantized(self) -> "View":
        """The same weight over a plain array in the place of its quantized base."""
        base = dataclasses.replace(self, weight=innermost(self.weight))
        matrix = base.over_stack(lambda w, _: dense(w), None).astype(self.exact.dtype)
        weight = with_innermost(self.weight, lambda _: matrix)
        return dataclasses.replace(self, weight=weight, natural=False)

    def _promoted(self) -> "View":
        """The same view with its base in a dtype that JAX promotes with those of the fields."""
        base = innermost(self.weight)
        if not isinstance(self.weight, Weight) or isinstance(base, Weight):
            return self
        if not jnp.issubdtype(base.dtype, jnp.inexact) or computing(base.dtype) == base.dtype:
            return self
        weight = with_innermost(self.weight, lambda w: w.astype(computing(w.dtype)))
        return dataclasses.replace(self, weight=weight)

    # Layout ------------------------------------------------------------------------------

    def unfolded(self) -> "View":
        """The same view with its base reshaped to `axes`, as every rule expects it."""
        base = innermost(self.weight)
        sizes = tuple(axis.size for axis in self.axes)
        if not self.natural or isinstance(base, Weight) or base.shape == sizes:
            return self
        return dataclasses.replace(
            self, weight=with_innermost(self.weight, lambda w: w.reshape(sizes))
        )

    def refined(self) -> "View":
        """The same view with axes cut so finely that every digit is a whole axis."""
        finer = layout.refine(self.axes, self.dims)
        if finer is None:
            return self
        axes, dims = finer
        natural = [axis.size for axis in axes]
        stack = [axis.size for axis in axes if axis.role == STACK]
        old_stack = len(self.sizes(STACK))

        def reshaped(leaf: Any, owner: layout.Owner) -> Any:
            if owner == "shared":
                return leaf
            if owner == "base" and self.natural:
                return leaf.reshape(natural)
            return leaf.reshape(*stack, *leaf.shape[old_stack:])

        leaves, treedef = jax.tree.flatten(self.weight)
        owners = layout.owners(self.weight)
        weight = jax.tree.unflatten(treedef, map(reshaped, leaves, owners))
        return dataclasses.replace(self, weight=weight, axes=axes, dims=dims)

    def stack_positions(self, axis: int) -> list[int | None]:
        """For each leaf of the weight: the position of a stack axis; `None` if it has none.

        Args:
          axis: Position of the stack axis in `axes`.
        """
        among = self.indices(STACK).index(axis)
        position = {"base": axis if self.natural else among, "field": among, "shared": None}
        return [position[owner] for owner in layout.owners(self.weight)]

    def without(self, axis: int, weight: Any, dims: Sequence[Dim] = ()) -> "View":
        """The view of one slice along an axis.

        Args:
          axis: Position of the axis.
          weight: The weight of the slice.
          dims: Dimensions of the current value, of which those of the axis are left out.
        """
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
          f: A function of the weight of one matrix and a slice of x.
          x: An array, or `None`.
          along: For each stack axis, whether x has it as a leading axis; `None` means that x
            has all of them.
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
        """f(view of one slice) for each slice of the stack in turn.

        It runs slice by slice, so that one matrix at a time of a quantized stack is dequantized.

        Args:
          f: A function of the view of one matrix.

        Returns:
          The results, stacked along leading axes.
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
            # The base is a plain array whose stack axis is not its first. A loop would copy it.
            return jax.vmap(one, in_axes=(at,))(leaves)

        def step(moving: list) -> Any:
            slices = iter(moving)
            return one([x if p is None else next(slices) for x, p in zip(leaves, at, strict=True)])

        # The stack axis is the first of every leaf, so `moveaxis` moves nothing. It keeps the order
        # of equations that the programs of recorded runs have.
        moving = [jnp.moveaxis(x, p, 0) for x, p in zip(leaves, at, strict=True) if p is not None]
        return lax.map(step, moving)

    def derived(self) -> dict[str, jax.Array]:
        """What the outermost weight derives from its fields, for the whole stack."""
        return self.over_each(_derived)

    def acting(self, call: Callable = lambda f, view: f(view)) -> "View":
        """The view with each weight that derives arrays replaced by the one that acts.

        Args:
          call: `call(f, view)` computes f(view). It differs from a plain call where shardings
            are part of the types.
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
        """For each leaf of the weight and each of its dimensions: the axes that it runs over."""
        return [[run.axes for run in dims] for dims in self._runs()]

    def _runs(self) -> list[list[layout.AxisRun]]:
        return layout.field_runs(self.weight, self.axes, self.natural)

    def divides(self, axis: int, parts: int) -> bool:
        """Whether every field can be cut into equal parts along an axis.

        Args:
          axis: Position of the axis.
          parts: How many.
        """
        size = self.axes[axis].size // parts
        return layout.field_cuts(self._runs(), self.axes, axis, 0, size) is not None

    def cut(self, axis: int, start: int, stop: int) -> "View | None":
        """The view of `start:stop` of an axis, or `None` if a field cannot be cut there.

        Args:
          axis: Position of the axis.
          start, stop: Bounds of the slice.
        """
        cuts = layout.field_cuts(self._runs(), self.axes, axis, start, stop)
        if cuts is None:
            return None
        leaves, treedef = jax.tree.flatten(self.weight)
        kept = [x if cut is None else cut.of(x) for x, cut in zip(leaves, cuts, strict=True)]
        size = stop - start
        axes = tuple(Axis(size, a.role) if i == axis else a for i, a in enumerate(self.axes))
        dims = digits.with_axis_size(self.dims, axis, size)
        weight = jax.tree.unflatten(treedef, kept)
        return dataclasses.replace(self, weight=weight, axes=axes, dims=dims)

    def redim(self, dims: Sequence[Dim | None]) -> "View | None":
        """The same weight with other dimensions, or `None` if one of them is unknown.

        Args:
          dims: What each dimension is made of, as digits of `axes`.
        """
        if any(dim is None for dim in dims):
            return None
        return dataclasses.replace(self, dims=tuple(dims))  # type: ignore[arg-type]


def _derived(view: View) -> dict[str, jax.Array]:
    roles = [axis.role for axis in view.axes] if view.natural else [IN, OUT]
    dtype = computing(view.dtype)
    return bind_weight(view.weight, CallSite(dtype), roles, dtype).derived()


def is_view(x: Any) -> "TypeIs[View]":
    """Whether a node of a tree is a structured weight."""
    return isinstance(x, View)


def roles_of(*roles: str) -> Callable[[Sequence[int]], tuple[Axis, ...]]:
    """The axes of a shape by role: `roles_of("in", "out")(w.shape)`."""
    return lambda shape: tuple(Axis(n, r) for n, r in zip(shape, roles, strict=True))


def map_views(f: Callable[[View], Any], tree: Any) -> Any:
    """The tree with `f(view)` in the place of each view."""
    return jax.tree.map(lambda x: f(x) if is_view(x) else x, tree, is_leaf=is_view)
