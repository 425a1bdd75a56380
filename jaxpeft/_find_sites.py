"""sites(fn, params, ...): finds what a program does with each of its parameters.

The jaxpr of `fn` is walked with labelled dimensions. Where a parameter meets a product, a gather
or a sum, the labels say which of its axes are inputs, outputs, or a stack of layers or experts.
Nothing is computed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxpeft import _tracing as tracing
from jaxpeft._axes import Digit
from jaxpeft._interpreter import Interpreter, Materialized
from jaxpeft._marks import is_array
from jaxpeft._site import Site
from jaxpeft._sites import Sites
from jaxpeft._tracing.values import Use
from jaxpeft._tree import flatten
from jaxpeft._view import Axis
from jaxpeft._weight import IN, OUT, STACK, Weight, base_weight, dense, weight


def sites(fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds what `fn(params, *args, **kwargs)` does with each parameter, by tracing it.

    Nothing is computed: shapes are enough.

    Args:
      fn: Any JAX function of a parameter tree.
      params: Arrays or `jax.ShapeDtypeStruct`s, in any pytree. Other leaves (functions,
        strings, numbers of Python) reach `fn` as they are and are not parameters.
      args, kwargs: As `fn` takes them. Arrays may be shapes too. Anything else, such as a flag,
        reaches `fn` as it is.

    Returns:
      The parameters by path, with the roles of their axes. Printing it shows a table.

    Raises:
      TypeError: `fn` is not a function.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> def model(params, ids):
      ...     return jax.nn.relu(params["embed"][ids] @ params["up"]) @ params["down"]
      >>> params = {"embed": jnp.ones((9, 4)), "up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
      >>> print(jp.sites(model, params, jnp.zeros((1, 3), int)))
      path   shape   axes     kinds
      down   (8, 2)  in, out  linear
      embed  (9, 4)  in, out  embedding
      up     (4, 8)  in, out  linear
    """
    if not callable(fn):
        raise TypeError(
            f"`sites(fn, params, *inputs)`: the function comes first, and {type(fn).__name__} "
            "cannot be called."
        )
    leaves, treedef = flatten(params)
    flat = {path: x for path, x in leaves.items() if is_array(x)}
    rest, rest_tree = jax.tree.flatten((args, kwargs))
    at = [i for i, x in enumerate(rest) if is_array(x)]

    def flat_fn(arrays: list, data: list) -> Any:
        values = list(rest)
        for i, x in zip(at, data, strict=True):
            values[i] = x
        args, kwargs = jax.tree.unflatten(rest_tree, values)
        every = {**leaves, **dict(zip(flat, arrays, strict=True))}
        return fn(jax.tree.unflatten(treedef, list(every.values())), *args, **kwargs)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat.values()]
    data = [jax.ShapeDtypeStruct(rest[i].shape, rest[i].dtype) for i in at]
    program = jax.make_jaxpr(flat_fn)(shapes, data)
    uses, mismatches = tracing.trace(program, list(flat), shapes)
    found = {path: _site(path, x, uses[path], uses) for path, x in zip(flat, shapes, strict=True)}
    for path, what in mismatches.items():
        found[path] = dataclasses.replace(found[path], bias_mismatch=what)
    _note_materializations(program, found, shapes, data)
    return Sites(found)


def _site(path: str, x: Any, uses: list[Use], every: Mapping[str, list[Use]]) -> Site:
    axes = _axes(x.shape, uses, every)
    biases = {
        other
        for other, theirs in every.items()
        for use in theirs
        if use.kind == "bias" and use.of == (path,)
    }
    of = tuple(dict.fromkeys(p for use in uses if use.kind in ("bias", "scale") for p in use.of))
    bias = biases.pop() if len(biases) == 1 else None
    return Site(path, tuple(x.shape), x.dtype, axes, tuple(uses), bias, of)


def _axes(
    shape: Sequence[int], uses: list[Use], every: Mapping[str, list[Use]]
) -> tuple[Axis, ...]:
    """The axes of a parameter with their roles, cut where the program uses parts differently."""
    linear = [use for use in uses if use.kind in ("linear", "embedding", "conv")]
    # The rows of a table are its inputs, also where its transpose is a tied head.
    linear.sort(key=lambda use: use.kind != "embedding")
    stack = {d for use in uses for d in use.stack}
    out: list[Axis] = []
    for axis, size in enumerate(shape):
        claims = {d: STACK for d in stack if d.axis == axis}
        if linear:
            sides = [(IN, linear[0].rows), (OUT, linear[0].cols)]
        else:
            sides = [(OUT, frozenset(d for use in uses for d in use.cols))]
        for role, side in sides:
            for digit in side:
                if digit.axis == axis and not _overlaps(digit, claims):
                    claims[digit] = role
        out.extend(_cut(axis, size, claims))
    return tuple(out)


def _overlaps(digit: Digit, claims: Iterable[Digit]) -> bool:
    return any(
        digit.stride < c.stride * c.size and c.stride < digit.stride * digit.size
        for c in claims
        if c.size > 1 or digit.size > 1
    )


def _cut(axis: int, size: int, claims: Mapping[Digit, str]) -> list[Axis]:
    """The pieces of one axis with their roles, most significant first."""
    roles = set(claims.values())
    covered = 1
    for digit in claims:
        covered *= digit.size
    if len(roles) <= 1:
        # An axis of length 1, or one that no use mentions, belongs to the outputs.
        return [Axis(size, roles.pop() if roles else OUT)]
    ordered = sorted(claims, key=lambda d: -d.stride)
    if covered != size:
        return [Axis(size, claims[ordered[0]])]
    return [Axis(d.size, claims[d]) for d in ordered]


@weight
class _Probe(Weight):
    """The matrix itself, as a weight: it shows where `lift` would materialize one."""

    w: Any = base_weight()
    local_in = local_out = True

    def materialize(self) -> jax.Array:
        return dense(self.w)

    def forward(self, x: Any) -> Any:
        return x @ self.w

    def transposed(self, y: Any) -> Any:
        return y @ self.w.T

    def lookup(self, ids: Any) -> Any:
        return self.w[ids]


def _note_materializations(program: Any, found: dict[str, Site], shapes: list, data: list) -> None:
    """Fills in `Site.materialized`, by lifting the program on shapes alone."""
    events: dict[str, list[Materialized]] = {}

    def note(event: Materialized) -> None:
        seen = events.setdefault(event.path, [])
        if event not in seen:
            seen.append(event)

    def evaluated(arrays: list, data: list) -> None:
        values = [
            dataclasses.replace(site.view(x), weight=_Probe(x)).unfolded() if site.is_matrix else x
            for x, site in zip(arrays, found.values(), strict=True)
        ]
        interpreter = Interpreter(note)
        for out in interpreter.run(program, [*values, *data]):
            if not any(out is value for value in values):
                interpreter.dense(out, None)

    jax.eval_shape(evaluated, shapes, data)
    for path, seen in events.items():
        found[path] = dataclasses.replace(found[path], materialized=tuple(seen))
