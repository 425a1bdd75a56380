"""X-LoRA: frozen experts side by side, and gates that weigh them by example, token or input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxpeft as jp
from jaxpeft._method import FACTORIES
from jaxpeft._method_json import from_json, to_json
from jaxpeft._methods.xlora import xlora
from jaxpeft.mixtures import merge_weighted, stack_adapters

from .stack import model, normal, params

L, D, F, N, T, W = 2, 5, 7, 4, 3, 6
KEY = jax.random.key(0)
F8 = jnp.float64

PARAMS = params(L, D, F, 4)
X = normal(3, N, T, D)
SITES = jp.sites(model, PARAMS, X).linear
HEAD = SITES.match("head")
METHODS = [
    jp.lora(2, SITES, alpha=3.0, dtype=F8),
    jp.lora(
        {"*up": 1, "*": 3},
        SITES,
        alpha={"layers/*": 2.0, "*": 5.0},
        scaling="alpha/sqrt(r)",
        dtype=F8,
    ),
    jp.lora(1, SITES.match("layers/*"), dtype=F8),
]
STRENGTHS = [
    {"layers/up": 1.5, "layers/down": 1.5, "head": 1.5},
    {"layers/up": 2.0, "layers/down": 2 / 3**0.5, "head": 5 / 3**0.5},
    {"layers/up": 1.0, "layers/down": 1.0},
]


def trained(method, params=PARAMS, seed=0):
    """An adapter of the method, away from its start."""
    shapes = jax.eval_shape(lambda key: jp.split(method(key, params))[1], KEY)
    return {k: normal(seed + i, *v.shape) / 2 for i, (k, v) in enumerate(shapes.items())}


@functools.partial(jax.jit, static_argnums=0)
def _merged(apply, params, adapter):
    frozen, _ = jp.split(apply(KEY, params))
    return jp.merge(jp.combine(frozen, adapter))


def merged(method, adapter, params=PARAMS):
    """The model of one adapter alone."""
    return _merged(method.apply, params, adapter)


def moved(adapter):
    return {path: normal(40 + i, *x.shape) for i, (path, x) in enumerate(adapter.items())}


ADAPTERS = [trained(method, seed=10 * i) for i, method in enumerate(METHODS)]
BANK = stack_adapters(list(zip(METHODS, ADAPTERS, strict=True)))
ALONE = list(map(merged, METHODS, ADAPTERS))
LIFTED = jax.jit(jp.lift(model))


def gated(away=False, base=None, **options):
    """The frozen tree and the gates, at their start or away from it."""
    method = xlora(BANK.sites, BANK.ranks, dtype=F8, **options)
    frozen, adapter = jp.split((jp.chain(base, method) if base else method)(KEY, PARAMS))
    return frozen, moved(adapter) if away else adapter


def run(frozen, adapter, x=X, **call):
    return LIFTED(jp.combine(frozen, {**BANK.arrays, **adapter}, **call), x)


# The formula -------------------------------------------------------------------------------------


def routing_weights_by_hand(logits, temperature, top_k):
    weights = np.exp(logits / temperature)
    if top_k is not None:
        weights[weights < np.sort(weights, axis=-1)[..., -top_k, None]] = 0
    return weights / weights.sum(-1, keepdims=True)


def by_hand(adapter, hidden, temperature, top_k):
    def product(path, x, layer=None):
        def at(array):
            return np.asarray(array if layer is None else array[layer])

        h = x if hidden is None else hidden
        logits = h @ at(adapter[f"{path}/experts/gate"]) + at(adapter[f"{path}/experts/bias"])
        weights = routing_weights_by_hand(logits, temperature, top_k)
        weights = weights.reshape(*h.shape[:-1], *(1,) * (x.ndim - h.ndim), 3)
        y = x @ at(PARAMS["head"] if layer is None else PARAMS["layers"][path[7:]])
        for i, (trained, strengths) in enumerate(zip(ADAPTERS, STRENGTHS, strict=True)):
            if path in strengths:
                a, b = at(trained[f"{path}/a"]), at(trained[f"{path}/b"])
                y = y + weights[..., i : i + 1] * strengths[path] * (x @ a @ b)
        return y

    h = np.asarray(X)
    for layer in range(L):
        h = h + product("layers/down", np.tanh(product("layers/up", h, layer)), layer)
    return product("head", h)


@pytest.mark.parametrize(
    "lead, top_k",
    [((), None), ((N,), None), ((N, T), None), (None, None), ((N, T), 1), ((N, T), 2), (None, 2)],
)
def test_the_update_is_that_of_the_formula(lead, top_k):
    options = dict(temperature=0.7, top_k=top_k)
    if lead is None:
        frozen, adapter = gated(True, gate_input="input", **options)
        got, h = run(frozen, adapter), None
    else:
        frozen, adapter = gated(True, hidden_size=W, **options)
        h = normal(50, *lead, W)
        got = run(frozen, adapter, hidden_states=h)
        h = np.asarray(h)
    np.testing.assert_allclose(got, by_hand(adapter, h, 0.7, top_k), rtol=1e-10)


def test_a_stack_holds_the_factors_side_by_side_and_no_columns_of_absent_experts():
    assert BANK.ranks == {"layers/up": [2, 1, 1], "layers/down": [2, 3, 1], "head": [2, 3, 0]}
    assert {path: x.shape for path, x in BANK.arrays.items()} == {
        "layers/up/experts/a": (L, D, 4),
        "layers/up/experts/b": (L, 4, F),
        "layers/down/experts/a": (L, F, 6),
        "layers/down/experts/b": (L, 6, D),
        "head/experts/a": (D, 5),
        "head/experts/b": (5, 4),
    }
    np.testing.assert_array_equal(BANK.arrays["head/experts/a"][:, 2:], ADAPTERS[1]["head/a"])
    np.testing.assert_array_equal(BANK.arrays["head/experts/b"][:2], 1.5 * ADAPTERS[0]["head/b"])


def test_training_starts_at_the_mean_of_the_experts_updates():
    mean = jax.tree.map(lambda *w: sum(w) / len(w), *ALONE)
    want = model(mean, X)
    assert np.abs(want - model(PARAMS, X)).max() > 0.1
    for top_k in (None, 1):  # equal logits have equal weights, whatever `top_k` says
        frozen, adapter = gated(hidden_size=W, top_k=top_k)
        assert not any(x.any() for x in adapter.values())
        got = run(frozen, adapter, hidden_states=normal(50, N, W))
        np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_allclose(run(*gated(gate_input="input")), want, rtol=1e-10)


@pytest.mark.parametrize("gate_input", ["hidden_states", "input"])
def test_a_gate_with_one_choice_is_that_expert_alone(gate_input):
    hidden = gate_input == "hidden_states"
    frozen, adapter = gated(gate_input=gate_input, hidden_size=W if hidden else None)
    call = {"hidden_states": normal(50, N, T, W)} if hidden else {}
    for i, alone in enumerate(ALONE):
        chosen = {
            k: x.at[..., i].set(1e3) if k.endswith("/bias") else x for k, x in adapter.items()
        }
        got = run(frozen, chosen, **call)
        np.testing.assert_allclose(got, model(alone, X), rtol=1e-10, atol=1e-10)


# Training ----------------------------------------------------------------------------------------


def test_only_the_gates_are_trained():
    frozen, adapter = gated(True, hidden_size=W)
    assert {path: x.shape for path, x in adapter.items()} == {
        "layers/up/experts/gate": (L, W, 3),
        "layers/up/experts/bias": (L, 3),
        "layers/down/experts/gate": (L, W, 3),
        "layers/down/experts/bias": (L, 3),
        "head/experts/gate": (W, 3),
        "head/experts/bias": (3,),
    }
    assert jp.count_params(frozen, adapter).trainable == (W + 1) * 3 * (2 * L + 1)
    h = normal(50, N, T, W)
    loss = lambda adapter: jnp.sum(run(frozen, adapter, hidden_states=h) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(adapter)
    assert set(grads) == set(adapter)
    assert all(jnp.abs(g).max() > 1e-3 for g in grads.values())
    with pytest.raises(KeyError, match="Nothing is given for 'head/experts/a'"):
        jp.combine(frozen, adapter, hidden_states=h)
    with pytest.raises(KeyError, match="Nothing is given for 'hidden_states'"):
        jp.combine(frozen, {**BANK.arrays, **adapter})


@pytest.mark.parametrize("gate_input", ["hidden_states", "input"])
def test_gates_learn_which_expert_serves_an_example(gate_input):
    """Two groups of inputs, each of which one expert was made for."""

    def linear(params, x):
        return x @ params["w"]

    base, x = {"w": normal(0, 6, 4)}, normal(1, 16, 6)
    group = jnp.arange(16) % 2
    x = x.at[:, 0].set(jnp.where(group == 0, 2.0, -2.0))
    method = jp.lora(2, jp.sites(linear, base, x), dtype=F8)
    adapters = [trained(method, base, seed=20 * i) for i in (1, 2)]
    ways = [linear(merged(method, adapter, base), x) for adapter in adapters]
    y = jnp.where(group[:, None] == 0, *ways)

    experts = stack_adapters([(method, adapter) for adapter in adapters])
    before = {path: np.array(array) for path, array in experts.arrays.items()}
    hidden = gate_input == "hidden_states"
    gates = xlora(
        experts.sites,
        experts.ranks,
        gate_input=gate_input,
        hidden_size=6 if hidden else None,
        dtype=F8,
    )
    frozen, adapter = jp.split(gates(KEY, base))
    call = {"hidden_states": x} if hidden else {}  # what a first pass would give

    def loss(adapter):
        tree = jp.combine(frozen, {**experts.arrays, **adapter}, **call)
        return jnp.mean((jp.lift(linear)(tree, x) - y) ** 2)

    tx = optax.adam(0.1)

    @jax.jit
    def step(adapter, state):
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    state, losses = tx.init(adapter), []
    for _ in range(60):
        adapter, state, value = step(adapter, state)
        losses.append(value)
    assert losses[-1] < 1e-2 * losses[0]
    logits = x @ adapter["w/experts/gate"] + adapter["w/experts/bias"]
    weights = routing_weights_by_hand(np.asarray(logits), 1.0, None)
    assert weights[np.arange(16), group].min() > 0.9
    for path, array in experts.arrays.items():
        np.testing.assert_array_equal(array, before[path])


# Uses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(N,), (N, T)], ids=str)
def test_under_vmap_an_example_has_its_own_states(lead):
    frozen, adapter = gated(True, hidden_size=W)
    h = normal(50, *lead, W)
    alone = jax.jit(jax.vmap(lambda x, h: run(frozen, adapter, x, hidden_states=h)))(X, h)
    np.testing.assert_allclose(alone, run(frozen, adapter, hidden_states=h), rtol=1e-10)


def test_experts_work_over_a_quantized_base():
    int8 = jp.quantize("int8", SITES)
    decoded = jp.merge(int8(KEY, PARAMS))
    frozen, adapter = gated(True, int8, hidden_size=W)
    adapter = {path.replace("/w/", "/"): x for path, x in adapter.items()}
    h = normal(50, N, W)
    method = xlora(BANK.sites, BANK.ranks, hidden_size=W, dtype=F8)
    want = run(jp.split(method(KEY, decoded))[0], adapter, hidden_states=h)
    got = run(frozen, adapter, hidden_states=h)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    plain = run(gated(hidden_size=W)[0], adapter, hidden_states=h)
    assert np.abs(got - plain).max() > 1e-3


def test_a_method_on_top_keeps_its_names_apart_and_a_second_gate_is_refused():
    gates = xlora(BANK.sites, BANK.ranks, hidden_size=W, dtype=F8)
    method = jp.chain(gates, jp.lora(2, SITES, dtype=F8))
    frozen, adapter = jp.split(method(KEY, PARAMS))
    assert {"head/a", "head/experts/gate"} <= set(adapter)
    h = normal(50, N, W)
    got = run(frozen, adapter, hidden_states=h)
    np.testing.assert_allclose(got, run(*gated(hidden_size=W), hidden_states=h), rtol=1e-10)
    with pytest.raises(ValueError, match="share arrays among their weights"):
        jp.split(jp.chain(gates, gates)(KEY, PARAMS))


def test_an_embedding_tied_to_the_head_is_weighted_in_both_uses():
    def tied(params, ids):
        return jnp.tanh(params["table"][ids]) @ params["table"].T

    base, ids = {"table": normal(0, 9, 4)}, jnp.array([[1, 5, 1], [0, 8, 2]])
    sites = jp.sites(tied, base, ids).embedding
    methods = [jp.lora(r, sites, dtype=F8) for r in (1, 2)]
    adapters = [trained(method, base, 5 * i) for i, method in enumerate(methods)]
    experts = stack_adapters(list(zip(methods, adapters, strict=True)))
    frozen, adapter = jp.split(xlora(sites, experts.ranks, hidden_size=W, dtype=F8)(KEY, base))
    adapter = moved(adapter)
    h = normal(50, 2, 3, W)
    got = jax.jit(jp.lift(tied))(
        jp.combine(frozen, {**experts.arrays, **adapter}, hidden_states=h), ids
    )
    logits = h @ adapter["table/experts/gate"] + adapter["table/experts/bias"]
    weights = routing_weights_by_hand(np.asarray(logits), 1.0, None)
    changes = np.stack([a["table/a"] @ a["table/b"] for a in adapters])
    for i, t in np.ndindex(2, 3):  # each token has a table of its own
        table = base["table"] + np.tensordot(weights[i, t], changes, 1)
        np.testing.assert_allclose(got[i, t], np.tanh(table[ids[i, t]]) @ table.T, rtol=1e-10)

    by_input = xlora(sites, experts.ranks, gate_input="input", dtype=F8)
    frozen, adapter = jp.split(by_input(KEY, base))
    with pytest.raises(
        jp.NotMergeableError, match="RoutedByInput at 'table'.*Leave this weight out"
    ):
        jax.jit(jp.lift(tied))(jp.combine(frozen, {**experts.arrays, **adapter}), ids)


@pytest.mark.parametrize("lead", [(2,), (2, 3, 3)], ids=str)
def test_a_convolution_in_groups_is_weighted_by_example_or_output_position(lead):
    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (2, 2),
            "SAME",
            feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    base, x = {"w": normal(0, 2, 2, 3, 4)}, normal(1, 2, 6, 6, 6)
    sites = jp.sites(convolve, base, x).conv
    methods = [jp.lora(r, sites, dtype=F8) for r in (1, 3)]
    adapters = [trained(method, base, 5 * i) for i, method in enumerate(methods)]
    experts = stack_adapters(list(zip(methods, adapters, strict=True)))
    frozen, adapter = jp.split(xlora(sites, experts.ranks, hidden_size=W, dtype=F8)(KEY, base))
    adapter = moved(adapter)
    h = normal(50, *lead, W)
    got = jax.jit(jp.lift(convolve))(
        jp.combine(frozen, {**experts.arrays, **adapter}, hidden_states=h), x
    )
    logits = h @ adapter["w/experts/gate"] + adapter["w/experts/bias"]
    weights = routing_weights_by_hand(np.asarray(logits), 1.0, None)
    weights = weights.reshape(*lead, *(1,) * (4 - len(lead) - 1), 2)
    want = plain = convolve(base, x)
    for i, (method, own) in enumerate(zip(methods, adapters, strict=True)):
        alone = convolve(merged(method, own, base), x)
        want = want + weights[..., i : i + 1] * (alone - plain)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


@functools.cache
def row_parallel():
    """A product whose partial sums are added over devices, and its experts."""
    mesh = jax.make_mesh((4,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    P = PartitionSpec

    def fn(p, x):
        def body(x, w):
            return jax.lax.psum(x @ w, "t")

        specs = (P(None, "t"), P("t", None))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())(x, p["w"])

    base, x = {"w": normal(0, 8, 6)}, normal(1, 3, 8)
    method = jp.lora(2, jp.sites(fn, base, x).linear, dtype=F8)
    return fn, base, x, stack_adapters([(method, trained(method, base, 5 * i)) for i in range(2)])


def test_gates_of_hidden_states_are_right_on_partial_sums():
    fn, base, x, experts = row_parallel()
    frozen, adapter = jp.split(
        xlora(experts.sites, experts.ranks, hidden_size=W, dtype=F8)(KEY, base)
    )
    adapter = moved(adapter)
    tree = jp.combine(frozen, {**experts.arrays, **adapter}, hidden_states=normal(50, 3, W))
    got = jax.jit(jp.lift(fn))(tree, x)
    np.testing.assert_allclose(got, jax.jit(jp.lift(lambda p, x: x @ p["w"]))(tree, x), rtol=1e-10)


def test_gates_of_a_part_of_the_input_are_refused():
    fn, base, x, experts = row_parallel()
    method = xlora(experts.sites, experts.ranks, gate_input="input", dtype=F8)
    frozen, adapter = jp.split(method(KEY, base))
    tree = jp.combine(frozen, {**experts.arrays, **adapter})
    with pytest.raises(
        jp.NotMergeableError, match="RoutedByInput at 'w'.*sharding that the weight"
    ):
        jax.jit(jp.lift(fn))(tree, x)


def test_tokens_that_the_model_sorts_by_its_own_experts_have_no_hidden_states():
    def ragged(p, x):
        return jax.lax.ragged_dot(x, p["w"], jnp.array([3, 1]))

    base, x = {"w": normal(0, 2, D, F)}, normal(1, 4, D)
    method = jp.lora(2, jp.sites(ragged, base, x).linear, dtype=F8)
    adapters = [trained(method, base, 5 * i) for i in range(2)]
    experts = stack_adapters([(method, adapter) for adapter in adapters])
    frozen, adapter = jp.split(
        xlora(experts.sites, experts.ranks, hidden_size=W, dtype=F8)(KEY, base)
    )
    with pytest.raises(
        jp.NotMergeableError, match="RoutedByHiddenStates at 'w'.*Leave this weight out"
    ):
        tree = jp.combine(frozen, {**experts.arrays, **adapter}, hidden_states=normal(50, 4, W))
        jax.jit(jp.lift(ragged))(tree, x)

    by_input = xlora(experts.sites, experts.ranks, gate_input="input", dtype=F8)
    frozen, adapter = jp.split(by_input(KEY, base))
    adapter = moved(adapter)
    got = jax.jit(jp.lift(ragged))(jp.combine(frozen, {**experts.arrays, **adapter}), x)
    gate, bias = (adapter[f"w/experts/{name}"] for name in ("gate", "bias"))
    for t, own in enumerate([0, 0, 0, 1]):
        weights = routing_weights_by_hand(np.asarray(x[t] @ gate[own] + bias[own]), 1.0, None)
        w = base["w"][own] + sum(
            share * a["w/a"][own] @ a["w/b"][own]
            for share, a in zip(weights, adapters, strict=True)
        )
        np.testing.assert_allclose(got[t], x[t] @ w, rtol=1e-10)


def test_the_method_survives_the_text():
    method = xlora(BANK.sites, BANK.ranks, hidden_size=W, temperature=0.5, top_k=2, dtype=F8)
    again = from_json(to_json(method), {**FACTORIES, "xlora": xlora})
    assert to_json(again) == to_json(method)
    frozen, adapter = gated(True, hidden_size=W, temperature=0.5, top_k=2)
    h = normal(50, N, W)
    got = run(jp.split(again(KEY, PARAMS))[0], adapter, hidden_states=h)
    np.testing.assert_array_equal(got, run(frozen, adapter, hidden_states=h))


def test_experts_with_fixed_weights_are_plain_lora():
    method, plain = merge_weighted(BANK, [0.3, 0.0, 0.7])
    assert plain["head/a"].shape == (D, 2) and plain["layers/up/a"].shape == (L, D, 3)
    got = merged(method, plain)
    want = jax.tree.map(lambda w, a, _, c: w + 0.3 * (a - w) + 0.7 * (c - w), PARAMS, *ALONE)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10), got, want)
    method, plain = merge_weighted(BANK, [0, 0, 1])
    assert set(method.options["sites"]) == {"layers/up", "layers/down"}


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, W), r"at 'layers/up'.*with shape \(3, 6\).*leading axes \(4, 3\)"),
        ((N, T + 1, W), r"at 'layers/up'.*with shape \(4, 4, 6\).*leading axes \(4, 3\)"),
        ((N, T, 1, W), r"with shape \(4, 3, 1, 6\).*leading axes \(4, 3\)"),
        ((N, W + 1), r"hidden states of size 6 and got them with shape \(4, 7\)"),
        ((), r"hidden states of size 6 and got them with shape \(\)"),
    ],
)
def test_hidden_states_of_another_shape_are_refused(shape, message):
    frozen, adapter = gated(hidden_size=W)
    with pytest.raises(ValueError, match=message):
        run(frozen, adapter, hidden_states=normal(50, *shape))


@pytest.mark.parametrize("lead", [(), (N,)], ids=str)
def test_hidden_states_may_be_a_list(lead):
    frozen, adapter = gated(True, hidden_size=W)
    h = normal(50, *lead, W)
    want = run(frozen, adapter, hidden_states=h)
    np.testing.assert_allclose(run(frozen, adapter, hidden_states=h.tolist()), want, rtol=1e-10)
    got = jp.lift(model)(
        jp.combine(frozen, {**BANK.arrays, **adapter}, hidden_states=h.tolist()), X
    )
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_another_stack_is_refused():
    frozen, adapter = gated(hidden_size=W)
    other = stack_adapters([(METHODS[0], ADAPTERS[0])] * 3)
    message = r"'head/experts/a' has shape \(5, 6\).*\(5, 5\).*ranks \[2, 3, 0\].*same stack"
    with pytest.raises(ValueError, match=message):
        jp.combine(frozen, {**other.arrays, **adapter}, hidden_states=normal(50, N, W))


def other_base():
    wide = params(L, D, F, 6)
    method = jp.lora(2, jp.sites(model, wide, X).linear.match("head"))
    return method, trained(method, wide)


def turned():
    square = {"head": normal(0, D, D)}
    sites = jp.sites(lambda p, x: x @ p["head"], square, X)
    both = [jp.lora(1, s) for s in (sites, sites.override("head", "out", "in"))]
    return stack_adapters([(method, trained(method, square)) for method in both])


def without(adapter, path):
    return {k: v for k, v in adapter.items() if k != path}


FIRST = (METHODS[0], ADAPTERS[0])
THIRD = (METHODS[2], ADAPTERS[2])
BOTH = {"head": [1, 1]}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: stack_adapters([]), "`stack_adapters` got 0 adapters.*at least two"),
        (lambda: stack_adapters([FIRST]), "`stack_adapters` got 1 adapters.*at least two"),
        (lambda: stack_adapters([FIRST, (jp.dora(2, HEAD), {})]), "adapter 1 is of 'dora'"),
        (
            lambda: stack_adapters([(jp.chain(METHODS[0]), {}), FIRST]),
            "adapter 0 is of 'chain'.*the `lora`",
        ),
        (lambda: stack_adapters([(len, {}), FIRST]), "adapter 0 is of '<built-in function len>'"),
        (
            lambda: stack_adapters([FIRST, (jp.lora(2, SITES.output_slice(0, 1)), {})]),
            "`stack_adapters`: a part of the columns of '(head|layers)",
        ),
        (
            lambda: stack_adapters([FIRST, (METHODS[0], without(ADAPTERS[0], "head/b"))]),
            r"'head/b' of adapter 1 has shape None, but its method has \(2, 4\)",
        ),
        (
            lambda: stack_adapters([(METHODS[2], {**ADAPTERS[2], "head/a": X}), FIRST]),
            r"'head/a' of adapter 0 has shape \(4, 3, 5\), but its method has None",
        ),
        (
            lambda: stack_adapters([FIRST, (METHODS[0], ADAPTERS[1])]),
            r"'head/a' of adapter 1 has shape \(5, 3\), but its method has \(5, 2\)",
        ),
        (
            lambda: stack_adapters([THIRD, FIRST, other_base()]),
            r"'head' is \(\(5, 4\), .* in adapter 1, but \(\(5, 6\), .* in adapter 2",
        ),
        (turned, r"'in', 'out'\)\) .* in adapter 0, but .*'out', 'in'\)\) in adapter 1"),
        (
            lambda: xlora(HEAD.output_slice(0, 2), BOTH, hidden_size=W),
            "`xlora`: a part of the columns of",
        ),
        (
            lambda: xlora(HEAD, BOTH),
            r"hidden_size=None, gate_input='hidden_states'\)`: give the size",
        ),
        (
            lambda: xlora(HEAD, BOTH, hidden_size=0),
            r"hidden_size=0, gate_input='hidden_states'\)`: give the size",
        ),
        (
            lambda: xlora(HEAD, BOTH, hidden_size=3, gate_input="input"),
            r"hidden_size=3, gate_input='input'.*Leave",
        ),
        (
            lambda: xlora(HEAD, BOTH, hidden_size=3, gate_input="output"),
            "gate_input='output'.*'hidden_states', 'input'",
        ),
        (
            lambda: xlora(HEAD, BOTH, hidden_size=W, temperature=0.0),
            r"temperature=0.0\)`: give a positive",
        ),
        (lambda: xlora(HEAD, BOTH, hidden_size=W, temperature=float("nan")), r"temperature=nan\)`"),
        (
            lambda: xlora(HEAD, BOTH, hidden_size=W, top_k=0),
            r"top_k=0\)`: there are 2 experts; choose 1 to",
        ),
        (lambda: xlora(HEAD, BOTH, hidden_size=W, top_k=3), r"top_k=3\)`: there are 2 experts"),
        (
            lambda: xlora(HEAD, {}, hidden_size=W),
            r"the sites are \['head'\].*\['head'\] are in only one",
        ),
        (
            lambda: xlora(HEAD, {**BOTH, "up": [1, 1]}, hidden_size=W),
            r"\['up'\] are in only one of the two",
        ),
        (
            lambda: xlora(HEAD, {"head": [3]}, hidden_size=W),
            r"ranks of 'head' are \[3\].*two or more",
        ),
        (lambda: xlora(HEAD, {"head": [0, 0]}, hidden_size=W), r"ranks of 'head' are \[0, 0\]"),
        (lambda: xlora(HEAD, {"head": [2, -1]}, hidden_size=W), r"ranks of 'head' are \[2, -1\]"),
        (
            lambda: xlora(SITES, {**BANK.ranks, "layers/down": [1, 1]}, hidden_size=W),
            r"ranks of 'layers/down' are \[1, 1\].*\(here 3\)",
        ),
        (
            lambda: xlora(SITES - SITES, {}, hidden_size=W)(KEY, PARAMS),
            "`xlora` selects no parameter",
        ),
        (
            lambda: merge_weighted(BANK, [1.0, 2.0]),
            r"weights=\[1.0, 2.0\]\)`: give one .* 3 experts",
        ),
        (
            lambda: merge_weighted(BANK, [0, 0, 0]),
            r"weights=\[0.0, 0.0, 0.0\].*not all of them zero",
        ),
        (lambda: merge_weighted(BANK, [1, 1, 0]), "sum to 5 at .*Set more of the weights to zero"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
