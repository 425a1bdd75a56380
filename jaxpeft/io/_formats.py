"""Which matrices of a folder are encoded as they are read, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft._sites import Pattern, Site, Sites
from jaxpeft._view import roles_of
from jaxpeft._weight import IN, OUT, STACK
from jaxpeft.io._coded import Encoder
from jaxpeft.io._stacked import Stack
from jaxpeft.quant._quantize import encoder

__all__ = ["Format", "Formats", "encoders"]

#: A name such as "nf4+dq", or a function from a matrix to a weight: `partial(nf4, block=128)`.
Format = str | Encoder
Formats = Format | Mapping[Pattern, Format | None] | None


def encoders(
    formats: Formats, plan: Mapping[str, Stack], hidden: Iterable[str]
) -> dict[str, Encoder]:
    """The encoder of each matrix that is to have one.

    Args:
      formats: One for all of `hidden`, or by pattern of path, where the first match wins and
        `None` leaves a matrix as it is, as no pattern does.
      plan: All arrays.
      hidden: Paths of those that are usually quantized.
    Raises:
      ValueError: A format is unknown, or a pattern matches no matrix.
      TypeError: A format is neither a name nor a function.
    """
    if formats is None:
        return {}
    if not isinstance(formats, Mapping):
        return dict.fromkeys(hidden, _encoder(formats))
    matrices = Sites({path: _site(path, stack) for path, stack in plan.items() if _sides(stack)})
    chosen: dict[str, Format | None] = {}
    for pattern, format in reversed(list(formats.items())):
        chosen |= dict.fromkeys(matrices.match(pattern), format)
    return {path: _encoder(chosen[path]) for path in plan if chosen.get(path) is not None}


def _encoder(format: Any) -> Encoder:
    if isinstance(format, str):
        return encoder(format)
    if not callable(format):
        raise TypeError(
            f"`quantize={format!r}`: a format is a name such as 'nf4+dq' or a function from a "
            "matrix to a weight such as `functools.partial(jp.quant.nf4, block=128)`."
        )
    return format


def _sides(stack: Stack) -> bool:
    """Whether the array is a matrix, or a stack of them."""
    return len(stack.shape) == 2 + stack.stacked


def _site(path: str, stack: Stack) -> Site:
    axes = roles_of(*[STACK] * stack.stacked, IN, OUT)(stack.shape)
    return Site(path, stack.shape, None, axes)
