"""One row under one method: everything that the columns of the table need."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp

from .methods import Method
from .rows import Case, Row
from .rows.row import matrices, paths, random
from .walk import Result, parameter_footprint, weight_sized

# By how much of its norm the output has to move before a law means anything.
MOVED = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model under a method, its adapter moved away from the start."""

    row: Row
    method: Method
    case: Case
    sites: Any
    frozen: Any
    adapter: dict[str, Any]

    @property
    def programs(self):
        """(fn, args) of the row: one, or several of the same parameters."""
        return ((self.case.fn, self.case.args), *self.case.also)

    @functools.cached_property
    def covered(self) -> list[str]:
        """Paths of the row's matrices that the method has taken."""
        taken = [n for n in matrices(self.row, self.case) if n not in paths(self.frozen)]
        assert taken, f"{self.method.name} took none of {self.row.matrices}"
        return taken

    def tree(self, args, adapter=None, others=None):
        """The parameters in a call with these arguments."""
        adapter = self.adapter if adapter is None else adapter
        # Before they are combined: a weight may hold the bias that follows it.
        frozen = with_leaves(self.frozen, others or {})
        return jp.combine(frozen, adapter, **self.method.given(args))

    def expected(self, fn, args, adapter=None, others=None):
        """The outputs that the law asks for."""
        adapter = self.adapter if adapter is None else adapter
        if not self.method.by_hand:
            return fn(jp.merge(self.tree(args, adapter, others)), *args)
        model = self.method.models[self.row.name]
        plain = paths(self.case.params) | (others or {})
        # NNX ends each path in `/value`; what the adapter has there stands behind it.
        for name in [n for n in plain if n.endswith("/value")]:
            short = name.removesuffix("/value")
            plain[short] = plain.pop(name)
            adapter = {
                short + n.removeprefix(name) if n.startswith(f"{name}/") else n: v
                for n, v in adapter.items()
            }
        return model(plain, self.method.by_hand(adapter, self.method.given(args)), *args)

    @functools.cached_property
    def others(self) -> dict[str, Any]:
        """Other parameters that are differentiated: plain ones that are no matrices of the row."""
        fixed, plain = set(matrices(self.row, self.case)), paths(self.frozen)
        params = paths(self.case.params)
        return {n: w for n, w in params.items() if n not in fixed and n in plain}

    @functools.cached_property
    def sizes(self) -> set[int]:
        """Element counts that a taken weight has somewhere in the program, whole or in parts."""
        found: set[int] = set()
        for fn, args in self.programs:
            seen = parameter_footprint(fn, self.case.params, args, self.covered)
            found = found.union(*seen.weights.values())
        clash = {n: v.shape for n, v in self.adapter.items() if v.size in found}
        assert not clash, f"choose another rank: {clash} are as large as a weight"
        return found


@functools.cache
def subject(row: Row, method: Method) -> Subject:
    case = row.build()
    sites = jp.sites(case.fn, case.params, *case.args)
    also = tuple((fn, method.args(args, sites)) for fn, args in case.also)
    case = dataclasses.replace(case, args=method.args(case.args, sites), also=also)
    make = method.make(sites, jnp.float64)
    frozen, adapter = jp.split(make(jax.random.key(1), case.params))
    start = Subject(row, method, case, sites, frozen, adapter)
    return dataclasses.replace(start, adapter=perturbed(start))


def perturbed(s: Subject) -> dict[str, Any]:
    """The adapter moved along a random direction until every program's output has moved."""
    scale = 0.1
    moves = {k: random(*v.shape, seed=7, scale=1.0) for k, v in s.adapter.items()}
    compiled = jax.jit(lambda a: [real(s.expected(fn, args, a)) for fn, args in s.programs])

    def outputs(adapter):
        with in_mesh(s.case.mesh):
            return compiled(adapter)

    before = outputs(s.adapter)
    while scale < 10:
        adapter = {k: (v + scale * moves[k]).astype(v.dtype) for k, v in s.adapter.items()}
        after = outputs(adapter)
        if all(far(a, b) >= MOVED for a, b in zip(after, before, strict=True)):
            return adapter
        scale *= 1.5
    raise AssertionError(f"no adapter of {s.method.name} moves the output of {s.row.name!r}")


def in_mesh(mesh):
    """The context that JAX asks for around a jit whose constants lie on a mesh."""
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def on_mesh(adapter, mesh):
    """The adapter on the model's devices, whole on each; without a mesh, on the first device."""
    if mesh is None:
        return jax.device_put(adapter, jax.devices()[0])
    return jax.device_put(adapter, jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))


# ---- outputs and how far apart they are


def is_real(x) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def real(tree) -> list:
    """The floating leaves."""
    return [x for x in jax.tree.leaves(tree) if is_real(x)]


def far(a: list, b: list) -> float:
    """|a - b| / |b| over all leaves together."""
    wide = lambda ys: np.concatenate([np.asarray(y, np.float64).ravel() for y in ys])  # noqa: E731
    a, b = wide(a), wide(b)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-300))


def worst(a, b) -> float:
    """The largest of |x - y| / (1 + |y|) over all leaves of two trees of one structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(real(a), real(b), strict=True)
    errors = [np.max(np.abs(x - y) / (1 + np.abs(y)), initial=0.0) for x, y in pairs]
    return float(np.max(errors, initial=0.0)) if not np.isnan(errors).any() else np.nan


# ---- programs to differentiate


def real_args(args) -> list[int]:
    return [i for i, x in enumerate(args) if is_real(x)]


def with_args(args, values: dict[int, Any]) -> tuple:
    return tuple(values.get(i, x) for i, x in enumerate(args))


def with_leaves(tree, values: dict[str, Any]):
    """The tree with other arrays at these paths."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
    return structure.unflatten([values.get(n, x) for n, (_, x) in zip(names, leaves, strict=True)])


def score(outputs):
    """A number that depends on every output in its own way."""
    return sum(
        jnp.sum(jnp.sin(y) * random(*y.shape, seed=i + 50, scale=1.0).astype(y.dtype))
        for i, y in enumerate(real(outputs))
    )


def scores(s: Subject, fn, args, call, keep=False):
    """`f(variables)`: the scaled score of `call(fn, variables, args)`, and its variables.

    With `keep`, `f` returns the real outputs as well.

    Variables are the adapter, real parameters that are no matrices, real arguments, and a
    factor on the output, so that every backward path of the program is walked.
    """
    variables = dict(
        adapter=s.adapter,
        others=s.others,
        args={i: args[i] for i in real_args(args)},
        factor=jnp.ones(()),
    )

    def f(v):
        outputs = call(fn, v, with_args(args, v["args"]))
        value = v["factor"] * score(outputs)
        return (value, real(outputs)) if keep else value

    return f, variables


def lifted_call(s: Subject):
    def call(fn, v, args):
        return jp.lift(fn)(s.tree(args, v["adapter"], v["others"]), *args)

    return call


def expected_call(s: Subject):
    def call(fn, v, args):
        return s.expected(fn, args, v["adapter"], v["others"])

    return call


def frozen_call(s: Subject):
    """The dense program; of its matrices only those that a custom rule differentiates vary."""

    def call(fn, v, args):
        return fn(with_leaves(s.case.params, {**v["others"], **v.get("rule", {})}), *args)

    return call


def differentiated(s: Subject, f, keep=False):
    """Value and gradient, or value and tangent where JAX has no reverse mode."""
    if s.row.reverse:
        return jax.value_and_grad(f, has_aux=keep)

    def tangent(v):
        ones = jax.tree.map(jnp.ones_like, v)
        return jax.jvp(f, (v,), (ones,))

    return tangent


def weight_sized_results(s: Subject) -> tuple[list[Result], list[Result]]:
    """(of the lifted step, of the dense step with its matrices frozen)."""
    lifted, dense = [], []
    for fn, args in s.programs:
        f, v = scores(s, fn, args, lifted_call(s))
        lifted += weight_sized(jax.make_jaxpr(differentiated(s, f))(v), s.sizes)
        f, v = scores(s, fn, args, frozen_call(s))
        del v["adapter"]
        params, rule = paths(s.case.params), set(s.row.rule)
        v["rule"] = {n: params[n] for n in s.covered if n.removesuffix("/value") in rule}
        dense += weight_sized(jax.make_jaxpr(differentiated(s, f))(v), s.sizes)
        dense += pulled_back(s, v["rule"])
    return lifted, dense


def pulled_back(s: Subject, weights: dict[str, Any]) -> list[Result]:
    """What it takes to get from the gradients of dense weights, whole or of a layer, to the
    adapter's: a custom rule covers dense weights only."""

    def pull(adapter, gradients):
        def dense(adapter):
            merged = paths(jp.merge(s.tree(s.case.args, adapter)))
            return {n: merged[n] for n in gradients}

        return jax.vjp(dense, adapter)[1](gradients)

    found = weight_sized(jax.make_jaxpr(pull)(s.adapter, weights), s.sizes) if weights else []
    return found + [r._replace(shape=r.shape[1:]) for r in found if len(r.shape) > 2]
