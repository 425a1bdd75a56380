"""lift(fn): the meaning of a tree with structured weights.

`fn` is traced as if every weight were a dense array, then its jaxpr is evaluated; where a
view meets a primitive, the rule of that primitive says how its weight acts. After `jit`
nothing of this is left.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxpeft import _compat as compat
from jaxpeft._composite import is_composite, is_structured
from jaxpeft._rules.registry import COMPOSITES, COMPUTING, RULES, Rule
from jaxpeft._rules.residual import Frame, residual
from jaxpeft._tree import check_filled
from jaxpeft._view import View, is_view, map_views
from jaxpeft._weight import PositionsError, Unsupported, Weight, chain_of, innermost

F = TypeVar("F", bound=Callable)


class MaterializedWarning(UserWarning):
    """A structured weight was turned into a dense array, which is right but costs its size."""


class NotMergeableError(TypeError):
    """A weight that is no matrix stands where only a dense array would do."""


@dataclasses.dataclass(frozen=True)
class Materialized:
    """One place where a weight was, or would be, turned into a dense array."""

    path: str
    primitive: str
    source: str

    def __str__(self) -> str:
        return f"'{self.path}' at {self.primitive} ({self.source})"


@dataclasses.dataclass
class Interpreter:
    """One run of the evaluator. Rules call it for the jaxprs inside an equation.

    Attributes:
      report: Called with every materialization.
      taps: What weights of this scope have left for each other, by name.
      sites: How many places a weight has acted at so far.
      frames: The jaxprs of this scope that are under way, the innermost last.
      within: The model's own equation, while a rule's program for it is under way.
    """

    report: Callable[[Materialized], None]
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    sites: list[int] = dataclasses.field(default_factory=lambda: [0])
    frames: list[Frame] = dataclasses.field(default_factory=list)
    within: Any = None

    def number(self) -> int:
        """A number for the next place where a weight acts."""
        self.sites[0] += 1
        return self.sites[0]

    def dense(self, x: Any, eqn: Any, why: str = "") -> Any:
        """x itself, or the array that a view or a composite stands for."""
        if is_composite(x):
            return x.array(*[self.dense(part, eqn, why) for part in x.parts])
        if not is_view(x):
            return x
        primitive = (eqn.primitive.name if eqn is not None else "return") + why
        where = self.source(eqn) if eqn is not None else "the end of the function"
        for w in chain_of(x.weight):
            if not w.is_mergeable:
                raise NotMergeableError(
                    f"{type(w).__name__} at '{x.path}' is no matrix, so it cannot stand where "
                    f"the model applies `{primitive}` to the weight itself ({where}). "
                    "Leave this weight out of the method's targets."
                )
        self.report(Materialized(x.path, primitive, where))
        return self.materialized(x, eqn)

    def decoded(self, view: View, eqn: Any, why: str = "") -> View:
        """The view over the array that its codes stand for, if it stands on codes."""
        if not isinstance(innermost(view.weight), Weight):
            return view
        self.report(Materialized(view.path, eqn.primitive.name + why, self.source(eqn)))
        return view.decoded()

    def source(self, eqn: Any) -> str:
        """Where in the model an equation comes from."""
        return compat.source(self.within or eqn)

    def materialized(self, view: View, eqn: Any) -> jax.Array:
        """The array of a view, sharded as the program's types say."""
        target = None
        for v in eqn.invars if eqn is not None else ():
            if v.aval.shape == view.shape:
                target = target or compat.typed_sharding(v.aval)
        if target is None:
            return view.materialize()
        return jax.sharding.auto_axes(View.materialize, out_sharding=target)(view)

    def inner(self) -> "Interpreter":
        """For a jaxpr whose values must not leave it, such as the body of a loop."""
        return Interpreter(self.report, {}, self.sites, within=self.within)

    def closed(self, what: str) -> None:
        """Says that a scope has ended; whatever was left in it can never be met."""
        if self.taps:
            name = next(iter(self.taps))
            raise NotMergeableError(
                f"The adapter '{name}' reads its input inside {what} but adds its output "
                "outside of it. Place both ends in the same scope of the model."
            )

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list:
        """Evaluates a jaxpr on arrays and views."""
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jex.Literal) else env[v]

        frame = Frame(jaxpr, env)
        self.frames.append(frame)
        for frame.at, eqn in enumerate(jaxpr.eqns):
            values = [read(v) for v in eqn.invars]
            if any(map(is_structured, values)):
                outs = self.apply(eqn, values)
            else:
                outs = compat.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        self.frames.pop()
        return [read(v) for v in jaxpr.outvars]

    def program(self, fn: Callable, eqn: Any, *values: Any) -> Any:
        """fn(*values), one result, as what the model's equation does; values may be structured."""
        outer, self.within = self.within, self.within or eqn
        try:
            (out,) = self.run(jax.make_jaxpr(fn)(*map(_type, values)), values)
        finally:
            self.within = outer
        return out

    def residual(self, path: str, row: int | None) -> list[jax.Array]:
        """The stream that the model adds to the product under evaluation, maybe with a bias."""
        return residual(self.frames, path, row)

    def apply(self, eqn: jex.JaxprEqn, values: list) -> list:
        """One equation with views or composites among its operands."""
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

    def _run_rule(self, rule: Rule | None, eqn: Any, values: list) -> list | None:
        """A rule's results; `None` where there is none or it does not cover the case."""
        try:
            return None if rule is None else self._in_context(rule, eqn, values)
        except Unsupported:
            return None

    def _in_context(self, rule: Rule, eqn: Any, values: list) -> list | None:
        """A rule, under the compiler's choice of shardings where these are part of the types."""
        shardings = [compat.typed_sharding(v.aval) for v in eqn.outvars]
        if eqn.primitive not in COMPUTING or None in shardings:
            return rule(self, eqn, *values)
        declined = []

        def compute(values: list) -> list:
            outs = rule(self, eqn, *values)
            if outs is None:
                declined.append(True)
                outs = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            return outs

        outs = jax.sharding.auto_axes(compute, out_sharding=shardings)(values)
        return None if declined else outs


_warned: set[tuple[str, str]] = set()


def _warn(event: Materialized) -> None:
    key = (event.path, event.primitive)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"The weight {event} is turned into a dense array there, because no rule covers "
            "this use. The result is right, at the cost of the array's size and of the "
            "gradient's. Leave it out of the targets to avoid this.",
            MaterializedWarning,
            stacklevel=2,
        )


def _raise(event: Materialized) -> None:
    raise ValueError(
        f"The weight {event} would be turned into a dense array, which "
        "`lift(..., materialize='error')` forbids. Leave it out of the method's targets."
    )


def lift(
    fn: F,
    *,
    materialize: Literal["warn", "error", "allow"] | Callable[[Materialized], None] = "warn",
) -> F:
    """`fn` on trees that hold structured weights in the place of arrays.

    For weights that are matrices, `lift(fn)(tree, ...) == fn(merge(tree), ...)`, without
    ever forming them. Only structured weights are traced: every other argument (arrays,
    flags, strings, keys, modules) reaches `fn` as the caller passed it. Use it inside
    `jax.jit`, as `jax.grad` is: each call traces `fn`.

    Args:
      fn: Any JAX function; results may be any pytree.
      materialize: What to do where no rule covers what the model does with a weight that is
        a matrix: "warn" once per path and primitive, "error", "allow", or a function of
        `Materialized`. A weight that is no matrix is an error there in any case.

    Returns:
      A function of the same arguments. A structured weight that `fn` returns as it came is
      returned as it came.

    Raises:
      NotAMatrixError: A bottleneck adapter, a prompt or the like stands where the model does
        something with the weight that it cannot follow; names path, primitive and line.
      ValueError: Something in the tree waits for `split` or `combine`; names it.
      TypeError: `fn` is no function.
    """
    if not callable(fn):
        raise TypeError(
            f"`lift` takes a function and was given a {type(fn).__name__}, which cannot be called: "
            "write `lift(fn)(tree, ...)`, not `lift(fn(tree, ...))`."
        )
    named: dict[Any, Any] = {"warn": _warn, "error": _raise, "allow": lambda event: None}
    report = named.get(materialize, materialize)
    if not callable(report):
        raise ValueError(
            f"`lift(materialize={materialize!r})`: give 'warn', 'error', 'allow' or a function."
        )

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        check_filled((args, kwargs), "lift")
        flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_view)
        at = [i for i, x in enumerate(flat) if is_view(x)]
        for i in at:
            if flat[i].is_vector:  # costs no more than the sum or product it is used in
                flat[i] = flat[i].materialize()
        at = [i for i in at if is_view(flat[i])]
        result: dict[str, Any] = {}

        def with_arrays(*arrays: Any) -> list:
            values = list(flat)
            for i, array in zip(at, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree.unflatten(treedef, values)
            out, result["tree"] = jax.tree.flatten(fn(*args, **kwargs))
            result["static"] = [None if _is_array(x) else (x,) for x in out]
            return [x for x in out if _is_array(x)]

        with _explained(flat):
            jaxpr = jax.make_jaxpr(with_arrays)(*[_abstract(flat[i]) for i in at])
        evaluation = Interpreter(report)
        views = [flat[i].unfolded().acting(_whole) for i in at]
        if _ambiguous(views):
            _retrace_with_fewer_examples(lifted, args, kwargs)
        outs = iter(evaluation.run(jaxpr, views))
        evaluation.closed("the function")
        given = {id(view): flat[i] for view, i in zip(views, at, strict=True)}
        values = []
        for static in result["static"]:
            out = static[0] if static else next(outs)
            values.append(given[id(out)] if id(out) in given else evaluation.dense(out, None))
        return jax.tree.unflatten(result["tree"], values)

    return lifted  # type: ignore[return-value]


def _positions(view: View) -> list[Any]:
    """Arrays (batch, time) that weights of the view are told of."""
    fields = [(w, w.per_position) for w in chain_of(view.weight) if w.per_position is not None]
    return [x for w, name in fields if (x := getattr(w, name)) is not None]


def _ambiguous(views: Sequence[View]) -> bool:
    """Whether batch and time are of one length, so that a shape does not tell them apart."""
    return any(x.ndim == 2 and x.shape[0] == x.shape[1] for v in views for x in _positions(v))


def _retrace_with_fewer_examples(lifted: Callable, args: tuple, kwargs: dict) -> None:
    """Traces the call without its last example, where batch and time have different lengths.

    A model with time first would else take the positions of one example for those of a time.

    Raises:
      PositionsError: A weight is told of other axes than its input has.
    """
    views = [x for x in jax.tree.leaves((args, kwargs), is_leaf=is_view) if is_view(x)]
    rows = next(x.shape[0] for v in views for x in _positions(v) if x.shape[0] == x.shape[1])

    def fewer(x: Any) -> Any:
        if not _is_array(x) or not x.shape or x.shape[0] != rows:
            return x
        return jax.ShapeDtypeStruct((rows - 1, *x.shape[1:]), x.dtype)

    def fewer_positions(view: View) -> View:
        mine = {id(x) for x in _positions(view)}
        return jax.tree.map(lambda x: fewer(x) if id(x) in mine else x, view)

    def smaller(arg: Any) -> Any:
        if any(is_view(x) for x in jax.tree.leaves(arg, is_leaf=is_view)):
            return map_views(fewer_positions, arg)  # parameters have no examples
        return jax.tree.map(fewer, arg)

    given = [smaller(x) for x in args], {name: smaller(x) for name, x in kwargs.items()}
    flat, treedef = jax.tree.flatten(given)
    at = [i for i, x in enumerate(flat) if isinstance(x, jax.ShapeDtypeStruct)]

    def call(shapes: list) -> None:
        values = list(flat)
        for i, x in zip(at, shapes, strict=True):
            values[i] = x
        args, kwargs = jax.tree.unflatten(treedef, values)
        lifted(*args, **kwargs)

    try:
        jax.eval_shape(call, [flat[i] for i in at])
    except PositionsError:
        raise
    except Exception:
        return  # a model of this many examples alone: nothing is learned


@contextlib.contextmanager
def _explained(values: Sequence[Any]) -> Iterator[None]:
    """Adds to JAX's error what to do, where the model decides by numbers that it has."""
    try:
        yield
    except compat.NEEDS_NUMBERS as error:
        if not any(isinstance(x, jax.core.Tracer) for x in values):
            error.add_note(
                "`lift` traces the model, so what JAX computes in it is not known while it runs, "
                f"even of arrays that are: {compat.line_of(error)}. If this does not depend on "
                "the weights, compute it there under `with jax.ensure_compile_time_eval():`, or "
                "before the call; otherwise use `jax.lax.cond` or `jnp.where`."
            )
        raise


def _whole(f: Callable[[View], Any], view: View) -> Any:
    """f(view); on a mesh with Explicit axes the results are whole on every device."""
    leaves = jax.tree.leaves(view.weight)
    typed = [x for x in leaves if compat.typed_sharding(jax.typeof(x)) is not None]
    if not typed:
        return f(view)
    mesh = compat.typed_sharding(jax.typeof(typed[0])).mesh
    everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with _on_mesh(
        next((x.sharding.mesh for x in typed if not isinstance(x, jax.core.Tracer)), None)
    ):
        return jax.sharding.auto_axes(f, out_sharding=everywhere)(view)


def _on_mesh(mesh: Any) -> Any:
    """The context in which what follows from an array of one device alone does not stay there.

    While something is traced there is no such context, and no need of one.
    """
    try:
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    except ValueError:
        return contextlib.nullcontext()


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _type(x: Any) -> jax.ShapeDtypeStruct:
    """What a program sees of a value, structured or not."""
    if is_structured(x):
        return x.abstract
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _abstract(view: View) -> jax.ShapeDtypeStruct:
    """The type under which a view is traced: that of the array it replaces."""
    base = innermost(view.weight)
    sharding = None
    if view.natural and not isinstance(base, Weight) and base.shape == view.shape:
        sharding = compat.abstract(base).sharding
    return jax.ShapeDtypeStruct(view.shape, view.dtype, sharding=sharding)


def merge(tree: Any, *, dtype: Any = None) -> Any:
    """Plain arrays in the place of structured weights, for export and inference.

    Each weight is computed in the wider of its parts' dtypes (at least float32 for a quantized
    base) at the highest matmul precision and cast once.

    Args:
      tree: With or without structured weights.
      dtype: To cast to; `None` is the dtype of the array that each weight replaces.

    Raises:
      NotAMatrixError: A weight in the tree is no matrix; names its path.
      ValueError: Something in the tree waits for `split` or `combine`; names it.
    """
    check_filled(tree, "merge")

    def one(view: View) -> jax.Array:
        for w in chain_of(view.weight):
            if not w.is_mergeable:
                raise NotMergeableError(
                    f"{type(w).__name__} at '{view.path}' is no matrix, so it cannot be merged. "
                    "Keep the tree as it is and call the model through `lift`."
                )
        wanted = view if dtype is None else dataclasses.replace(view, dtype=jnp.dtype(dtype))
        return wanted.materialize()

    with jax.default_matmul_precision("highest"):
        return map_views(one, tree)
