"""What a rule is, and the table of all of them.

A rule says what a primitive does with structured weights. It is called with the evaluation
under way, the equation, and its operands, some of which are views; it returns the results,
or `None` where it does not cover the case. The evaluator then materializes the views, which
is right for matrices, and reports it.
"""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

#: (evaluation, equation, operands) -> results or None
Rule = Callable[..., list | None]

RULES: dict[jex.Primitive, Rule] = {}

#: Primitives whose rules compute arrays. Where shardings are part of the types, their maths
#: runs with the compiler's choice inside and the equation's own sharding outside.
COMPUTING: set[jex.Primitive] = set()


def rule(*primitives: jex.Primitive | None, computes: bool = False) -> Callable[[Rule], Rule]:
    """Registers what these primitives do with views. `None` is one this JAX does not have."""

    def register(f: Rule) -> Rule:
        for primitive in primitives:
            if primitive is not None:
                RULES[primitive] = f
                if computes:
                    COMPUTING.add(primitive)
        return f

    return register


#: What primitives do where a composite is among the operands, in the same form.
COMPOSITES: dict[jex.Primitive, Rule] = {}


def composite_rule(*primitives: jex.Primitive | None) -> Callable[[Rule], Rule]:
    """Registers what these primitives do with composites. `None` is one this JAX does not have."""

    def register(f: Rule) -> Rule:
        COMPOSITES.update({primitive: f for primitive in primitives if primitive is not None})
        return f

    return register


def cut_dims(eqn: Any) -> list[int]:
    """The dimensions that a slice of an array shortens."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


def row_dims(eqn: Any) -> list[int]:
    """The dimensions in which a gather chooses: those it does not take whole.

    In a mode that clips, the start of a slice as long as its dimension is zero.
    """
    sizes, shape = eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    chosen = list(eqn.params["dimension_numbers"].start_index_map)
    if len(chosen) > 1 and eqn.params["mode"].name != "FILL_OR_DROP":
        chosen = [i for i in chosen if sizes[i] != shape[i]]
    return chosen
