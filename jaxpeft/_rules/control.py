"""Control flow: views pass into the jaxprs of an equation as the pytrees they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft._composite import Concatenation, is_composite
from jaxpeft._rules.registry import rule
from jaxpeft._rules.sharding import constrain
from jaxpeft._view import View, is_view
from jaxpeft._weight import STACK, chain_of


def forwarded(jaxpr: Any) -> dict[int, int]:
    """Which results of a jaxpr are operands that pass through untouched: {result: operand}."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    origin = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive in (p.jit_p, p.remat_p, p.closed_call_p):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            for out, arg in forwarded(inner).items():
                source = eqn.invars[arg]
                if not isinstance(source, jex.Literal) and source in origin:
                    origin[eqn.outvars[out]] = origin[source]
    return {
        i: origin[v]
        for i, v in enumerate(jaxpr.outvars)
        if not isinstance(v, jex.Literal) and v in origin
    }


def _restore(outs: list, args: Sequence[Any], passed: dict[int, int]) -> list:
    """Results of which some are operands that passed through as the views they were."""
    return [
        args[passed[i]] if i in passed and is_view(args[passed[i]]) else x
        for i, x in enumerate(outs)
    ]


@rule(p.jit_p, p.closed_call_p, p.call_p)
def inlined(run: Any, eqn: Any, *args: Any) -> list:
    """A call is its body; shardings at its border stay as constraints."""
    params = eqn.params
    args = tuple(map(constrain, args, params.get("in_shardings", (None,) * len(args))))
    outs = run.run(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], args)
    return list(map(constrain, outs, params.get("out_shardings", (None,) * len(outs))))


@rule(p.remat_p)
def remat(run: Any, eqn: Any, *args: Any) -> list:
    """Its body is checkpointed again, by the same policy, with the views as arguments."""
    jaxpr, passed = eqn.params["jaxpr"], forwarded(eqn.params["jaxpr"])

    def body(args: Sequence[Any]) -> tuple[list, dict]:
        inner = run.inner()
        inner.taps.update(run.taps)
        outs = inner.run(jaxpr, args)
        outs = [
            jnp.zeros(()) if i in passed and is_view(args[passed[i]]) else inner.dense(x, eqn)
            for i, x in enumerate(outs)
        ]
        return outs, inner.taps

    checkpointed = jax.checkpoint(
        body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
    )
    outs, taps = checkpointed(list(args))
    run.taps.clear()
    run.taps.update(taps)
    return _restore(outs, args, passed)


def _differentiable(x: Any) -> bool:
    return is_view(x) or jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _split(eqn: Any, args: Sequence[Any]) -> tuple[list, Callable[[Sequence[Any]], list]]:
    """The operands that can be differentiated, and how to put them back among the others.

    A custom rule says nothing of what its function closes over: those come first.
    """
    closed_over = eqn.params.get("num_consts", 0)
    at = [i for i, x in enumerate(args) if i >= closed_over and _differentiable(x)]

    def join(chosen: Sequence[Any]) -> list:
        values = list(args)
        for i, x in zip(at, chosen, strict=True):
            values[i] = x
        return values

    return [args[i] for i in at], join


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return x.abstract if is_view(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _matrices_only(args: Sequence[Any], what: str) -> None:
    for x in args:
        for w in chain_of(x.weight) if is_view(x) else ():
            if not w.is_mergeable:
                raise TypeError(
                    f"{type(w).__name__} at '{x.path}' is no matrix, so the derivative rule of "
                    f"the {what} that the model applies to it has no meaning. "
                    "Leave this weight out of the method's targets."
                )


def _refuse_closed_over(eqn: Any, args: Sequence[Any]) -> None:
    """Raises where a custom_vjp is differentiated that closes over a weight."""
    for x in args[: eqn.params.get("num_consts", 0)]:
        if is_view(x):
            raise TypeError(
                f"The model differentiates a custom_vjp ({compat.source(eqn)}) whose function "
                f"closes over the weight '{x.path}', of which its derivative rule cannot speak. "
                "Pass the weight to it as an argument, or leave it out of the method's targets."
            )


# A model's own derivative rule speaks of dense weights and their cotangents. It is traced
# as such and then evaluated on views, so that it holds exactly: only the cotangent of the
# weight is dense, as it is in the model, and is pulled back to the fields of the weight.


@rule(p.custom_vjp_call_p)
def custom_vjp(run: Any, eqn: Any, *args: Any) -> list:
    """The model's derivative rule holds, for the weight as the array that it stands for."""
    _matrices_only(args, "custom_vjp")
    chosen, join = _split(eqn, args)

    def dense_call(*arrays: Any) -> list:
        return compat.bind(eqn, join(arrays))

    @jax.custom_vjp
    def call(chosen: list) -> list:
        inner = run.inner()
        outs = inner.run(eqn.params["call_jaxpr"], join(chosen))
        return [inner.dense(x, eqn) for x in outs]

    def forward(chosen: list) -> tuple[list, Any]:
        _refuse_closed_over(eqn, args)
        tree: dict[str, Any] = {}

        def rule_forward(*arrays: Any) -> tuple:
            outs, pullback = jax.vjp(dense_call, *arrays)
            residuals, tree["pullback"] = jax.tree.flatten(pullback)
            return outs, residuals

        jaxpr = jax.make_jaxpr(rule_forward)(*map(_abstract, chosen))
        inner = run.inner()
        outs = inner.run(jaxpr, chosen)
        count = len(eqn.outvars)
        outs, residuals = [inner.dense(x, eqn) for x in outs[:count]], outs[count:]
        return outs, (_Static(tree["pullback"]), residuals, chosen)

    def backward(saved: Any, cotangents: list) -> tuple:
        pullback, residuals, chosen = saved

        def rule_backward(residuals: list, cotangents: list) -> tuple:
            return jax.tree.unflatten(pullback.value, residuals)(cotangents)

        jaxpr = jax.make_jaxpr(rule_backward)(
            list(map(_abstract, residuals)), list(map(_abstract, cotangents))
        )
        inner = run.inner()
        outs = inner.run(jaxpr, [*residuals, *cotangents])
        grads = []
        for x, ct in zip(chosen, (inner.dense(ct, eqn) for ct in outs), strict=True):
            grads.append(_pull_back(x, ct) if is_view(x) else ct)
        return (grads,)

    call.defvjp(forward, backward)
    return call(chosen)


def _pull_back(view: View, cotangent: jax.Array) -> Any:
    """The cotangents of a view's leaves from that of the array it stands for."""
    _, pull = jax.vjp(lambda view: view.materialize(), view)
    return pull(cotangent)[0]


@jax.tree_util.register_static
class _Static:
    """A value that is part of the program, in the place of data."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@rule(p.custom_jvp_call_p)
def custom_jvp(run: Any, eqn: Any, *args: Any) -> list:
    """The model's derivative rule holds, for the weight as the array that it stands for."""
    _matrices_only(args, "custom_jvp")
    chosen, join = _split(eqn, args)

    @jax.custom_jvp
    def call(chosen: list) -> list:
        inner = run.inner()
        outs = inner.run(eqn.params["call_jaxpr"], join(chosen))
        return [inner.dense(x, eqn) for x in outs]

    @call.defjvp
    def rule_of_model(primals: tuple, tangents: tuple) -> tuple:
        (chosen,), (tangent,) = primals, tangents
        dense_tangents = [
            jax.jvp(lambda view: view.materialize(), (x,), (t,))[1] if is_view(x) else t
            for x, t in zip(chosen, tangent, strict=True)
        ]

        def rule_forward(primals: list, tangents: list) -> tuple:
            return jax.jvp(lambda *xs: compat.bind(eqn, join(xs)), tuple(primals), tuple(tangents))

        types = list(map(_abstract, chosen))
        jaxpr = jax.make_jaxpr(rule_forward)(types, types)
        inner = run.inner()
        outs = [inner.dense(x, eqn) for x in inner.run(jaxpr, [*chosen, *dense_tangents])]
        return outs[: len(eqn.outvars)], outs[len(eqn.outvars) :]

    return call(chosen)


# Loops. A weight that goes in as a constant, or is carried unchanged, stays as it is; one
# that changes from step to step is an array from then on.


def _scanned(run: Any, eqn: Any, x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """An operand of a scan as the tree to scan over, and what one slice of it stands for."""
    if is_composite(x):
        joined = x.stacked() if isinstance(x, Concatenation) and x.dim == 0 else None
        x = run.dense(x, eqn, " across an axis that is no stack") if joined is None else joined
    if not is_view(x):
        return x, lambda slice_: slice_
    view, lead = x.refined(), None
    if len(view.dims[0]) == 1 and view.axes[view.dims[0][0].axis].role == STACK:
        lead = view.dims[0][0].axis
    if lead is None:
        return run.dense(x, eqn, " across an axis that is no stack"), lambda slice_: slice_
    leaves, treedef = jax.tree.flatten(view.weight)
    positions = view.stack_positions(lead)
    moved = [
        leaf if at in (0, None) else jnp.moveaxis(leaf, at, 0)
        for leaf, at in zip(leaves, positions, strict=True)
    ]
    sliced = [leaf for leaf, at in zip(moved, positions, strict=True) if at is not None]

    def one(slices: list) -> View:
        rest = iter(slices)
        parts = [
            leaf if at is None else next(rest) for leaf, at in zip(moved, positions, strict=True)
        ]
        return view.without(lead, jax.tree.unflatten(treedef, parts), view.dims[1:])

    return sliced, one


@rule(p.scan_p)
def scan(run: Any, eqn: Any, *args: Any) -> list:
    """Views go in as constants, unchanged carries, or a stack of which a step has one slice."""
    body = eqn.params["jaxpr"]
    n_const, n_carry, _ = compat.scan_counts(eqn)
    passed = forwarded(body)
    consts, init = args[:n_const], list(args[n_const : n_const + n_carry])
    fixed = {i for i in range(n_carry) if passed.get(i) == n_const + i}
    # A result that stacks slices of an operand is that operand.
    returned = {i: passed[i] for i in passed if i >= n_carry and passed[i] >= n_const + n_carry}
    returned = {i: j for i, j in returned.items() if is_view(args[j])}
    carried = {
        i: run.dense(x, eqn, " carried from step to step")
        for i, x in enumerate(init)
        if i not in fixed
    }
    scanned = [_scanned(run, eqn, x) for x in args[n_const + n_carry :]]

    def step(carry: dict, xs: list) -> tuple[dict, dict]:
        inner = run.inner()
        slices = [one(x) for (_, one), x in zip(scanned, xs, strict=True)]
        outs = inner.run(body, [*consts, *(carry.get(i, x) for i, x in enumerate(init)), *slices])
        inner.closed("a loop")
        new = {i: inner.dense(outs[i], eqn, " carried from step to step") for i in carry}
        ys = {
            i: inner.dense(x, eqn, " stacked")
            for i, x in enumerate(outs)
            if i >= n_carry and i not in returned
        }
        return new, ys

    carry, ys = lax.scan(
        step,
        carried,
        [x for x, _ in scanned],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    results = [carry.get(i, x) for i, x in enumerate(init)]
    for i in range(n_carry, len(eqn.outvars)):
        results.append(args[returned[i]] if i in returned else ys[i])
    return results


@rule(p.while_p)
def while_loop(run: Any, eqn: Any, *args: Any) -> list:
    """Views go in as constants or as carries that no step changes."""
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    init = list(args[n_cond + n_body :])
    passed = forwarded(params["body_jaxpr"])
    fixed = {i for i in range(len(init)) if passed.get(i) == n_body + i}
    start = {
        i: run.dense(x, eqn, " carried from step to step")
        for i, x in enumerate(init)
        if i not in fixed
    }

    def full(carry: dict) -> list:
        return [carry.get(i, x) for i, x in enumerate(init)]

    def condition(carry: dict) -> jax.Array:
        return run.inner().run(params["cond_jaxpr"], [*cond_consts, *full(carry)])[0]

    def body(carry: dict) -> dict:
        inner = run.inner()
        outs = inner.run(params["body_jaxpr"], [*body_consts, *full(carry)])
        inner.closed("a loop")
        return {i: inner.dense(outs[i], eqn, " carried from step to step") for i in carry}

    return full(lax.while_loop(condition, body, start))


@rule(p.cond_p)
def cond(run: Any, eqn: Any, index: Any, *operands: Any) -> list:
    """Views go into every branch, and out where all branches hand on the same."""
    branches = eqn.params["branches"]
    passed = [forwarded(branch) for branch in branches]
    # Operands that every branch hands on are known outside.
    same = {
        i: j
        for i, j in passed[0].items()
        if is_view(operands[j]) and all(other.get(i) == j for other in passed)
    }

    def evaluated(branch: Any) -> Callable[[Sequence[Any]], dict]:
        def body(operands: Sequence[Any]) -> dict:
            inner = run.inner()
            outs = inner.run(branch, operands)
            inner.closed("a branch")
            return {
                i: inner.dense(x, eqn, " out of a branch")
                for i, x in enumerate(outs)
                if i not in same
            }

        return body

    outs = lax.switch(index, [evaluated(branch) for branch in branches], list(operands))
    return [operands[same[i]] if i in same else outs[i] for i in range(len(eqn.outvars))]
