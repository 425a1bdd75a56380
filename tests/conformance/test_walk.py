"""The walker finds a weight however it was formed, and takes nothing else for one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from .rows.row import params, random
from .walk import footprint, more_than, parameter_footprint, weight_sized

L, D, F, R = 3, 13, 17, 2
X = random(2, 5, D, seed=9)
ADAPTER = dict(a=random(D, R, seed=3), b=random(R, F, seed=4))
STACKED = dict(a=random(L, D, R, seed=3), b=random(L, R, D, seed=4))
W = random(D, F, seed=5)
WS = random(L, D, D, seed=6)


def found(fn, adapter, counts=(D * F,)):
    """Weight-sized results of the value and gradient of sum(sin(fn(adapter, x)))."""
    step = jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(fn(p, x))), argnums=(0, 1))
    return weight_sized(jax.make_jaxpr(step)(adapter, X), counts)


def formed(p, x):
    return x @ (W + p["a"] @ p["b"])


def factored(p, x):
    return x @ W + (x @ p["a"]) @ p["b"]


def scanned(layer):
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (layer(*p, x), None), x, (WS, p))[0]

    return fn


def layer_formed(w, p, x):
    return jnp.tanh(x @ (w + p["a"] @ p["b"]))


def layer_factored(w, p, x):
    return jnp.tanh(x @ w + (x @ p["a"]) @ p["b"])


STACK_COUNTS = (L * D * D, D * D)


def test_factored_lora_by_hand_has_no_weight_sized_result():
    assert not found(factored, ADAPTER)
    assert not found(jax.checkpoint(factored), ADAPTER)


def test_factored_lora_in_a_scan_has_no_weight_sized_result():
    assert not found(scanned(layer_factored), STACKED, STACK_COUNTS)
    assert not found(scanned(jax.checkpoint(layer_factored)), STACKED, STACK_COUNTS)


def test_a_formed_weight_is_found_with_its_primitives_and_its_line():
    results = found(formed, ADAPTER)
    assert {"add", "dot_general"} <= {r.primitive for r in results}
    assert {r.shape for r in results} <= {(D, F), (F, D)}
    assert any("test_walk.py" in r.where and "(formed)" in str(r) for r in results)


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable),
        lambda f: jax.jit(jax.jit(f)),
        lambda f: lambda p, x: jax.lax.cond(x.sum() > 0, f, factored, p, x),
        lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x),
    ],
    ids=["jit", "remat", "remat with a policy", "jit in jit", "cond", "vmap"],
)
def test_a_formed_weight_is_found_inside(wrap):
    assert "add" in {r.primitive for r in found(wrap(formed), ADAPTER)}


def test_a_formed_layer_is_found_inside_a_scan():
    for layer in (layer_formed, jax.checkpoint(layer_formed)):
        results = found(scanned(layer), STACKED, STACK_COUNTS)
        assert ("add", (D, D)) in {(r.primitive, r.shape) for r in results}


def test_a_stack_that_a_scan_puts_together_is_found():
    def fn(p, x):
        ws = jax.lax.map(lambda p: p["a"] @ p["b"], p)
        return jnp.einsum("btd,ldf->btf", x, ws)

    results = found(fn, STACKED, (L * D * D,))
    assert "scan" in {r.primitive for r in results}


def test_a_formed_weight_is_found_inside_a_while_loop():
    def fn(p, x):
        return jax.lax.while_loop(
            lambda c: c[1] < 3, lambda c: (layer_formed(WS[0], p, c[0]), c[1] + 1), (x, 0)
        )[0]

    p = jax.tree.map(lambda v: v[0], STACKED)
    assert "add" in {r.primitive for r in weight_sized(jax.make_jaxpr(fn)(p, X), (D * D,))}


def test_a_formed_weight_is_found_in_the_backward_pass_of_a_custom_vjp():
    @jax.custom_vjp
    def product(p, x):
        return factored(p, x)

    def backward(saved, g):
        p, x = saved
        w = W + p["a"] @ p["b"]  # formed here, and only here
        return jax.tree.map(jnp.zeros_like, p), g @ w.T

    product.defvjp(lambda p, x: (factored(p, x), (p, x)), backward)
    assert "add" in {r.primitive for r in found(product, ADAPTER)}
    assert not weight_sized(jax.make_jaxpr(product)(ADAPTER, X), (D * F,))


def test_what_no_output_needs_is_not_counted():
    def fn(p, x):
        unused = W + p["a"] @ p["b"]
        inner = jax.jit(lambda x, w: (x, w * 2))(x @ p["a"], unused)
        return inner[0] @ p["b"] + x @ W

    assert not found(fn, ADAPTER)


def test_the_gradient_of_a_frozen_weight_is_dead_but_that_of_a_trained_one_counts():
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(
        lambda w, x: (x @ w, (w, x)),
        lambda s, g: (jnp.einsum("bti,bto->io", s[1], g), jnp.einsum("bto,io->bti", g, s[0])),
    )
    assert not found(lambda p, x: product(W, x) + (x @ p["a"]) @ p["b"], ADAPTER)
    assert found(lambda w, x: product(w, x), W)


def test_a_value_that_a_scan_carries_but_no_output_needs_is_dead():
    def fn(p, x):
        def body(c, _):
            x, w = c
            return (jnp.tanh(x @ p["a"] @ p["b"][:, :D]), w + p["a"] @ p["b"]), None

        return jax.lax.scan(body, (x, W), None, length=2)[0][0]

    assert not weight_sized(jax.make_jaxpr(fn)(ADAPTER, X), (D * F,))


def test_only_results_beyond_the_allowed_ones_are_left():
    once = found(lambda p, x: x @ (p["a"] @ p["b"]), ADAPTER)
    twice = once + once
    assert not more_than(once, twice)
    assert more_than(twice, once) == once


def test_a_footprint_knows_a_weight_in_every_cut_and_shape():
    def fn(p, x):
        y = x @ p["w"].T.reshape(2, 6, 17)[1].T
        return y, p["s"].sum()

    p = params(w=(17, 12), s=(7, 11))
    jaxpr = jax.make_jaxpr(lambda s, w, x: fn({"w": w, "s": s}, x))(p["s"], p["w"], random(3, 17))
    seen = footprint(jaxpr, [1])
    assert seen.weights == {1: {17 * 12, 17 * 6}}
    assert (3, 6) in {r.shape for r in seen.activations}


def test_a_footprint_follows_a_stack_into_a_scan():
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    seen = parameter_footprint(fn, {"w": WS}, (X,), ["w"])
    assert seen.weights == {0: {L * D * D, D * D}}
