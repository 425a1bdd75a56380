"""LoRA: the formula, its scalings, inits, parts, dropout, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

F8 = jnp.float64


def linear(p, x):
    return x @ p["w"]


def sites_of(shape=(8, 6), fn=linear):
    return jp.sites(fn, {"w": jax.ShapeDtypeStruct(shape, F8)}, jnp.ones((2, shape[0]), F8))


def make(method, w):
    frozen, adapter = jp.split(method(jax.random.key(0), {"w": w}))
    return frozen, toy.perturbed(adapter)


@pytest.mark.parametrize(
    "alpha, scaling, s",
    [(None, "alpha/r", 1), (6, "alpha/r", 2), (6, "alpha/sqrt(r)", 6 / 3**0.5)],
)
def test_the_matrix_is_w_plus_s_a_b(alpha, scaling, s):
    w = toy.normal(0, 8, 6)
    frozen, adapter = make(jp.lora(3, sites_of().linear, alpha=alpha, scaling=scaling, dtype=F8), w)
    by_hand = w + s * adapter["w/a"] @ adapter["w/b"]
    tree = jp.combine(frozen, adapter)
    np.testing.assert_allclose(jp.merge(tree)["w"], by_hand, rtol=1e-12)
    x = toy.normal(1, 4, 8)
    np.testing.assert_allclose(jp.lift(linear)(tree, x), x @ by_hand, rtol=1e-12)


def test_starts_at_the_base_model_bit_for_bit():
    p, ids = toy.params(), toy.ids()
    sites = jp.sites(toy.model, p, ids)
    frozen, adapter = jp.split(jp.lora(2, sites.matrices, dtype=F8)(jax.random.key(0), p))
    out = jax.jit(jp.lift(toy.model))(jp.combine(frozen, adapter), ids)
    np.testing.assert_array_equal(out, jax.jit(toy.model)(p, ids))


def test_inits_have_the_spread_they_promise():
    w = jnp.zeros((400, 300), F8)
    for init, spread in (("kaiming", 1 / (3 * 400) ** 0.5), ("gaussian", 1 / 400**0.5)):
        method = jp.lora(64, sites_of((400, 300)).linear, init=init, dtype=F8)
        _, adapter = jp.split(method(jax.random.key(0), {"w": w}))
        np.testing.assert_allclose(adapter["w/a"].std(), spread, rtol=0.02)
        assert not adapter["w/b"].any()


def test_selecting_more_weights_changes_no_other_init():
    p, ids = toy.params(), toy.ids()
    sites = jp.sites(toy.model, p, ids)
    few = jp.split(jp.lora(2, sites.match("*/q/kernel"))(jax.random.key(0), p))[1]
    many = jp.split(jp.lora(2, sites.linear)(jax.random.key(0), p))[1]
    np.testing.assert_array_equal(few["layers/q/kernel/a"], many["layers/q/kernel/a"])


def test_the_adapter_keeps_its_dtype_and_the_base_product_its_own():
    w = toy.normal(0, 8, 6).astype(jnp.bfloat16)
    sites = jp.sites(linear, {"w": w}, jnp.ones((2, 8), jnp.bfloat16))
    frozen, adapter = jp.split(jp.lora(2, sites.linear)(jax.random.key(0), {"w": w}))
    assert {x.dtype for x in adapter.values()} == {jnp.dtype(jnp.float32)}
    x = jnp.ones((2, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jp.lift(linear))(jp.combine(frozen, adapter), x)
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [e.outvars[0].aval.dtype.name for e in products] == ["bfloat16", "float32", "float32"]
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [1, 2])
def test_a_part_of_the_outputs_is_that_block_in_each_group(groups):
    """The value third of a fused qkv kernel, plain and interleaved by heads."""
    w = toy.normal(0, 8, 12)
    chosen = sites_of((8, 12)).linear.output_slice(2, 3, groups)
    frozen, adapter = make(jp.lora(2, chosen, dtype=F8), w)
    assert adapter["w/b"].shape == (2, 4)
    columns = np.arange(12).reshape(groups, 3, -1)[:, 2].ravel()
    delta = np.zeros((8, 12))
    delta[:, columns] = adapter["w/a"] @ adapter["w/b"]
    tree = jp.combine(frozen, adapter)
    np.testing.assert_allclose(jp.merge(tree)["w"], w + delta, rtol=1e-12)
    x, y = toy.normal(1, 4, 8), toy.normal(2, 4, 12)
    np.testing.assert_allclose(jp.lift(linear)(tree, x), x @ (w + delta), rtol=1e-12)
    back = jp.lift(lambda p, y: y @ p["w"].T)(tree, y)
    np.testing.assert_allclose(back, y @ (w + delta).T, rtol=1e-12)


def test_per_target_ranks_and_strengths_follow_the_first_pattern():
    p, ids = toy.params(), toy.ids()
    sites = jp.sites(toy.model, p, ids)
    method = jp.lora({"*/q/*": 4, "*": 1}, sites.linear, alpha={"*/q/*": 8.0, "*": 3.0})
    tree = method(jax.random.key(0), p)
    weights = {n: tree["layers"][n]["kernel"].weight for n in ("q", "up")}
    assert [(w.a.shape[-1], w.scale) for w in weights.values()] == [(4, 2.0), (1, 3.0)]


def test_dropout_is_off_without_a_key_and_differs_between_layers_and_uses():
    def fn(p, x):
        def step(carry, w):
            return carry, (x @ w, x @ w)

        return jax.lax.scan(step, 0, p["w"])[1]

    w = jnp.zeros((3, 8, 6), F8)
    x = jnp.ones((1, 8), F8)
    sites = jp.sites(fn, {"w": w}, x)
    method = jp.lora(8 - 2, sites.linear, dropout=0.5, dtype=F8)
    frozen, adapter = jp.split(method(jax.random.key(0), {"w": w}))
    adapter["w/a"] = jnp.broadcast_to(jnp.eye(8, 6), (3, 8, 6))
    adapter["w/b"] = jnp.broadcast_to(jnp.eye(6), (3, 6, 6))
    run = jax.jit(jp.lift(fn))
    np.testing.assert_array_equal(run(jp.combine(frozen, adapter), x)[0], np.ones((3, 1, 6)))
    first, second = run(jp.combine(frozen, adapter, dropout=jax.random.key(3)), x)
    masks = {tuple(m.ravel()) for m in [*np.asarray(first), *np.asarray(second)]}
    assert len(masks) == 6 and set(np.unique(first)) == {0.0, 2.0}
    again, _ = run(jp.combine(frozen, adapter, dropout=jax.random.key(3)), x)
    np.testing.assert_array_equal(first, again)


def test_dropout_keeps_the_expected_value():
    w = jnp.zeros((64, 4), F8)
    method = jp.lora(4, sites_of((64, 4)).linear, dropout=0.25, dtype=F8)
    frozen, adapter = make(method, w)
    x = jnp.ones((20_000, 64), F8)
    run = jax.jit(jp.lift(linear))
    dropped = run(jp.combine(frozen, adapter, dropout=jax.random.key(0)), x).mean(0)
    np.testing.assert_allclose(dropped, run(jp.combine(frozen, adapter), x)[0], atol=0.02)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: jp.lora(7, s)(jax.random.key(0), {"w": jnp.ones((8, 6))}), r"rank=7.*8 x 6"),
        (lambda s: jp.lora(0, s)(jax.random.key(0), {"w": jnp.ones((8, 6))}), r"rank=0"),
        (lambda s: jp.lora(2, s, dropout=1.0), r"dropout=1.0"),
        (lambda s: jp.lora(2, s, init="xavier"), r"init='xavier'"),
        (lambda s: jp.lora(2, s, scaling="r"), r"scaling='r'"),
        (lambda s: jp.lora({"q": 2}, s), r"covers 'w'"),
        (lambda s: jp.lora({"*": 2, "value": 3}, s), r"'value' of `rank` is never used"),
        (lambda s: jp.lora(2, s - s)(jax.random.key(0), {}), r"selects no parameter"),
        (lambda s: jp.lora(2, s)(jax.random.key(0), {"v": jnp.ones(2)}), r"selects 'w'.*\['v'\]"),
        (
            lambda s: jp.lora(2, s)(jax.random.key(0), {"w": jnp.ones((8, 5))}),
            r"has shape \(8, 5\), but had \(8, 6\)",
        ),
    ],
)
def test_refusals_name_the_thing(call, message):
    with pytest.raises(ValueError, match=message):
        call(sites_of().linear)


def test_a_bias_is_refused():
    sites = jp.sites(toy.model, toy.params(), toy.ids())
    with pytest.raises(ValueError, match=r"'layers/q/bias' of shape \(3, 16\).*as bias"):
        jp.lora(1, sites.match("layers/q/bias"))(jax.random.key(0), toy.params())
