"""What a rule is, what it may ask of the interpreter, and the table of all rules.

A rule says what a primitive does with structured weights. It is called with its context, the
equation, and its operands, some of which are structured; it returns the results, or `None` where
it does not cover the case. The interpreter then materializes the operands, which is right for
mergeable weights, and reports it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Protocol, TypeVar

import jax
from jax.extend import core as jex

from jaxpeft._composite import Composite
from jaxpeft._view import View

#: What stands for an array of the program while its jaxpr is evaluated.
Value = jax.Array | View | Composite
#: What rules of views get: the interpreter has materialized composites before.
ArrayOrView = jax.Array | View
#: What a rule returns; `None` where it does not cover the case.
Results = Sequence[Value] | None
#: A jaxpr as a parameter of an equation.
Jaxpr = jex.Jaxpr | jex.ClosedJaxpr


class RuleContext(Protocol):
    """What a rule may ask of the interpreter that calls it.

    Attributes:
      taps: What weights of this scope have left for each other, by name.
    """

    taps: dict[str, Any]

    def run(self, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Any]:
        """Evaluates a jaxpr inside the equation on arrays and structured weights."""

    def trace_and_run(self, fn: Callable[..., jax.Array], eqn: jex.JaxprEqn, *values: Value) -> Any:
        """Evaluates `fn(*values)`, which has one result, in the place of the equation."""

    def apply(self, eqn: jex.JaxprEqn, values: Sequence[Value]) -> list[Any]:
        """Evaluates an equation on operands, at least one of which is structured."""

    def dense(self, x: Value, eqn: jex.JaxprEqn, why: str = "") -> jax.Array:
        """The array itself, or the one that a structured weight stands for, which is reported.

        Raises:
          NotMergeableError: The weight has no dense equivalent.
        """

    def dequantized(self, view: View, eqn: jex.JaxprEqn, why: str = "") -> View:
        """The view over the dense array of its base, which is reported if it is quantized."""

    def new_scope(self) -> "RuleContext":
        """A context for a jaxpr whose values must not leave it, such as the body of a loop."""

    def close_scope(self, what: str) -> None:
        """Ends a scope, of which `what` is the name in messages.

        Raises:
          NotMergeableError: Something was left in `taps` that no weight of the scope has read.
        """

    def next_site_number(self) -> int:
        """A number for the next place where a weight acts."""

    def residual(self, path: str, row: int | None) -> list[jax.Array]:
        """What the model adds to the product of this equation: see `_rules.residual`."""


#: (context, equation, *operands) -> results
Rule = Callable[Concatenate[RuleContext, jex.JaxprEqn, ...], Results]
R = TypeVar("R", bound=Rule)

#: What primitives do with views.
RULES: dict[jex.Primitive, Rule] = {}

#: What primitives do where a composite is among the operands, in the same form.
COMPOSITES: dict[jex.Primitive, Rule] = {}

#: Primitives whose rules compute arrays. Where shardings are part of the types, their maths
#: runs with the compiler's choice inside and the equation's own sharding outside.
COMPUTING: set[jex.Primitive] = set()


def rule(*primitives: jex.Primitive | None, computes: bool = False) -> Callable[[R], R]:
    """Registers what these primitives do with views. `None` is one this JAX does not have."""

    def register(f: R) -> R:
        for primitive in primitives:
            if primitive is not None:
                RULES[primitive] = f
                if computes:
                    COMPUTING.add(primitive)
        return f

    return register


def composite_rule(*primitives: jex.Primitive | None) -> Callable[[R], R]:
    """Registers what these primitives do with composites. `None` is one this JAX does not have."""

    def register(f: R) -> R:
        COMPOSITES.update({primitive: f for primitive in primitives if primitive is not None})
        return f

    return register
