"""What a model adds to a product: the residual stream beside a sub-layer.

A sub-layer ends in a product, a bias, and a sum with the stream that went around it. Where a
weight stands in that product, the stream is a value that exists already: it is found by
following the product to the sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft._composite import is_structured

#: What a product may go through on its way, its elements in the same order.
_PASSING = {p.reshape_p, p.convert_element_type_p, p.squeeze_p, p.copy_p, p.name_p}
_PASSING |= {p.reduce_precision_p, p.sharding_constraint_p, compat.optimization_barrier_p}


@dataclasses.dataclass
class Frame:
    """A jaxpr under evaluation: its values so far, and the equation that it has reached."""

    jaxpr: Any
    env: dict[Any, Any]
    at: int = 0

    @property
    def eqn(self) -> Any:
        return self.jaxpr.eqns[self.at]


def residual(frames: Sequence[Frame], path: str, row: int | None) -> list[jax.Array]:
    """The stream that is added to the product of the equation under evaluation.

    A bias is told from it by its size, which one row alone leaves open.

    Args:
      frames: The jaxpr of that equation last, before it those that it was inlined into.
      path: Of the weight, for messages.
      row: Numbers in one row of the product, where the model is known to add a bias to it.

    Returns:
      The stream alone, or of one row the bias and the stream, in the program's order.

    Raises:
      ValueError: The product is not added to one value that exists already, or something else
        happens to it first; says what, and where.
    """
    depth = len(frames) - 1
    value = frames[depth].eqn.outvars[0]
    alike = 2 if row == value.aval.size else 1  # partners of the product's size to come
    found: list[jax.Array] = []

    def end(what: str) -> list[jax.Array]:
        if alike:
            raise _lost(path, what)
        return found

    while True:
        frame = frames[depth]
        users = [eqn for eqn in frame.jaxpr.eqns[frame.at + 1 :] if value in _variables(eqn)]
        if not users and value in frame.jaxpr.outvars and depth:
            depth -= 1
            value = frames[depth].eqn.outvars[frame.jaxpr.outvars.index(value)]
            continue
        if len(users) != 1 or value in frame.jaxpr.outvars:
            return end(f"is read at {len(users)} places of its scope, and not by one sum")
        (eqn,) = users
        if eqn.primitive in _PASSING:
            value = eqn.outvars[eqn.invars.index(value) if len(eqn.outvars) > 1 else 0]
            continue
        if eqn.primitive not in (p.add_p, p.add_jaxvals_p):
            return end(f"meets `{eqn.primitive.name}` first ({compat.source(eqn)})")
        other = next((v for v in eqn.invars if v is not value), None)
        if other is None:
            return end(f"is added to itself ({compat.source(eqn)})")
        if not _is_bias(frame, other, value):
            exists = other in frame.env and not is_structured(frame.env[other])
            if not alike and exists:
                raise _lost(path, f"is added to several values ({compat.source(eqn)})")
            alike = max(alike - 1, 0)
            if exists:
                found.append(frame.env[other])
            elif not alike and not found:
                raise _lost(path, f"is added to what is computed after it ({compat.source(eqn)})")
        value = eqn.outvars[0]


def _variables(eqn: Any) -> list:
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def _is_bias(frame: Frame, other: Any, product: Any) -> bool:
    """Whether it is fewer numbers than the product, repeated: no stream."""
    if isinstance(other, jex.Literal) or other.aval.size < product.aval.size:
        return True
    for eqn in frame.jaxpr.eqns:
        if other in eqn.outvars:
            repeated = eqn.primitive is p.broadcast_in_dim_p
            return repeated and eqn.invars[0].aval.size < other.aval.size
    return False


def _lost(path: str, what: str) -> ValueError:
    return ValueError(
        f"The adapter at '{path}' reads the residual stream that the model adds to the output of "
        f"its sub-layer, but that output {what}. Choose the kernel that ends the sub-layer, "
        "in the same function as the sum; or an adapter that reads the output alone."
    )
