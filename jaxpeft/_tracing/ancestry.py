"""Which parameters a value is computed from, and where their axes went.

A model may compute a kernel before it uses it: it joins, masks, normalizes or rounds arrays of
the tree. What such a value depends on are its ancestors, each with its own digits in the
value's dimensions, so that a product shows what is input and what is output of each of them.
A value that depends on the function's arguments and on parameters is an activation, which has
no ancestors.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft import _compat as compat
from jaxpeft._axes import Digit, Dim
from jaxpeft._dimensions import row_dims

#: What a value depends on: parameters and constants alone, the arguments alone, or both.
FIXED, GIVEN, ACTIVE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """A parameter that a value is computed from.

    Attributes:
      param: Its path.
      dims: Per dimension of the value its digits; those of nothing have `of=None`.
      whole: Nothing of it was cut away or summed up on the way.
    """

    param: str
    dims: tuple[Dim, ...]
    whole: bool = True

    @property
    def known(self) -> int:
        """How many of its numbers the dimensions tell apart."""
        return math.prod(d.size for dim in self.dims for d in dim if d.of == self.param)

    def moved(self, dims: Sequence[Dim], whole: bool = True) -> "Ancestor":
        return dataclasses.replace(self, dims=tuple(dims), whole=self.whole and whole)

    def resized(self, shape: Sequence[int]) -> "Ancestor":
        """In a value of which some dimensions are longer or shorter."""
        return self.moved(tuple(map(_resized, self.dims, shape)))


def _nothing(size: int, axis: int = 0) -> Dim:
    return (Digit(None, axis, 1, size),) if size > 1 else ()


def _resized(dim: Dim, size: int) -> Dim:
    """The same labels for a dimension of another length, of which a part is theirs."""
    old = math.prod(d.size for d in dim)
    if old == size:
        return dim
    lead = next((i for i, d in enumerate(dim) if d.size > 1), None)
    if lead is None:
        return _nothing(size)
    rest = old // dim[lead].size
    if size % rest:
        return (dim[lead]._replace(stride=1, size=size),)
    return (*dim[:lead], dim[lead]._replace(size=size // rest), *dim[lead + 1 :])


def ancestors_of(value: Any, shape: Sequence[int], shapes: Mapping) -> tuple[Ancestor, ...]:
    """Of a value of this shape: itself, if it is a parameter rearranged."""
    if value.ids:
        return ()  # rows or matrices that the data chose
    if value.param is None:
        return value.ancestors
    dims = tuple(
        _nothing(n, i) if dim is None else dim
        for i, (dim, n) in enumerate(zip(value.dims, shape, strict=True))
    )
    dims = tuple(map(_resized, dims, shape))
    own = Ancestor(value.param, dims)
    return (own.moved(dims, own.known == math.prod(shapes[value.param])),)


def reshaped(ancestor: Ancestor, old: Sequence[int], new: Sequence[int]) -> tuple[Dim | None, ...]:
    """The dimensions of a parameter some of which are copies; `None` where nothing is its own."""
    dims = digits.reshape(ancestor.dims, old, new)
    return tuple(
        dim if dim is not None and any(d.of == ancestor.param for d in dim) else None
        for dim in dims
    )


def merged(several: Sequence[Sequence[Ancestor]]) -> tuple[Ancestor, ...]:
    """All of them, each once: where most of it is known."""
    found: dict[str, Ancestor] = {}
    for ancestor in (a for some in several for a in some):
        known = found.setdefault(ancestor.param, ancestor)
        if ancestor.known > known.known:
            found[ancestor.param] = ancestor
    return tuple(found.values())


#: Products, in which the first two operands meet.
PRODUCTS = {p.dot_general_p, compat.ragged_dot_p, p.conv_general_dilated_p}
#: What may leave out entries of a weight, as the arguments say.
_MASKING = {p.mul_p, p.div_p, p.select_n_p}
_REDUCING = {p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p}
_REDUCING |= {p.reduce_and_p, p.reduce_or_p, p.argmax_p, p.argmin_p}


def inherited(eqn: Any, values: list, outs: list, shapes: Mapping) -> list:
    """The results of an equation, with what they depend on."""
    if not outs:
        return outs
    mine = [
        ancestors_of(v, getattr(x.aval, "shape", ()), shapes)
        for v, x in zip(values, eqn.invars, strict=True)
    ]
    depends = _depends(eqn, values, mine)
    return [
        out
        if out.param is not None
        else dataclasses.replace(
            out,
            depends=depends,
            ancestors=() if depends == ACTIVE else _passed(eqn, mine, x.aval.shape),
        )
        if hasattr(x.aval, "shape")
        else out
        for out, x in zip(outs, eqn.outvars, strict=True)
    ]


def _depends(eqn: Any, values: list, mine: list) -> int:
    """FIXED, GIVEN or ACTIVE."""
    primitive, shape = eqn.primitive, getattr(eqn.outvars[0].aval, "shape", ())
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


def _is_full(ancestor: Ancestor, shape: Sequence[int]) -> bool:
    """Whether every dimension is one of the parameter's, and there are two at least."""
    own = [dim for dim in ancestor.dims if any(d.of == ancestor.param for d in dim)]
    pairs = zip(ancestor.dims, shape, strict=True)
    return len(own) >= 2 and all(n == 1 for dim, n in pairs if dim not in own)


def _reads_rows(eqn: Any) -> bool:
    rows = row_dims(eqn)
    return len(rows) == 1 and eqn.params["slice_sizes"][rows[0]] == 1


def _passed(eqn: Any, mine: list, shape: Sequence[int]) -> tuple[Ancestor, ...]:
    """The ancestors of a result of this shape."""
    primitive, params = eqn.primitive, eqn.params
    if primitive in PRODUCTS:
        return merged([_through_product(eqn, side, mine[side]) for side in (0, 1)])
    if primitive is p.select_n_p:
        mine = mine[1:]
    several: list[list[Ancestor]] = []
    for i, some in enumerate(mine):
        old = getattr(eqn.invars[i].aval, "shape", ())
        several.append([_through(primitive, params, a, old, shape) for a in some])
    return merged(several)


def _through(
    primitive: Any, params: Mapping, a: Ancestor, old: Sequence[int], new: Sequence[int]
) -> Ancestor:
    """An ancestor after an operation from a value of shape `old` to one of shape `new`."""
    if primitive is p.transpose_p:
        return a.moved([a.dims[i] for i in params["permutation"]])
    if primitive is p.reshape_p:
        folded = enumerate(digits.reshape(a.dims, old, new))
        return a.moved([_nothing(new[i], i) if dim is None else dim for i, dim in folded])
    if primitive is p.squeeze_p:
        return a.moved([d for i, d in enumerate(a.dims) if i not in params["dimensions"]])
    if primitive is p.broadcast_in_dim_p:
        dims = [_nothing(n, i) for i, n in enumerate(new)]
        for i, j in enumerate(params["broadcast_dimensions"]):
            dims[j] = a.dims[i] if old[i] == new[j] else dims[j]
        return a.moved(dims)
    if primitive is compat.stack_p and "axis" in params:
        dims = list(a.dims)
        dims.insert(params["axis"] % len(new), ())
        return a.moved(dims).resized(new)
    if primitive is compat.tile_p and "reps" in params:
        pairs = zip(params["reps"], a.dims, strict=True)
        return a.moved([(*_nothing(n), *dim) for n, dim in pairs])
    if primitive in _REDUCING:
        return a.moved([d for i, d in enumerate(a.dims) if i not in params["axes"]], False)
    if primitive in (p.slice_p, p.dynamic_slice_p, compat.split_p):
        return a.moved(a.dims, False).resized(new)
    joining = (p.concatenate_p, p.pad_p, p.dynamic_update_slice_p, p.all_gather_p)
    if len(old) == len(new) and (
        primitive in joining or primitive is not p.gather_p and _fits(old, new)
    ):
        return a.resized(new)
    return a.moved([_nothing(n, i) for i, n in enumerate(new)])


def _fits(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether an elementwise operation takes this shape to that."""
    return all(a in (b, 1) for a, b in zip(old, new, strict=True))


def _through_product(eqn: Any, side: int, some: Sequence[Ancestor]) -> list[Ancestor]:
    """Ancestors of one operand in the product of two computed weights."""
    shape = eqn.outvars[0].aval.shape
    nothing = [_nothing(n, i) for i, n in enumerate(shape)]
    if eqn.primitive is not p.dot_general_p:
        return [a.moved(nothing) for a in some]
    contracted, batch = eqn.params["dimension_numbers"]
    ndim = len(eqn.invars[side].aval.shape)
    free = [i for i in range(ndim) if i not in contracted[side] and i not in batch[side]]
    start = len(shape) - len(free) if side else len(batch[0])
    out = []
    for a in some:
        dims = list(nothing)
        for j, i in enumerate(batch[side]):
            dims[j] = a.dims[i]
        for j, i in enumerate(free):
            dims[start + j] = a.dims[i]
        out.append(a.moved(dims))
    return out


def either(values: Sequence[Any], aval: Any, shapes: Mapping) -> tuple[int, tuple[Ancestor, ...]]:
    """What one of several values depends on, as out of a branch."""
    depends = max(v.depends for v in values)
    several = [ancestors_of(v, aval.shape, shapes) for v in values]
    return depends, () if depends == ACTIVE else merged(several)


def added(values: Sequence[Any]) -> list[Ancestor]:
    """Ancestors of what is added to an activation here."""
    if len(values) != 2 or not any(v.depends == ACTIVE for v in values):
        return []
    return [a for v in values if v.param is None for a in v.ancestors]


def adopt(ancestor: Ancestor, shapes: Mapping, uses: Mapping, of_descendant: Mapping) -> None:
    """Adds to the uses of a parameter those of what was computed from it, as a matrix."""
    param = ancestor.param
    for use in of_descendant[param]:
        stack = digits_of(param, shapes[param], use.stack)
        known = frozenset(d for other in uses[param] for d in other.stack)
        found = _sides(ancestor, shapes[param], use, {d.axis for d in known | stack})
        if use.kind == "expert":  # says which axis is a stack, and nothing else
            found = (use.rows, use.cols) if stack else None
        if use.kind == "other" or found is None:
            continue
        use = dataclasses.replace(use, rows=found[0], cols=found[1], stack=stack)
        if use not in uses[param]:
            uses[param].append(use)


def _sides(
    ancestor: Ancestor, shape: Sequence[int], use: Any, stacked: set[int]
) -> tuple[frozenset[Digit], frozenset[Digit]] | None:
    """(rows, cols) of a parameter whose descendant is used like this; `None` if it is no matrix.

    Args:
      ancestor: The parameter, as it stands in the dimensions of its descendant.
      shape: Of the parameter.
      stacked: Its axes that are known to be a stack.
    """
    rows, cols = (digits_of(ancestor.param, shape, some) for some in (use.rows, use.cols))
    if digits.significant(rows) and digits.significant(cols):
        return rows, cols
    wide = [i for i, n in enumerate(shape) if n > 1 and i not in stacked]
    if len(wide) != 2 or not ancestor.whole:
        return None
    # One axis, or both, were lost in what the program computed: of two, the other side.
    first, last = (frozenset([Digit(ancestor.param, i, 1, shape[i])]) for i in wide)
    at = {d.axis for d in digits.significant(rows)}, {d.axis for d in digits.significant(cols)}
    if at in ((set(), set()), ({wide[0]}, set()), (set(), {wide[1]})):
        return first, last
    if at in (({wide[1]}, set()), (set(), {wide[0]})):
        return last, first
    return None


def own(ancestor: Ancestor, shapes: Mapping) -> frozenset[Digit]:
    """The digits of a vector in what was computed from it; none of what has more sides."""
    some = frozenset(d for dim in ancestor.dims for d in dim)
    found = digits_of(ancestor.param, shapes[ancestor.param], some)
    return found if len(digits.significant(found)) == 1 else frozenset()


def digits_of(param: str, shape: Sequence[int], some: frozenset[Digit]) -> frozenset[Digit]:
    """The digits among some that are of the parameter, no longer than they are there."""
    found = set()
    for d in some:
        if d.of == param:
            fits = shape[d.axis] % d.stride == 0
            stride = d.stride if fits else 1
            found.add(d._replace(stride=stride, size=min(d.size, shape[d.axis] // stride)))
    return frozenset(found)
