"""Which parameters a value is computed from, and where their axes went.

A model may compute a kernel before it uses it: it concatenates, masks, normalizes or rounds arrays
of the tree. The parameters that such a value is computed from are its ancestors, each with its own
digits in the value's dimensions, so that a product shows which of their axes are inputs and
outputs. A value that depends on the function's arguments and on parameters is an activation,
which has no ancestors.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft import _dimensions as dimensions
from jaxpeft._axes import Digit, Dim
from jaxpeft._tracing.values import ACTIVE, FIXED, GIVEN, Ancestor, Shape, Use, Value
from jaxpeft._tracing.values import resized as _resized
from jaxpeft._tracing.values import unlabelled as _unlabelled

if TYPE_CHECKING:
    from jax.core import ShapedArray

#: The shapes of all parameters, by path.
Shapes = Mapping[str, tuple[int, ...]]


def ancestors_of(value: Value, shape: Shape, shapes: Shapes) -> tuple[Ancestor, ...]:
    """The ancestors of a value of this shape; a parameter in another layout is its own."""
    if value.ids:
        return ()  # rows or matrices that the data has selected
    if value.param is None:
        return value.ancestors
    dims = tuple(
        _unlabelled(i, n) if dim is None else dim
        for i, (dim, n) in enumerate(zip(value.dims, shape, strict=True))
    )
    dims = tuple(map(_resized, dims, shape))
    own = Ancestor(value.param, dims)
    return (own.moved(dims, own.known == math.prod(shapes[value.param])),)


def reshaped(ancestor: Ancestor, eqn: JaxprEqn) -> tuple[Dim | None, ...]:
    """A repeated parameter's dimensions after a reshape; `None` where all digits count copies."""
    dims = dimensions.after_layout(eqn, ancestor.dims)
    return tuple(
        dim if dim is not None and any(d.of == ancestor.param for d in dim) else None
        for dim in dims
    )


def merged(several: Sequence[Sequence[Ancestor]]) -> tuple[Ancestor, ...]:
    """All of them, each parameter once: with the dimensions that tell most of its entries apart."""
    found: dict[str, Ancestor] = {}
    for ancestor in (a for some in several for a in some):
        known = found.setdefault(ancestor.param, ancestor)
        if ancestor.known > known.known:
            found[ancestor.param] = ancestor
    return tuple(found.values())


#: Products of two operands; further ones say how they are multiplied.
PRODUCTS = {p.dot_general_p, compat.ragged_dot_p, p.conv_general_dilated_p}
#: Primitives that may mask entries of a weight by an argument.
_MASKING = {p.mul_p, p.div_p, p.select_n_p}
#: Primitives whose result is longer than an operand of which it contains all entries.
_EXTENDING = {p.concatenate_p, p.pad_p, p.dynamic_update_slice_p, p.all_gather_p}


def inherited(eqn: JaxprEqn, values: list[Value], outs: list[Value], shapes: Shapes) -> list[Value]:
    """The results of an equation, with what they depend on and their ancestors."""
    if not outs:
        return outs
    mine = [
        ancestors_of(v, compat.shape_of(x), shapes) for v, x in zip(values, eqn.invars, strict=True)
    ]
    depends = _depends(eqn, values, mine)
    return [
        out
        if out.param is not None
        else dataclasses.replace(
            out,
            depends=depends,
            ancestors=() if depends == ACTIVE else _passed(eqn, mine, compat.shape_of(x)),
        )
        if hasattr(x.aval, "shape")
        else out
        for out, x in zip(outs, eqn.outvars, strict=True)
    ]


def _depends(eqn: JaxprEqn, values: Sequence[Value], mine: Sequence[Sequence[Ancestor]]) -> int:
    """What the results depend on: FIXED, GIVEN or ACTIVE."""
    primitive, shape = eqn.primitive, compat.shape_of(eqn.outvars[0])
    counted: Sequence[Value]
    counted = list(values)
    if primitive in PRODUCTS:
        counted = values[:2]
        if sum(map(bool, mine[:2])) == 1:
            return ACTIVE
    elif primitive is p.select_n_p and all(mine[1:]):
        counted = values[1:]
    elif primitive is p.dynamic_slice_p and mine[0]:
        counted = values[:1]
    elif primitive is p.gather_p and mine[0] and (values[1].depends or _reads_rows(eqn)):
        return ACTIVE
    reached = {v.depends for v in counted}
    if not any(mine) or reached <= {FIXED}:
        return max(reached, default=FIXED)
    masked = reached == {FIXED, GIVEN} and primitive in _MASKING
    return GIVEN if masked and all(_is_full(a, shape) for some in mine for a in some) else ACTIVE


def _is_full(ancestor: Ancestor, shape: Shape) -> bool:
    """Whether every dimension has digits of the parameter, and there are at least two."""
    own = [dim for dim in ancestor.dims if any(d.of == ancestor.param for d in dim)]
    pairs = zip(ancestor.dims, shape, strict=True)
    return len(own) >= 2 and all(n == 1 for dim, n in pairs if dim not in own)


def _reads_rows(eqn: JaxprEqn) -> bool:
    rows = dimensions.row_dims(eqn)
    return len(rows) == 1 and eqn.params["slice_sizes"][rows[0]] == 1


def _passed(
    eqn: JaxprEqn, mine: Sequence[Sequence[Ancestor]], shape: Shape
) -> tuple[Ancestor, ...]:
    """The ancestors of a result of this shape."""
    if eqn.primitive in PRODUCTS:
        return merged([_through_product(eqn, side, mine[side]) for side in (0, 1)])
    first = 1 if eqn.primitive is p.select_n_p else 0
    several: list[list[Ancestor]] = []
    for i in range(first, len(mine)):
        if mine[i]:
            old = compat.shape_of(eqn.invars[i])
            several.append([_through(eqn, a, old, shape) for a in mine[i]])
    return merged(several)


def _through(eqn: JaxprEqn, a: Ancestor, old: Shape, new: Shape) -> Ancestor:
    """An ancestor after an operation from a value of shape `old` to one of shape `new`."""
    primitive, params = eqn.primitive, eqn.params
    if primitive in dimensions.LAYOUT:
        return a.moved(_labelled(dimensions.after_layout(eqn, a.dims, _unlabelled), new))
    if primitive in dimensions.REDUCTIONS:
        return a.moved(_labelled(dimensions.without(a.dims, params["axes"]), new), False)
    if primitive in dimensions.SLICES:
        return a.moved(a.dims, False).resized(new)
    if primitive is compat.stack_p and "axis" in params:
        return a.moved(dimensions.stacked(a.dims, params["axis"])).resized(new)
    if primitive is compat.tile_p and "reps" in params:
        pairs = zip(params["reps"], a.dims, strict=True)
        return a.moved([(*_unlabelled(0, n), *dim) for n, dim in pairs])
    if len(old) == len(new) and (
        primitive in _EXTENDING or primitive is not p.gather_p and _fits(old, new)
    ):
        return a.resized(new)
    return a.moved([_unlabelled(i, n) for i, n in enumerate(new)])


def _labelled(dims: dimensions.Dims, shape: Shape) -> list[Dim]:
    """Dimensions of a value of this shape, where those that are not known belong to nothing."""
    return [_unlabelled(i, shape[i]) if dim is None else dim for i, dim in enumerate(dims)]


def _fits(old: Shape, new: Shape) -> bool:
    """Whether an elementwise operation leads from this shape to that."""
    return all(a in (b, 1) for a, b in zip(old, new, strict=True))


def _through_product(eqn: JaxprEqn, side: int, some: Sequence[Ancestor]) -> list[Ancestor]:
    """Ancestors of one operand in the product of two computed weights."""
    shape = compat.shape_of(eqn.outvars[0])
    positions: dict[int, int] = {}
    if eqn.primitive is p.dot_general_p:
        ndims = compat.aval(eqn.invars[0]).ndim, compat.aval(eqn.invars[1]).ndim
        contracted, batch = eqn.params["dimension_numbers"]
        positions = dimensions.product_positions(contracted, batch, ndims)[side]
    out = []
    for a in some:
        dims = [_unlabelled(i, n) for i, n in enumerate(shape)]
        for i, j in positions.items():
            dims[j] = a.dims[i]
        out.append(a.moved(dims))
    return out


def either(
    values: Sequence[Value], aval: "ShapedArray", shapes: Shapes
) -> tuple[int, tuple[Ancestor, ...]]:
    """What a value depends on that is one of several, such as the result of a branch."""
    depends = max(v.depends for v in values)
    several = [ancestors_of(v, aval.shape, shapes) for v in values]
    return depends, () if depends == ACTIVE else merged(several)


def added(values: Sequence[Value]) -> list[Ancestor]:
    """The ancestors of what a sum adds to an activation."""
    if len(values) != 2 or not any(v.depends == ACTIVE for v in values):
        return []
    return [a for v in values if v.param is None for a in v.ancestors]


def adopt(
    ancestor: Ancestor,
    shapes: Shapes,
    uses: Mapping[str, "list[Use]"],
    of_descendant: Mapping[str, "list[Use]"],
) -> None:
    """Adds to the uses of a parameter the uses as a matrix of what was computed from it."""
    param = ancestor.param
    for use in of_descendant[param]:
        stack = digits_of(param, shapes[param], use.stack)
        known = frozenset(d for other in uses[param] for d in other.stack)
        found = _sides(ancestor, shapes[param], use, {d.axis for d in known | stack})
        if use.kind == "expert":  # it says which axis is a stack, and nothing else
            found = (use.rows, use.cols) if stack else None
        if use.kind == "other" or found is None:
            continue
        use = dataclasses.replace(use, rows=found[0], cols=found[1], stack=stack)
        if use not in uses[param]:
            uses[param].append(use)


def _sides(
    ancestor: Ancestor, shape: Shape, use: Use, stacked: set[int]
) -> tuple[frozenset[Digit], frozenset[Digit]] | None:
    """(rows, cols) of a parameter with this use of its descendant; `None` where it has not both.

    Args:
      ancestor: The parameter, in the dimensions of its descendant.
      shape: Shape of the parameter.
      use: Use of the descendant.
      stacked: The axes of the parameter that are known to be a stack.
    """
    rows, cols = (digits_of(ancestor.param, shape, some) for some in (use.rows, use.cols))
    if digits.significant(rows) and digits.significant(cols):
        return rows, cols
    wide = [i for i, n in enumerate(shape) if n > 1 and i not in stacked]
    if len(wide) != 2 or not ancestor.whole:
        return None
    # The program's computation has lost one axis or both: of two axes, each is the other side.
    first, last = (frozenset([Digit(ancestor.param, i, 1, shape[i])]) for i in wide)
    at = {d.axis for d in digits.significant(rows)}, {d.axis for d in digits.significant(cols)}
    if at in ((set(), set()), ({wide[0]}, set()), (set(), {wide[1]})):
        return first, last
    if at in (({wide[1]}, set()), (set(), {wide[0]})):
        return last, first
    return None


def own(ancestor: Ancestor, shapes: Shapes) -> frozenset[Digit]:
    """The digits of a vector in what was computed from it; none if it is not a vector."""
    some = frozenset(d for dim in ancestor.dims for d in dim)
    found = digits_of(ancestor.param, shapes[ancestor.param], some)
    return found if len(digits.significant(found)) == 1 else frozenset()


def digits_of(param: str, shape: Shape, some: frozenset[Digit]) -> frozenset[Digit]:
    """The digits among some that are of the parameter, each at most as long as it is there."""
    found = set()
    for d in some:
        if d.of == param:
            fits = shape[d.axis] % d.stride == 0
            stride = d.stride if fits else 1
            found.add(d._replace(stride=stride, size=min(d.size, shape[d.axis] // stride)))
    return frozenset(found)
