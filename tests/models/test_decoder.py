"""The decoder against itself: cached, packed, padded, windowed, saved and loaded."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft.models import _layers as layers
from jaxpeft.models import decoder

BASE = decoder.Config(
    vocab=19, width=12, mlp_width=20, layers=3, heads=4, kv_heads=2, head_dim=6, context=64
)
LLAMA3 = decoder.Rope(500.0, "llama3", 8.0, low=1.0, high=4.0, context=8)
CONFIGS = {
    "llama": BASE,
    "llama 3": dataclasses.replace(BASE, rope=LLAMA3, eps=1e-5, bos=1, eos=(2, 3), pad=0),
    "llama, biases": dataclasses.replace(
        BASE, qkv_bias=True, o_bias=True, mlp_bias=True, rope=decoder.Rope(1e4, "linear", 3.0)
    ),
    "mistral": dataclasses.replace(BASE, family="mistral", window=3, eos=(2,)),
    "mistral, no window": dataclasses.replace(BASE, family="mistral", tied=True),
    "qwen2": dataclasses.replace(BASE, family="qwen2", tied=True, qkv_bias=True),
    "qwen2, window": dataclasses.replace(BASE, family="qwen2", qkv_bias=True, window=3),
    "qwen3": dataclasses.replace(BASE, family="qwen3", qk_norm=True),
    "qwen3, mixed": dataclasses.replace(
        BASE, family="qwen3", qk_norm=True, window=3, full_layers=(0, 2), tied=True
    ),
}
SOME = ("llama 3", "mistral", "qwen3, mixed")
SHARP = {"rtol": 1e-10, "atol": 1e-10}


def random_params(config, seed=0):
    """Every tensor random, in float64, so that each part of the model matters."""
    rng = np.random.default_rng(seed)

    def fill(path, array):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.7, 1.3, array.shape))
        return jnp.asarray(rng.normal(0, 0.4, array.shape))

    return jax.tree_util.tree_map_with_path(fill, decoder.shapes(config))


@functools.cache
def compiled(config, **options):
    return jax.jit(decoder.pure(config, **options))


def ids(rows=2, length=10, seed=0):
    return np.random.default_rng(seed).integers(0, BASE.vocab, (rows, length))


@pytest.fixture(params=SOME)
def model(request):
    config = CONFIGS[request.param]
    return compiled(config), config, random_params(config)


# The forward pass --------------------------------------------------------------------------------


def test_the_cache_gives_what_the_full_forward_gives(model):
    forward, config, params = model
    tokens, got = ids(), []
    cache = decoder.init_cache(config, 2, 12, jnp.float64)
    for part in (slice(0, 6), slice(6, 9), slice(9, 10)):
        logits, cache = forward(params, tokens[:, part], cache=cache)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), forward(params, tokens), **SHARP)
    assert int(cache.used) == 10


def test_packed_segments_get_what_they_get_alone(model):
    forward, config, params = model
    tokens = ids(1)
    # The same text twice, so that a look across the border would not be noticed by its rank alone.
    tokens[:, 4:8] = tokens[:, :4]
    segments = np.array([[5, 5, 5, 5, 2, 2, 2, 2, 5, 0]])
    got = forward(params, tokens, segment_ids=segments)
    np.testing.assert_allclose(got[:, 4:8], got[:, :4], **SHARP)
    np.testing.assert_allclose(got[:, :4], forward(params, tokens[:, :4]), **SHARP)
    # A segment that goes on later is one text.
    text = np.concatenate([tokens[:, :4], tokens[:, 8:9]], axis=1)
    np.testing.assert_allclose(got[:, 8], forward(params, text)[:, 4], **SHARP)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    forward, config, params = model
    tokens = ids()
    tokens[1, :3] = tokens[1, 5:8] if side == "left" else tokens[1, :3]
    mask = np.ones((2, 10), bool)
    real = slice(3, 10) if side == "left" else slice(0, 7)
    mask[1] = False
    mask[1, real] = True
    got = forward(params, tokens, mask=mask)
    np.testing.assert_allclose(got[0], forward(params, tokens)[0], **SHARP)
    np.testing.assert_allclose(got[1, real], forward(params, tokens[1:, real])[0], **SHARP)


def test_mask_and_segments_together_hide_both(model):
    forward, config, params = model
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2]])
    mask = np.array([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    both = forward(params, ids(1), segment_ids=segments, mask=mask)
    one = forward(params, ids(1), segment_ids=segments * mask)
    np.testing.assert_array_equal(both, one)


def test_a_padded_prompt_is_continued_through_the_cache(model):
    forward, config, params = model
    tokens, cache = ids(), decoder.init_cache(config, 2, 10, jnp.float64)
    mask = np.ones((2, 10), bool)
    mask[0, 5:8] = False  # padding in the middle: a prompt that was padded on its right
    first, cache = forward(params, tokens[:, :8], mask=mask[:, :8], cache=cache)
    second, cache = forward(params, tokens[:, 8:], cache=cache)
    want = forward(params, tokens[:1, mask[0]])
    np.testing.assert_allclose(first[0, :5], want[0, :5], **SHARP)
    np.testing.assert_allclose(second[0], want[0, 5:], **SHARP)


def test_rows_of_padding_alone_give_no_nan_and_no_gradient(model):
    forward, config, params = model
    mask = np.zeros((2, 10), bool)
    mask[0] = True

    def loss(params):
        logits = forward(params, ids(), mask=mask)
        return jnp.sum(logits[1] ** 2), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    assert jnp.isfinite(logits).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Attention contributed nothing, so its products have no gradient.
    assert not gradient["layers"]["attn"]["v"]["kernel"].any()


def changed(forward, params, at):
    """Which logits change when the token `at` does."""
    tokens = ids(1)
    other = tokens.copy()
    other[0, at] = (other[0, at] + 1) % BASE.vocab
    difference = forward(params, tokens) - forward(params, other)
    return np.flatnonzero(np.abs(difference).max(axis=(0, 2)) > 1e-9).tolist()


def test_a_token_is_seen_as_far_as_layers_and_window_reach():
    one = dataclasses.replace(CONFIGS["mistral"], layers=1)
    assert changed(compiled(one), random_params(one), 4) == [4, 5, 6]
    three = CONFIGS["mistral"]
    assert changed(compiled(three), random_params(three), 2) == [2, 3, 4, 5, 6, 7, 8]
    mixed = dataclasses.replace(three, full_layers=(1,), family="qwen2")
    assert changed(compiled(mixed), random_params(mixed), 2) == list(range(2, 10))


def test_positions_move_the_rotation_alone():
    config, params = BASE, random_params(BASE)
    forward, tokens = compiled(config), ids()
    shifted = np.arange(10)[None] + 1000
    # float32 angles near 1000 are known to 6e-5.
    np.testing.assert_allclose(
        forward(params, tokens, positions=shifted), forward(params, tokens), atol=1e-2
    )
    stretched = forward(params, tokens, positions=np.arange(10)[None] * 2)
    assert np.abs(stretched - forward(params, tokens)).max() > 0.1


def test_rope_turns_by_the_formula():
    plain = decoder.Rope(10000.0).frequencies(8)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    linear = decoder.Rope(10000.0, "linear", 4.0).frequencies(8)
    np.testing.assert_allclose(linear, np.array([1, 0.1, 0.01, 0.001]) / 4, rtol=1e-6)
    # In 100 * 2 pi tokens the pairs turn 100, 10, 1 and 0.1 times.
    rope = decoder.Rope(10000.0, "llama3", 5.0, low=0.5, high=19.5, context=100 * 2 * np.pi)
    share = np.array([1, (10 - 0.5) / 19, 0.5 / 19, 0])
    want = (share + (1 - share) / 5) * np.array([1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(rope.frequencies(8), want, rtol=1e-5)


def test_an_id_beyond_the_table_gives_nan():
    tokens = ids()
    tokens[1, 4] = BASE.vocab
    logits = compiled(BASE)(random_params(BASE), tokens)
    assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1, 4:]).all()


# Options -----------------------------------------------------------------------------------------


POLICY = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


OPTIONS = {"full": {"remat": "full"}, "policy": {"remat": POLICY}, "unrolled": {"unroll": 2}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_remat_and_unroll_change_no_value_and_no_gradient(options):
    got, want = gradient(**options), gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SHARP), got, want)


@functools.cache
def gradient(**options):
    forward = decoder.pure(BASE, **options)
    loss = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(forward(params, ids()))))
    return jax.jit(loss)(random_params(BASE))


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_all_layers_are_one_scan():
    jaxpr = jax.make_jaxpr(decoder.pure(BASE))(decoder.shapes(BASE), ids())
    scans = [eqn for eqn in primitives(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [3]


def test_weights_meet_plain_products_and_gathers_only():
    config = dataclasses.replace(BASE, tied=True)
    shapes = decoder.shapes(config)
    jaxpr = jax.make_jaxpr(decoder.pure(config))(shapes, ids()).jaxpr
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    # As they are in the body of the scan.
    matrices = {leaf.shape[-2:] for path, leaf in leaves if path[-1].key != "scale"}
    users = {
        eqn.primitive.name
        for eqn in primitives(jaxpr)
        for var in eqn.invars
        if getattr(var.aval, "shape", ()) in matrices
    }
    assert users - {"jit"} == {"dot_general", "gather"}  # jnp.take is a jit of its own


def test_compute_and_logits_dtypes_are_as_asked():
    params = jax.tree.map(lambda w: w.astype(jnp.float32), random_params(BASE))
    tokens = ids()
    want = compiled(BASE)(params, tokens)
    assert want.dtype == jnp.float32
    half = compiled(BASE, dtype=jnp.bfloat16)(params, tokens)
    assert half.dtype == jnp.bfloat16
    wide = compiled(BASE, dtype=jnp.bfloat16, logits_dtype=jnp.float32)(params, tokens)
    assert wide.dtype == jnp.float32
    for got in (half, wide):
        error = np.abs(np.asarray(got, np.float32) - want).max() / want.std()
        assert 1e-4 < error < 0.1
    assert np.abs(np.asarray(half, np.float32) - wide).max() > 0
    halved = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(compiled(BASE)(halved, tokens).dtype, jnp.bfloat16)


def test_the_norm_is_computed_in_float32():
    norm = layers.RMSNorm(4096, 1e-6, param_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4096,)).astype(jnp.bfloat16)
    y = x.astype(jnp.float32)
    want = (y / np.sqrt(np.mean(np.square(y, dtype=np.float64)))).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm(x), want)


def test_another_attention_function_takes_the_place_of_ours():
    seen = []

    def attend(q, k, v, *, queries, keys, window):
        seen.append((q.shape, k.shape, v.shape, queries.order.shape, keys.segment.shape, window))
        return jnp.zeros_like(q)

    params = random_params(BASE)
    forward = decoder.pure(dataclasses.replace(BASE, window=5), attention_fn=attend)
    got = forward(params, ids(), segment_ids=np.ones((2, 10)))
    assert seen[0] == ((2, 10, 4, 6), (2, 10, 2, 6), (2, 10, 2, 6), (2, 10), (2, 10), 5)
    silent = jax.tree.map(jnp.copy, params)
    silent["layers"]["attn"]["o"]["kernel"] *= 0
    np.testing.assert_allclose(got, compiled(BASE)(silent, ids()), **SHARP)


def test_the_module_and_the_pure_function_are_one():
    model = decoder.Decoder(BASE, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    want = nnx.jit(lambda model: model(ids()))(model)
    np.testing.assert_array_equal(compiled(BASE)(params, ids()), want)
    pieces = nnx.jit(lambda model: model.logits(model.hidden(ids())))(model)
    np.testing.assert_array_equal(pieces, want)
    hidden = compiled(BASE, call="hidden")(params, ids())
    assert hidden.shape == (2, 10, BASE.width)
    head = jax.jit(lambda x: x @ params["head"]["kernel"])(hidden)
    np.testing.assert_allclose(head, want, atol=1e-5)


# Parameters and files ----------------------------------------------------------------------------


def test_the_parameters_are_these():
    config = dataclasses.replace(CONFIGS["qwen3"], mlp_bias=True, o_bias=True)
    flat = jax.tree_util.tree_leaves_with_path(decoder.shapes(config, jnp.bfloat16))
    got = {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}
    assert got == {
        "embed/embedding": (19, 12),
        "head/kernel": (12, 19),
        "layers/attn/k/kernel": (3, 12, 12),
        "layers/attn/k_norm/scale": (3, 6),
        "layers/attn/o/bias": (3, 12),
        "layers/attn/o/kernel": (3, 24, 12),
        "layers/attn/q/kernel": (3, 12, 24),
        "layers/attn/q_norm/scale": (3, 6),
        "layers/attn/v/kernel": (3, 12, 12),
        "layers/attn_norm/scale": (3, 12),
        "layers/mlp/down/bias": (3, 12),
        "layers/mlp/down/kernel": (3, 20, 12),
        "layers/mlp/gate/bias": (3, 20),
        "layers/mlp/gate/kernel": (3, 12, 20),
        "layers/mlp/up/bias": (3, 20),
        "layers/mlp/up/kernel": (3, 12, 20),
        "layers/mlp_norm/scale": (3, 12),
        "norm/scale": (12,),
    }
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in flat)


def hf(family, vocab, width, mlp_width, layers, heads, kv_heads, **options):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    sizes = zip(names, (vocab, width, mlp_width, layers, heads, kv_heads), strict=True)
    return {"model_type": family, "hidden_act": "silu", **dict(sizes), **options}


# What the config.json of published models holds, and how many parameters they have.
TIED = {"tie_word_embeddings": True}
LLAMA31 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
QWEN25 = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}
QWEN3 = {"head_dim": 128, "attention_bias": False, "sliding_window": None, "max_window_layers": 28}
PUBLISHED = {
    "Llama-2-7B": (hf("llama", 32000, 4096, 11008, 32, 32, 32, pretraining_tp=1), 6_738_415_616),
    "Llama-3.1-70B": (
        hf("llama", 128256, 8192, 28672, 80, 64, 8, rope_scaling=LLAMA31 | {"factor": 8.0}),
        70_553_706_496,
    ),
    "Llama-3.2-1B": (
        hf("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_scaling=LLAMA31, **TIED),
        1_235_814_400,
    ),
    "SmolLM2-135M": (
        hf("llama", 49152, 576, 1536, 30, 9, 3, is_llama_config=True, rope_scaling=None, **TIED),
        134_515_008,
    ),
    "Mistral-7B": (
        hf("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (hf("qwen2", 151936, 896, 4864, 24, 14, 2, **QWEN25, **TIED), 494_032_768),
    "Qwen3-0.6B": (hf("qwen3", 151936, 1024, 3072, 28, 16, 8, **QWEN3, **TIED), 596_049_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_without_memory(name):
    config_json, count = PUBLISHED[name]
    config = decoder.Config.from_hf(config_json)
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder.shapes(config))) == count
    assert (config.window is None) == (name != "Mistral-7B")


def test_init_is_normal_with_norms_at_one():
    config = dataclasses.replace(BASE, width=64, mlp_width=96, qkv_bias=True)
    params = decoder.init(config, jax.random.key(0), jnp.bfloat16)
    shapes = decoder.shapes(config, jnp.bfloat16)
    assert jax.tree.map(lambda w: (w.shape, w.dtype), params) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes
    )
    assert (params["layers"]["attn_norm"]["scale"] == 1).all()
    assert (params["layers"]["attn"]["q"]["bias"] == 0).all()
    up = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float32)
    assert abs(up.std() - 0.02) < 1e-3 and abs(up.mean()) < 1e-3
    assert len({layer.tobytes() for layer in up}) == 3  # layers differ


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_gives_the_same_config_again(name):
    config = CONFIGS[name]
    assert decoder.Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_save_and_load_come_back_bit_for_bit(tmp_path, dtype, shard_bytes):
    config = CONFIGS["llama, biases"]
    params = jax.tree.map(lambda w: w.astype(dtype), random_params(config))
    decoder.save(tmp_path, config, params, shard_bytes=shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes > 2000)
    again, loaded = decoder.load(tmp_path)
    assert again == config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype.dtype.name
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda w: w.dtype, loaded) == jax.tree.map(lambda w: w.dtype, params)


def test_loading_converts_and_shards(tmp_path):
    params = random_params(BASE)
    decoder.save(tmp_path, BASE, params)
    sharding = NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), P(None))
    _, loaded = decoder.load(tmp_path, dtype=jnp.bfloat16, sharding=sharding)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert got.sharding == sharding
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


# Bad input ---------------------------------------------------------------------------------------


HF = BASE.to_hf()


def test_what_config_json_leaves_out_is_what_transformers_assumes():
    def read(family, **options):
        return decoder.Config.from_hf(hf(family, 9, 8192, 4, 2, 32, None) | options)

    assert read("llama").kv_heads == 32 and read("llama").head_dim == 256
    mistral = hf("mistral", 9, 64, 4, 2, 32, None)
    del mistral["num_key_value_heads"]
    assert decoder.Config.from_hf(mistral).kv_heads == 8
    assert decoder.Config.from_hf(mistral).window == 4096
    assert read("qwen3").head_dim == 128 and read("qwen2").head_dim == 256
    assert read("qwen2", use_sliding_window=True, max_window_layers=1).window == 4096
    assert read("qwen2").qkv_bias and not read("qwen2").o_bias and not read("qwen3").qkv_bias
    assert read("llama").rope == decoder.Rope(10000.0)
    assert (read("llama").eps, read("llama").tied, read("llama").eos) == (1e-6, False, ())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2', which this decoder does not compute; it must"),
        ({"model_type": "smollm3"}, "must be one of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', which"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1, which"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, which"),
        ({"sliding_window": 9}, "sliding_window=9, which .* llama has no such option"),
        (
            {"model_type": "mistral", "attention_bias": True},
            "attention_bias=True, which .* mistral",
        ),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias=True, which .* qwen2"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn', which"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic', which"),
        ({"rope_scaling": {"rope_type": "linear"}}, "asks for linear RoPE but lacks its factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "llama3 RoPE but lacks its high_freq_factor, original_max_position_embeddings",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 3}},
            "mscale among its RoPE options=3, which",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor among its RoPE options=0.25",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, r"layer_types=\['sliding_attention', "),
        ({"layer_types": ["full_attention"] * 2}, r"layer_types=.*must be 3 entries like"),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            r"layer_types=\['chunked_attention', ",
        ),
        ({"num_key_value_heads": 3}, "heads=4, kv_heads=3, head_dim=6"),
        ({"head_dim": 5}, "heads=4, kv_heads=2, head_dim=5"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        decoder.Config.from_hf(HF | change)


def test_fields_that_have_no_default_are_asked_for():
    with pytest.raises(ValueError, match="config.json lacks hidden_size, num_attention_heads"):
        decoder.Config.from_hf(
            {k: v for k, v in HF.items() if k not in ("hidden_size", "num_attention_heads")}
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 4}, "of a llama cannot say window=4, it would be read as None"),
        ({"qk_norm": True}, "of a llama cannot say qk_norm=True, it would be read as False"),
        ({"qkv_bias": True}, "of a llama cannot say qkv_bias=True, it would be read as False"),
        (
            {"family": "mistral", "window": 4, "full_layers": (1,)},
            r"of a mistral cannot say full_layers=\(1,\), it would be read as \(\)",
        ),
        ({"family": "gpt2"}, "model_type='gpt2'"),
    ],
    ids=str,
)
def test_what_config_json_cannot_say_is_not_written(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change).to_hf()


def rewrite(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_a_folder_with_other_tensors_names_them(tmp_path):
    decoder.save(tmp_path, BASE, random_params(BASE))
    rewrite(tmp_path, num_hidden_layers=4, intermediate_size=21, attention_bias=True)
    with pytest.raises(ValueError) as info:
        decoder.load(tmp_path)
    message = str(info.value)
    assert "missing: model.layers.3.self_attn.q_proj.weight of shape (24, 12)" in message
    assert "missing: model.layers.0.self_attn.o_proj.bias of shape (12,)" in message
    rewrite(tmp_path, num_hidden_layers=2, intermediate_size=21, attention_bias=False)
    with pytest.raises(ValueError) as info:
        decoder.load(tmp_path)
    message = str(info.value)
    assert "model.layers.1.mlp.down_proj.weight is (12, 20), should be (12, 21)" in message
    assert "left over: model.layers.2." in message


def test_a_tied_folder_may_repeat_its_head_but_not_change_it(tmp_path):
    params = random_params(BASE)
    decoder.save(tmp_path, BASE, params)
    rewrite(tmp_path, tie_word_embeddings=True)
    message = re.escape("model.safetensors has a lm_head.weight unlike its model.embed_tokens")
    with pytest.raises(ValueError, match=message):
        decoder.load(tmp_path)
    decoder.save(tmp_path, BASE, params | {"head": {"kernel": params["embed"]["embedding"].T}})
    rewrite(tmp_path, tie_word_embeddings=True)
    config, loaded = decoder.load(tmp_path)
    assert config.tied and "head" not in loaded


def test_an_untied_head_is_not_left_out_in_silence(tmp_path):
    config = dataclasses.replace(BASE, tied=True)
    decoder.save(tmp_path, config, random_params(config))
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight of shape \(19, 12\)"):
        decoder.load(tmp_path)


def test_params_of_another_config_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"wrong shape: norm/scale is \(12,\), should be \(14,\)"):
        decoder.save(tmp_path, dataclasses.replace(BASE, width=14), random_params(BASE))
    assert not list(tmp_path.iterdir())


def test_a_full_cache_is_refused_or_under_jit_gives_nan():
    params, cache = random_params(BASE), decoder.init_cache(BASE, 2, 12, jnp.float64)
    with pytest.raises(ValueError, match="13 tokens do not fit in the 12 free slots"):
        compiled(BASE)(params, ids(length=13), cache=cache)
    _, cache = compiled(BASE)(params, ids(), cache=cache)
    with pytest.raises(ValueError, match="3 tokens do not fit in the 2 free slots"):
        decoder.pure(BASE)(params, ids(length=3), cache=cache)
    logits, _ = compiled(BASE)(params, ids(length=3), cache=cache)
    assert jnp.isnan(logits).all()


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="or a checkpoint policy, got 'some'"):
        decoder.pure(BASE, remat="some")
