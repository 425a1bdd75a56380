"""What the walk knows about a value, where it comes from, and about one use of a parameter."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal, Var

from jaxpeft import _compat as compat
from jaxpeft import _dimensions as dimensions
from jaxpeft._axes import Digit, Dim

Shape = Sequence[int]

#: What a value depends on: parameters and constants alone, the arguments alone, or both.
#: An array that the function closes over is a constant here, since models close over masks and
#: frozen deltas of their weights; `Flow.live` takes it for data, since they also close over
#: batches. So neither of the two follows from the other.
FIXED, GIVEN, ACTIVE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Ancestor:
    """A parameter that a value is computed from.

    Attributes:
      param: Its path.
      dims: Per dimension of the value, its digits; those of no parameter have `of=None`.
      whole: Whether none of it was cut away or summed over on the way.
    """

    param: str
    dims: tuple[Dim, ...]
    whole: bool = True

    @property
    def known(self) -> int:
        """How many of its entries the dimensions tell apart."""
        return math.prod(d.size for dim in self.dims for d in dim if d.of == self.param)

    def moved(self, dims: Sequence[Dim], whole: bool = True) -> "Ancestor":
        """The same parameter in other dimensions."""
        return dataclasses.replace(self, dims=tuple(dims), whole=self.whole and whole)

    def resized(self, shape: Shape) -> "Ancestor":
        """The same parameter in a value of which some dimensions are longer or shorter."""
        return self.moved(tuple(map(resized, self.dims, shape)))


def unlabelled(axis: int, size: int) -> Dim:
    """A dimension that belongs to no parameter."""
    return (Digit(None, axis, 1, size),) if size > 1 else ()


def resized(dim: Dim, size: int) -> Dim:
    """A dimension of another length of which a part has the same labels."""
    old = math.prod(d.size for d in dim)
    if old == size:
        return dim
    lead = next((d for d in dim if d.size > 1), None)
    if lead is None:
        return unlabelled(0, size)
    found = dimensions.resized(dim, old, size)
    return (lead._replace(stride=1, size=size),) if found is None else found


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known about the origin of a value.

    Attributes:
      live: Whether it depends on data: on arguments, or on arrays that the function closes over.
        All else is computed from parameters and scalars. See `FIXED` for the difference.
      ids: Whether it is integers that the caller gives, at most moved, shifted, selected and
        clamped.
      made: The weights of which it is the product, or rows, with no weight after them:
        (path, whether it was looked up).
      mixed: Whether two activations were multiplied since the last weight.
      weights: The parameters that it is computed from, if it is not live.
      entries: Those of them from which it is computed entry by entry.
      deviation: Those of `entries` of which a square root was taken.
      times: The parameter that was multiplied by a deviation last.
      minus: The parameter that was subtracted last.
      is_exp: Whether it is exp of something.
      exp_sum_dim: The dimension over which exponentials were summed.
      softmax_dim: The dimension along which it is a softmax, so that it sums to one.
    """

    live: bool = False
    ids: bool = False
    made: frozenset[tuple[str, bool]] = frozenset()
    mixed: bool = False
    weights: frozenset[str] = frozenset()
    entries: frozenset[str] = frozenset()
    deviation: frozenset[str] = frozenset()
    times: str | None = None
    minus: str | None = None
    is_exp: bool = False
    exp_sum_dim: Dim = ()
    softmax_dim: Dim = ()


@dataclasses.dataclass(frozen=True)
class Use:
    """One thing that a program does with a parameter.

    Attributes:
      kind: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", "added", "stack"
        (it is scanned over), "slice" (one slice of it is taken), "one-hot" (a table multiplied by
        the result of a comparison with ids), "head" (its product is the logits of a vocabulary),
        "statistic" (a mean or variance that is accumulated, not trained), or "other".
      rows, cols, stack: Digits of the parameter that are summed over or looked up, that
        remain, and that select one slice.
      of: For a bias or a scale, the weights whose product it acts on.
      plain: Whether a bias is added as it is, neither subtracted nor multiplied.
      by_id: Whether a table is read by integers that the caller gives.
      free: Shape of the free dimensions of the activation, such as (batch, time).
      source: `file:line (function)` of the model.
    """

    kind: str
    rows: frozenset[Digit] = frozenset()
    cols: frozenset[Digit] = frozenset()
    stack: frozenset[Digit] = frozenset()
    of: tuple[str, ...] = ()
    plain: bool = True
    by_id: bool = False
    free: tuple[int, ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known about a value.

    Attributes:
      dims: Per dimension the digits it is made of, or `None`.
      param: The parameter that it is, in another layout.
      after: The weights whose product it is, to which no bias has been added yet.
      summed: Whether something else was added to that product.
      selected: Digits of the parameter of which one index was selected: a row of a table, or one
        slice of a stack of vectors. Its next use decides which of the two it is.
      static_index: Whether that index is part of the program (`w[0]`), so that it is not a lookup.
      scaled: The parameter by which it was multiplied last, entry by entry.
      normed: Whether it was divided by a standard deviation since the last product.
      one_hot: Whether it is the result of a comparison.
      depends: What it depends on: `FIXED`, `GIVEN` or `ACTIVE`.
      ancestors: The parameters that it is computed from, if it is not an activation.
      plain: Whether it is the parameter itself, neither negated nor multiplied.
      biased: The weights of which it is the product plus a bias and nothing else.
      stack: Digits of the parameter along which a gather has selected one slice for each id.
      ids: Shape of these ids.
      mixture: A weight and digits of it, where this is a sum of the weight's slices along them,
        one-hot or weighted by a softmax.
      by_id: Whether the caller gives the integers by which rows were selected.
      flow: Where it comes from; `None` where that follows from the operands.
    """

    dims: tuple[Dim | None, ...]
    param: str | None = None
    after: tuple[str, ...] = ()
    summed: bool = False
    selected: frozenset[Digit] = frozenset()
    static_index: bool = False
    scaled: str | None = None
    normed: bool = False
    one_hot: bool = False
    depends: int = FIXED
    ancestors: tuple[Ancestor, ...] = ()
    plain: bool = True
    biased: tuple[str, ...] = ()
    stack: frozenset[Digit] = frozenset()
    ids: tuple[int, ...] = ()
    mixture: tuple[str, frozenset[Digit]] | None = None
    by_id: bool = False
    flow: Flow = None  # type: ignore[assignment]  # filled in by `Walk.step`

    def digits(self, dims: Sequence[int]) -> frozenset[Digit]:
        """The digits of the dimensions at these positions."""
        return frozenset(d for i in dims for d in self.dims[i] or ())

    def as_activation(self, **changes: Any) -> "Value":
        """The same value, as an activation and no longer a parameter."""
        return dataclasses.replace(self, param=None, **changes)


def unknown(v: Var | Literal) -> Value:
    """The value of a variable of which nothing is known."""
    return Value((None,) * len(compat.shape_of(v)))
