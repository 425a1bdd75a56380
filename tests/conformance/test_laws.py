"""The columns of the conformance table: what holds for every method on every row.

The everyday suite runs LoRA on the rows that stand for their kind, and each other method on a
few; `pytest -m conformance` runs the full product.
"""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from .methods import METHODS
from .rows import ROWS
from .rows.row import all_rows, marks
from .subject import (
    differentiated,
    expected_call,
    far,
    in_mesh,
    is_real,
    lifted_call,
    real,
    score,
    scores,
    subject,
    weight_sized_results,
    worst,
)
from .walk import more_than, weight_sized

pytestmark = pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")


def table(wanted=lambda row, method: True, everyday=lambda row, method: True):
    """Rows crossed with methods; pairs outside the everyday suite carry the mark."""
    pairs = []
    for method in METHODS:
        for row in ROWS:
            if not method.takes(row) or not wanted(row, method):
                continue
            first = row.everyday if method is METHODS[0] else row.name in method.rows
            known = marks(first and everyday(row, method))
            pairs.append(pytest.param(row, method, id=f"{method.name}: {row.name}", marks=known))
    return pytest.mark.parametrize(("row", "method"), pairs)


# The rows on which the everyday suite runs the columns that cost the most.
FEW = {
    "x @ w.T",
    "(d, heads, head_dim) kernels",
    "experts by ragged_dot",
    "tied head",
    "convolution, NHWC",
    "linen nn.scan over axis 1",
    "a stacked weight that nnx.scan returns",
    "lax.scan of remat with a policy",
    "shard_map, column- then row-parallel",
    "a mesh with Explicit axes",
}


def case_sharding(mesh):
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def few(row, method):
    return row.name in FEW


@table(everyday=few)
def test_lifted_is_merged(row, method):
    s = subject(row, method)
    for fn, args in s.programs:
        assert worst(jp.lift(fn)(s.tree(args), *args), s.expected(fn, args)) <= row.tolerance


@table()
def test_outputs_and_gradients_are_those_of_the_merged_model_under_jit(row, method):
    s = subject(row, method)
    for fn, args in s.programs:
        results = []
        for call in (lifted_call(s), expected_call(s)):
            f, variables = scores(s, fn, args, call, keep=True)
            results.append(jax.jit(differentiated(s, f, keep=True))(variables))
        (value, slope), (wanted_value, wanted_slope) = results
        assert worst(value, wanted_value) <= row.tolerance
        # A gradient sums over more terms than the outputs it comes from.
        assert worst(slope, wanted_slope) <= row.tolerance * 10
        if row.reverse:
            for path, g in slope["adapter"].items():
                # A method may act at other places, too, than on the weight that is stopped.
                wanted = jnp.any(wanted_slope["adapter"][path] != 0)
                assert bool(jnp.any(g != 0)) == bool(wanted), path
                assert wanted or path.startswith(row.stopped), path


@table(lambda row, method: row.vmap, few)
def test_a_stack_of_adapters_shares_one_base(row, method):
    """vmap over adapters: each gives its own outputs, and no array holds a weight per adapter."""
    s = subject(row, method)
    many = [s.adapter, jax.tree.map(lambda v: -0.5 * v, s.adapter), *[s.adapter] * 5]
    stacked = jax.tree.map(lambda *vs: jnp.stack(vs), *many)
    for fn, args in s.programs:
        outputs = lambda a, fn=fn, args=args: real(jp.lift(fn)(s.tree(args, a), *args))  # noqa: E731
        with in_mesh(s.case.mesh):
            each = jax.jit(jax.vmap(outputs))(stacked)
        for i in (0, 1):
            wanted = real(s.expected(fn, args, many[i]))
            assert worst([y[i] for y in each], wanted) <= row.tolerance
        if method.is_factored(row):
            sizes = {len(many) * n for n in s.sizes}
            copies = weight_sized(jax.make_jaxpr(jax.vmap(outputs))(stacked), sizes)
            assert not copies, "\n".join(map(str, copies))


@table(lambda row, method: row.bf16, few)
def test_in_bf16_it_is_as_exact_as_the_dense_model(row, method):
    """Against the same numbers in float64; the adapter stays in float32, dtypes are the model's.

    Outputs are few, so that one adapter's error is up to three times another's: the law is of the
    root mean square over four adapters.
    """
    s = subject(row, method)
    narrow = lambda x: x.astype(jnp.bfloat16) if is_real(x) else x  # noqa: E731
    wide = lambda x: narrow(x).astype(jnp.float64) if is_real(x) else x  # noqa: E731
    at = {cast: in_dtype(s, cast) for cast in (narrow, wide)}
    assert all(v.dtype == jnp.float32 for v in at[narrow].adapter.values())

    def dense(cast, i, adapter):
        """The merged model; where there is none, the model without the method."""
        fn, args = at[cast].programs[i]
        if not method.by_hand:
            return real(at[cast].expected(fn, args, adapter))
        plain = row.build()
        return real(fn(at[cast].case.params, *jax.tree.map(cast, plain.args)))

    draws = mirrored(at[narrow])
    for i, (fn, args) in enumerate(at[narrow].programs):
        errors, roundings = [], []
        for adapter in draws:
            exact = real(at[wide].expected(*at[wide].programs[i], adapter))
            lifted = real(jp.lift(fn)(at[narrow].tree(args, adapter), *args))
            errors.append(far(lifted, exact))
            if not roundings or not method.by_hand:
                merged = dense(narrow, i, adapter)
                assert [y.dtype for y in lifted] == [y.dtype for y in merged]
                # Where the program itself casts down, its result in float64 is no more exact.
                roundings.append(far(merged, dense(wide, i, adapter)))
        error, rounding = (np.sqrt(np.mean(np.square(x))) for x in (errors, roundings))
        assert error <= 2 * rounding + max(2**-8, row.tolerance)


def mirrored(s):
    """Four adapters: the subject's, and its distance from the start negated and backwards."""
    _, start = jp.split(s.method.make(s.sites, jnp.float32)(jax.random.key(1), s.case.params))
    start = {k: v.astype(s.adapter[k].dtype) for k, v in start.items()}
    ways = (lambda x: x, jnp.negative, jnp.flip, lambda x: -jnp.flip(x))
    return [{k: v + way(s.adapter[k] - v) for k, v in start.items()} for way in ways]


def in_dtype(s, cast):
    """The subject with another dtype for the model and its arguments, the adapter in float32."""
    cast_all = lambda tree: jax.tree.map(cast, tree)  # noqa: E731
    also = tuple((fn, cast_all(args)) for fn, args in s.case.also)
    params, args = cast_all(s.case.params), cast_all(s.case.args)
    case = dataclasses.replace(s.case, params=params, args=args, also=also)
    make = s.method.make(s.sites, jnp.float32)
    frozen, start = jp.split(make(jax.random.key(1), params))
    adapter = {k: v.astype(start[k].dtype) for k, v in s.adapter.items()}
    return dataclasses.replace(s, case=case, frozen=frozen, adapter=adapter)


@table(lambda row, method: row.reverse, few)
def test_three_steps_two_adapters_and_a_reload_trace_once(row, method):
    s = subject(row, method)

    def loss(adapter, frozen, args):
        return score(jp.lift(s.case.fn)(jp.combine(frozen, adapter, **s.method.given(args)), *args))

    # On a mesh the adapter lies where the steps leave it, as a training loop would pin it.
    everywhere = case_sharding(s.case.mesh)
    place = lambda a: jax.device_put(a, everywhere)  # noqa: E731

    rate = max(1e-3, row.tolerance)  # a smaller step is lost where the program rounds to bfloat16

    @functools.partial(jax.jit, out_shardings=everywhere)
    @chex.assert_max_traces(1)
    def step(adapter, frozen, args):
        value, slope = jax.value_and_grad(loss)(adapter, frozen, args)
        return jax.tree.map(lambda v, g: v - rate * g, adapter, slope), value

    make = method.make(s.sites, jnp.float64)
    chex.clear_trace_counter()
    for key in (1, 2):
        frozen, adapter = jp.split(make(jax.random.key(key), s.case.params))
        adapter = place(adapter)
        values = []
        for _ in range(3):
            adapter, value = step(adapter, frozen, s.case.args)
            values.append(float(value))
        assert len(set(values)) == 3, "the steps did nothing"
    stored = {k: np.asarray(v) for k, v in adapter.items()}
    again, fresh = jp.split(make(jax.random.key(3), s.case.params))
    assert stored.keys() == fresh.keys()
    step(place(stored), again, s.case.args)


def refusals():
    pairs = [(method, name) for method in METHODS for name in method.refused]
    row = {r.name: r for r in ROWS}
    return [pytest.param(row[n], m, id=f"{m.name}: {n}") for m, n in pairs]


@pytest.mark.parametrize(("row", "method"), refusals())
def test_what_would_be_wrong_is_refused_by_path(row, method):
    case = row.build()
    sites = jp.sites(case.fn, case.params, *case.args)
    args = method.args(case.args, sites)
    with pytest.raises((ValueError, TypeError), match=method.refused[row.name]):
        frozen, adapter = jp.split(method.make(sites, jnp.float64)(jax.random.key(1), case.params))
        if method.name == "prompt":  # what ids become is data: tracing alone cannot see it
            (table,) = (sites.embedding or sites.match("table")).values()
            jp.prompts.check_prompt(case.fn, case.params, table, *case.args)
        given = method.given(args)
        tree = jp.combine(frozen, adapter, **given)
        jax.eval_shape(jp.lift(case.fn), tree, *args)
        if "virtual" in given and args[-1].ndim == 2:  # ids: what reads them is data, too
            jp.prompts.check_prefix(case.fn, tree, args[-1], given["virtual"], *args[:-1])


def test_a_method_has_each_row_once():
    names = {r.name for r in ROWS}
    for method in METHODS:
        own, refused = set(method.models), set(method.refused)
        assert own <= names and refused <= names and not own & refused
        assert not method.by_hand or set(method.rows) <= own


@table(lambda row, method: method.is_factored(row))
def test_nothing_of_a_weights_size_is_formed(row, method):
    s = subject(row, method)
    lifted, dense = weight_sized_results(s)
    extra = more_than(lifted, dense)
    assert not extra, "\n".join(map(str, extra))


@pytest.mark.parametrize("row", all_rows())
def test_sites_finds_what_each_weight_does(row):
    case = row.build()
    sites = jp.sites(case.fn, case.params, *case.args)
    found = {
        role: {n.removesuffix("/value") for n in getattr(sites, role)}
        for role in ("linear", "embedding", "conv", "matrices")
    }
    assert found == {
        "linear": set(row.linear),
        "embedding": set(row.embedding),
        "conv": set(row.conv),
        "matrices": set(row.matrices),
    }


@table(everyday=few)
def test_sites_announces_what_lift_materializes(row, method):
    s = subject(row, method)
    events = []
    call = jp.lift(s.case.fn, materialize=events.append)
    jax.make_jaxpr(lambda a: real(call(s.tree(s.case.args, a), *s.case.args)))(s.adapter)
    made = {(e.path, e.primitive, e.source) for e in events}
    announced = {
        (e.path, e.primitive, e.source) for n in s.covered for e in s.sites[n].materialized
    }
    if row.name in method.coarse:  # `sites` knows the model, not the blocks that do not fit it
        assert announced <= made
        return
    assert made == announced
    paths = {e.path.removesuffix("/value") for e in events}
    assert paths <= set(row.materializes)
    assert bool(paths) == bool(
        set(row.materializes) & {n.removesuffix("/value") for n in s.covered}
    )


def test_lift_warns_once_for_each_weight_it_materializes():
    row = next(r for r in ROWS if r.name == "a weight under a non-linear operation")
    s = subject(row, METHODS[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            jp.lift(s.case.fn)(s.tree(s.case.args), *s.case.args)
    messages = [str(w.message) for w in caught if w.category is jp.MaterializedWarning]
    assert len(messages) <= 1  # none, if another test of this process has seen it already
    assert all("'w'" in t and "tanh" in t for t in messages)
