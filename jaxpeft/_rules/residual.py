"""What a model adds to a product: the residual stream beside a sub-layer.

A sub-layer ends in a product, a bias, and a sum with the residual stream. Where the interpreter
evaluates that product, the stream has been computed already: it is found by following the product
to the sum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft._composite import is_structured
from jaxpeft._dimensions import IDENTITIES

#: What a product may pass on its way to the sum: it keeps the row-major order of the entries.
_PASSING = IDENTITIES | {p.reshape_p, p.squeeze_p}


@dataclasses.dataclass
class Frame:
    """A jaxpr under evaluation: its values so far, and the equation that it has reached."""

    jaxpr: jex.Jaxpr
    env: dict[jex.Var, Any]
    at: int = 0

    @property
    def eqn(self) -> jex.JaxprEqn:
        return self.jaxpr.eqns[self.at]


def residual(frames: Sequence[Frame], path: str, row: int | None) -> list[jax.Array]:
    """The stream that is added to the product of the equation under evaluation.

    A bias is smaller than the product, unless the product has a single row. Then both are
    returned.

    Args:
      frames: The jaxpr of that equation last, before it those that it was inlined into.
      path: Path of the weight, for messages.
      row: The number of entries in one row of the product, where the model is known to add a bias
        to it.

    Returns:
      The stream alone, or, for a single row, the bias and the stream in the program's order.

    Raises:
      ValueError: The product is not added to one value that has been computed before it, or
        something else happens to it first; the message says what, and where.
    """
    depth = len(frames) - 1
    value = frames[depth].eqn.outvars[0]
    # How many values of the product's size are still to be added to it.
    expected = 2 if row == compat.aval(value).size else 1
    found: list[jax.Array] = []

    def end(what: str) -> list[jax.Array]:
        if expected:
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
            assert isinstance(other, jex.Var)  # a literal is no larger than a scalar
            computed = other in frame.env and not is_structured(frame.env[other])
            if not expected and computed:
                raise _lost(path, f"is added to several values ({compat.source(eqn)})")
            expected = max(expected - 1, 0)
            if computed:
                found.append(frame.env[other])
            elif not expected and not found:
                raise _lost(path, f"is added to what is computed after it ({compat.source(eqn)})")
        value = eqn.outvars[0]


def _variables(eqn: jex.JaxprEqn) -> list[jex.Var]:
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def _is_bias(frame: Frame, other: jex.Var | jex.Literal, product: jex.Var) -> bool:
    """Whether it has fewer entries than the product before its broadcast, so it is not a stream."""
    if isinstance(other, jex.Literal) or compat.aval(other).size < compat.aval(product).size:
        return True
    for eqn in frame.jaxpr.eqns:
        if other in eqn.outvars:
            is_broadcast = eqn.primitive is p.broadcast_in_dim_p
            return is_broadcast and compat.aval(eqn.invars[0]).size < compat.aval(other).size
    return False


def _lost(path: str, what: str) -> ValueError:
    return ValueError(
        f"The adapter at '{path}' reads the residual stream that the model adds to the output of "
        f"its sub-layer, but that output {what}. Choose the kernel that ends the sub-layer, "
        "in the same function as the sum; or an adapter that reads the output alone."
    )
