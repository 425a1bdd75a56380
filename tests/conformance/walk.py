"""Reads jaxprs: which results have a weight's size, and where they come from.

`weight_sized` lists every result of a program, sub-programs included, whose element count is one
of the given. A materialized weight shows up there however it was formed. `footprint` says which
counts a parameter takes on as the program cuts and rearranges it (one layer of a stack, one
device's part), so that a part that is materialized is found as well.

Only live equations count: JAX traces more than it runs (a custom rule returns the gradient of
frozen weights, too), and what no output needs is never computed.
"""

import collections
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core, source_info_util


class Result(NamedTuple):
    primitive: str
    shape: tuple[int, ...]
    where: str  # the source line

    def __str__(self):
        return f"{self.primitive} {self.shape} at {self.where}"


# ---- live equations


class Live(NamedTuple):
    """An equation that is needed, with the sub-programs of it cut down likewise."""

    eqn: Any
    subs: tuple[tuple[Any, list["Live"]], ...]


def opened(jaxpr):
    """The Jaxpr of a ClosedJaxpr or a Jaxpr."""
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def sub_jaxprs(eqn) -> list:
    """The programs in an equation's parameters; callables are not entered."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                found.append(opened(item))
    return found


def scan_carry(eqn) -> tuple[int, int]:
    """(constants, carried values) of a scan, told apart from slices by their ranks."""
    (body,) = sub_jaxprs(eqn)
    sliced = sum(
        len(o.aval.shape) == len(i.aval.shape) + 1
        for o, i in zip(eqn.invars, body.invars, strict=True)
    )
    carried = sum(
        len(o.aval.shape) == len(i.aval.shape)
        for o, i in zip(eqn.outvars, body.outvars, strict=True)
    )
    return len(eqn.invars) - sliced - carried, carried


def live(jaxpr, needed: Collection[bool]) -> tuple[list[bool], list[Live]]:
    """Dead code elimination: (which inputs are needed, the equations that are)."""
    wanted = {v for v, n in zip(jaxpr.outvars, needed, strict=True) if n and not literal(v)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        outs = [v in wanted for v in eqn.outvars]
        if not any(outs) and not eqn.effects:
            continue
        ins, subs = _live_inside(eqn, outs)
        wanted.update(v for v, n in zip(eqn.invars, ins, strict=True) if n and not literal(v))
        kept.append(Live(eqn, subs))
    return [v in wanted for v in jaxpr.invars], kept[::-1]


def _live_inside(eqn, outs):
    subs = sub_jaxprs(eqn)
    name = eqn.primitive.name
    if not subs:
        return [True] * len(eqn.invars), ()
    if name == "scan":
        (body,) = subs
        consts, carried = scan_carry(eqn)
        while True:  # a carried value is needed if any later step needs it
            ins, kept = live(body, outs)
            grown = [a or b for a, b in zip(outs, ins[consts : consts + carried], strict=False)]
            if grown == outs[:carried]:
                break
            outs = grown + outs[carried:]
        ins[consts : consts + carried] = outs[:carried]
        return ins, ((body, kept),)
    if name == "cond":
        each = [live(branch, outs) for branch in subs]
        ins = [any(n) for n in zip(*(ins for ins, _ in each), strict=True)]
        return [True, *ins], tuple((b, kept) for b, (_, kept) in zip(subs, each, strict=True))
    if len(subs) == 1 and matches(subs[0], eqn):  # a call: jit, remat, shard_map, custom rules
        ins, kept = live(subs[0], outs)
        return ins, ((subs[0], kept),)
    all_live = [(sub, live(sub, [True] * len(sub.outvars))[1]) for sub in subs]
    return [True] * len(eqn.invars), tuple(all_live)


def literal(v) -> bool:
    return isinstance(v, core.Literal)


def matches(sub, eqn) -> bool:
    return len(sub.invars) == len(eqn.invars) and len(sub.outvars) == len(eqn.outvars)


# ---- results of a given size


def count(v) -> int:
    return math.prod(getattr(v.aval, "shape", ()))


def weight_sized(jaxpr, counts: Collection[int]) -> list[Result]:
    """Every live result with one of these element counts.

    Args:
      jaxpr: a ClosedJaxpr or Jaxpr, usually `jax.make_jaxpr(jax.value_and_grad(...))(...)`.
      counts: element counts of weights.
    Returns:
      One Result for each, in program order; one of a scan's body counts once.
    """
    jaxpr = opened(jaxpr)
    return list(_weight_sized(live(jaxpr, [True] * len(jaxpr.outvars))[1], frozenset(counts)))


def _weight_sized(equations: list[Live], counts: frozenset[int]) -> Iterator[Result]:
    for eqn, subs in equations:
        for _, inside in subs:
            yield from _weight_sized(inside, counts)
        # A call only hands on what its body made; a loop also stacks slices into a new array.
        outs = eqn.outvars if not subs else ()
        if eqn.primitive.name == "scan":
            outs = eqn.outvars[scan_carry(eqn)[1] :]
        for v in outs:
            if count(v) in counts:
                where = source_info_util.summarize(eqn.source_info)
                yield Result(eqn.primitive.name, tuple(v.aval.shape), where)


# Different primitives that lay the same elements out: one program cuts with a static slice where
# another cuts with a dynamic one. They are compared as one kind, and by shape without ones.
_KINDS = {
    "cut": ("slice", "dynamic_slice", "split"),
    "shape": ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"),
}
_KIND = {primitive: kind for kind, primitives in _KINDS.items() for primitive in primitives}

# Says where an array lies and computes nothing; test_collectives.py counts what it moves.
_ANNOTATIONS = ("reshard",)


def _kind(r: Result) -> tuple[str, tuple[int, ...]]:
    return _KIND.get(r.primitive, r.primitive), tuple(n for n in r.shape if n != 1)


def more_than(found: list[Result], allowed: list[Result]) -> list[Result]:
    """The results in `found` beyond those of `allowed`, as multisets of primitive and shape."""
    spare = collections.Counter(map(_kind, allowed))
    extra = []
    for r in found:
        if spare[_kind(r)]:
            spare[_kind(r)] -= 1
        elif r.primitive not in _ANNOTATIONS:
            extra.append(r)
    return extra


# ---- the counts of a parameter

# Results of these hold the elements of their first operand and no others.
_LAYOUT = frozenset(
    "transpose reshape squeeze expand_dims broadcast_in_dim rev slice dynamic_slice split copy "
    "convert_element_type reduce_precision sharding_constraint reshard optimization_barrier "
    "name stop_gradient pvary pcast device_put neg all_gather all_gather_invariant".split()
)


class Footprint(NamedTuple):
    weights: dict[int, set[int]]  # parameter -> element counts it takes on, whole and in parts
    activations: list[Result]  # every other result


def footprint(jaxpr, parameters: Collection[int]) -> Footprint:
    """Which counts the inputs at these positions take on, and all results that are not theirs."""
    jaxpr = opened(jaxpr)
    seen = Footprint({i: set() for i in parameters}, [])
    _follow(jaxpr, [i if i in seen.weights else None for i in range(len(jaxpr.invars))], seen)
    return seen


def _follow(jaxpr, owners, seen):
    """Follows parameters through a program; returns the owners of its outputs."""
    owner = dict(zip(jaxpr.invars, owners, strict=True))
    get = lambda v: None if literal(v) else owner.get(v)  # noqa: E731
    for eqn in jaxpr.eqns:
        ins = [get(v) for v in eqn.invars]
        subs = sub_jaxprs(eqn)
        name = eqn.primitive.name
        outs = [None] * len(eqn.outvars)
        if name == "while":
            conditions, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carry = ins[conditions + bodies :]
            _follow(opened(eqn.params["cond_jaxpr"]), ins[:conditions] + carry, seen)
            outs = _follow(opened(eqn.params["body_jaxpr"]), ins[conditions:], seen)
        elif name == "cond":
            outs = [_follow(branch, ins[1:], seen) for branch in subs][0]
        elif subs and matches(subs[0], eqn):
            outs = _follow(subs[0], ins, seen)
        elif name == "optimization_barrier":
            outs = ins
        elif name in _LAYOUT and ins[0] is not None:
            outs = [ins[0]] * len(outs)
        elif name in ("mul", "div") and ins[0] is not None and _is_constant_along_a_side(eqn):
            outs = ins[:1]
        for v, own in zip(eqn.outvars, outs, strict=True):
            if own is not None:
                owner[v] = own
            elif not subs:
                where = source_info_util.summarize(eqn.source_info)
                shape = tuple(getattr(v.aval, "shape", ()))
                seen.activations.append(Result(name, shape, where))
    for v in [*jaxpr.invars, *(o for eqn in jaxpr.eqns for o in eqn.outvars)]:
        if get(v) is not None:
            seen.weights[get(v)].add(count(v))
    return [get(v) for v in jaxpr.outvars]


def _is_constant_along_a_side(eqn) -> bool:
    """Whether a weight comes first and is scaled by a scalar or by one factor for each row."""
    weight, factor = (v.aval.shape for v in eqn.invars)
    return factor == () or len(factor) == len(weight) and factor != weight


def parameter_footprint(fn, params, args, chosen: Collection[str]) -> Footprint:
    """`footprint` of `fn(params, *args)`, with the chosen parameters given by path."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
    jaxpr = jax.make_jaxpr(lambda ws: fn(structure.unflatten(ws), *args))([w for _, w in leaves])
    return footprint(jaxpr, [names.index(n) for n in chosen])
