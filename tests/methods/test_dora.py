"""DoRA against its formula, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

KEY = jax.random.key(0)


def model(p, x):
    return jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]


def params():
    shapes = dict(up=(12, 20), b=(20,), down=(20, 9))
    keys = jax.random.split(KEY, 3)
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


X = jax.random.normal(jax.random.key(5), (4, 12))


def split(**options):
    sites = jp.sites(model, params(), X)
    return jp.split(jp.dora(3, sites.linear, dtype=jnp.float64, **options)(KEY, params()))


def moved(adapter):
    keys = jax.random.split(jax.random.key(9), len(adapter))
    return {
        n: v + jax.random.normal(k, v.shape)
        for k, (n, v) in zip(keys, adapter.items(), strict=True)
    }


def by_hand(p, adapter, s, still=lambda x: x):
    p = dict(p)
    for name in ("up", "down"):
        v = p[name] + s * adapter[f"{name}/a"] @ adapter[f"{name}/b"]
        p[name] = adapter[f"{name}/magnitude"] * v / still(jnp.linalg.norm(v, axis=0))
    return model(p, X)


def test_it_starts_at_the_base_model_and_is_its_formula_afterwards():
    frozen, adapter = split(alpha=6.0)
    start = jp.lift(model)(jp.combine(frozen, adapter), X)
    np.testing.assert_allclose(start, model(params(), X), rtol=1e-12)
    assert sum(v.size for v in adapter.values()) == 3 * (12 + 20) + 20 + 3 * (20 + 9) + 9
    adapter = moved(adapter)
    got = jax.jit(jp.lift(model))(jp.combine(frozen, adapter), X)
    np.testing.assert_allclose(got, by_hand(params(), adapter, 2.0), rtol=1e-10)


def test_gradients_take_the_lengths_for_constants():
    frozen, adapter = split()
    adapter = moved(adapter)
    lifted = jax.grad(lambda a: jnp.sum(jp.lift(model)(jp.combine(frozen, a), X) ** 2))(adapter)
    still = jax.lax.stop_gradient
    wanted = jax.grad(lambda a: jnp.sum(by_hand(params(), a, 1.0, still) ** 2))(adapter)
    for name, grad in lifted.items():
        np.testing.assert_allclose(grad, wanted[name], rtol=1e-9, err_msg=name)
    whole = jax.grad(lambda a: jnp.sum(by_hand(params(), a, 1.0) ** 2))(adapter)
    assert not np.allclose(whole["up/a"], wanted["up/a"])


def test_a_column_of_zeros_stays_one():
    """As pruning by outputs leaves them: it has no direction, and 0 / 0 would be all there is."""
    sites, p = jp.sites(model, params(), X).linear, params()
    masks = jp.sparsity.topk_mask(
        jp.sparsity.magnitude_scores(p, sites), sites, 0.5, structure="output", scope="matrix"
    )
    method = jp.chain(jp.prune(masks, sites), jp.dora(3, sites, dtype=jnp.float64))
    frozen, adapter = jp.split(method(KEY, p))

    @jax.jit
    def loss(adapter):
        return jnp.sum((jp.lift(model)(jp.combine(frozen, adapter), X) - 1) ** 2)

    values = [loss(adapter)]
    for _ in range(3):
        adapter = jax.tree.map(lambda v, g: v - 1e-3 * g, adapter, jax.grad(loss)(adapter))
        values.append(loss(adapter))
    assert values[3] < values[0]
    merged = jp.merge(jp.combine(frozen, adapter))
    for path, mask in masks.items():
        np.testing.assert_array_equal(merged[path] != 0, mask)


def test_a_slice_of_the_outputs_is_refused():
    sites = jp.sites(model, params(), X)
    part = r"OutputSlice\(index=1, of=2"
    with pytest.raises(ValueError, match=rf"columns of 'up' is selected \({part}"):
        jp.dora(2, sites.match("up").output_slice(1, 2))


def test_a_base_that_is_trained_is_refused():
    sites = jp.sites(model, params(), X)
    with pytest.raises(ValueError, match=r"'up' is trained by another method already"):
        jp.chain(jp.lora(2, sites.match("up")), jp.dora(2, sites.match("up")))(KEY, params())
    after = jp.chain(jp.dora(2, sites.match("up"), dtype=X.dtype), jp.lora(2, sites.match("up")))
    frozen, adapter = jp.split(after(KEY, params()))
    out = jp.lift(model)(jp.combine(frozen, adapter), X)
    np.testing.assert_allclose(out, model(params(), X), rtol=1e-10)


def test_flops_are_within_a_tenth_of_loras():
    """On layers of 256, where the products with the weights are nearly all there is."""
    n, layers, tokens = 256, 3, 1024
    p = {"w": jnp.ones((layers, n, n), jnp.float32) / n}
    x = jnp.ones((tokens, n), jnp.float32)

    def f(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    sites = jp.sites(f, p, x)

    def flops(method):
        frozen, adapter = jp.split(method(8, sites.linear)(KEY, p))
        loss = lambda a, f_: jnp.sum(jp.lift(f)(jp.combine(f_, a), x))  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss)).lower(adapter, frozen).compile()
        return step.cost_analysis()["flops"]

    assert flops(jp.dora) <= 1.10 * flops(jp.lora)
