"""What only the whole of a program tells: which weights are heads, statistics or experts, and to
which products something else is added than one bias."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpeft import _axes as digits
from jaxpeft._axes import Digit, Dim

Uses = dict[str, list[Any]]


def heads(uses: Uses, results: Iterable[Any], consumed: set[str]) -> None:
    """Notes as "head" the weights whose product is the scores of a vocabulary.

    A head has as many outputs as a table has rows that is read by numbers which the caller gives,
    and its product goes on to the result (a loss is one, too) with no other weight after it. What
    is added to the stream that begins with the rows of a table are hidden states.

    Args:
      uses: Of each parameter.
      results: Of the function.
      consumed: The weights that another weight comes after.
    """
    read = [use for every in uses.values() for use in every if use.by_id]
    vocabularies = {size(use.rows) for use in read}
    last = {path for value in results for path, lookup in value.flow.made if not lookup}
    for path in last - consumed:
        for use in uses[path]:
            if use.kind == "linear" and size(use.cols) in vocabularies:
                head = dataclasses.replace(use, kind="head", stack=frozenset())
                uses[path].append(head)
                break


def statistics(uses: Uses, found: Iterable[str]) -> None:
    """Notes as "statistic" what a program subtracts and divides by but counts, not trains.

    The mean and the variance of a batch normalization that runs on averages: a mean that is
    subtracted before a product with the root of a parameter.
    """
    vectors = ("bias", "added", "norm", "scale", "other")
    for path in found:
        uses[path] = [
            dataclasses.replace(use, kind="statistic", of=()) if use.kind in vectors else use
            for use in uses[path]
        ]


def experts(uses: Uses, stacks: Iterable[tuple[Digit, list[Digit]]], dims: Mapping) -> None:
    """Notes as "expert" the weights of which an axis chooses a matrix, and their vectors.

    Only a whole axis in front of the inputs can be one: (heads, head_dim) outputs of one kernel
    are as often multiplied head by head.

    Args:
      uses: Of each parameter.
      stacks: Digits that choose a matrix in some product, each with all that run along it.
      dims: Of each parameter.
    """
    for seed, along in stacks:
        if not _leads(seed, uses, dims):
            continue
        for digit in along:
            path = digit.of
            if path not in uses or any(digit in use.stack for use in uses[path]):
                continue
            if _leads(digit, uses, dims):
                like = next(use for use in uses[path] if use.kind == "linear")
                kind, of = "expert", ()
            elif vectors := [u for u in uses[path] if u.kind in ("bias", "scale", "norm", "added")]:
                like, kind, of = vectors[0], "stack", ()
            else:
                continue
            one = frozenset([digit])
            use = dataclasses.replace(
                like, kind=kind, of=of, rows=frozenset(), cols=frozenset(), stack=one
            )
            uses[path].append(use)


def _leads(digit: Digit, uses: Uses, dims: Mapping[str, Sequence[Dim]]) -> bool:
    """Whether a digit is a whole axis of a weight that comes before its inputs."""
    linear = [use for use in uses.get(str(digit.of), ()) if use.kind == "linear"]
    if not linear or (digit,) not in dims[str(digit.of)]:
        return False
    inputs = [d.axis for d in digits.significant(linear[0].rows) if d != digit]
    return bool(inputs) and digit.axis < min(inputs)


def unlike(
    uses: Uses,
    sums: Sequence[tuple[tuple[str, ...], Any, str]],
    products: Mapping[str, Sequence[frozenset[Digit]]],
) -> dict[str, str]:
    """What a program adds to a weight's product, where that is not one bias as it is.

    Args:
      uses: Of each parameter.
      sums: Each bias that is added to a product: (weights, use, bias).
      products: How often a weight is multiplied, by the digits that it is contracted over.

    Returns:
      For a message, by the path of the weight: what is done, and where.
    """
    out: dict[str, str] = {}
    by_weight: dict[str, list[tuple[Any, str]]] = {}
    for weights, use, bias in sums:
        if len(weights) == 1 and any(u.kind in ("bias", "added") for u in uses[bias]):
            by_weight.setdefault(weights[0], []).append((use, bias))
    for path, found in by_weight.items():
        names = list(dict.fromkeys(bias for _, bias in found))
        turned = [(use, bias) for use, bias in found if not use.plain]
        cut = [(use, bias) for use, bias in found if use.kind == "added"]
        rows = [tuple(sorted(r)) for r in products[path]]
        times = max((rows.count(r) for r in rows), default=0)
        if turned:
            use, bias = turned[0]
            out[path] = f"subtracts or scales '{bias}' ({use.source})"
        elif cut:
            use, bias = cut[0]
            part = "to a part of its product, or to it in another order"
            out[path] = f"adds '{bias}' {part} ({use.source})"
        elif len(names) > 1:
            where = ", ".join(f"'{bias}' ({use.source})" for use, bias in found)
            out[path] = f"adds more than one bias: {where}"
        elif times != len(found):
            use, bias = found[0]
            many = f"multiplies by the weight {times} times and adds '{bias}' {len(found)} times"
            out[path] = f"{many} ({found[-1][0].source})"
    return out


def size(side: Iterable[Digit]) -> int:
    """Length of a side."""
    return math.prod(d.size for d in side)
