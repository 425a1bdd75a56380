"""Evaluates a jaxpr on arrays and structured weights.

Where a view meets a primitive, the rule of that primitive says how its weight acts; where no rule
covers the case, the weight is materialized and that is reported.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxpeft import _compat as compat
from jaxpeft._composite import is_composite, is_structured
from jaxpeft._rules.registry import COMPOSITES, COMPUTING, RULES, Jaxpr, Rule, Value
from jaxpeft._rules.residual import Frame, residual
from jaxpeft._view import View, is_view
from jaxpeft._weight import Unsupported, Weight, chain_of, innermost


class NotMergeableError(TypeError):
    """A weight that has no dense equivalent stands where only a dense array would do."""


@dataclasses.dataclass(frozen=True)
class Materialized:
    """One place where a weight was, or would be, turned into a dense array.

    Attributes:
      path: Path of the parameter.
      primitive: The JAX primitive that no rule covers, and why where that is known.
      source: `file:line (function)` of the model.
    """

    path: str
    primitive: str
    source: str

    def __str__(self) -> str:
        return f"'{self.path}' at {self.primitive} ({self.source})"


#: What is called with every materialization.
Report = Callable[[Materialized], None]


@dataclasses.dataclass
class Interpreter:
    """Evaluates jaxprs on arrays and structured weights; the `RuleContext` of every rule.

    Attributes:
      report: Called with every materialization.
      taps: What weights of this scope have left for each other, by name.
      site_numbers: Numbers for the places where weights act.
      frames: The jaxprs of this scope that are being evaluated, the innermost last.
      model_eqn: The model's own equation, while a program that a rule has written for it runs.
    """

    report: Report
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    site_numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    frames: list[Frame] = dataclasses.field(default_factory=list)
    model_eqn: jex.JaxprEqn | None = None

    # What rules ask of it: see `RuleContext` ------------------------------------------------

    def run(self, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Any]:
        """Evaluates a jaxpr on arrays and structured weights."""
        opened, consts = compat.open_jaxpr(jaxpr)
        env: dict[jex.Var, Any] = dict(zip(opened.constvars, consts, strict=True))
        env.update(zip(opened.invars, args, strict=True))

        def read(v: jex.Var | jex.Literal) -> Any:
            return v.val if isinstance(v, jex.Literal) else env[v]

        frame = Frame(opened, env)
        self.frames.append(frame)
        for frame.at, eqn in enumerate(opened.eqns):
            values = [read(v) for v in eqn.invars]
            if any(map(is_structured, values)):
                outs = self.apply(eqn, values)
            else:
                outs = compat.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        self.frames.pop()
        return [read(v) for v in opened.outvars]

    def trace_and_run(self, fn: Callable[..., jax.Array], eqn: jex.JaxprEqn, *values: Value) -> Any:
        """Evaluates `fn(*values)`, which has one result, in the place of the model's equation."""
        outer, self.model_eqn = self.model_eqn, self.model_eqn or eqn
        try:
            (out,) = self.run(jax.make_jaxpr(fn)(*map(_type, values)), values)
        finally:
            self.model_eqn = outer
        return out

    def apply(self, eqn: jex.JaxprEqn, values: Sequence[Value]) -> list[Any]:
        """Evaluates an equation with views or composites among its operands."""
        name = str(eqn.source_info.name_stack)
        scope = jax.named_scope(name) if name else contextlib.nullcontext()
        # The maths of a weight mixes dtypes and ranks on purpose, whatever the caller forbids.
        promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with eqn.ctx.manager, scope, promote[0], promote[1]:
            outs = None
            if any(map(is_composite, values)):
                outs = self._run_rule(COMPOSITES.get(eqn.primitive), eqn, values)
                if outs is None:
                    values = [self.dense(v, eqn) if is_composite(v) else v for v in values]
            if outs is None and any(map(is_view, values)):
                outs = self._run_rule(RULES.get(eqn.primitive), eqn, values)
        if outs is None:
            outs = compat.bind(eqn, [self.dense(v, eqn) for v in values])
        return outs

    def dense(self, x: Value, eqn: jex.JaxprEqn | None, why: str = "") -> jax.Array:
        """The array itself, or the one that a view or a composite stands for, which is reported.

        Args:
          x: The value.
          eqn: Where it is needed; `None` for a result of the function.
          why: Added to the name of the primitive in the report.
        """
        if is_composite(x):
            return x.array(*[self.dense(part, eqn, why) for part in x.parts])
        if not is_view(x):
            return x
        primitive = (eqn.primitive.name if eqn is not None else "return") + why
        where = self._source(eqn) if eqn is not None else "the end of the function"
        for w in chain_of(x.weight):
            if not w.is_mergeable:
                raise NotMergeableError(
                    f"{type(w).__name__} at '{x.path}' has no dense equivalent, so it cannot stand "
                    f"where the model applies `{primitive}` to the weight itself ({where}). "
                    "Leave this weight out of the method's targets."
                )
        self.report(Materialized(x.path, primitive, where))
        return _materialized(x, eqn)

    def dequantized(self, view: View, eqn: jex.JaxprEqn, why: str = "") -> View:
        """The view over the dense array of its base, which is reported if it is quantized."""
        if not isinstance(innermost(view.weight), Weight):
            return view
        self.report(Materialized(view.path, eqn.primitive.name + why, self._source(eqn)))
        return view.dequantized()

    def new_scope(self) -> "Interpreter":
        """For a jaxpr whose values must not leave it, such as the body of a loop."""
        return Interpreter(self.report, {}, self.site_numbers, model_eqn=self.model_eqn)

    def close_scope(self, what: str) -> None:
        """Raises if something was left in the taps of a scope that no weight can read any more."""
        if self.taps:
            name = next(iter(self.taps))
            raise NotMergeableError(
                f"The adapter '{name}' reads its input inside {what} but adds its output "
                "outside of it. Place both ends in the same scope of the model."
            )

    def next_site_number(self) -> int:
        """A number for the next place where a weight acts."""
        return next(self.site_numbers)

    def residual(self, path: str, row: int | None) -> list[jax.Array]:
        """What the model adds to the product of the equation that is being evaluated."""
        return residual(self.frames, path, row)

    # -----------------------------------------------------------------------------------------

    def _source(self, eqn: jex.JaxprEqn) -> str:
        """Where in the model an equation comes from."""
        return compat.source(self.model_eqn or eqn)

    def _run_rule(
        self, rule: Rule | None, eqn: jex.JaxprEqn, values: Sequence[Value]
    ) -> list[Any] | None:
        """A rule's results; `None` where there is no rule or it does not cover the case."""
        if rule is None:
            return None
        try:
            outs = self._run_sharded(rule, eqn, values)
        except Unsupported:
            return None
        return None if outs is None else list(outs)

    def _run_sharded(
        self, rule: Rule, eqn: jex.JaxprEqn, values: Sequence[Value]
    ) -> Sequence[Any] | None:
        """A rule's results, under the compiler's choice of shardings where types contain them."""
        shardings = [compat.typed_sharding(v.aval) for v in eqn.outvars]
        if eqn.primitive not in COMPUTING or None in shardings:
            return rule(self, eqn, *values)
        declined = []

        def compute(values: Sequence[Value]) -> Sequence[Any]:
            outs = rule(self, eqn, *values)
            if outs is None:
                declined.append(True)
                avals = [compat.aval(v) for v in eqn.outvars]
                return [jnp.zeros(aval.shape, aval.dtype) for aval in avals]
            return outs

        outs = jax.sharding.auto_axes(compute, out_sharding=shardings)(list(values))
        return None if declined else outs


def _materialized(view: View, eqn: jex.JaxprEqn | None) -> jax.Array:
    """The array of a view, sharded as the types of the equation's operands say."""
    target = None
    for v in eqn.invars if eqn is not None else ():
        if compat.shape_of(v) == view.shape:
            target = target or compat.typed_sharding(v.aval)
    if target is None:
        return view.materialize()
    return jax.sharding.auto_axes(View.materialize, out_sharding=target)(view)


def _type(x: Value) -> jax.ShapeDtypeStruct:
    """The shape and dtype that a program sees of a value, structured or not."""
    if is_structured(x):
        return x.abstract
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
