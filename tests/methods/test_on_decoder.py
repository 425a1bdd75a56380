"""Methods on the reference decoder, whose file knows nothing of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder

from . import toy

CONFIG = decoder.Config(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    model_type="qwen2",
    tie_word_embeddings=True,
)
N = 3


@pytest.fixture(scope="module")
def params():
    shapes, treedef = jax.tree.flatten(decoder.shapes(CONFIG, jnp.float64))
    arrays = [
        0.3 * jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(shapes)
    ]
    return jax.tree.unflatten(treedef, arrays)


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(9), (2, 7), 0, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def sites(params, ids):
    return jp.sites(decoder.apply_fn(CONFIG), params, ids)


def test_sites_of_the_decoder(sites):
    assert set(sites.linear) == {
        f"layers/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert set(sites.embedding) == {"embed/embedding"}
    assert set(sites.bias) == {f"layers/attn/{n}/bias" for n in "qkv"}
    assert set(sites.norm) == {"layers/attn_norm/scale", "layers/mlp_norm/scale", "norm/scale"}
    assert sites["layers/attn/q/kernel"].bias == "layers/attn/q/bias"
    assert not any(site.materialized for site in sites.values())


def test_lora_everywhere_is_the_merged_model(sites, params, ids):
    method = jp.lora(2, sites.matrices, dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    tree = jp.combine(frozen, toy.perturbed(adapter, 0.2))
    forward = decoder.apply_fn(CONFIG, remat="full")
    out = jax.jit(jp.lift(forward, materialize="error"))(tree, ids)
    np.testing.assert_allclose(out, forward(jp.merge(tree), ids), atol=1e-10)


def test_a_prefix_holds_keys_after_the_rotation(sites, params, ids):
    """Against attention that is handed the trained rows as keys and values of its own."""
    frequencies = CONFIG.rope.frequencies(CONFIG.head_dim)
    method = jp.prefix_tuning(
        N,
        sites.match("*/k/kernel"),
        sites.match("*/v/kernel"),
        rope=frequencies,
        dtype=jnp.float64,
    )
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    adapter = toy.perturbed(adapter, 0.5)
    virtual, virtual_positions = jp.prompts.prepend_virtual_tokens(ids, N)
    lifted = jp.lift(decoder.apply_fn(CONFIG))
    out = lifted(jp.combine(frozen, adapter, virtual_positions=virtual_positions), virtual)
    out = jp.prompts.drop_virtual_positions(out, N)

    layer = iter(range(CONFIG.num_layers))

    def attend(q, k, v, *, query_positions, key_positions, window):
        # Unrolled below, so that each call is the next layer.
        i = next(layer)
        rows = [adapter[f"layers/attn/{n}/kernel/rows"][i] for n in "kv"]
        rows = [r.reshape(1, N, CONFIG.num_kv_heads, -1) for r in rows]
        k, v = (
            jnp.concatenate([jnp.broadcast_to(r, (2, *r.shape[1:])), x], axis=1)
            for r, x in zip(rows, (k, v), strict=True)
        )
        keys = decoder.TokenPositions(jnp.arange(N + ids.shape[1])[None], None)
        queries = decoder.TokenPositions(N + jnp.arange(ids.shape[1])[None], None)
        return decoder.attention(
            q, k, v, query_positions=queries, key_positions=keys, window=window
        )

    x = params["embed"]["embedding"][ids]
    positions = N + jnp.arange(ids.shape[1])[None]
    by_hand = unrolled(params, x, positions, attend)
    np.testing.assert_allclose(out, by_hand, atol=1e-6)
    plain = decoder.apply_fn(CONFIG)(params, ids)
    assert np.abs(np.asarray(out) - np.asarray(plain)).max() > 0.1


def unrolled(params, x, positions, attend):
    """The decoder layer by layer in plain JAX."""
    angles = positions[:, :, None, None] * CONFIG.rope.frequencies(CONFIG.head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def norm(x, p):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * p["scale"]

    def turn(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def linear(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    for i in range(CONFIG.num_layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
        h = norm(x, p["attn_norm"])
        heads = (*h.shape[:2], -1, CONFIG.head_dim)
        q, k, v = (linear(h, p["attn"][n]).reshape(heads) for n in "qkv")
        y = attend(turn(q), turn(k), v, query_positions=None, key_positions=None, window=None)
        x = x + linear(y.reshape(*h.shape[:2], -1), p["attn"]["o"])
        h = norm(x, p["mlp_norm"])
        inner = jax.nn.silu(linear(h, p["mlp"]["gate"])) * linear(h, p["mlp"]["up"])
        x = x + linear(inner, p["mlp"]["down"])
    return norm(x, params["norm"]) @ params["embed"]["embedding"].T


def test_generation_runs_on_the_lifted_model_through_the_cache(sites, params, ids):
    from jaxpeft.serve import generator

    method = jp.lora(2, sites.linear, dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    tree = jp.combine(frozen, toy.perturbed(adapter, 0.2))
    forward = decoder.apply_fn(CONFIG)
    cache = functools.partial(decoder.init_cache, CONFIG, dtype=jnp.float64)
    lifted = generator(jp.lift(forward, materialize="error"), cache, max_new_tokens=5)
    merged = generator(forward, cache, max_new_tokens=5)
    np.testing.assert_array_equal(
        jax.tree.leaves(lifted(tree, ids))[0], jax.tree.leaves(merged(jp.merge(tree), ids))[0]
    )
