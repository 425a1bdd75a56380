"""Roles that only the whole program reveals: which weights are heads, statistics or experts, and
to which products the program adds something else than one bias."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from jaxpeft import _axes as digits
from jaxpeft._axes import Digit, Dim
from jaxpeft._tracing.values import Use, Value

Uses = Mapping[str, list[Use]]


def heads(uses: Uses, results: Iterable[Value], consumed: set[str]) -> None:
    """Adds the use "head" to the weights whose product is the logits of a vocabulary.

    A head has as many outputs as some table that is read by integers of the caller has rows, and
    its product reaches the result (or a loss) with no other weight after it. What is added to the
    residual stream that begins with the rows of a table is a hidden state.

    Args:
      uses: Uses of each parameter.
      results: Results of the function.
      consumed: The weights whose output another weight reads.
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


def statistics(uses: dict[str, list[Use]], found: Iterable[str]) -> None:
    """Turns the uses of running statistics into "statistic": they are accumulated, not trained.

    They are the mean and the variance of a batch normalization in evaluation mode: a parameter
    that is subtracted before a product with the square root of another.
    """
    vectors = ("bias", "added", "norm", "scale", "other")
    for path in found:
        uses[path] = [
            dataclasses.replace(use, kind="statistic", of=()) if use.kind in vectors else use
            for use in uses[path]
        ]


def experts(
    uses: Uses,
    stacks: Iterable[tuple[Digit, list[Digit]]],
    dims: Mapping[str, Sequence[Dim | None]],
) -> None:
    """Adds the use "expert" to weights of which an axis selects a matrix, and to their vectors.

    Only a whole axis in front of the inputs counts, since the (heads, head_dim) outputs of one
    kernel are often multiplied head by head, too.

    Args:
      uses: Uses of each parameter.
      stacks: Digits that select a matrix in some product, each with all that are aligned with it.
      dims: Dimensions of each parameter.
    """
    for seed, along in stacks:
        if not _leads(seed, uses, dims):
            continue
        for digit in along:
            path = str(digit.of)
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


def _leads(digit: Digit, uses: Uses, dims: Mapping[str, Sequence[Dim | None]]) -> bool:
    """Whether a digit is a whole axis of a weight that comes before its inputs."""
    linear = [use for use in uses.get(str(digit.of), ()) if use.kind == "linear"]
    if not linear or (digit,) not in dims[str(digit.of)]:
        return False
    inputs = [d.axis for d in digits.significant(linear[0].rows) if d != digit]
    return bool(inputs) and digit.axis < min(inputs)


def unlike(
    uses: Uses,
    sums: Sequence[tuple[tuple[str, ...], Use, str]],
    products: Mapping[str, Sequence[frozenset[Digit]]],
) -> dict[str, str]:
    """What a program adds to the product of a weight, where that is not one unchanged bias.

    Args:
      uses: Uses of each parameter.
      sums: Each bias that is added to a product: (weights, use, bias).
      products: Per weight and product, the digits that it is contracted over.

    Returns:
      For a message, by the path of the weight: what the program does, and where.
    """
    out: dict[str, str] = {}
    by_weight: dict[str, list[tuple[Use, str]]] = {}
    for weights, use, bias in sums:
        if len(weights) == 1 and any(u.kind in ("bias", "added") for u in uses[bias]):
            by_weight.setdefault(weights[0], []).append((use, bias))
    for path, found in by_weight.items():
        names = list(dict.fromkeys(bias for _, bias in found))
        changed = [(use, bias) for use, bias in found if not use.plain]
        cut = [(use, bias) for use, bias in found if use.kind == "added"]
        rows = [tuple(sorted(r)) for r in products[path]]
        times = max((rows.count(r) for r in rows), default=0)
        if changed:
            use, bias = changed[0]
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
    """Length of a side: the product of the sizes of its digits."""
    return math.prod(d.size for d in side)
