"""lift(fn): gives meaning to a tree with structured weights.

`fn` is traced as if every weight were a dense array, then `_interpreter` evaluates its jaxpr on
the weights. None of this remains at run time, after `jit`.
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
from jaxpeft._interpreter import Interpreter, Materialized, NotMergeableError, Report
from jaxpeft._tree import check_filled
from jaxpeft._view import View, is_view, map_views
from jaxpeft._weight import PositionsError, Weight, chain_of, innermost

F = TypeVar("F", bound=Callable)


class MaterializedWarning(UserWarning):
    """A structured weight was turned into a dense array: correct, but it costs the array's size."""


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

    For mergeable weights, `lift(fn)(tree, ...) == fn(merge(tree), ...)`, without ever forming
    them. Only structured weights are traced: every other argument (arrays, flags, strings, keys,
    modules) reaches `fn` as the caller passed it. Use it inside `jax.jit`, as you would use
    `jax.grad`: each call traces `fn`.

    Args:
      fn: Any JAX function; results may be any pytree.
      materialize: What to do where no rule covers what the model does with a mergeable weight:
        "warn" once per path and primitive, "error", "allow", or a function of `Materialized`. A
        weight that has no dense equivalent is an error there in any case.

    Returns:
      A function of the same arguments. A structured weight that `fn` returns unchanged is
      returned as a structured weight.

    Raises:
      NotMergeableError: A weight without a dense equivalent, such as a bottleneck adapter or a
        prompt, stands where the model does something with it that no rule covers; the message
        names path, primitive and line.
      PositionsError: The model has other axes than the (batch, time) of its virtual positions.
      ValueError: Something in the tree waits for `split` or `combine`; the message names it.
      TypeError: `fn` is not a function.
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
        program = _TracedCall.of(fn, args, kwargs)
        _check_positions(fn, args, kwargs)
        return program.evaluate(report)

    return lifted  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class _TracedCall:
    """A call of a function, traced with dense arrays in the place of its structured weights.

    Attributes:
      jaxpr: From these arrays to those of the results.
      views: The structured weights.
      static: Per leaf of the results, (leaf,) where it is not an array, else `None`.
      tree: The structure of the results.
    """

    jaxpr: jex.ClosedJaxpr
    views: list[View]
    static: list[tuple | None]
    tree: Any

    @classmethod
    def of(cls, fn: Callable, args: tuple, kwargs: dict[str, Any]) -> "_TracedCall":
        """Only structured weights are traced; every other argument is closed over."""
        flat, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_view)
        # A vector costs no more to compute than the sum or the product that it is used in.
        flat = [x.materialize() if is_view(x) and x.is_vector else x for x in flat]
        at = [i for i, x in enumerate(flat) if is_view(x)]
        result: dict[str, Any] = {}

        def with_arrays(*arrays: jax.Array) -> list[jax.Array]:
            values = list(flat)
            for i, array in zip(at, arrays, strict=True):
                values[i] = array
            args, kwargs = jax.tree.unflatten(treedef, values)
            out, result["tree"] = jax.tree.flatten(fn(*args, **kwargs))
            result["static"] = [None if _is_array(x) else (x,) for x in out]
            return [x for x in out if _is_array(x)]

        with _explained(flat):
            jaxpr = jax.make_jaxpr(with_arrays)(*[_abstract(flat[i]) for i in at])
        return cls(jaxpr, [flat[i] for i in at], **result)

    def evaluate(self, report: Report) -> Any:
        """The function's results; `report` is called with every materialization."""
        interpreter = Interpreter(report)
        views = [view.unfolded().acting(_whole) for view in self.views]
        outs = iter(interpreter.run(self.jaxpr, views))
        interpreter.close_scope("the function")
        given = {id(view): original for view, original in zip(views, self.views, strict=True)}
        values = []
        for static in self.static:
            out = static[0] if static else next(outs)
            values.append(given[id(out)] if id(out) in given else interpreter.dense(out, None))
        return jax.tree.unflatten(self.tree, values)


def _positions(view: View) -> list[jax.Array]:
    """The arrays (batch, time) that weights of the view have been given."""
    fields = [(w, w.per_position) for w in chain_of(view.weight) if w.per_position is not None]
    return [x for w, name in fields if (x := getattr(w, name)) is not None]


def _check_positions(fn: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses values per position (batch, time) for a model with time first, if both are as long.

    The shapes do not tell the two apart then, and the values of one example would be taken for
    those of one time step. So the call is traced once more without its last example, where the
    lengths differ. Nothing of that is computed, and no materialization is reported.

    Raises:
      PositionsError: A weight was given other axes than its input has.
    """
    views = [x for x in jax.tree.leaves((args, kwargs), is_leaf=is_view) if is_view(x)]
    square = [x for v in views for x in _positions(v) if x.ndim == 2 and x.shape[0] == x.shape[1]]
    if not square:
        return
    examples = square[0].shape[0]

    def fewer(x: Any) -> Any:
        if not _is_array(x) or not x.shape or x.shape[0] != examples:
            return x
        return jax.ShapeDtypeStruct((examples - 1, *x.shape[1:]), x.dtype)

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
    refused: list[Exception] = []

    def call(shapes: list[jax.Array]) -> None:
        values = list(flat)
        for i, x in zip(at, shapes, strict=True):
            values[i] = x
        args, kwargs = jax.tree.unflatten(treedef, values)
        try:
            program = _TracedCall.of(fn, args, kwargs)
        except Exception as error:  # whatever the model raises for another number of examples
            refused.append(error)
            return
        try:
            program.evaluate(lambda event: None)
        except PositionsError:
            raise
        except (TypeError, ValueError) as error:  # JAX's errors for shapes that do not fit
            refused.append(error)

    jax.eval_shape(call, [flat[i] for i in at])
    if refused:
        warnings.warn(
            f"`lift` was given values per position (batch, time) of shape ({examples}, {examples}) "
            "and could not check that the model has its axes in this order: it does not run on "
            f"{examples - 1} examples ({type(refused[0]).__name__}: {refused[0]}). Call it once "
            "with a batch of another length to have this checked.",
            stacklevel=3,
        )


@contextlib.contextmanager
def _explained(values: Sequence[Any]) -> Iterator[None]:
    """Adds the way out to JAX's error, where the model needs the concrete value of an array."""
    try:
        yield
    except compat.CONCRETIZATION_ERRORS as error:
        if not any(isinstance(x, jax.core.Tracer) for x in values):
            error.add_note(
                "`lift` traces the model, so what JAX computes in it is not known while it runs, "
                f"even where its inputs are: {compat.line_of(error)}. If this does not depend on "
                "the weights, compute it there under `with jax.ensure_compile_time_eval():`, or "
                "before the call; otherwise use `jax.lax.cond` or `jnp.where`."
            )
        raise


def _whole(f: Callable[[View], Any], view: View) -> Any:
    """f(view); on a mesh with Explicit axes the results are replicated on every device."""
    leaves = jax.tree.leaves(view.weight)
    typed = [x for x in leaves if compat.typed_sharding(jax.typeof(x)) is not None]
    if not typed:
        return f(view)
    sharding = compat.typed_sharding(jax.typeof(typed[0]))
    assert sharding is not None
    everywhere = jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    with _on_mesh(
        next((x.sharding.mesh for x in typed if not isinstance(x, jax.core.Tracer)), None)
    ):
        return jax.sharding.auto_axes(f, out_sharding=everywhere)(view)


def _on_mesh(mesh: Any) -> Any:
    """A context in which results that depend on an array of one device do not stay on it.

    JAX has no such context while something is traced, and needs none.
    """
    try:
        return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    except ValueError:
        return contextlib.nullcontext()


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _abstract(view: View) -> jax.ShapeDtypeStruct:
    """The type as which a view is traced: that of the array that it replaces."""
    base = innermost(view.weight)
    sharding = None
    if view.natural and not isinstance(base, Weight) and base.shape == view.shape:
        sharding = compat.abstract(base).sharding
    return jax.ShapeDtypeStruct(view.shape, view.dtype, sharding=sharding)


def merge(tree: Any, *, dtype: Any = None) -> Any:
    """Plain arrays in the place of structured weights, for export and inference.

    Each weight is computed in the widest dtype of its parts (at least float32 for a quantized
    base) at the highest matmul precision and cast once.

    Args:
      tree: With or without structured weights.
      dtype: Dtype of the merged arrays; `None` is the dtype of the array that each weight replaces.

    Raises:
      NotMergeableError: A weight in the tree has no dense equivalent; the message names its path.
      ValueError: Something in the tree waits for `split` or `combine`; the message names it.
    """
    check_filled(tree, "merge")

    def one(view: View) -> jax.Array:
        for w in chain_of(view.weight):
            if not w.is_mergeable:
                raise NotMergeableError(
                    f"{type(w).__name__} at '{view.path}' has no dense equivalent, so it cannot be "
                    "merged. Keep the tree as it is and call the model through `lift`."
                )
        wanted = view if dtype is None else dataclasses.replace(view, dtype=jnp.dtype(dtype))
        return wanted.materialize()

    with jax.default_matmul_precision("highest"):
        return map_views(one, tree)
