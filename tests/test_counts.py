"""Numbers that papers report, from shapes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

import jaxpeft as jp
from jaxpeft.models import decoder


def split_shapes(method, params):
    """`jp.split(method(key, params))` of shapes: nothing is allocated."""
    kept = {}

    def make(key):
        kept["frozen"], adapter = jp.split(method(key, params))
        return adapter

    adapter = jax.eval_shape(make, jax.random.key(0))
    return kept["frozen"], adapter


# Llama 2 7B ------------------------------------------------------------------------------------


@functools.cache
def llama():
    config = decoder.Config(
        vocab=32000, width=4096, mlp_width=11008, layers=32, heads=32, kv_heads=32, head_dim=128
    )
    params = decoder.shapes(config)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return params, jp.sites(decoder.pure(config), params, tokens)


def test_rank_8_on_q_and_v_of_a_7b_llama_trains_4194304_numbers():
    params, sites = llama()
    assert sum(x.size for x in jax.tree.leaves(params)) == 6_738_415_616
    counts = jp.count_params(*split_shapes(jp.lora(8, sites.match("*/q/*", "*/v/*")), params))
    assert counts.trainable == 4_194_304
    assert counts.frozen == 6_738_415_616
    assert counts.trainable_bytes == 16_777_216


def test_that_adapter_takes_16_8_megabytes_on_disk(tmp_path):
    params, sites = llama()
    _, adapter = split_shapes(jp.lora(8, sites.match("*/q/*", "*/v/*")), params)
    assert {x.dtype for x in adapter.values()} == {jnp.dtype(jnp.float32)}
    save_file({p: jnp.zeros(x.shape, x.dtype) for p, x in adapter.items()}, tmp_path / "adapter")
    assert (tmp_path / "adapter").stat().st_size == pytest.approx(16.8e6, rel=0.02)


def test_an_adapter_in_bfloat16_is_half_as_large():
    params, sites = llama()
    method = jp.lora(8, sites.match("*/q/*", "*/v/*"), dtype=jnp.bfloat16)
    assert jp.count_params(*split_shapes(method, params)).trainable_bytes == 8_388_608


# BERT-base, uncased ------------------------------------------------------------------------------

D, F, LAYERS, HEADS = 768, 3072, 12, 12


def bert_shapes():
    """Its parameters under the names of transformers."""

    def linear(n, m):
        return {"kernel": f32(n, m), "bias": f32(m)}

    def norm():
        return {"scale": f32(D), "bias": f32(D)}

    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    layer = lambda: {  # noqa: E731
        "attention": {
            "self": {name: linear(D, D) for name in ("query", "key", "value")},
            "output": {"dense": linear(D, D), "LayerNorm": norm()},
        },
        "intermediate": {"dense": linear(D, F)},
        "output": {"dense": linear(F, D), "LayerNorm": norm()},
    }
    return {
        "embeddings": {
            "word_embeddings": {"embedding": f32(30522, D)},
            "position_embeddings": {"embedding": f32(512, D)},
            "token_type_embeddings": {"embedding": f32(2, D)},
            "LayerNorm": norm(),
        },
        "encoder": {"layer": {str(i): layer() for i in range(LAYERS)}},
        "pooler": {"dense": linear(D, D)},
    }


def bert(params, ids, kinds):
    """Hidden states (B, T, D) and what the pooler makes of the first (B, D)."""

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        return x * p["scale"] + p["bias"]

    e = params["embeddings"]
    x = e["word_embeddings"]["embedding"][ids] + e["token_type_embeddings"]["embedding"][kinds]
    x = norm(e["LayerNorm"], x + e["position_embeddings"]["embedding"][jnp.arange(ids.shape[1])])
    for i in range(LAYERS):
        p = params["encoder"]["layer"][str(i)]
        heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)  # noqa: E731  (B, T, N, H)
        q, k, v = (heads(linear(p["attention"]["self"][n], x)) for n in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) * (D // HEADS) ** -0.5)
        y = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(x.shape)
        out = p["attention"]["output"]
        x = norm(out["LayerNorm"], x + linear(out["dense"], y))
        y = jax.nn.gelu(linear(p["intermediate"]["dense"], x), approximate=False)
        x = norm(p["output"]["LayerNorm"], x + linear(p["output"]["dense"], y))
    return x, jnp.tanh(linear(params["pooler"]["dense"], x[:, 0]))


@functools.cache
def bert_sites():
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    return jp.sites(bert, bert_shapes(), ids, ids)


def test_bitfit_trains_102912_of_the_109482240_numbers_of_bert_base():
    frozen, adapter = split_shapes(jp.bitfit(bert_sites()), bert_shapes())
    counts = jp.count_params(frozen, adapter)
    assert (counts.trainable, counts.total) == (102_912, 109_482_240)
    assert all(path.endswith("/bias") for path in adapter)
    every = [path for path in bert_sites() if path.endswith("/bias")]
    assert sorted(adapter) == sorted(every)


def test_the_small_variant_of_bitfit_trains_46080():
    method = jp.bitfit(bert_sites(), subset=("query", "intermediate"))
    frozen, adapter = split_shapes(method, bert_shapes())
    assert jp.count_params(frozen, adapter).trainable == 46_080
    assert len(adapter) == 2 * LAYERS
    assert all("query/bias" in path or "intermediate/dense/bias" in path for path in adapter)


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("query", LAYERS * D),
        ("key", LAYERS * D),
        ("value", LAYERS * D),
        ("intermediate", LAYERS * F),
        ("output", LAYERS * D),
        ("attention_layernorm", LAYERS * D),
        ("output_layernorm", LAYERS * D),
    ],
)
def test_each_subset_of_bitfit_is_one_vector_per_layer(name, numbers):
    counts = jp.count_params(*split_shapes(jp.bitfit(bert_sites(), subset=(name,)), bert_shapes()))
    assert counts.trainable == numbers


def test_lora_on_the_linears_of_bert_base_trains_r_times_in_plus_out():
    sites = bert_sites().linear
    assert len(sites) == 6 * LAYERS + 1
    counts = jp.count_params(*split_shapes(jp.lora(4, sites), bert_shapes()))
    per_layer = 4 * (D + D) + 2 * (D + F)
    assert counts.trainable == 4 * (LAYERS * per_layer + 2 * D)
    assert np.isclose(counts.total - counts.trainable, 109_482_240, rtol=0)


# Prompts on the embedding of BLOOMZ 560M ----------------------------------------------------------

BLOOMZ = 559_214_592  # numbers of the whole model


def prompts_on_bloomz(method):
    """(trainable, total, percent trainable) of a method on its table, the rest counted."""
    table = {"table": jax.ShapeDtypeStruct((250_880, 1024), jnp.float32)}
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jp.sites(lambda params, tokens: params["table"][tokens], table, tokens)
    counts = jp.count_params(*split_shapes(method(sites.match("table")), table))
    total = counts.total + BLOOMZ - 250_880 * 1024
    return counts.trainable, total, 100 * counts.trainable / total


def test_8_virtual_tokens_on_bloomz_560m_train_8192_numbers():
    found = prompts_on_bloomz(lambda table: jp.prompt_tuning(8, table))
    assert found == (8_192, 559_222_784, 0.0014648902430985358)


def test_p_tuning_with_20_tokens_and_an_lstm_of_128_units_trains_1926400_numbers():
    method = functools.partial(jp.p_tuning, 20, encoder="lstm", hidden=128, layers=2)
    assert prompts_on_bloomz(method) == (1_926_400, 561_140_992, 0.343300530074267)


@pytest.mark.parametrize(
    "options, numbers",
    [
        # 20 * 1024; 1024 -> 1024 -> 1024 -> 1024 with biases.
        (dict(encoder="mlp"), 20_480 + 3 * 1024 * 1025),
        (dict(encoder="mlp", hidden=300, embed=96), 20 * 96 + 97 * 300 + 301 * 300 + 301 * 1024),
        # Four gates in two directions, with two biases; then 600 -> 600 -> 1024.
        (
            dict(hidden=300, embed=96, layers=1),
            20 * 96 + 2 * 1200 * (96 + 300 + 2) + 601 * 600 + 601 * 1024,
        ),
    ],
)
def test_other_widths_of_the_prompt_encoder(options, numbers):
    found = prompts_on_bloomz(lambda table: jp.p_tuning(20, table, **options))
    assert found[0] == numbers
