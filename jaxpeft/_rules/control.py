"""Control flow: views pass into the jaxprs of an equation as the pytrees they are."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from jaxpeft import _compat as compat
from jaxpeft._composite import Concatenation, is_composite
from jaxpeft._rules.registry import ArrayOrView, Jaxpr, RuleContext, Value, rule
from jaxpeft._rules.sharding import constrain
from jaxpeft._view import View, is_view
from jaxpeft._weight import STACK, chain_of


def forwarded(closed: Jaxpr) -> dict[int, int]:
    """Which results of a jaxpr are operands that it returns unchanged: {result: operand}."""
    jaxpr, _ = compat.open_jaxpr(closed)
    origin = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive in (p.jit_p, p.remat_p, p.closed_call_p):
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
            for out, arg in forwarded(inner).items():
                source = eqn.invars[arg]
                if not isinstance(source, jex.Literal) and source in origin:
                    origin[eqn.outvars[out]] = origin[source]
    return {
        i: origin[v]
        for i, v in enumerate(jaxpr.outvars)
        if not isinstance(v, jex.Literal) and v in origin
    }


def _restore(outs: Sequence[Value], args: Sequence[Value], passed: dict[int, int]) -> list[Value]:
    """Results, with the views that were operands and were returned unchanged in their places."""
    return [
        args[passed[i]] if i in passed and is_view(args[passed[i]]) else x
        for i, x in enumerate(outs)
    ]


@rule(p.jit_p, p.closed_call_p, p.call_p)
def inlined(ctx: RuleContext, eqn: JaxprEqn, *args: Value) -> list[Value]:
    """A call is evaluated as its body; shardings of its arguments and results stay constraints."""
    params = eqn.params
    args = tuple(map(constrain, args, params.get("in_shardings", (None,) * len(args))))
    outs = ctx.run(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], args)
    return list(map(constrain, outs, params.get("out_shardings", (None,) * len(outs))))


@rule(p.remat_p)
def remat(ctx: RuleContext, eqn: JaxprEqn, *args: Value) -> list[Value]:
    """The body is checkpointed again, by the same policy, with the views as arguments."""
    jaxpr, passed = eqn.params["jaxpr"], forwarded(eqn.params["jaxpr"])

    def body(args: Sequence[Value]) -> tuple[list[jax.Array], dict[str, Any]]:
        inner = ctx.new_scope()
        inner.taps.update(ctx.taps)
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
    ctx.taps.clear()
    ctx.taps.update(taps)
    return _restore(outs, args, passed)


def _differentiable(x: ArrayOrView) -> bool:
    return is_view(x) or jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _split(
    eqn: JaxprEqn, args: Sequence[ArrayOrView]
) -> tuple[list[ArrayOrView], Callable[[Sequence[Any]], list[Any]]]:
    """The operands that can be differentiated, and how to put them back among the others.

    The values that its function closes over come first: a custom rule does not cover them.
    """
    closed_over = eqn.params.get("num_consts", 0)
    at = [i for i, x in enumerate(args) if i >= closed_over and _differentiable(x)]

    def join(chosen: Sequence[Any]) -> list[Any]:
        values = list(args)
        for i, x in zip(at, chosen, strict=True):
            values[i] = x
        return values

    return [args[i] for i in at], join


def _abstract(x: ArrayOrView) -> jax.ShapeDtypeStruct:
    return x.abstract if is_view(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)


def _refuse_not_mergeable(args: Sequence[ArrayOrView], what: str) -> None:
    """Raises where a weight without a dense equivalent meets the model's own derivative rule."""
    for x in filter(is_view, args):
        for w in chain_of(x.weight):
            if not w.is_mergeable:
                raise TypeError(
                    f"{type(w).__name__} at '{x.path}' has no dense equivalent, so the derivative "
                    f"rule of the {what} that the model applies to it has no meaning. "
                    "Leave this weight out of the method's targets."
                )


def _refuse_closed_over(eqn: JaxprEqn, args: Sequence[ArrayOrView]) -> None:
    """Raises where a custom_vjp that closes over a weight is differentiated."""
    for x in args[: eqn.params.get("num_consts", 0)]:
        if is_view(x):
            raise TypeError(
                f"The model differentiates a custom_vjp ({compat.source(eqn)}) whose function "
                f"closes over the weight '{x.path}', which its derivative rule cannot cover. "
                "Pass the weight to it as an argument, or leave it out of the method's targets."
            )


# A model's own derivative rule is written for dense weights and their cotangents. It is traced
# as such and then evaluated on views, so that it holds exactly: only the cotangent of the
# weight is dense, as it is in the model, and is pulled back to the fields of the weight.


@rule(p.custom_vjp_call_p)
def custom_vjp(ctx: RuleContext, eqn: JaxprEqn, *args: ArrayOrView) -> list[jax.Array]:
    """The model's derivative rule applies to the array that the weight stands for."""
    _refuse_not_mergeable(args, "custom_vjp")
    chosen, join = _split(eqn, args)

    def dense_call(*arrays: jax.Array) -> list[jax.Array]:
        return compat.bind(eqn, join(arrays))

    @jax.custom_vjp
    def call(chosen: list[ArrayOrView]) -> list[jax.Array]:
        inner = ctx.new_scope()
        outs = inner.run(eqn.params["call_jaxpr"], join(chosen))
        return [inner.dense(x, eqn) for x in outs]

    def forward(chosen: list[ArrayOrView]) -> tuple[list[jax.Array], tuple]:
        _refuse_closed_over(eqn, args)
        tree: dict[str, Any] = {}

        def rule_forward(*arrays: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            outs, pullback = jax.vjp(dense_call, *arrays)
            residuals, tree["pullback"] = jax.tree.flatten(pullback)
            return outs, residuals

        jaxpr = jax.make_jaxpr(rule_forward)(*map(_abstract, chosen))
        inner = ctx.new_scope()
        outs = inner.run(jaxpr, chosen)
        count = len(eqn.outvars)
        outs, residuals = [inner.dense(x, eqn) for x in outs[:count]], outs[count:]
        return outs, (_Static(tree["pullback"]), residuals, chosen)

    def backward(saved: tuple, cotangents: list[jax.Array]) -> tuple:
        pullback, residuals, chosen = saved

        def rule_backward(residuals: list, cotangents: list) -> tuple[jax.Array, ...]:
            return jax.tree.unflatten(pullback.value, residuals)(cotangents)

        jaxpr = jax.make_jaxpr(rule_backward)(
            list(map(_abstract, residuals)), list(map(_abstract, cotangents))
        )
        inner = ctx.new_scope()
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
    """A value that is part of the program, where JAX expects data."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@rule(p.custom_jvp_call_p)
def custom_jvp(ctx: RuleContext, eqn: JaxprEqn, *args: ArrayOrView) -> list[jax.Array]:
    """The model's derivative rule applies to the array that the weight stands for."""
    _refuse_not_mergeable(args, "custom_jvp")
    chosen, join = _split(eqn, args)

    @jax.custom_jvp
    def call(chosen: list[ArrayOrView]) -> list[jax.Array]:
        inner = ctx.new_scope()
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
        inner = ctx.new_scope()
        outs = [inner.dense(x, eqn) for x in inner.run(jaxpr, [*chosen, *dense_tangents])]
        return outs[: len(eqn.outvars)], outs[len(eqn.outvars) :]

    return call(chosen)


# Loops. A weight that enters as a constant, or is carried unchanged, stays a weight; one that
# changes from step to step is materialized.


def _scanned(ctx: RuleContext, eqn: JaxprEqn, x: Value) -> tuple[Any, Callable[[Any], Value]]:
    """An operand of a scan as the tree to scan over, and the value that one slice of it is."""
    if is_composite(x):
        joined = x.stacked() if isinstance(x, Concatenation) and x.dim == 0 else None
        x = ctx.dense(x, eqn, " across an axis that is not a stack") if joined is None else joined
    if not is_view(x):
        return x, lambda slice_: slice_
    view, lead = x.refined(), None
    if len(view.dims[0]) == 1 and view.axes[view.dims[0][0].axis].role == STACK:
        lead = view.dims[0][0].axis
    if lead is None:
        return ctx.dense(x, eqn, " across an axis that is not a stack"), lambda slice_: slice_
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
def scan(ctx: RuleContext, eqn: JaxprEqn, *args: Value) -> list[Value]:
    """Views enter as constants, as unchanged carries, or as a stack, one slice per step."""
    body = eqn.params["jaxpr"]
    n_const, n_carry, _ = compat.scan_counts(eqn)
    passed = forwarded(body)
    consts, init = args[:n_const], list(args[n_const : n_const + n_carry])
    fixed = {i for i in range(n_carry) if passed.get(i) == n_const + i}
    # A result that stacks the slices of an operand again is that operand.
    returned = {i: passed[i] for i in passed if i >= n_carry and passed[i] >= n_const + n_carry}
    returned = {i: j for i, j in returned.items() if is_view(args[j])}
    carried = {
        i: ctx.dense(x, eqn, " carried from step to step")
        for i, x in enumerate(init)
        if i not in fixed
    }
    scanned = [_scanned(ctx, eqn, x) for x in args[n_const + n_carry :]]

    def step(carry: dict, xs: list) -> tuple[dict, dict]:
        inner = ctx.new_scope()
        slices = [one(x) for (_, one), x in zip(scanned, xs, strict=True)]
        outs = inner.run(body, [*consts, *(carry.get(i, x) for i, x in enumerate(init)), *slices])
        inner.close_scope("a loop")
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
def while_loop(ctx: RuleContext, eqn: JaxprEqn, *args: Value) -> list[Value]:
    """Views enter as constants or as carries that no step changes."""
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    init = list(args[n_cond + n_body :])
    passed = forwarded(params["body_jaxpr"])
    fixed = {i for i in range(len(init)) if passed.get(i) == n_body + i}
    start = {
        i: ctx.dense(x, eqn, " carried from step to step")
        for i, x in enumerate(init)
        if i not in fixed
    }

    def full(carry: dict) -> list:
        return [carry.get(i, x) for i, x in enumerate(init)]

    def condition(carry: dict) -> jax.Array:
        return ctx.new_scope().run(params["cond_jaxpr"], [*cond_consts, *full(carry)])[0]

    def body(carry: dict) -> dict:
        inner = ctx.new_scope()
        outs = inner.run(params["body_jaxpr"], [*body_consts, *full(carry)])
        inner.close_scope("a loop")
        return {i: inner.dense(outs[i], eqn, " carried from step to step") for i in carry}

    return full(lax.while_loop(condition, body, start))


@rule(p.cond_p)
def cond(ctx: RuleContext, eqn: JaxprEqn, index: jax.Array, *operands: Value) -> list[Value]:
    """Views enter every branch, and leave it where all branches return the same one."""
    branches = eqn.params["branches"]
    passed = [forwarded(branch) for branch in branches]
    # An operand that every branch returns at one place is known outside.
    same = {
        i: j
        for i, j in passed[0].items()
        if is_view(operands[j]) and all(other.get(i) == j for other in passed)
    }

    def evaluated(branch: Jaxpr) -> Callable[[Sequence[Value]], dict[int, jax.Array]]:
        def body(operands: Sequence[Value]) -> dict[int, jax.Array]:
            inner = ctx.new_scope()
            outs = inner.run(branch, operands)
            inner.close_scope("a branch")
            return {
                i: inner.dense(x, eqn, " out of a branch")
                for i, x in enumerate(outs)
                if i not in same
            }

        return body

    outs = lax.switch(index, [evaluated(branch) for branch in branches], list(operands))
    return [operands[same[i]] if i in same else outs[i] for i in range(len(eqn.outvars))]
