"""Where a value comes from, beside the labels of its dimensions.

The flow of a value says which tables are read by integers that the caller gives, which product
reaches the result, what is computed from parameters alone, and which axes are experts rather than
outputs.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jaxpeft import _axes as digits
from jaxpeft._axes import Digit, Dim
from jaxpeft._tracing.values import Flow, Value


def parameter(path: str) -> Flow:
    """The flow of a parameter itself."""
    return Flow(weights=frozenset([path]), entries=frozenset([path]))


_ROOTS = {p.sqrt_p, p.rsqrt_p}
_SHIFTS = {p.add_p, p.mul_p, p.min_p, p.max_p, p.rem_p, p.concatenate_p, p.clamp_p}
_PICKS = {p.gather_p, p.dynamic_slice_p, p.pad_p, p.rev_p}


def merged(eqn: JaxprEqn, flows: Sequence[Flow]) -> Flow:
    """The flow of the results of an equation whose operands have these flows."""
    primitive = eqn.primitive
    live = any(f.live for f in flows)
    weights = frozenset() if live else frozenset().union(*(f.weights for f in flows))
    entries = frozenset().union(*(f.entries for f in flows)) & weights
    if "axes" in eqn.params:
        entries = frozenset()
    deviation = frozenset().union(*(f.deviation for f in flows if not f.live))
    softmax_dim = next((f.softmax_dim for f in flows if f.softmax_dim), ())
    if primitive is p.div_p and flows[0].is_exp and flows[1].exp_sum_dim:
        softmax_dim = flows[1].exp_sum_dim
    return Flow(
        live=live,
        ids=_ids(primitive, flows),
        made=frozenset().union(*(f.made for f in flows)),
        mixed=any(f.mixed for f in flows),
        weights=weights,
        entries=entries,
        deviation=frozenset() if live else entries if primitive in _ROOTS else deviation,
        is_exp=primitive is p.exp_p,
        softmax_dim=softmax_dim,
    )


def _ids(primitive: Primitive, flows: Sequence[Flow]) -> bool:
    """Whether the result is ids: a comparison of ids, their difference or their sum is not."""
    if primitive is p.select_n_p:
        return any(f.ids for f in flows[1:])
    if primitive is p.sub_p:
        return flows[0].ids and not flows[1].ids
    if primitive in _PICKS:
        return flows[0].ids
    return primitive in _SHIFTS and any(f.ids for f in flows)


def together(flows: Iterable[Flow]) -> Flow:
    """The flow of a value that is one of several, such as the result of a branch."""
    found = list(flows)
    made = frozenset().union(*(f.made for f in found))
    return dataclasses.replace(found[0], live=any(f.live for f in found), made=made)


def of_product(flows: Sequence[Flow], paths: Sequence[str]) -> Flow:
    """The flow of a product of two values, of which `paths` are parameters."""
    live = any(f.live for f in flows)
    weights = frozenset() if live else frozenset().union(*(f.weights for f in flows))
    if paths:
        return Flow(live, made=frozenset((path, False) for path in paths), weights=weights)
    made = frozenset().union(*(f.made for f in flows))
    return Flow(live, made=made, mixed=True, weights=weights)


def of_rows(flow: Flow, path: str) -> Flow:
    """The flow of rows of a table that ids with this flow have looked up."""
    return Flow(live=flow.live, made=frozenset([(path, True)]))


# --- Experts -----------------------------------------------------------------------------------


class Stacks:
    """Which digits are aligned with each other, and which of them select a matrix.

    Nothing in `einsum("td,edf->tef")` tells experts from heads; what follows does. Either a second
    weight is batched over e (`einsum("tef,efd->ted")`), or the outputs of the experts are weighted
    by a softmax over e and summed.
    """

    def __init__(self) -> None:
        self._parent: dict[Digit, Digit] = {}
        self._found: list[Digit] = []

    def _root(self, digit: Digit) -> Digit:
        while digit in self._parent:
            digit = self._parent[digit]
        return digit

    def align(self, a: Dim | None, b: Dim | None) -> None:
        """Records that two dimensions become one in the result of an equation."""
        a, b = tuple(digits.significant(a or ())), tuple(digits.significant(b or ()))
        if [d.size for d in a] != [d.size for d in b]:
            return
        for left, right in zip(map(self._root, a), map(self._root, b), strict=True):
            if left != right:
                self._parent[left] = right

    def note(self, dim: Dim | None) -> None:
        """Records that a dimension selects a matrix."""
        self._found += digits.significant(dim or ())

    def __iter__(self) -> Iterator[tuple[Digit, list[Digit]]]:
        """The digits that select a matrix, each with all digits that are aligned with it."""
        for seed in dict.fromkeys(self._found):
            every = {*self._parent, *self._parent.values(), seed}
            yield seed, [d for d in every if self._root(d) == self._root(seed)]


def weighted(value: Value, routing: Value, pairs: Iterable[tuple[int, int]]) -> list[Dim]:
    """Dimensions of the output of a weight along which a softmax weights it.

    Args:
      value: The output of one weight.
      routing: What it is multiplied by; nothing is found where that is not a softmax.
      pairs: Which of their dimensions meet.
    """
    along = routing.flow.softmax_dim
    if not along or value.flow.mixed:
        return []
    pairs = list(pairs)
    constant = [i for i, dim in enumerate(value.dims) if i not in dict(pairs)]
    constant += [i for i, j in pairs if not routing.dims[j]]
    inner = {d.of for i in constant for d in digits.significant(value.dims[i] or ())}
    met = [value.dims[i] or () for i, j in pairs if routing.dims[j] == along]
    return [dim for dim in met if any(d.of in inner for d in dim)]
