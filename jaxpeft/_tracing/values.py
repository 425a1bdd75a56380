"""What the walk knows: of a value, and of one use of a parameter."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxpeft._axes import Digit, Dim
from jaxpeft._tracing.ancestry import FIXED, Ancestor
from jaxpeft._tracing.flow import Flow


@dataclasses.dataclass(frozen=True)
class Use:
    """One thing that a program does with a parameter.

    Attributes:
      kind: "linear", "embedding", "conv", "expert", "bias", "norm", "scale", "added", "tied"
        (a table multiplied by its output side), "one-hot" (a table multiplied by something
        that is compared to ids), "head" (its product is the scores of a vocabulary),
        "statistic" (a mean or variance that was counted, not trained), or "other".
      rows, cols, stack: Digits of the parameter that are summed over or looked up, that
        remain, and that select one slice.
      of: For a bias or a scale, the weights whose product it acts on.
      plain: Whether a bias is added as it is, neither subtracted nor multiplied.
      by_id: Whether a table is read by whole numbers that the caller gives.
      free: Shape of what the activation keeps, such as (batch, time).
      source: Where in the model.
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
    """What is known of a value.

    Attributes:
      dims: Per dimension the digits it is made of, or `None`.
      param: The parameter that this is a rearrangement of.
      after: The weights whose product this is, to which no bias has been added yet.
      summed: Something else was added to that product.
      chosen: Digits of the parameter of which one index was chosen: a row of a table, or one
        slice of a stack of vectors. What it meets next tells which.
      fixed: The index was part of the program (`w[0]`), so it is no lookup.
      scaled: The parameter that this was multiplied with last, entry by entry.
      normed: Was divided by a standard deviation since the last product.
      one_hot: Comes from a comparison.
      depends: On what: `ancestry.FIXED`, `GIVEN` or `ACTIVE`.
      ancestors: The parameters that this is computed from, if it is no activation.
      plain: A parameter as it is, neither negated nor multiplied.
      biased: The weights whose product, with a bias and nothing else added, this is.
      stack: Digits of the parameter that a gather has chosen by, one slice for each id.
      ids: Shape of these ids.
      mixture: The weight of whose slices along these digits this is a sum, one-hot or by shares.
      by_id: Whether what was chosen was chosen by numbers that the caller gives.
      flow: Where it comes from; `None` where that follows from the operands.
    """

    dims: tuple[Dim | None, ...]
    param: str | None = None
    after: tuple[str, ...] = ()
    summed: bool = False
    chosen: frozenset[Digit] = frozenset()
    fixed: bool = False
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
        """The digits of some dimensions."""
        return frozenset(d for i in dims for d in self.dims[i] or ())

    def data(self, **changes: Any) -> "Value":
        """The same value as an activation, no longer a parameter."""
        return dataclasses.replace(self, param=None, **changes)


def unknown(aval: Any) -> Value:
    """A value of which nothing is known."""
    return Value((None,) * len(getattr(aval, "shape", ())))
