"""Learned gates: their formulas, their price in the loss, and which of them training closes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft._method_json import from_json, to_json
from jaxpeft._methods.gates import Gated, gates
from jaxpeft.sparsity import expected_density, gate_masks
from jaxpeft.sparsity._gates import gate_values

from .stack import normal

L, D, H, K, V = 2, 4, 3, 2, 6
KEY = jax.random.key(0)
STRUCTURES = ["entry", "input", "output", "matrix", (2, 2), (None, K), (K, None)]
each_kind = pytest.mark.parametrize("kind", ["hard concrete", "sigmoid"])
each_structure_or_two = pytest.mark.parametrize(
    "structure, kind",
    [*((s, "hard concrete") for s in STRUCTURES), ("entry", "sigmoid"), ((2, 2), "sigmoid")],
)


def model(params, ids):
    """Kernels by heads, in layers under a scan, and a table that is also the head."""

    def layer(h, p):
        q = jnp.tanh(jnp.einsum("td,dhk->thk", h, p["q"]))
        return h + jnp.einsum("thk,hkd->td", q, p["o"]), None

    h, _ = jax.lax.scan(layer, params["embed"][ids], params["layers"])
    return h @ params["embed"].T


PARAMS = {
    "embed": normal(0, V, D),
    "layers": {"q": normal(1, L, D, H, K), "o": normal(2, L, H, K, D)},
}
IDS = jnp.array([0, 3, 5, 1, 3])
SITES = jp.sites(model, PARAMS, IDS).matrices
#: {path: (*stack, in, out)}
SIDES = {"embed": (V, D), "layers/q": (L, D, H * K), "layers/o": (L, H * K, D)}
TABLE = SITES.match("embed")


def flat(params):
    return {"embed": params["embed"], **{f"layers/{k}": v for k, v in params["layers"].items()}}


def tree_of(found):
    layers = {k: found[f"layers/{k}"] for k in ("q", "o")}
    return {"embed": found["embed"], "layers": layers}


def label(structure):
    named = isinstance(structure, str)
    return structure if named else "x".join("all" if n is None else str(n) for n in structure)


def made(structure, kind, sites=SITES, params=PARAMS, size=3.0):
    """The method, the frozen tree, and logits of which some are open, some closed, some between."""
    method = gates(sites, kind=kind, structure=structure, dtype=jnp.float64)
    frozen, adapter = jp.split(method(KEY, params))
    adapter = {k: normal(i, *v.shape) * size for i, (k, v) in enumerate(sorted(adapter.items()))}
    return method, frozen, adapter


#: A structure for each weight: a table read by row that is a head too, and kernels by heads.
MIXES = [
    {"embed": "input", "layers/q": (None, K), "layers/o": (K, None)},
    {"embed": "entry", "layers/q": (2, 2), "layers/o": "output"},
    {"embed": "output", "layers/q": "entry", "layers/o": "input"},
    {"embed": (2, 2), "layers/q": "matrix", "layers/o": "entry"},
]


def mixed(mix, kind, size):
    """As `made`, with a structure of its own for each weight."""
    own = [
        gates(SITES.match(path), kind=kind, structure=structure, dtype=jnp.float64)
        for path, structure in mix.items()
    ]
    frozen, adapter = jp.split(jp.chain(*own)(KEY, PARAMS))
    return frozen, {k: normal(i, *v.shape) * size for i, (k, v) in enumerate(adapter.items())}


def block_sides(structure, n, m):
    named = {"entry": (1, 1), "input": (1, m), "output": (n, 1), "matrix": (n, m)}
    rows, columns = named.get(structure, structure) if isinstance(structure, str) else structure
    return rows or n, columns or m


def over_entries(structure, path, values):
    """What stands at each group (*stack, groups), at every entry of the weight."""
    *stack, n, m = SIDES[path]
    rows, columns = block_sides(structure, n, m)
    out = np.zeros((*stack, n, m), np.asarray(values).dtype)
    for i in range(n):
        for j in range(m):
            out[..., i, j] = values[..., (i // rows) * (m // columns) + j // columns]
    return out.reshape(SITES[path].shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def z_by_hand(kind, logits, inverse_temperature=None):
    if kind == "hard concrete":
        return np.clip(sigmoid(logits) * (1.1 - -0.1) - 0.1, 0, 1)
    return (
        sigmoid(inverse_temperature * logits) if inverse_temperature else (logits > 0).astype(float)
    )


def run(frozen, adapter, **call):
    return jp.lift(model, materialize="error")(jp.combine(frozen, adapter, **call), IDS)


def merged(frozen, adapter, **call):
    return flat(jax.jit(lambda a: jp.merge(jp.combine(frozen, a, **call)))(adapter))


# Formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix, kind, inverse_temperature",
    [
        *((mix, "hard concrete", None) for mix in MIXES),
        (MIXES[1], "sigmoid", None),
        (MIXES[1], "sigmoid", 1.7),
    ],
)
def test_gates_are_those_of_the_formula(mix, kind, inverse_temperature):
    frozen, adapter = mixed(mix, kind, 3.0)
    got = merged(
        frozen,
        adapter,
        **({} if inverse_temperature is None else {"inverse_temperature": inverse_temperature}),
    )
    for path, w in flat(PARAMS).items():
        logits = np.asarray(adapter[f"{path}/gates/{label(mix[path])}"])
        *stack, n, m = SIDES[path]
        assert logits.shape == (*stack, n * m // math.prod(block_sides(mix[path], n, m)))
        z = over_entries(mix[path], path, z_by_hand(kind, logits, inverse_temperature))
        np.testing.assert_allclose(got[path], w * z, rtol=1e-12)


@each_structure_or_two
def test_masks_and_expected_density_are_those_of_the_formula(structure, kind):
    method, _, adapter = made(structure, kind)
    masks = gate_masks(method, adapter)
    assert list(masks) == list(SITES)
    chances, hard = [], []
    for path, mask in masks.items():
        logits = np.asarray(adapter[f"{path}/gates/{label(structure)}"])
        z = over_entries(structure, path, z_by_hand(kind, logits))
        np.testing.assert_array_equal(mask, z > 0)
        hard.append(z.ravel() > 0)
        if kind == "hard concrete":
            chance = sigmoid(logits - 2 / 3 * np.log(0.1 / 1.1))
        else:
            chance = sigmoid(2.5 * logits)
        chances.append(over_entries(structure, path, chance).ravel())
    given = 2.5 if kind == "sigmoid" else None
    share = expected_density(method, adapter, inverse_temperature=given)
    np.testing.assert_allclose(share, np.concatenate(chances).mean(), rtol=1e-6)
    if kind == "sigmoid":
        np.testing.assert_allclose(
            expected_density(method, adapter), np.concatenate(hard).mean(), rtol=1e-6
        )
    some = gate_masks(method, adapter, TABLE)
    assert list(some) == ["embed"] and (some["embed"] == masks["embed"]).all()


def test_a_sampled_gate_is_a_stretched_and_clipped_concrete_variable():
    logits = normal(0, 6)
    drawn = Gated(jnp.ones((3, 2)), logits, None, KEY, sides=(3, 2)).materialize()
    u = sigmoid(jax.random.logistic(KEY, (6,), jnp.float64))
    s = sigmoid((np.log(u) - np.log(1 - u) + np.asarray(logits)) / (2 / 3))
    want = np.clip(s * 1.2 - 0.1, 0, 1).reshape(3, 2)
    np.testing.assert_allclose(drawn, want, rtol=1e-9)
    assert (want == 1).any() and ((want > 0) & (want < 1)).any()


# Draws ------------------------------------------------------------------------------------------


def test_every_weight_and_layer_has_samples_of_its_own():
    sites = SITES.match("layers/*")
    _, frozen, adapter = made("entry", "hard concrete", sites)
    adapter = {k: jnp.zeros_like(v) for k, v in adapter.items()}

    @jax.jit
    def draw(key):
        drawn = flat(jp.merge(jp.combine(frozen, adapter, gates=key)))
        z = {p: drawn[p] / flat(PARAMS)[p] for p in sites}
        return [z[p][i].ravel() for p in sites for i in range(L)]

    first = draw(KEY)
    for a, b in zip(first, draw(KEY), strict=True):
        np.testing.assert_array_equal(a, b)
    every = [*first, *draw(jax.random.key(1))]
    for i, a in enumerate(every):
        for b in every[:i]:
            assert np.abs(a - b).max() > 0.1


def test_the_fraction_of_open_samples_is_the_expected_density():
    method, frozen, adapter = made("input", "hard concrete", size=1.5)
    count = 4000

    def share(key):
        drawn = flat(jp.merge(jp.combine(frozen, adapter, gates=key)))
        entries = jnp.concatenate([w.ravel() for w in drawn.values()])
        return jnp.mean(entries != 0)

    shares = jax.jit(jax.vmap(share))(jax.random.split(KEY, count))
    error = 4 * float(jnp.std(shares)) / math.sqrt(count)
    assert 0.3 < float(shares.mean()) < 0.9 and error < 0.01
    np.testing.assert_allclose(expected_density(method, adapter), shares.mean(), atol=error)


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, call, mix",
    [
        ("hard concrete", {"gates": KEY}, 0),
        ("hard concrete", {}, 2),
        ("hard concrete", {"gates": KEY}, 3),
        ("sigmoid", {"inverse_temperature": 3.0}, 1),
    ],
)
def test_a_lifted_model_and_its_gradients_are_those_of_the_merged_one(kind, call, mix):
    frozen, adapter = mixed(MIXES[mix], kind, 0.7)
    lifted = jax.jit(jax.value_and_grad(lambda a: jnp.sum(run(frozen, a, **call) ** 2)))

    def dense(adapter):
        return jnp.sum(model(jp.merge(jp.combine(frozen, adapter, **call)), IDS) ** 2)

    (y, slope), (want, of_dense) = lifted(adapter), jax.jit(jax.value_and_grad(dense))(adapter)
    np.testing.assert_allclose(y, want, rtol=1e-9)
    for path, g in slope.items():
        np.testing.assert_allclose(g, of_dense[path], rtol=1e-7, atol=1e-9)
        at = np.unravel_index(np.argmax(np.abs(g)), g.shape)
        up, down = (
            lifted({**adapter, path: adapter[path].at[at].add(h)})[0] for h in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((up - down) / 2e-5, g[at], rtol=1e-5)


@each_kind
def test_the_expected_density_asks_every_gate_to_close(kind):
    method, _, adapter = made("input", kind, TABLE)
    price = lambda a: expected_density(method, a, 1.5 if kind == "sigmoid" else None)  # noqa: E731
    (slope,) = jax.grad(price)(adapter).values()
    (logits,) = adapter.values()
    sharp, shift = (1.5, 0) if kind == "sigmoid" else (1, -2 / 3 * np.log(0.1 / 1.1))
    p = sigmoid(sharp * logits + shift)
    np.testing.assert_allclose(slope, sharp * p * (1 - p) / V, rtol=1e-6)


@each_structure_or_two
def test_training_starts_at_the_base_to_the_last_bit(structure, kind):
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    half = jnp.bfloat16
    x, params = normal(0, 3, V).astype(half), {"w": normal(1, V, D).astype(half)}
    start = {"hard concrete": 0.92, "sigmoid": 0.501}[kind]
    method = gates(
        jp.sites(linear, params, x), kind=kind, structure=structure, start=start, dtype=half
    )
    tree = jp.combine(*jp.split(method(KEY, params)))
    np.testing.assert_array_equal(jp.lift(linear, materialize="error")(tree, x), linear(params, x))
    np.testing.assert_array_equal(jp.merge(tree)["w"], params["w"])


@each_kind
def test_the_start_is_the_sigmoid_of_the_logits(kind):
    _, adapter = jp.split(gates(TABLE, kind=kind, start=0.97)(KEY, PARAMS))
    (logits,) = adapter.values()
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(sigmoid(logits), 0.97, rtol=1e-6)


@each_kind
def test_training_closes_the_gates_of_inputs_that_do_not_matter(kind):
    x, w = normal(0, 64, 6), normal(1, 6, 2)
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    params = {"w": jnp.where(jnp.abs(w) < 0.5, 0.5, w)}
    y = x[:, ::2] @ params["w"][::2]  # every other input has no part in it
    sites = jp.sites(linear, params, x).linear
    method = gates(sites, kind=kind, structure="input", dtype=jnp.float64)
    frozen, adapter = jp.split(method(KEY, params))
    steps, tx = 300, optax.adam(0.1)
    inverse_temperature = optax.exponential_decay(1.0, steps, 200.0)

    def step(carry, i):
        adapter, state = carry
        hard = kind == "hard concrete"
        call = (
            {"gates": jax.random.fold_in(KEY, i)}
            if hard
            else {"inverse_temperature": inverse_temperature(i)}
        )

        def loss(a):
            off = jp.lift(linear)(jp.combine(frozen, a, **call), x) - y
            return jnp.mean(off**2) + 0.02 * expected_density(
                method, a, call.get("inverse_temperature")
            )

        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    carry = adapter, tx.init(adapter)
    (adapter, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(carry)
    masks = gate_masks(method, adapter)
    np.testing.assert_array_equal(masks["w"], jnp.array([[True], [False]] * 3) & jnp.ones(2, bool))
    # What is pruned is the merged matrix but for the values of the gates that stay.
    gated = jp.merge(jp.combine(frozen, adapter))
    pruned = jp.prune(masks, sites)(KEY, params)
    z = gate_values(kind, adapter["w/gates/input"])
    np.testing.assert_allclose(linear(gated, x), (x * z) @ pruned["w"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(linear(gated, x), y, atol=0.1 * float(jnp.abs(y).max()))
    np.testing.assert_array_equal(jp.prune(masks, sites)(KEY, gated)["w"], gated["w"])


# Uses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "below, structure", [("full", "entry"), ("lora", (2, 2)), ("int8", "input"), ("dora", "output")]
)
def test_gates_stand_over_and_under_other_methods(below, structure):
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    params, x = {"w": normal(1, V, D)}, normal(0, 3, V)
    sites = jp.sites(linear, params, x)
    low = {"lora": jp.lora, "dora": jp.dora}
    under = {"full": jp.full_finetuning(sites), "int8": jp.quantize("int8", sites)}
    under |= {name: f(2, sites, dtype=jnp.float64) for name, f in low.items()}
    own = gates(sites, structure=structure, dtype=jnp.float64)
    method = jp.chain(under[below], own, jp.lora(1, sites, dtype=jnp.float64))
    frozen, adapter = jp.split(method(KEY, params))
    assert len(adapter) == {"full": 4, "lora": 5, "int8": 3, "dora": 6}[below]
    name = f"w/gates/{label(structure)}"  # whatever stands above and below
    adapter = {k: v + normal(i, *v.shape) for i, (k, v) in enumerate(adapter.items())}
    adapter[name] = jnp.linspace(-4, 4, adapter[name].size)
    tree = jp.combine(frozen, adapter, gates=KEY)
    got = jax.jit(jp.lift(linear, materialize="error"))(tree, x)
    np.testing.assert_allclose(got, linear(jax.jit(jp.merge)(tree), x), rtol=1e-5)
    assert 0 < jp.sparsity.mask_density(gate_masks(own, adapter))[""] < 1


def test_inputs_and_outputs_of_one_weight_may_have_gates():
    sites = SITES.match("layers/q")
    both = [gates(sites, structure=s, dtype=jnp.float64) for s in ("input", (None, K))]
    frozen, adapter = jp.split(jp.chain(*both)(KEY, PARAMS))
    assert sorted(adapter) == ["layers/q/gates/allx2", "layers/q/gates/input"]
    adapter = {k: normal(i, *v.shape) for i, (k, v) in enumerate(sorted(adapter.items()))}
    z = {k: z_by_hand("hard concrete", np.asarray(v)) for k, v in adapter.items()}
    want = flat(PARAMS)["layers/q"] * z["layers/q/gates/input"][:, :, None, None]
    want = want * z["layers/q/gates/allx2"][:, None, :, None]
    np.testing.assert_allclose(merged(frozen, adapter)["layers/q"], want, rtol=1e-12)


def test_an_inverse_temperature_may_be_traced():
    _, frozen, adapter = made("input", "sigmoid", TABLE)
    traced = jax.jit(
        lambda s: jp.merge(jp.combine(frozen, adapter, inverse_temperature=s))["embed"]
    )
    given = merged(frozen, adapter, inverse_temperature=1.7)["embed"]
    np.testing.assert_allclose(traced(1.7), given, rtol=1e-12)
    assert np.abs(traced(4.0) - given).max() > 1e-2


@pytest.mark.parametrize("structure", ["input", (9, 1)])
def test_an_input_of_a_convolution_is_one_of_its_window(structure):
    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"k": normal(0, 3, 3, 2, 4)}, normal(1, 1, 5, 4, 2)
    sites = jp.sites(conv, params, x).conv
    _, frozen, adapter = made(structure, "hard concrete", sites, params, size=5.0)
    tree = jp.combine(frozen, adapter)
    dense = jp.merge(tree)
    assert (dense["k"] == 0).any() and (dense["k"] != 0).any()
    got = jp.lift(conv, materialize="error")(tree, x)
    np.testing.assert_allclose(got, conv(dense, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "structure, side",
    [("entry", "in"), ("input", "in"), ("output", "out"), ((2, 3), "in"), ((2, 3), "out")],
)
def test_gates_are_sharded_with_their_matrix(structure, side):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x = normal(0, 8, 6), normal(1, 5, 8)
    specs = ((P("d"), P(None, "d")), P()) if side == "in" else ((P(None, "d"), P()), P(None, "d"))

    def local(w, x):
        return jax.lax.psum(x @ w, "d") if side == "in" else x @ w

    def sharded(params, x):
        parts = jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
        return parts(params["w"], x) @ params["w"][:6, :3]

    sites = jp.sites(sharded, {"w": w}, x).match("w")
    _, frozen, adapter = made(structure, "hard concrete", sites, {"w": w})
    tree = jp.combine(frozen, adapter)
    got = jax.jit(jp.lift(sharded, materialize="error"))(tree, x)
    np.testing.assert_allclose(got, sharded(jp.merge(tree), x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure, start", [("output", 0.93), ((None, K), 0.99)])
def test_a_method_survives_its_description(structure, start):
    method = gates(TABLE, structure=structure, start=start, dtype=jnp.bfloat16)
    again = from_json(json.loads(json.dumps(to_json(method))), {"gates": gates})
    (frozen, adapter), (other, same) = (jp.split(m(KEY, PARAMS)) for m in (method, again))
    jax.tree.map(np.testing.assert_array_equal, adapter, same)
    adapter = {k: normal(0, *v.shape) for k, v in adapter.items()}
    got = [merged(f, adapter, gates=KEY)["embed"] for f in (frozen, other)]
    np.testing.assert_array_equal(*got)
    for path, mask in gate_masks(again, adapter).items():
        np.testing.assert_array_equal(mask, gate_masks(method, adapter)[path])


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: gates(SITES, kind="gumbel"),
            r"kind='gumbel'\)`: `kind` must be 'hard concrete' or 'sigmoid'",
        ),
        (lambda: gates(SITES, start=0.9), r"'hard concrete', start=0.9\)` needs 0.92 <= start < 1"),
        (lambda: gates(SITES, start=1.0), r"'hard concrete', start=1.0\)` needs 0.92 <= start < 1"),
        (
            lambda: gates(SITES, kind="sigmoid", start=0.5),
            r"kind='sigmoid', start=0.5\)` needs 0.5 < start < 1",
        ),
        (lambda: gates(TABLE, structure=(4, 1)), "blocks of 4 x 1 do not.*'embed', which is 6 x 4"),
        (
            lambda: gates(TABLE, structure="ring"),
            "structure='ring' is unknown; it must be one of entry",
        ),
        (lambda: gates(SITES - SITES)(KEY, PARAMS), "`gates` selects no parameter"),
        (lambda: gates(TABLE.output_slice(0, 2)), "`gates`: a part of the columns of 'embed'"),
        (
            lambda: jp.chain(
                jp.moelora(2, SITES.match("*q"), experts=1, tasks=2), gates(SITES.match("*q"))
            )(KEY, PARAMS),
            r"structure='entry'\)`: 'layers/q' holds TaskGatedExperts, which has no dense equivale",
        ),
        (
            lambda: gate_masks(jp.prune({}, SITES - SITES), {}),
            "`gate_masks` takes.*this one is 'pr",
        ),
        (
            lambda: expected_density(jp.chain(gates(TABLE)), {}),
            "`expected_density` takes.*this one is 'chain'",
        ),
        (
            lambda: expected_density(gates(TABLE), {"embed/gates/input": jnp.ones(6)}),
            r"no 'embed/gates/entry', the logits.*\['embed/gates/input'\]",
        ),
        (
            lambda: gate_masks(gates(TABLE), {}, SITES),
            r"`gate_masks`: \['layers/o', 'layers/q'\] have no gates.*at \['embed'\]",
        ),
        (
            lambda: expected_density(gates(TABLE), {}, inverse_temperature=3),
            r"inverse_temperature=3\)`: gates of kind 'hard",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
