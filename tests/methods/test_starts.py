"""LoRA that starts somewhere else: at a matrix's own parts, at a task's inputs, at its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._methods.pissa import top_singular_triplets
from jaxpeft.io import load_adapter, save_adapter

from .stack import model, params

L, D, F, R = 3, 8, 12, 2
KEY = jax.random.key(0)


PARAMS = params(L, D, F, 5)
BATCHES = [jnp.asarray(np.random.default_rng(i).normal(size=(4, 6, D))) for i in range(3)]
SITES = jp.sites(model, PARAMS, BATCHES[0])
LAYERS = SITES.match("layers/*")
TARGET = jnp.asarray(np.random.default_rng(9).normal(size=(4, 6, 5)))


def loss(params, batch):
    return jnp.mean((model(params, batch) - TARGET) ** 2)


@functools.cache
def moments():
    return jp.calibration.input_moments(model, PARAMS, SITES.linear, BATCHES)


@functools.cache
def gradients():
    return jp.calibration.mean_gradients(loss, PARAMS, SITES.linear, BATCHES)


METHODS = {
    "pissa": lambda sites, **more: jp.pissa(R, sites, dtype=jnp.float64, **more),
    "pissa, sketched": lambda sites, **more: jp.pissa(
        R, sites, n_iter=6, dtype=jnp.float64, **more
    ),
    "olora": lambda sites, **more: jp.olora(R, sites, dtype=jnp.float64, **more),
    "corda": lambda sites, **more: jp.corda(R, sites, moments(), dtype=jnp.float64, **more),
    "lora_ga": lambda sites, **more: jp.lora_ga(R, sites, gradients(), dtype=jnp.float64, **more),
}
each = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def moved(adapter, by=0.1):
    rng = np.random.default_rng(1)
    return {k: x + by * rng.normal(size=x.shape) for k, x in adapter.items()}


def outputs(frozen, adapter):
    return jp.lift(model)(jp.combine(frozen, adapter), BATCHES[0])


# What a model does ------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs_layer_by_layer():
    found = moments()
    for index in range(L):
        second = first = 0
        for batch in BATCHES:
            h = batch
            for i in range(index):
                p = jax.tree.map(lambda x, i=i: x[i], PARAMS["layers"])
                h = h + jnp.tanh(h @ p["up"]) @ p["down"]
            rows = h.reshape(-1, D)
            second, first = second + rows.T @ rows, first + rows.sum(0)
        np.testing.assert_allclose(found["layers/up"].second[index], second, rtol=1e-9)
        np.testing.assert_allclose(found["layers/up"].first[index], first, rtol=1e-9)
    np.testing.assert_array_equal(found["layers/down"].count, [72.0] * L)
    assert found["head"].count == 72


def test_moments_of_a_quantized_model_are_those_of_the_dequantized_one():
    quantized = jp.quantize("int8", LAYERS)(KEY, PARAMS)
    dense = jax.tree.map(jnp.asarray, jp.merge(quantized))
    codes, values = (
        jp.calibration.input_moments(model, tree, SITES.linear, BATCHES[:1])
        for tree in (quantized, dense)
    )
    for path in SITES.linear:
        np.testing.assert_allclose(codes[path].second, values[path].second, rtol=1e-6)


def test_padding_does_not_count_whatever_it_holds():
    batch = BATCHES[0].at[:, 4:].set(1e3)
    mask = lambda batch: jnp.broadcast_to(jnp.arange(6) < 4, (4, 6)).astype(float)  # noqa: E731
    got = jp.calibration.input_moments(model, PARAMS, SITES.linear, [batch], mask=mask)
    want = jp.calibration.input_moments(model, PARAMS, SITES.linear, [BATCHES[0][:, :4]])
    for path, own in want.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got[path], own)


def test_gradients_are_averaged_over_batches():
    want = [jax.grad(loss)(PARAMS, batch)["layers"]["up"] for batch in BATCHES]
    np.testing.assert_allclose(gradients()["layers/up"], sum(want) / 3, rtol=1e-9)


def test_gradients_of_a_base_in_bf16_are_averaged_over_all_batches():
    """A sum in bfloat16 stops growing after some hundred equal terms."""
    narrow, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, BATCHES[0]))
    few, many = (
        jp.calibration.mean_gradients(loss, narrow, SITES.linear, [batch] * n) for n in (1, 600)
    )
    for path in few:
        np.testing.assert_allclose(many[path], few[path], rtol=1e-4)


def test_batches_that_run_dry_are_refused():
    spent = iter(BATCHES)
    list(spent)
    for find in (jp.calibration.input_moments, jp.calibration.mean_gradients):
        f = loss if find is jp.calibration.mean_gradients else model
        with pytest.raises(ValueError, match="iterator was exhausted after 3 batches, of 5 needed"):
            find(f, PARAMS, LAYERS, BATCHES, steps=5)
        with pytest.raises(
            ValueError, match="iterator was exhausted after 0 batches, of at least one"
        ):
            find(f, PARAMS, LAYERS, spent)
        with pytest.raises(ValueError, match=r"steps=0\)`: `steps` must be at least 1"):
            find(f, PARAMS, LAYERS, BATCHES, steps=0)


def test_only_as_many_batches_are_taken_as_are_asked_for():
    stream = iter(BATCHES)
    jp.calibration.input_moments(model, PARAMS, LAYERS, stream, steps=2)
    assert len(list(stream)) == 1


def test_inputs_that_are_not_finite_are_named_with_their_batch():
    batches = [BATCHES[0], BATCHES[1].at[0, 0, 0].set(jnp.nan)]
    with pytest.raises(ValueError, match=r"inputs of 'layers/(up|down)'.* in batch 1 are not fin"):
        jp.calibration.input_moments(model, PARAMS, LAYERS, batches)
    with pytest.raises(
        ValueError, match="gradient of 'layers/down', 'layers/up' in batch 1 are not finite"
    ):
        jp.calibration.mean_gradients(loss, PARAMS, LAYERS, batches)


def test_what_has_no_inputs_of_its_own_is_refused():
    def embedded(params, ids):
        return params["table"][ids]

    params = {"table": jnp.ones((7, 4))}
    sites = jp.sites(embedded, params, jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="uses 'table' as embedding, but only the inputs of plain"):
        jp.calibration.input_moments(embedded, params, sites.embedding, [jnp.zeros((2, 3), int)])


def test_a_product_that_no_output_depends_on_is_named():
    def half(params, batch):
        return batch @ params["a"], jnp.argmax(batch @ params["b"])

    params = {"a": jnp.ones((D, 2)), "b": jnp.ones((D, 3))}
    sites = jp.sites(half, params, BATCHES[0])
    with pytest.raises(ValueError, match="found no input of 'b': the outputs"):
        jp.calibration.input_moments(half, params, sites.linear, BATCHES[:1])


def test_counts_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"shape \(4,\), but the inputs of 'layers/up' have .*\(4, 6"
    ):
        jp.calibration.input_moments(model, PARAMS, LAYERS, BATCHES, mask=lambda batch: jnp.ones(4))


def test_a_gradient_of_quantized_values_is_refused():
    quantized = jp.quantize("int8", LAYERS)(KEY, PARAMS)
    with pytest.raises(ValueError, match="'layers/down' is not a plain array of this tree"):
        jp.calibration.mean_gradients(loss, quantized, LAYERS, BATCHES)


# Starts -----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("scale", [None, 6.0])
def test_training_starts_at_the_base(make, scale):
    frozen, adapter = jp.split(make(LAYERS, alpha=scale)(KEY, PARAMS))
    np.testing.assert_allclose(outputs(frozen, adapter), model(PARAMS, BATCHES[0]), atol=1e-9)
    far = outputs(frozen, moved(adapter))
    assert np.abs(far - model(PARAMS, BATCHES[0])).max() > 1e-2
    assert all(jnp.abs(x).max() > 1e-3 for x in adapter.values())


@each
def test_over_quantized_values_the_start_is_subtracted_as_a_second_low_rank_matrix(make):
    quantized = jp.quantize("int8", LAYERS)(KEY, PARAMS)
    frozen, adapter = jp.split(make(LAYERS)(KEY, quantized))
    want = jp.lift(model)(quantized, BATCHES[0])
    np.testing.assert_allclose(outputs(frozen, adapter), want, atol=1e-6)
    codes = [x for x in jax.tree.leaves(frozen) if getattr(x, "dtype", None) == jnp.int8]
    assert len(codes) == 2
    # The frozen pair is no part of what is trained, and donating that leaves it alone.
    jax.jit(lambda x: jax.tree.map(lambda v: v + 1, x), donate_argnums=0)(adapter)
    jax.block_until_ready(jax.tree.leaves(frozen))


@each
def test_to_lora_gives_the_same_update_of_the_original_base(make, tmp_path):
    for options in ({}, {"alpha": 3.0}, {"alpha": 3.0, "scaling": "alpha/sqrt(r)"}):
        method = make(LAYERS, **options)
        frozen, start = jp.split(method(KEY, PARAMS))
        adapter = moved(start)
        plain, same = jp.adapters.to_lora(method, adapter, start)
        save_adapter(tmp_path, same, plain, PARAMS, key=KEY)
        loaded = load_adapter(tmp_path, PARAMS)
        got = outputs(loaded.frozen, loaded.adapter)
        np.testing.assert_allclose(got, outputs(frozen, adapter), atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 3.0}, {"alpha": 3.0, "scaling": "alpha/sqrt(r)"}]
)
@pytest.mark.parametrize(
    "make",
    [jp.pissa, jp.olora, lambda rank, sites, **more: jp.corda(rank, sites, moments(), **more)],
    ids=["pissa", "olora", "corda"],
)
def test_to_lora_has_no_larger_rank_than_the_smaller_side(make, options):
    ranks = {"layers/up": 8, "layers/down": 5, "head": 3}  # of 8 x 12, 12 x 8 and 8 x 5
    method = make(ranks, SITES.linear, dtype=jnp.float64, **options)
    frozen, start = jp.split(method(KEY, PARAMS))
    adapter = moved(start)
    plain, same = jp.adapters.to_lora(method, adapter, start)
    assert {k: x.shape for k, x in same.items()} == {
        "layers/up/a": (L, 8, 8),
        "layers/up/b": (L, 8, 12),
        "layers/down/a": (L, 12, 8),
        "layers/down/b": (L, 8, 8),
        "head/a": (8, 5),
        "head/b": (5, 5),
    }
    fresh, like = jp.split(plain(KEY, PARAMS))
    assert like.keys() == same.keys()
    want = jp.merge(jp.combine(frozen, adapter))
    got = jp.merge(jp.combine(fresh, same))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)


def test_to_lora_reduces_a_small_update_up_to_the_rounding_of_the_update():
    """In 16 bits too, where that of the factors is as large as the change itself."""
    head = SITES.match("head")
    method = jp.pissa(4, head, dtype=jnp.bfloat16)
    _, start = jp.split(method(KEY, PARAMS))
    adapter = {path: x.at[0, 0].multiply(1.0625) for path, x in start.items()}
    _, same = jp.adapters.to_lora(method, adapter, start)
    wide = [{k: np.asarray(v, float) for k, v in x.items()} for x in (adapter, start, same)]
    after, before, got = (x["head/a"] @ x["head/b"] for x in wide)
    assert same["head/a"].dtype == jnp.bfloat16 and same["head/a"].shape == (8, 5)
    want = after - before
    assert np.abs(got - want).max() < 2**-7 * np.abs(want).max() < 2**-7 * np.abs(before).max() / 4


def test_to_lora_replaces_the_method_in_a_chain():
    """Over codes, and with what another method trains, which stays in the adapter."""
    head = jp.unfreeze(SITES.match("head"))
    int8, own = jp.quantize("int8", LAYERS), METHODS["pissa"](LAYERS)
    frozen, start = jp.split(jp.chain(int8, own, head)(KEY, PARAMS))
    adapter = moved(start)
    plain, same = jp.adapters.to_lora(own, adapter, start)
    np.testing.assert_array_equal(same["head"], adapter["head"])
    again, _ = jp.split(jp.chain(int8, plain, head)(KEY, PARAMS))
    np.testing.assert_allclose(outputs(again, same), outputs(frozen, adapter), atol=1e-5)


def to_lora_of(method=None, adapter=None, start=None):
    own = jp.pissa(R, SITES.match("head"))
    _, whole = jp.split(own(KEY, PARAMS))
    given = (whole if x is None else x for x in (adapter, start))
    return jp.adapters.to_lora(own if method is None else method, *given)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: to_lora_of(jp.lora(R, LAYERS)),
            "or `lora_ga`, but got one from 'lora'. From a `chain`",
        ),
        (lambda: to_lora_of(jp.chain(jp.pissa(R, LAYERS))), "from 'chain'.*give that method in"),
        (lambda: to_lora_of(len), "from '<built-in function len>'. From a `chain`"),
        (
            lambda: to_lora_of(adapter={}),
            r"adapter lacks \['head/a', 'head/b'\].*it has \[\]. Give all",
        ),
        (
            lambda: to_lora_of(start={"head/a": 1}),
            r"start lacks \['head/b'\].*has \['head/a'\]. Give all",
        ),
    ],
)
def test_to_lora_refuses_other_methods_and_missing_arrays(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pissa_trains_the_largest_components():
    frozen, adapter = jp.split(jp.pissa(R, LAYERS, alpha=3.0, dtype=jnp.float64)(KEY, PARAMS))
    u, s, v = np.linalg.svd(PARAMS["layers"]["up"])
    want = (u[..., :R] * s[:, None, :R]) @ v[:, :R]
    scale = 3.0 / R
    np.testing.assert_allclose(scale * adapter["layers/up/a"] @ adapter["layers/up/b"], want)
    sizes = [np.linalg.norm(adapter[f"layers/up/{n}"][0], axis=i) for n, i in (("a", 0), ("b", 1))]
    np.testing.assert_allclose(*sizes)  # evenly shared


def test_a_sketch_finds_the_leading_components():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(40, 30)) @ np.diag(0.7 ** np.arange(30.0)))
    u, s, v = top_singular_triplets(KEY, w, 4, n_iter=4)
    exact = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(s, exact[:4], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(w - u * s @ v, 2), exact[4], rtol=1e-5)


def test_oloras_outputs_are_orthonormal():
    _, adapter = jp.split(jp.olora(R, LAYERS, dtype=jnp.float64)(KEY, PARAMS))
    b = adapter["layers/down/b"]
    np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), [np.eye(R)] * L, atol=1e-12)
    # R is triangular: the first r columns of w^T are in the span of the first r of Q.
    part = PARAMS["layers"]["down"][:, :R]
    product = adapter["layers/down/a"][:, :R] @ b
    np.testing.assert_allclose(product, part, atol=1e-9)


def test_corda_takes_what_the_tasks_inputs_see():
    """Of all matrices of rank r, a0 @ b0 is the closest to w where it is multiplied with C."""
    w, c = PARAMS["head"], moments()["head"].second / 72
    c = c + 0.01 * jnp.trace(c) / D * jnp.eye(D)
    head = SITES.match("head")
    for mode, k in (
        ("instruction-previewed", slice(0, R)),
        ("knowledge-preserved", slice(-R, None)),
    ):
        _, adapter = jp.split(
            jp.corda(R, head, moments(), mode=mode, dtype=jnp.float64)(KEY, PARAMS)
        )
        u, s, v = np.linalg.svd(c @ w, full_matrices=False)
        want = np.linalg.inv(c) @ (u[:, k] * s[k]) @ v[k]
        np.testing.assert_allclose(adapter["head/a"] @ adapter["head/b"], want, atol=1e-9)


def test_lora_gas_first_step_is_the_best_of_rank_2r():
    _, start = jp.split(
        jp.lora_ga(R, SITES.match("head"), gradients(), gamma=4.0, dtype=jnp.float64)(KEY, PARAMS)
    )
    a, b, g = start["head/a"], start["head/b"], gradients()["head"]
    step = a @ (a.T @ g) + (g @ b.T) @ b  # a @ b after a small step down, to first order
    u, s, v = np.linalg.svd(g, full_matrices=False)
    best = (u[:, : 2 * R] * s[: 2 * R]) @ v[: 2 * R]
    np.testing.assert_allclose(step / (5**0.5 / 4), best, atol=1e-9)


def test_eva_spends_its_ranks_where_inputs_vary():
    method = jp.eva(R, SITES.linear, moments(), dtype=jnp.float64, alpha=4.0)
    frozen, adapter = jp.split(method(KEY, PARAMS))
    ranks = {
        path: adapter[f"{path}/a"].shape[-1] for path in SITES.linear if f"{path}/a" in adapter
    }
    costs = {"layers/up": L, "layers/down": L, "head": 1}
    spent = sum(costs[path] * r for path, r in ranks.items())
    assert R * (2 * L + 1) - L < spent <= R * (2 * L + 1) and max(ranks.values()) <= 2 * R
    np.testing.assert_allclose(outputs(frozen, adapter), model(PARAMS, BATCHES[0]), rtol=1e-12)
    a, second = adapter["head/a"], moments()["head"].second
    values, vectors = np.linalg.eigh(second)
    best = vectors[:, ::-1][:, : a.shape[-1]]
    np.testing.assert_allclose(np.abs(a.T @ best), np.eye(a.shape[-1]), atol=1e-9)
    equal = jp.eva(R, SITES.linear, moments(), rho=1.0)
    _, adapter = jp.split(equal(KEY, PARAMS))
    assert {adapter[f"{path}/a"].shape[-1] for path in SITES.linear} == {R}


def of_variances(values, *stack):
    """Moments whose inputs have these variances along the axes, the same ones in all layers."""
    second = jnp.broadcast_to(jnp.diag(jnp.asarray(values)), (*stack, len(values), len(values)))
    return jp.calibration.Moments(second, jnp.zeros((*stack, len(values))), jnp.ones(stack))


STEEP, EVEN = 2.0 ** -np.arange(D), np.ones(D)


@pytest.mark.parametrize(
    "layers, head, ranks",
    [
        # The head takes twice the rank. Six ranks are left, and a component of the layers costs 4.
        (EVEN, STEEP, {"layers": 1, "head": 4}),
        # The layers take two, for 8. What is left is too little for a third, and the head's.
        (STEEP, EVEN, {"layers": 2, "head": 2}),
        # Nothing is explained where inputs are zero, so that those come last.
        (EVEN, 0 * EVEN, {"layers": 2, "head": 2}),
        (0 * EVEN, EVEN, {"layers": 1, "head": 4}),
    ],
)
def test_evas_components_of_a_stack_cost_as_many_ranks_as_it_has_layers(layers, head, ranks):
    def square(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
        return h @ params["head"]

    base = {"layers": jnp.ones((4, D, D)), "head": jnp.ones((D, D))}
    sites = jp.sites(square, base, BATCHES[0]).linear
    found = {"layers": of_variances(layers, 4), "head": of_variances(head)}
    frozen, adapter = jp.split(jp.eva(2, sites, found)(KEY, base))
    assert {path: adapter[f"{path}/a"].shape[-1] for path in ranks} == ranks
    most = jp.count_params(*jp.split(jp.lora(2, sites)(KEY, base))).trainable
    assert jp.count_params(frozen, adapter).trainable <= most == 10 * 2 * D
    assert all(jnp.isfinite(x).all() for x in adapter.values())


def test_eva_counts_a_layer_without_inputs_as_one_that_explains_nothing():
    """The mean shares of `up` begin at 1/3, 1/6, 1/12; those of `down` are 1/12 each."""
    up = of_variances(STEEP, L)
    found = {
        "layers/up": up._replace(second=up.second.at[:2].set(0)),
        "layers/down": of_variances(np.ones(F), L),
    }
    _, adapter = jp.split(jp.eva(R, LAYERS, found)(KEY, PARAMS))
    ranks = {path: adapter[f"{path}/a"].shape[-1] for path in LAYERS}
    assert ranks == {"layers/up": 2, "layers/down": 2}


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_eva_is_stored_as_lora_with_the_same_scale(tmp_path, scaling):
    method = jp.eva(R, SITES.linear, moments(), dtype=jnp.float64, alpha=4.0, scaling=scaling)
    frozen, adapter = jp.split(method(KEY, PARAMS))
    adapter = moved(adapter)
    save_adapter(tmp_path, adapter, method, PARAMS, key=KEY)
    loaded = load_adapter(tmp_path, PARAMS)
    np.testing.assert_array_equal(outputs(loaded.frozen, loaded.adapter), outputs(frozen, adapter))
    scale = 4.0 / R if scaling == "alpha/r" else 4.0 / R**0.5
    merged = jp.merge(jp.combine(frozen, adapter))
    want = PARAMS["head"] + scale * adapter["head/a"] @ adapter["head/b"]
    np.testing.assert_allclose(merged["head"], want, rtol=1e-9)


def of_no_inputs(path, at):
    own = moments()[path]
    return {**moments(), path: own._replace(second=own.second.at[at].set(0))}


def of_nan(path):
    layers = {**PARAMS["layers"], path.split("/")[1]: jnp.full((L, D, F), jnp.nan)}
    return {**PARAMS, "layers": layers}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jp.eva(R, LAYERS, moments(), rho=0.5), r"eva\(rho=0.5\)`: give at least 1"),
        (
            lambda: jp.eva(6, SITES.linear, moments()),
            r"eva\(rank=6\)` needs .* 'head' of shape \(8, 5\) is 8 x 5",
        ),
        (lambda: jp.eva(0, LAYERS, moments()), r"eva\(rank=0\)` needs 1 <= rank .* 'layers/down'"),
        (
            lambda: jp.eva(R + 1, SITES.match("head").output_slice(0, 5), moments()),
            r"eva\(rank=3\)` needs .* 'head' of shape \(8, 5\) is 8 x 1",
        ),
        (lambda: jp.eva(R, LAYERS, {}), "no moments of the inputs of 'layers/down'; those given"),
        (lambda: jp.corda(R, LAYERS, {}), "no moments of the inputs of 'layers/down'; those given"),
        (
            lambda: jp.corda(R, LAYERS, moments(), mode="all"),
            "mode='all'.*choose 'instruction-previewed' .PEFT's 'ipm'. or",
        ),
        (lambda: jp.corda(R, LAYERS, moments(), damping=0), "damping=0.*positive fraction"),
        (
            lambda: jp.corda(R, LAYERS, of_no_inputs("layers/up", 1)),
            r"`corda`: the inputs of 'layers/up' were all zero or .* in \[\[1\]\] of its stack",
        ),
        (
            lambda: jp.corda(R, SITES.match("head"), of_no_inputs("head", ...)),
            "`corda`: the inputs of 'head' were all zero or not finite, so",
        ),
        (
            lambda: jp.corda(R, LAYERS, moments())(KEY, of_nan("layers/up")),
            r"corda\(damping=0.01\)`: the moments of 'layers/up' cannot be inverted in float64, or",
        ),
        (
            lambda: jp.lora_ga(
                R, LAYERS, {**gradients(), "layers/up": jnp.full((L, D, F), jnp.nan)}
            ),
            "`lora_ga`: the gradient of 'layers/up' is not finite.*names the batch",
        ),
        (lambda: jp.lora_ga(R, LAYERS, gradients(), gamma=0), "gamma=0.*positive number"),
        (
            lambda: jp.lora_ga(R, LAYERS, {}),
            r"'layers/down' has shape None, but should have \(3, 12, 8",
        ),
        (lambda: jp.pissa(R, LAYERS, n_iter=-1), r"n_iter=-1\)`: give 0 or more iterations"),
        (lambda: jp.lora_ga(5, LAYERS, gradients())(KEY, PARAMS), "2 \\* rank = 10.*rank to 4"),
        (
            lambda: jp.olora(R, LAYERS.output_slice(0, 2)),
            "`olora`: a part of the columns of 'layers",
        ),
        (
            lambda: jp.chain(jp.lora(R, LAYERS), jp.pissa(R, LAYERS))(KEY, PARAMS),
            "`pissa`: 'layers/down' is trained by another method already",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ON_LORA = {
    "adalora": jp.adalora,
    "corda": lambda r, sites: jp.corda(r, sites, moments()),
    "dora": jp.dora,
    "hira": jp.hira,
    "lora": jp.lora,
    "lora_fa": jp.lora_fa,
    "lora_ga": lambda r, sites: jp.lora_ga(r, sites, gradients()),
    "moelora": lambda r, sites: jp.moelora(r, sites, experts=3, tasks=2),
    "olora": jp.olora,
    "pissa": jp.pissa,
    "poly": lambda r, sites: jp.poly(r, sites, skills=2, tasks=2),
    "unipelt": lambda r, sites: jp.unipelt(sites, *[sites] * 3, rank=r, bottleneck_dim=1, length=1),
}


@pytest.mark.parametrize("name", ON_LORA)
def test_what_is_built_on_lora_refuses_in_its_own_name(name):
    with pytest.raises(ValueError, match=rf"`{name}\(rank=9\)` needs .*'layers/down' of shape"):
        ON_LORA[name](9, LAYERS)


@pytest.mark.parametrize("make, found", [(jp.corda, moments), (jp.lora_ga, gradients)])
def test_what_a_task_has_shown_may_be_traced_or_a_constant_of_a_traced_program(make, found):
    def start(params, found):
        return jp.split(make(R, LAYERS, found, dtype=jnp.float64)(KEY, params))[1]

    want = start(PARAMS, found())
    for got in (jax.jit(start)(PARAMS, found()), jax.jit(lambda p: start(p, found()))(PARAMS)):
        for path in ("layers/up", "layers/down"):
            products = (x[f"{path}/a"] @ x[f"{path}/b"] for x in (got, want))
            np.testing.assert_allclose(*products, atol=1e-9)


def test_moments_of_another_model_are_refused():
    other = {path: m._replace(second=m.second[..., 1:, 1:]) for path, m in moments().items()}
    with pytest.raises(ValueError, match=r"'layers/down' have shape \(3, 11, 11\), but must"):
        jp.eva(R, LAYERS, other)


@pytest.mark.parametrize("make", [jp.lora, jp.adalora, jp.dora], ids=lambda f: f.__name__)
def test_a_full_rank_reaches_any_update(make):
    head = SITES.match("head")
    change = np.random.default_rng(3).normal(size=PARAMS["head"].shape)
    frozen, adapter = jp.split(make(5, head, dtype=jnp.float64)(KEY, PARAMS))
    u, s, v = np.linalg.svd(change, full_matrices=False)
    values = {"head/a": u * s, "head/b": v}
    if make is jp.adalora:
        values = {"head/a": u, "head/values": s, "head/b": v}
    if make is jp.dora:
        values["head/magnitude"] = np.linalg.norm(PARAMS["head"] + change, axis=0)
    assert values.keys() == adapter.keys()
    merged = jp.merge(jp.combine(frozen, jax.tree.map(jnp.asarray, values)))
    np.testing.assert_allclose(merged["head"], PARAMS["head"] + change, rtol=1e-9)
