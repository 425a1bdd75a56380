"""The encoder-decoder against itself and the formula: cached, padded, adapted, saved and loaded."""

import dataclasses
import functools
import json
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models import encoder_decoder

T5 = encoder_decoder.Config(
    vocab=19,
    width=12,
    mlp_width=20,
    layers=2,
    decoder_layers=3,
    heads=4,
    head_dim=5,
    buckets=6,
    reach=7,
)
FLAN = dataclasses.replace(T5, tied=False, scaled=False, mlp="gated-gelu")
CONFIGS = {
    "t5": T5,
    "flan": FLAN,
    "ul2": dataclasses.replace(FLAN, mlp="gated-silu", eps=1e-5, start=3, eos=(2, 4), pad=None),
    "1.1, tied": dataclasses.replace(FLAN, tied=True, eos=(), dropout=0.0),
}
SOME = ("t5", "flan")
SHARP = {"rtol": 1e-10, "atol": 1e-10}


def random_params(config, seed=0):
    """Every tensor random, in float64, so that each part of the model matters."""
    rng = np.random.default_rng(seed)

    def fill(path, array):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.7, 1.3, array.shape))
        return jnp.asarray(rng.normal(0, 0.5, array.shape))

    return jax.tree_util.tree_map_with_path(fill, encoder_decoder.shapes(config))


@functools.cache
def compiled(config, call="__call__", **options):
    return jax.jit(encoder_decoder.pure(config, call, **options))


def ids(rows=2, length=10, seed=0):
    return np.random.default_rng(seed).integers(0, T5.vocab, (rows, length))


INPUTS, TARGETS = ids(length=9), ids(length=8, seed=1)


@pytest.fixture(params=SOME)
def model(request):
    config = CONFIGS[request.param]
    return compiled(config), config, random_params(config)


# The forward pass --------------------------------------------------------------------------------


def by_hand(config, params, inputs, targets):
    """The model layer by layer in plain NumPy, one row, written from the paper."""

    def norm(x, p):
        return p["scale"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + config.eps)

    def bucket(distance, both_ways):  # memory - query, as in the paper's code
        count, offset = config.buckets, 0
        if both_ways:
            count //= 2
            offset = count if distance > 0 else 0
            distance = abs(distance)
        else:
            distance = max(-distance, 0)
        if distance < count // 2:
            return offset + distance
        far = math.log(distance / (count // 2)) / math.log(config.reach / (count // 2))
        return offset + min(count // 2 + int(far * (count - count // 2)), count - 1)

    def attend(p, x, memory, table=None, both_ways=True):
        out = []
        for head in range(config.heads):
            part = slice(head * config.head_dim, (head + 1) * config.head_dim)
            q, k, v = (
                y @ p[n]["kernel"][:, part] for y, n in ((x, "q"), (memory, "k"), (memory, "v"))
            )
            scores = q @ k.T
            if table is not None:
                for i, j in np.ndindex(scores.shape):
                    scores[i, j] += table[bucket(j - i, both_ways), head]
                    if j > i and not both_ways:
                        scores[i, j] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(weights / weights.sum(-1, keepdims=True) @ v)
        return np.concatenate(out, -1) @ p["o"]["kernel"]

    def mlp(p, x):
        up = x @ p["up"]["kernel"]
        if config.mlp == "relu":
            return np.maximum(up, 0) @ p["down"]["kernel"]
        gate = x @ p["gate"]["kernel"]
        gelu = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return (gelu * up) @ p["down"]["kernel"]

    def tower(tower, x, depth, memory=None):
        table = tower["bias"]["embedding"]
        for i in range(depth):
            p = jax.tree.map(lambda a, i=i: a[i], tower["layers"])
            y = norm(x, p["attn_norm"])
            x = x + attend(p["attn"], y, y, table, memory is None)
            if memory is not None:
                x = x + attend(p["cross"], norm(x, p["cross_norm"]), memory)
            x = x + mlp(p["mlp"], norm(x, p["mlp_norm"]))
        return norm(x, tower["norm"])

    params = jax.tree.map(np.asarray, params)
    table = params["embed"]["embedding"]
    memory = tower(params["encoder"], table[inputs], config.layers)
    x = tower(params["decoder"], table[targets], config.decoder_layers, memory)
    if config.scaled:
        x = x / math.sqrt(config.width)
    return x @ (table.T if config.tied else params["head"]["kernel"])


def test_logits_follow_the_formula(model):
    forward, config, params = model
    got = forward(params, INPUTS, TARGETS)
    for row in range(2):
        want = by_hand(config, params, INPUTS[row], TARGETS[row])
        np.testing.assert_allclose(got[row], want, **SHARP)


def test_the_halves_make_the_whole(model):
    forward, config, params = model
    memory = compiled(config, "encode")(params, INPUTS)
    got = compiled(config, "decode")(params, TARGETS, memory)
    np.testing.assert_allclose(got, forward(params, INPUTS, TARGETS), **SHARP)


def test_the_cache_gives_what_the_full_forward_gives(model):
    forward, config, params = model
    mask = np.arange(9) < np.array([[9], [5]])
    decode, got = compiled(config, "decode"), []
    first = {"memory": compiled(config, "encode")(params, INPUTS, mask=mask), "mask": mask}
    cache = encoder_decoder.init_cache(config, 2, 10, jnp.float64)
    for part in (slice(0, 1), slice(1, 6), slice(6, 7), slice(7, 8)):
        logits, cache = decode(params, TARGETS[:, part], cache=cache, **first)
        got.append(logits)
        first = {}
    want = forward(params, INPUTS, TARGETS, mask=mask)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, **SHARP)
    assert int(cache.used) == 8


def test_keys_of_the_input_are_computed_once():
    params = random_params(T5)
    memory = compiled(T5, "encode")(params, INPUTS)
    cache = encoder_decoder.init_cache(T5, 2, 4, jnp.float64)
    _, cache = compiled(T5, "decode")(params, TARGETS[:, :1], memory, cache=cache)
    broken = jax.tree.map(jnp.copy, params)
    for name in "kv":
        broken["decoder"]["layers"]["cross"][name]["kernel"] *= jnp.nan
    step = compiled(T5, "decode")
    want, _ = step(params, TARGETS[:, 1:2], cache=cache)
    np.testing.assert_array_equal(step(broken, TARGETS[:, 1:2], cache=cache)[0], want)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model, side):
    forward, config, params = model
    slots = {"left": slice(3, None), "right": slice(0, -3), "middle": np.r_[0:2, 5:8]}[side]
    mask, target_mask = np.ones((2, 9), bool), np.ones((2, 8), bool)
    mask[1], target_mask[1] = False, False
    mask[1, slots], target_mask[1, slots] = True, True
    got = forward(params, INPUTS, TARGETS, mask=mask, target_mask=target_mask)
    np.testing.assert_allclose(got[0], forward(params, INPUTS, TARGETS)[0], **SHARP)
    want = forward(params, INPUTS[1:, mask[1]], TARGETS[1:, target_mask[1]])[0]
    np.testing.assert_allclose(got[1][target_mask[1]], want, **SHARP)


def test_padded_targets_are_continued_through_the_cache(model):
    forward, config, params = model
    decode = compiled(config, "decode")
    memory = compiled(config, "encode")(params, INPUTS)
    target_mask = np.ones((2, 6), bool)
    target_mask[0, 3:] = False
    cache = encoder_decoder.init_cache(config, 2, 8, jnp.float64)
    _, cache = decode(params, TARGETS[:, :6], memory, target_mask=target_mask, cache=cache)
    got, _ = decode(params, TARGETS[:, 6:], cache=cache)
    short = TARGETS[:1, [0, 1, 2, 6, 7]]
    np.testing.assert_allclose(got[0], forward(params, INPUTS[:1], short)[0, 3:], **SHARP)
    np.testing.assert_allclose(got[1], forward(params, INPUTS[1:], TARGETS[1:])[0, 6:], **SHARP)


def test_rows_of_padding_alone_give_no_nan_and_no_gradient(model):
    forward, config, params = model
    mask = np.array([[True] * 9, [False] * 9])

    def loss(params):
        logits = forward(params, INPUTS, TARGETS, mask=mask, target_mask=mask[:, :8])
        return jnp.sum(logits[1] ** 2), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    assert jnp.isfinite(logits).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Attention contributed nothing, so its products have no gradient.
    layers = gradient["decoder"]["layers"]
    assert not layers["cross"]["v"]["kernel"].any() and not layers["attn"]["v"]["kernel"].any()
    assert layers["mlp"]["up"]["kernel"].any()


def test_a_target_is_seen_by_no_earlier_one_and_an_input_by_all():
    forward, params = compiled(T5), random_params(T5)
    targets, inputs = jnp.array(TARGETS[:1]), jnp.array(INPUTS[:1])
    want = forward(params, inputs, targets)
    other = targets.at[0, 4].set((targets[0, 4] + 1) % T5.vocab)
    difference = np.abs(forward(params, inputs, other) - want).max((0, 2))
    assert np.flatnonzero(difference > 1e-9).tolist() == [4, 5, 6, 7]
    other = inputs.at[0, 8].set((inputs[0, 8] + 1) % T5.vocab)
    difference = np.abs(forward(params, other, targets) - want).max((0, 2))
    assert (difference > 1e-9).all()


def test_an_id_beyond_the_table_gives_nan():
    targets = TARGETS.copy()
    targets[1, 4] = T5.vocab
    logits = compiled(T5)(random_params(T5), INPUTS, targets)
    assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1, 4:]).all()


def test_targets_are_shifted_behind_the_start():
    labels = jnp.array([[5, 6, 1, -100, -100], [7, 8, 9, 2, 1]])
    want = [[3, 5, 6, 1, 0], [3, 7, 8, 9, 2]]
    np.testing.assert_array_equal(encoder_decoder.shift_right(labels, start=3), want)
    got = encoder_decoder.shift_right(labels, 3, pad=11)
    np.testing.assert_array_equal(got[0], [3, 5, 6, 1, 11])
    assert got.dtype == labels.dtype


# Options -----------------------------------------------------------------------------------------


POLICY = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
OPTIONS = {"full": {"remat": "full"}, "policy": {"remat": POLICY}, "unrolled": {"unroll": 2}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_remat_and_unroll_change_no_value_and_no_gradient(options):
    got, want = gradient(**options), gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SHARP), got, want)


@functools.cache
def gradient(**options):
    forward = encoder_decoder.pure(FLAN, **options)
    loss = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(forward(params, INPUTS, TARGETS))))
    return jax.jit(loss)(random_params(FLAN))


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def test_each_stack_is_one_scan():
    forward = encoder_decoder.pure(T5)
    jaxpr = jax.make_jaxpr(forward)(encoder_decoder.shapes(T5), INPUTS, TARGETS)
    scans = [eqn for eqn in primitives(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [2, 3]


def test_compute_and_logits_dtypes_are_as_asked():
    params = jax.tree.map(lambda w: w.astype(jnp.float32), random_params(T5))
    want = compiled(T5)(params, INPUTS, TARGETS)
    assert want.dtype == jnp.float32
    half = compiled(T5, dtype=jnp.bfloat16)(params, INPUTS, TARGETS)
    assert half.dtype == jnp.bfloat16
    wide = compiled(T5, dtype=jnp.bfloat16, logits_dtype=jnp.float32)(params, INPUTS, TARGETS)
    assert wide.dtype == jnp.float32
    for got in (half, wide):
        error = np.abs(np.asarray(got, np.float32) - want).max() / want.std()
        assert 1e-4 < error < 0.2
    assert np.abs(np.asarray(half, np.float32) - wide).max() > 0
    halved = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert compiled(T5)(halved, INPUTS, TARGETS).dtype == jnp.bfloat16


def test_another_attention_function_takes_the_place_of_ours():
    calls = []

    def attend(q, k, v, *, seen, bias):
        calls.append(
            (q.shape, k.shape, v.shape, *(x if x is None else x.shape for x in (seen, bias)))
        )
        return jnp.zeros_like(q)

    params = random_params(T5)
    got = encoder_decoder.pure(T5, attention_fn=attend)(params, INPUTS, TARGETS)
    of = lambda length: (2, length, 4, 5)  # noqa: E731
    assert calls == [
        (of(9), of(9), of(9), None, (1, 4, 9, 9)),
        (of(8), of(8), of(8), (1, 8, 8), (1, 4, 8, 8)),
        (of(8), of(9), of(9), None, None),
    ]
    silent = jax.tree.map(jnp.copy, params)
    for tower, name in (("encoder", "attn"), ("decoder", "attn"), ("decoder", "cross")):
        silent[tower]["layers"][name]["o"]["kernel"] *= 0
    np.testing.assert_allclose(got, compiled(T5)(silent, INPUTS, TARGETS), **SHARP)


def test_the_module_and_the_pure_function_are_one():
    model = encoder_decoder.EncoderDecoder(T5, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model))
    want = nnx.jit(lambda model: model(INPUTS, TARGETS))(model)
    np.testing.assert_array_equal(compiled(T5)(params, INPUTS, TARGETS), want)
    pieces = nnx.jit(lambda model: model.logits(model.hidden(INPUTS, TARGETS)))(model)
    np.testing.assert_array_equal(pieces, want)


# Methods -----------------------------------------------------------------------------------------


@functools.cache
def found(config):
    return jp.sites(encoder_decoder.pure(config), random_params(config), INPUTS, TARGETS)


def test_sites_say_what_each_weight_does():
    sites = found(FLAN)
    linear = {f"{tower}/layers/attn/{n}/kernel" for tower in ("encoder", "decoder") for n in "qkvo"}
    linear |= {f"decoder/layers/cross/{n}/kernel" for n in "qkvo"}
    linear |= {
        f"{tower}/layers/mlp/{n}/kernel"
        for tower in ("encoder", "decoder")
        for n in ("gate", "up", "down")
    }
    assert set(sites.linear) == linear | {"head/kernel"}
    assert set(sites.hidden) == linear
    tables = {"embed/embedding", "encoder/bias/embedding", "decoder/bias/embedding"}
    assert set(sites.embedding) == tables
    norms = {
        f"{tower}/layers/{n}_norm/scale"
        for tower in ("encoder", "decoder")
        for n in ("attn", "mlp")
    }
    norms |= {"decoder/layers/cross_norm/scale", "encoder/norm/scale", "decoder/norm/scale"}
    assert set(sites.norm) == norms
    assert not any(site.materialized for site in sites.values())


def adapted(config):
    """Parameters with LoRA on every matrix, away from its start."""
    method = jp.lora(2, found(config).matrices, dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), random_params(config)))
    rng = np.random.default_rng(3)
    moved = {path: x + rng.normal(0, 0.2, x.shape) for path, x in adapter.items()}
    return frozen, moved


@pytest.mark.parametrize("name", SOME)
def test_lora_on_every_matrix_is_the_merged_model(name):
    config = CONFIGS[name]
    tree = jp.combine(*adapted(config))
    forward = encoder_decoder.pure(config, remat="full")
    mask = np.arange(9) >= np.array([[0], [4]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", jp.MaterializedWarning)
        got = jax.jit(jp.lift(forward))(tree, INPUTS, TARGETS, mask=mask)
    want = compiled(config)(jp.merge(tree), INPUTS, TARGETS, mask=mask)
    np.testing.assert_allclose(got, want, **SHARP)
    plain = compiled(config)(random_params(config), INPUTS, TARGETS, mask=mask)
    assert np.abs(got - plain).max() > 0.1


def test_gradients_reach_every_adapter():
    frozen, adapter = adapted(FLAN)
    forward = jp.lift(encoder_decoder.pure(FLAN, remat="full"), materialize="error")

    def loss(adapter):
        return jnp.sum(jnp.sin(forward(jp.combine(frozen, adapter), INPUTS, TARGETS)))

    gradients = jax.jit(jax.grad(loss))(adapter)
    assert gradients.keys() == adapter.keys() and len(adapter) > 30
    assert all(jnp.isfinite(g).all() and g.any() for g in gradients.values())


# Parameters and files ----------------------------------------------------------------------------


def test_the_parameters_are_these():
    flat = jax.tree_util.tree_leaves_with_path(encoder_decoder.shapes(FLAN, jnp.bfloat16))
    got = {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}
    want = {"embed/embedding": (19, 12), "head/kernel": (12, 19)}
    for tower, depth in (("encoder", 2), ("decoder", 3)):
        want |= {f"{tower}/bias/embedding": (6, 4), f"{tower}/norm/scale": (12,)}
        parts = ("attn", "cross") if tower == "decoder" else ("attn",)
        for part in parts:
            want |= {f"{tower}/layers/{part}/{n}/kernel": (depth, 12, 20) for n in "qkv"}
            want[f"{tower}/layers/{part}/o/kernel"] = (depth, 20, 12)
        for norm in (*parts, "mlp"):
            want[f"{tower}/layers/{norm}_norm/scale"] = (depth, 12)
        want |= {f"{tower}/layers/mlp/{n}/kernel": (depth, 12, 20) for n in ("gate", "up")}
        want[f"{tower}/layers/mlp/down/kernel"] = (depth, 20, 12)
    assert got == want
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in flat)


def hf(width, mlp_width, layers, heads, head_dim, **options):
    names = ("d_model", "d_ff", "num_layers", "num_heads", "d_kv")
    sizes = zip(names, (width, mlp_width, layers, heads, head_dim), strict=True)
    return {"model_type": "t5", "vocab_size": 32128, **dict(sizes), **options}


GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# What the config.json of published models holds, and how many parameters they have.
PUBLISHED = {
    "t5-small": (hf(512, 2048, 6, 8, 64, n_positions=512, dropout_rate=0.1), 60_506_624),
    "t5-base": (hf(768, 3072, 12, 12, 64), 222_903_552),
    "t5-11b": (hf(1024, 65536, 24, 128, 128), 11_307_321_344),
    "flan-t5-small": (
        hf(512, 1024, 8, 6, 64, num_decoder_layers=8, dense_act_fn="gelu_new", **GATED),
        76_961_152,
    ),
    "flan-t5-base": (hf(768, 2048, 12, 12, 64, **GATED), 247_577_856),
    "flan-t5-xl": (hf(2048, 5120, 24, 32, 64, **GATED), 2_849_757_184),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_without_memory(name):
    config_json, count = PUBLISHED[name]
    config = encoder_decoder.Config.from_hf(config_json)
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder_decoder.shapes(config))) == count
    assert (config.buckets, config.reach, config.start, config.eos) == (32, 128, 0, (1,))
    assert config.scaled == config.tied == ("flan" not in name)


def test_init_is_normal_with_norms_at_one():
    config = dataclasses.replace(FLAN, width=64, mlp_width=96)
    params = encoder_decoder.init(config, jax.random.key(0), jnp.bfloat16)
    shapes = encoder_decoder.shapes(config, jnp.bfloat16)
    alike = lambda w: (w.shape, w.dtype)  # noqa: E731
    assert jax.tree.map(alike, params) == jax.tree.map(alike, shapes)
    assert (params["decoder"]["layers"]["cross_norm"]["scale"] == 1).all()
    ups = [
        np.asarray(params[t]["layers"]["mlp"]["up"]["kernel"], np.float32)
        for t in ("encoder", "decoder")
    ]
    assert all(abs(up.std() - 0.02) < 1e-3 and abs(up.mean()) < 1e-3 for up in ups)
    assert len({layer.tobytes() for up in ups for layer in up}) == 5  # layers differ


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_gives_the_same_config_again(name):
    config = CONFIGS[name]
    again = json.loads(json.dumps(config.to_hf()))
    assert encoder_decoder.Config.from_hf(again) == config


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_and_load_come_back_bit_for_bit(tmp_path, name, dtype):
    config = CONFIGS[name]
    params = jax.tree.map(lambda w: w.astype(dtype), random_params(config))
    encoder_decoder.save(tmp_path, config, params, shard_bytes=2000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, loaded = encoder_decoder.load(tmp_path)
    assert again == config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype.dtype.name
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda w: w.dtype, loaded) == jax.tree.map(lambda w: w.dtype, params)


def test_loading_converts_and_shards(tmp_path):
    params = random_params(T5)
    encoder_decoder.save(tmp_path, T5, params)
    sharding = NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), P(None))
    _, loaded = encoder_decoder.load(tmp_path, dtype=jnp.bfloat16, sharding=sharding)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert got.sharding == sharding
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_loading_into_codes_is_quantizing_what_was_loaded(tmp_path):
    params = jax.tree.map(lambda w: w.astype(jnp.float32), random_params(FLAN))
    encoder_decoder.save(tmp_path, FLAN, params)
    _, loaded = encoder_decoder.load(tmp_path, quantize="int8")
    want = jp.quantize("int8", found(FLAN).hidden)(jax.random.key(0), params)
    assert jax.tree.structure(loaded) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    got = jp.lift(encoder_decoder.pure(FLAN))(loaded, INPUTS, TARGETS)
    dense = compiled(FLAN)(jp.merge(loaded), INPUTS, TARGETS)
    assert np.abs(got - dense).max() < 1e-4 * dense.std()


# Bad input ---------------------------------------------------------------------------------------


HF = T5.to_hf()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mt5"}, "model_type='mt5', which this encoder-decoder .* must be 't5'"),
        (
            {"feed_forward_proj": "gelu"},
            "feed_forward_proj='gelu', which .* 'relu' or 'gated-gelu'",
        ),
        ({"dense_act_fn": "silu"}, "dense_act_fn='silu', which .* must be 'relu' or absent"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False, which .* must be True"),
        ({"is_decoder": True}, "is_decoder=True, which .* must be False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, which"),
        ({"relative_attention_num_buckets": 7}, "got buckets=7, reach=7"),
        ({"relative_attention_num_buckets": 2}, "got buckets=2, reach=7"),
        ({"relative_attention_max_distance": 3}, "got buckets=6, reach=3"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        encoder_decoder.Config.from_hf(HF | change)


def test_fields_that_have_no_default_are_asked_for():
    with pytest.raises(ValueError, match="config.json lacks d_model, num_heads"):
        encoder_decoder.Config.from_hf(
            {k: v for k, v in HF.items() if k not in ("d_model", "num_heads")}
        )


def test_an_unknown_mlp_is_refused():
    with pytest.raises(ValueError, match="one of relu, gated-gelu, gated-silu, got 'gelu'"):
        dataclasses.replace(T5, mlp="gelu")


def test_what_config_json_leaves_out_is_what_transformers_assumes():
    def read(**options):
        return encoder_decoder.Config.from_hf(hf(8, 8, 5, 2, 4, **options))

    assert read().decoder_layers == 5 and read(num_decoder_layers=2).decoder_layers == 2
    assert (read().mlp, read().eps, read().pad) == ("relu", 1e-6, 0)
    assert read(pad_token_id=3).start == 3 and read(pad_token_id=None).start == 0
    assert read(eos_token_id=[1, 2]).eos == (1, 2) and read(eos_token_id=None).eos == ()


def rewrite(folder, drop=(), **change):
    file = folder / "config.json"
    hf = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in hf.items() if k not in drop}))


def with_tensors(folder, **more):
    """Adds tensors to the one file of a folder."""
    hf, tensors = safetensors.open_folder(folder)
    kept = {name: np.array(safetensors.read(tensor)) for name, tensor in tensors.items()} | more
    lazy = {
        name: safetensors.Lazy(array.shape, array.dtype, lambda array=array: array)
        for name, array in kept.items()
    }
    safetensors.write_folder(folder, hf, lazy)


def test_a_folder_with_other_tensors_names_them(tmp_path):
    encoder_decoder.save(tmp_path, FLAN, random_params(FLAN))
    rewrite(tmp_path, num_decoder_layers=4, d_ff=21)
    with pytest.raises(ValueError) as info:
        encoder_decoder.load(tmp_path)
    message = str(info.value)
    assert "missing: decoder.block.3.layer.1.EncDecAttention.q.weight of shape (20, 12)" in message
    rewrite(tmp_path, num_decoder_layers=2)
    with pytest.raises(ValueError) as info:
        encoder_decoder.load(tmp_path)
    message = str(info.value)
    assert (
        "encoder.block.1.layer.1.DenseReluDense.wo.weight is (12, 20), should be (12, 21)"
        in message
    )
    assert "left over: decoder.block.2." in message


def test_copies_of_the_table_and_a_bias_nothing_reads_are_passed_over(tmp_path):
    params = random_params(T5)
    encoder_decoder.save(tmp_path, T5, params)
    table = np.asarray(params["embed"]["embedding"])
    copies = {f"{part}.weight": table for part in ("encoder.embed_tokens", "decoder.embed_tokens")}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    with_tensors(tmp_path, **copies, **{"lm_head.weight": table, unused: np.ones((6, 4))})
    config, loaded = encoder_decoder.load(tmp_path)
    assert config == T5
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    "name, advice",
    [
        ("encoder.embed_tokens.weight", "Only a table shared by both stacks is known"),
        ("decoder.embed_tokens.weight", "Only a table shared by both stacks is known"),
        ("lm_head.weight", "says tie_word_embeddings=True: false there uses the head"),
    ],
)
def test_a_copy_that_differs_is_refused(tmp_path, name, advice):
    encoder_decoder.save(tmp_path, T5, random_params(T5))
    with_tensors(tmp_path, **{name: np.ones((19, 12))})
    message = f"model.safetensors has a {re.escape(name)} unlike its shared.weight. .*{advice}"
    with pytest.raises(ValueError, match=message):
        encoder_decoder.load(tmp_path)


def test_a_head_that_is_not_scaled_counts_whatever_the_tie_says(tmp_path):
    # What transformers 5 writes for T5 1.1.
    params = random_params(FLAN)
    encoder_decoder.save(tmp_path, FLAN, params)
    rewrite(tmp_path, tie_word_embeddings=True, scale_decoder_outputs=False)
    config, loaded = encoder_decoder.load(tmp_path)
    assert config == FLAN
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    # And what transformers 4 wrote.
    rewrite(tmp_path, tie_word_embeddings=False, drop=("scale_decoder_outputs",))
    assert encoder_decoder.load(tmp_path)[0] == FLAN


def test_an_untied_head_is_not_left_out_in_silence(tmp_path):
    encoder_decoder.save(tmp_path, T5, random_params(T5))
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight of shape \(19, 12\)"):
        encoder_decoder.load(tmp_path)


def test_params_of_another_config_are_not_saved(tmp_path):
    message = r"wrong shape: decoder/norm/scale is \(12,\), should be \(14,\)"
    with pytest.raises(ValueError, match=message):
        other = dataclasses.replace(T5, width=14)
        encoder_decoder.save(tmp_path, other, random_params(T5))
    assert not list(tmp_path.iterdir())


def test_a_full_cache_is_refused_or_under_jit_gives_nan():
    params, decode = random_params(T5), compiled(T5, "decode")
    cache = encoder_decoder.init_cache(T5, 2, 7, jnp.float64)
    memory = compiled(T5, "encode")(params, INPUTS)
    with pytest.raises(ValueError, match="8 targets do not fit in the 7 free slots"):
        decode(params, TARGETS, memory, cache=cache)
    _, cache = decode(params, TARGETS[:, :5], memory, cache=cache)
    with pytest.raises(ValueError, match="3 targets do not fit in the 2 free slots"):
        encoder_decoder.pure(T5, "decode")(params, TARGETS[:, 5:], cache=cache)
    logits, _ = decode(params, TARGETS[:, 5:], cache=cache)
    assert jnp.isnan(logits).all()


def test_decoding_without_an_input_is_refused():
    params, decode = random_params(T5), encoder_decoder.pure(T5, "decode")
    with pytest.raises(ValueError, match="got memory=None and no cache"):
        decode(params, TARGETS)
    cache = encoder_decoder.init_cache(T5, 2, 8, jnp.float64)
    with pytest.raises(ValueError, match="got memory=None and a cache that has seen none"):
        decode(params, TARGETS, cache=cache)
    memory = compiled(T5, "encode")(params, INPUTS)
    _, cache = decode(params, TARGETS[:, :1], memory, cache=cache)
    with pytest.raises(ValueError, match=r"got a mask \(2, 9\) without the memory"):
        decode(params, TARGETS[:, 1:2], cache=cache, mask=np.ones((2, 9), bool))


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="or a checkpoint policy, got 'some'"):
        encoder_decoder.pure(T5, remat="some")
