"""The encoder against itself: padded, counted, adapted, saved and loaded, and what it refuses."""

import dataclasses
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models import encoder

BASE = encoder.Config(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=20,
    num_layers=3,
    num_heads=3,
    max_position_embeddings=16,
    type_vocab_size=2,
    pooler=True,
)
ROBERTA = dataclasses.replace(
    BASE, model_type="roberta", pad_token_id=1, pooler=False, norm_eps=1e-5
)
DISTIL = dataclasses.replace(
    BASE, model_type="distilbert", type_vocab_size=0, pooler=False, hidden_act="relu"
)
CONFIGS = {"bert": BASE, "roberta": ROBERTA, "distilbert": DISTIL}
SHARP = {"rtol": 1e-10, "atol": 1e-10}


def random_params(config, seed=0):
    """Every tensor random, in float64, so that each part of the model matters."""
    rng = np.random.default_rng(seed)

    def fill(path, array):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.7, 1.3, array.shape))
        return jnp.asarray(rng.normal(0, 0.4, array.shape))

    return jax.tree_util.tree_map_with_path(fill, encoder.shapes(config))


@functools.cache
def compiled(config, **options):
    return jax.jit(encoder.apply_fn(config, **options))


def ids(rows=2, length=10, seed=0):
    return np.random.default_rng(seed).integers(2, BASE.vocab_size, (rows, length))


@pytest.fixture(params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    return compiled(config), config, random_params(config)


# The forward pass --------------------------------------------------------------------------------


def by_hand(config, params, tokens, mask, types, positions):
    """Devlin et al., 2018, one layer, one row and one head after the other in NumPy."""
    p = jax.tree.map(np.asarray, params)

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return centred / scale * p["scale"] + p["bias"]

    rows = []
    for ids_, seen, kinds, places in zip(tokens, mask, types, positions, strict=True):
        x = p["embed"]["embedding"][ids_] + p["positions"]["embedding"][places]
        if config.type_vocab_size:
            x = x + p["types"]["embedding"][kinds]
        x = norm(x, p["embed_norm"])
        for i in range(config.num_layers):
            w = jax.tree.map(lambda a, i=i: a[i], p["layers"])
            q, k, v = (x @ w["attn"][n]["kernel"] + w["attn"][n]["bias"] for n in "qkv")
            heads = []
            for h in range(config.num_heads):
                part = slice(h * config.head_dim, (h + 1) * config.head_dim)
                scores = q[:, part] @ k[seen, part].T / config.head_dim**0.5
                weights = np.exp(scores)
                weights /= weights.sum(-1, keepdims=True)
                heads.append(weights @ v[seen, part])
            y = np.concatenate(heads, -1) @ w["attn"]["o"]["kernel"] + w["attn"]["o"]["bias"]
            x = norm(x + y, w["attn_norm"])
            y = x @ w["mlp"]["up"]["kernel"] + w["mlp"]["up"]["bias"]
            y = np.maximum(y, 0) @ w["mlp"]["down"]["kernel"] + w["mlp"]["down"]["bias"]
            x = norm(x + y, w["mlp_norm"])
        rows.append(x)
    return np.stack(rows)


def test_the_forward_pass_is_the_one_written_out_by_hand(model):
    _, config, params = model
    config = dataclasses.replace(
        config, hidden_act="relu", norm_eps=1e-12 if not config.type_vocab_size else 1e-3
    )
    mask = np.ones((2, 10), bool)
    mask[1, 6:] = False
    types, positions = ids(seed=1) % 2, ids(seed=2) % 16
    where = {"mask": mask, "positions": positions} | (
        {"token_type_ids": types} if config.type_vocab_size else {}
    )
    got = compiled(config)(params, ids(), **where)
    want = by_hand(config, params, ids(), mask, types, positions)
    np.testing.assert_allclose(got, want, **SHARP)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    forward, config, params = model
    real = slice(3, 10) if side == "left" else slice(0, 7)
    mask = np.ones((2, 10), bool)
    mask[1] = False
    mask[1, real] = True
    # RoBERTa counts tokens; the others count places, so that positions have to move along.
    where = {"mask": mask}
    if config.model_type != "roberta":
        where["positions"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    got = forward(params, ids(), **where)
    np.testing.assert_allclose(got[0], forward(params, ids())[0], **SHARP)
    np.testing.assert_allclose(got[1, real], forward(params, ids()[1:, real])[0], **SHARP)


def test_a_mask_of_ones_is_no_mask(model):
    forward, _, params = model
    got = forward(params, ids(), mask=np.ones((2, 10), np.int32))
    np.testing.assert_allclose(got, forward(params, ids()), **SHARP)


def test_roberta_counts_from_behind_its_padding_row():
    count = encoder.Encoder(ROBERTA, rngs=nnx.Rngs(0))._default_positions
    tokens = jnp.asarray([[1, 1, 5, 6, 7], [5, 6, 1, 7, 1]])
    want = [[1, 1, 2, 3, 4], [2, 3, 1, 4, 1]]
    assert count(tokens, None).tolist() == want
    assert count(tokens, tokens != 1).tolist() == want
    # A mask has the last word: here id 1 is a token like any other.
    assert count(tokens, jnp.ones((2, 5), bool)).tolist() == [[2, 3, 4, 5, 6]] * 2
    plain = encoder.Encoder(BASE, rngs=nnx.Rngs(0))._default_positions
    assert plain(tokens, tokens != 1).tolist() == [[0, 1, 2, 3, 4]]


def test_types_default_to_the_first():
    forward, params = compiled(BASE), random_params(BASE)
    plain = forward(params, ids())
    zeros = np.zeros((2, 10), np.int32)
    np.testing.assert_array_equal(forward(params, ids(), token_type_ids=zeros), plain)
    assert np.abs(forward(params, ids(), token_type_ids=zeros + 1) - plain).max() > 0.1


def test_the_pooler_reads_the_first_place():
    params = random_params(BASE)
    x = compiled(BASE)(params, ids())[:, 0]
    want = np.tanh(x @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    np.testing.assert_allclose(compiled(BASE, method="pooled")(params, ids()), want, **SHARP)


def test_rows_of_padding_alone_give_no_nan_and_no_gradient(model):
    forward, _, params = model
    mask = np.zeros((2, 10), bool)
    mask[0] = True

    def loss(params):
        x = forward(params, ids(), mask=mask)
        return jnp.sum(x[1] ** 3), x

    gradient, x = jax.grad(loss, has_aux=True)(params)
    assert jnp.isfinite(x).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Attention contributed nothing, so its products have no gradient.
    assert not gradient["layers"]["attn"]["v"]["kernel"].any()
    assert gradient["layers"]["mlp"]["up"]["kernel"].any()


def test_an_id_beyond_the_table_gives_nan():
    tokens = ids()
    tokens[1, 4] = BASE.vocab_size
    x = compiled(BASE)(random_params(BASE), tokens)
    assert jnp.isfinite(x[0]).all() and jnp.isnan(x[1]).all()


# Options -----------------------------------------------------------------------------------------


POLICY = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
OPTIONS = {"full": {"remat": "full"}, "policy": {"remat": POLICY}, "unrolled": {"unroll": 2}}


@functools.cache
def gradient(**options):
    forward = encoder.apply_fn(BASE, **options)
    loss = jax.value_and_grad(lambda params: jnp.sum(jnp.sin(forward(params, ids()))))
    return jax.jit(loss)(random_params(BASE))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_remat_and_unroll_change_no_value_and_no_gradient(options):
    got, want = gradient(**options), gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SHARP), got, want)


def test_the_compute_dtype_is_as_asked():
    params = jax.tree.map(lambda w: w.astype(jnp.float32), random_params(BASE))
    want = compiled(BASE)(params, ids())
    got = compiled(BASE, dtype=jnp.bfloat16)(params, ids())
    assert want.dtype == jnp.float32 and got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want).max() / want.std()
    assert 1e-4 < error < 0.1


def test_another_attention_function_takes_the_place_of_ours():
    seen = []

    def attend(q, k, v, *, mask):
        seen.append((q.shape, k.shape, v.shape, mask.shape, mask.dtype))
        return jnp.zeros_like(q)

    params = random_params(BASE)
    got = encoder.apply_fn(BASE, attention_fn=attend)(
        params, ids(), mask=np.ones((2, 10), np.int32)
    )
    heads = (2, 10, 3, 4)
    assert seen[0] == (heads, heads, heads, (2, 10), jnp.bool_)
    silent = jax.tree.map(jnp.copy, params)
    silent["layers"]["attn"]["o"]["kernel"] *= 0
    np.testing.assert_allclose(got, compiled(BASE)(silent, ids()), **SHARP)


# Methods -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sites():
    return jp.sites(
        encoder.apply_fn(BASE), encoder.shapes(BASE), ids(), mask=np.ones((2, 10), bool)
    )


def test_sites_of_the_encoder(sites):
    kernels = {
        f"layers/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")
    }
    assert set(sites.linear) == set(sites.hidden) == kernels
    assert set(sites.embedding) == {f"{n}/embedding" for n in ("embed", "positions", "types")}
    assert {sites[path].bias for path in kernels} == {p.replace("kernel", "bias") for p in kernels}
    norms = ("embed_norm", "layers/attn_norm", "layers/mlp_norm")
    assert {f"{norm}/scale" for norm in norms} <= set(sites.norm)
    assert not any(site.materialized for site in sites.values())


def test_lora_everywhere_is_the_merged_model_and_materializes_nothing(sites):
    params = random_params(BASE)
    method = jp.lora(2, sites.matrices, dtype=jnp.float64)
    frozen, adapter = jp.split(method(jax.random.key(0), params))
    keys = jax.random.split(jax.random.key(1), len(adapter))
    adapter = {
        path: 0.2 * jax.random.normal(key, array.shape, array.dtype)
        for key, (path, array) in zip(keys, adapter.items(), strict=True)
    }
    tree = jp.combine(frozen, adapter)
    mask = np.arange(10) < np.array([[10], [6]])
    forward = encoder.apply_fn(BASE, remat="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", jp.MaterializedWarning)
        got = jax.jit(jp.lift(forward, materialize="error"))(tree, ids(), mask=mask)
    want = forward(jp.merge(tree), ids(), mask=mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert np.abs(got - forward(params, ids(), mask=mask)).max() > 0.1


# Parameters and files ----------------------------------------------------------------------------


def test_the_parameters_are_these():
    flat = jax.tree_util.tree_leaves_with_path(encoder.shapes(BASE, jnp.bfloat16))
    got = {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}
    square = {f"layers/attn/{n}/kernel": (3, 12, 12) for n in "qkvo"}
    vectors = [f"layers/attn/{n}/bias" for n in "qkvo"] + ["layers/mlp/down/bias"]
    vectors += [f"layers/{n}_norm/{s}" for n in ("attn", "mlp") for s in ("scale", "bias")]
    assert got == square | dict.fromkeys(vectors, (3, 12)) | {
        "embed/embedding": (19, 12),
        "positions/embedding": (16, 12),
        "types/embedding": (2, 12),
        "embed_norm/scale": (12,),
        "embed_norm/bias": (12,),
        "layers/mlp/up/kernel": (3, 12, 20),
        "layers/mlp/up/bias": (3, 20),
        "layers/mlp/down/kernel": (3, 20, 12),
        "pooler/kernel": (12, 12),
        "pooler/bias": (12,),
    }
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in flat)
    assert not {"types", "pooler"} & encoder.shapes(DISTIL).keys()


BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768}
BERT_BASE |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
DISTIL_BASE = {"model_type": "distilbert", "vocab_size": 30522, "dim": 768, "hidden_dim": 3072}
DISTIL_BASE |= {"n_layers": 6, "n_heads": 12, "sinusoidal_pos_embds": False, "dropout": 0.1}
PUBLISHED = {  # with the pooler where the model has one
    "bert-base-uncased": (BERT_BASE, 109_482_240),
    "roberta-base": (
        BERT_BASE
        | {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514}
        | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
        124_645_632,
    ),
    "distilbert-base-uncased": (DISTIL_BASE, 66_362_880),
    "all-MiniLM-L6-v2": (
        BERT_BASE | {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
        22_713_216,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_counted_without_memory(name):
    config_json, count = PUBLISHED[name]
    config = encoder.Config.from_hf(config_json)
    config = dataclasses.replace(config, pooler=config.model_type != "distilbert")
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder.shapes(config))) == count
    assert config.max_length == 512


def test_init_is_normal_with_norms_at_one():
    config = dataclasses.replace(BASE, hidden_size=48, intermediate_size=96)
    params = encoder.init(config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda w: (w.shape, w.dtype), params) == jax.tree.map(
        lambda s: (s.shape, s.dtype), encoder.shapes(config, jnp.bfloat16)
    )
    assert (params["layers"]["attn_norm"]["scale"] == 1).all()
    assert (params["layers"]["attn"]["q"]["bias"] == 0).all()
    up = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float32)
    assert abs(up.std() - 0.02) < 1e-3 and abs(up.mean()) < 1e-3
    assert len({layer.tobytes() for layer in up}) == 3  # layers differ


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_save_and_load_come_back_bit_for_bit(model, tmp_path, dtype):
    _, config, params = model
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    encoder.save(tmp_path, config, params, shard_bytes=2000)
    again, loaded = encoder.load(tmp_path)
    assert again == config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype.dtype.name
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda w: w.dtype, loaded) == jax.tree.map(lambda w: w.dtype, params)


def rename(folder, change):
    """Writes the weights of a folder anew, each under the name that `change` gives it."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({change(name): np.ascontiguousarray(x) for name, x in tensors.items()}, file)
    return tensors


def test_a_folder_may_have_a_prefix_old_names_and_heads_of_pretraining(model, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, config, params = model
    encoder.save(tmp_path, config, params)

    def older(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return f"{config.model_type}." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    rename(tmp_path, older)
    more = {f"{config.model_type}.embeddings.position_ids": np.arange(16)[None]}
    heads = ("cls.predictions.bias", "cls.seq_relationship.weight", "lm_head.dense.weight")
    heads += ("vocab_transform.bias", "vocab_layer_norm.bias", "vocab_projector.weight")
    more |= dict.fromkeys(heads, np.ones((3, 3), np.float32))
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | more, file)
    again, loaded = encoder.load(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_loading_into_codes_is_quantizing_the_loaded_model(sites, tmp_path):
    config = dataclasses.replace(BASE, hidden_size=24, intermediate_size=32)
    params = jax.tree.map(lambda w: w.astype(jnp.float32), random_params(config))
    encoder.save(tmp_path, config, params)
    _, loaded = encoder.load(tmp_path, quantize="int8")
    wanted = jp.sites(encoder.apply_fn(config), params, ids())
    want = jp.quantize("int8", wanted.hidden)(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    forward = jp.lift(encoder.apply_fn(config), materialize="error")
    assert jnp.isfinite(forward(loaded, ids())).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_gives_the_same_config_again(name):
    config = dataclasses.replace(CONFIGS[name], pooler=False)
    assert encoder.Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


# Bad input ---------------------------------------------------------------------------------------


def test_what_config_json_leaves_out_is_what_transformers_assumes():
    read = encoder.Config.from_hf
    bert, distil = read(BERT_BASE), read(DISTIL_BASE)
    assert (
        bert.max_position_embeddings,
        bert.type_vocab_size,
        bert.norm_eps,
        bert.hidden_act,
        bert.pad_token_id,
    ) == (512, 2, 1e-12, "gelu", 0)
    assert read(BERT_BASE | {"model_type": "roberta"}).pad_token_id == 1
    assert (
        distil.max_position_embeddings,
        distil.type_vocab_size,
        distil.norm_eps,
        distil.hidden_act,
    ) == (512, 0, 1e-12, "gelu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type='llama', which this encoder does not compute; it"),
        ({"model_type": "electra"}, "must be one of bert, roberta, distilbert"),
        ({"hidden_act": "mish"}, "hidden_act='mish', which"),
        ({"is_decoder": True}, "is_decoder=True, which"),
        ({"add_cross_attention": True}, "add_cross_attention=True, which"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key', which .* must be 'absolute'",
        ),
        ({"pruned_heads": {"1": [2]}}, r"pruned_heads={'1': \[2\]}, which"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, which"),
        ({"num_attention_heads": 7}, "got hidden_size=768, num_heads=7"),
        (
            {"model_type": "roberta", "pad_token_id": None},
            r"from pad_token_id \+ 1, got pad_token_id=None",
        ),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        encoder.Config.from_hf(BERT_BASE | change)


def test_distilberts_activation_has_its_own_name():
    with pytest.raises(ValueError, match="activation='mish', which"):
        encoder.Config.from_hf(DISTIL_BASE | {"activation": "mish"})


def test_fields_that_have_no_default_are_asked_for():
    with pytest.raises(ValueError, match="config.json lacks hidden_size, num_attention_heads"):
        encoder.Config.from_hf(
            {k: v for k, v in BERT_BASE.items() if "hidden_size" not in k and "heads" not in k}
        )


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dataclasses.replace(DISTIL, type_vocab_size=2),
            "distilbert cannot say type_vocab_size=2, .* read as 0",
        ),
        (
            dataclasses.replace(DISTIL, norm_eps=0.1),
            "distilbert cannot say norm_eps=0.1, .* read as 1e-12",
        ),
        (dataclasses.replace(BASE, model_type="llama"), "model_type='llama'"),
    ],
    ids=str,
)
def test_what_config_json_cannot_say_is_not_written(config, message):
    with pytest.raises(ValueError, match=message):
        config.to_hf()


@pytest.mark.parametrize("config, longest", [(BASE, 16), (ROBERTA, 14)], ids=["bert", "roberta"])
def test_more_tokens_than_positions_are_refused(config, longest):
    forward, params = encoder.apply_fn(config), random_params(config)
    assert jnp.isfinite(forward(params, ids(1, longest))).all()
    with pytest.raises(ValueError, match=f"{longest + 1} tokens do not fit in the {longest} pos"):
        forward(params, ids(1, longest + 1))


def test_types_and_poolers_that_are_not_there_are_refused():
    params = random_params(DISTIL)
    with pytest.raises(
        ValueError, match=r"distilbert has no token types, got token_type_ids of shape \(2, 10\)"
    ):
        compiled(DISTIL)(params, ids(), token_type_ids=np.zeros((2, 10), np.int32))
    with pytest.raises(ValueError, match=r"distilbert has no pooler \(pooler=False\)"):
        compiled(DISTIL, method="pooled")(params, ids())


def test_a_folder_with_other_tensors_names_them(tmp_path):
    encoder.save(tmp_path, BASE, random_params(BASE))
    rename(tmp_path, lambda name: name.replace("pooler.dense.bias", "classifier.bias"))
    with pytest.raises(ValueError) as info:
        encoder.load(tmp_path)
    message = str(info.value)
    assert "missing: pooler.dense.bias of shape (12,)" in message
    assert "left over: classifier.bias of shape (12,)" in message


def test_params_of_another_config_are_not_saved(tmp_path):
    message = re.escape("wrong shape: layers/mlp/up/bias is (3, 20), should be (3, 21)")
    with pytest.raises(ValueError, match=message):
        encoder.save(tmp_path, dataclasses.replace(BASE, intermediate_size=21), random_params(BASE))
    assert not list(tmp_path.iterdir())


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="or a checkpoint policy, got 'some'"):
        encoder.apply_fn(BASE, remat="some")
