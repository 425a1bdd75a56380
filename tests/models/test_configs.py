"""Configurations: every fault is a ValueError that names it, and a further family is one table."""

import dataclasses
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import _config, decoder, encoder, encoder_decoder
from jaxpeft.models import _decoder_config as decoder_config
from jaxpeft.models import _encoder_config as encoder_config
from jaxpeft.models import _encoder_decoder_config as encoder_decoder_config

SIZES = {"vocab_size": 19, "hidden_size": 12, "intermediate_size": 20, "num_layers": 2}
SIZES |= {"num_heads": 2}
CONFIGS = {
    (decoder, "llama"): decoder.Config(**SIZES, num_kv_heads=1, head_dim=6),
    (decoder, "mistral"): decoder.Config(
        **SIZES, num_kv_heads=1, head_dim=6, model_type="mistral", sliding_window=3
    ),
    (decoder, "qwen2"): decoder.Config(
        **SIZES, num_kv_heads=1, head_dim=6, model_type="qwen2", qkv_bias=True, sliding_window=3
    ),
    (decoder, "qwen3"): decoder.Config(
        **SIZES, num_kv_heads=1, head_dim=6, model_type="qwen3", qk_norm=True
    ),
    (encoder, "bert"): encoder.Config(**SIZES),
    (encoder, "roberta"): encoder.Config(**SIZES, model_type="roberta", pad_token_id=1),
    (encoder, "distilbert"): encoder.Config(**SIZES, model_type="distilbert", type_vocab_size=0),
    (encoder_decoder, "t5"): encoder_decoder.Config(**SIZES, num_decoder_layers=2, head_dim=6),
}
FAMILIES = {
    decoder: decoder_config.FAMILIES,
    encoder: encoder_config.FAMILIES,
    encoder_decoder: encoder_decoder_config.FAMILIES,
}
# Values of every JSON type; each option takes some of them.
JSON = ["abc", "", [], ["abc"], [1, "abc"], {}, {"a": 1}, True, -3, 0, 2.5, float("nan"), None]


def test_every_family_is_tested_here():
    for model, families in FAMILIES.items():
        assert {name for module, name in CONFIGS if module is model} == set(families)


def options_of():
    for (model, name), config in CONFIGS.items():
        for option, row in FAMILIES[model][name].options.items():
            # `model_type` says which table it is, and is tested below.
            if isinstance(row, _config.Option) and option != "model_type":
                yield pytest.param(model, config, option, row, id=f"{name} {option}")


@pytest.mark.parametrize("model, config, option, row", list(options_of()))
def test_a_value_of_another_kind_is_refused_by_name(model, config, option, row):
    """What is read is of the kind of its field, and all else is a ValueError."""
    fields = (row.fields,) if isinstance(row.fields, str) else row.fields
    (kind,) = (f.metadata["kind"] for f in dataclasses.fields(config) if f.name == fields[0])
    refused = 0
    for value in JSON:
        hf = config.to_hf() | {option: value}
        try:
            read = model.Config.from_hf(hf)
        except ValueError as error:
            refused += 1
            if value is not None and not kind.accepts(kind.from_json(value)):
                assert f"config.json has {option}={value!r}" in str(error)
                assert f"must be {kind.words}" in str(error)
        else:
            assert all(kind.accepts(getattr(read, field)) for field in fields)
    assert refused >= 6


MESSAGES = [
    (decoder, {"hidden_size": "abc"}, "hidden_size='abc', but it must be a positive integer"),
    (decoder, {"hidden_size": [64]}, r"hidden_size=\[64\], but it must be a positive integer"),
    (decoder, {"hidden_size": 12.0}, "hidden_size=12.0, but it must be a positive integer"),
    (decoder, {"hidden_size": True}, "hidden_size=True, but it must be a positive integer"),
    (decoder, {"hidden_size": None}, "hidden_size=None, but it must be a positive integer"),
    (decoder, {"num_hidden_layers": -1}, "num_hidden_layers=-1, but it must be a positive integer"),
    (decoder, {"num_attention_heads": 0}, "num_attention_heads=0, but it must be a positive"),
    (decoder, {"head_dim": "x"}, "head_dim='x', but it must be a positive integer"),
    (decoder, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6', but it must be a number of at least"),
    (decoder, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, but it must be a number of at l"),
    (decoder, {"tie_word_embeddings": "no"}, "tie_word_embeddings='no', but it must be a boolean"),
    (decoder, {"attention_bias": 1}, "attention_bias=1, but it must be a boolean"),
    (
        decoder,
        {"eos_token_id": "x"},
        "eos_token_id='x', but it must be a tuple of integers .in con",
    ),
    (decoder, {"eos_token_id": [1, [2]]}, r"eos_token_id=\[1, \[2\]\], but it must be a tuple of"),
    (decoder, {"pad_token_id": [0]}, r"pad_token_id=\[0\], but it must be an integer or null"),
    (decoder, {"model_type": ["llama"]}, r"model_type=\['llama'\], which this decoder does not"),
    (decoder, {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\], which this decoder does not"),
    (decoder, {"rope_theta": "1e4"}, "rope_theta='1e4', but it must be a positive number"),
    (decoder, {"rope_theta": -1}, "rope_theta=-1, but it must be a positive number"),
    (decoder, {"rope_scaling": "linear"}, "rope_scaling='linear', but it must be an object of opt"),
    (decoder, {"rope_scaling": [2]}, r"rope_scaling=\[2\], but it must be an object of options"),
    (
        decoder,
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
        r"rope_type=\['linear'\], which this decoder does not compute; it must be 'default'",
    ),
    (
        decoder,
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        "factor='2', but it must be a positive number",
    ),
    (
        decoder,
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            }
        },
        "needs a high_freq_factor above its low_freq_factor, got high_freq_factor=4.0, low",
    ),
    (
        decoder,
        {"rope_parameters": {"rope_theta": [1]}},
        r"rope_theta=\[1\], but it must be a positive number",
    ),
    (
        decoder,
        {"model_type": "mistral", "sliding_window": "4096"},
        "sliding_window='4096', but it must be a positive integer",
    ),
    (
        decoder,
        {"model_type": "mistral", "sliding_window": 0},
        "sliding_window=0, but it must be a positive integer",
    ),
    (
        decoder,
        {"model_type": "qwen2", "use_sliding_window": "yes"},
        "use_sliding_window='yes', but it must be a boolean",
    ),
    (
        decoder,
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "all"},
        "max_window_layers='all', but it must be an integer of at least 0",
    ),
    (
        decoder,
        {"model_type": "qwen3", "layer_types": "full_attention"},
        "layer_types='full_attention', but it must be a list of strings",
    ),
    (
        decoder,
        {"model_type": "qwen3", "layer_types": [["full_attention"], 2]},
        r"layer_types=\[\['full_attention'\], 2\], but it must be a list of strings",
    ),
    (encoder, {"hidden_size": "abc"}, "hidden_size='abc', but it must be a positive integer"),
    (encoder, {"hidden_act": 3}, "hidden_act=3, which this encoder does not compute; it must be"),
    (encoder, {"type_vocab_size": -1}, "type_vocab_size=-1, but it must be an integer of at least"),
    (
        encoder,
        {"layer_norm_eps": []},
        r"layer_norm_eps=\[\], but it must be a number of at least 0",
    ),
    (encoder, {"model_type": {}}, "model_type={}, which this encoder does not compute"),
    (
        encoder,
        {"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1},
        r"max_position_embeddings=2, of which RoBERTa uses pad_token_id \+ 1 = 2 for none",
    ),
    (encoder_decoder, {"d_model": "abc"}, "d_model='abc', but it must be a positive integer"),
    (encoder_decoder, {"d_kv": [6]}, r"d_kv=\[6\], but it must be a positive integer"),
    (
        encoder_decoder,
        {"feed_forward_proj": ["relu"]},
        r"feed_forward_proj=\['relu'\], which this encoder-decoder does not compute; it must be",
    ),
    (
        encoder_decoder,
        {"relative_attention_num_buckets": "32"},
        "relative_attention_num_buckets='32', but it must be a positive integer",
    ),
    (encoder_decoder, {"dropout_rate": "0.1"}, "dropout_rate='0.1', but it must be a number of at"),
    (encoder_decoder, {"model_type": None}, "model_type=None, which this encoder-decoder .* 't5'"),
]


@pytest.mark.parametrize("model, change, message", MESSAGES, ids=str)
def test_a_fault_says_what_it_was_and_what_it_should_be(model, change, message):
    base = next(config for (module, _), config in CONFIGS.items() if module is model)
    with pytest.raises(ValueError, match=message):
        model.Config.from_hf(base.to_hf() | change)


@pytest.mark.parametrize("model", FAMILIES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("hf", [[], "llama", 3, None])
def test_a_config_that_is_no_object_is_refused(model, hf):
    with pytest.raises(ValueError, match=re.escape(f"config.json must hold an object, got {hf!r}")):
        model.Config.from_hf(hf)


@pytest.mark.parametrize(
    "model, field, value, words",
    [
        (decoder, "vocab_size", "abc", "a positive integer"),
        (decoder, "rope", {"theta": 1e4}, "a `Rope`"),
        (decoder, "sliding_window", 0, "a positive integer or None"),
        (decoder, "eos_token_ids", 2, "a tuple of integers"),
        (decoder, "full_attention_layers", [0], "a tuple of integers"),
        (decoder, "qk_norm", None, "a boolean"),
        (encoder, "hidden_act", "mish", "'gelu' or 'gelu_new' or 'relu' or 'silu'"),
        (encoder, "pooler", 1, "a boolean"),
        (encoder, "num_heads", 2.0, "a positive integer"),
        (encoder_decoder, "feed_forward_proj", "gelu", "'relu' or 'gated-gelu' or 'gated-silu'"),
        (encoder_decoder, "decoder_start_token_id", None, "an integer"),
        (encoder_decoder, "num_buckets", "32", "a positive integer"),
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused_in_the_constructor(model, field, value, words):
    base = next(config for (module, _), config in CONFIGS.items() if module is model)
    message = re.escape(f"`Config({field}={value!r})`: `{field}` must be {words}")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, **{field: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"rope_type": "yarn"},
            r"`Rope\(rope_type='yarn'\)`: .* 'default' or 'linear' or 'llama3'",
        ),
        ({"theta": 0}, r"`Rope\(theta=0\)`: `theta` must be a positive number"),
        ({"low_freq_factor": 4.0}, "got high_freq_factor=4.0, low_freq_factor=4.0"),
    ],
    ids=str,
)
def test_rope_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        decoder.Rope(**change)


def test_numpy_integers_are_integers():
    sizes = {name: np.int64(size) for name, size in SIZES.items()}
    assert encoder.Config(**sizes) == encoder.Config(**SIZES)


def test_a_fault_in_a_folder_is_one_of_load(tmp_path):
    for (model, _), config in CONFIGS.items():
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.shapes(config))
        model.save(tmp_path, config, ones)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": "many"}))
        with pytest.raises(ValueError, match="vocab_size='many', but it must be a positive"):
            model.load(tmp_path)


# A further family --------------------------------------------------------------------------------


def gpt_names():
    """A family that stores the same decoder under other names and options."""
    Option, Constant = _config.Option, _config.Constant
    options = {
        "architectures": Constant(written=["OtherLMHeadModel"]),
        "model_type": Option("model_type"),
        "vocab_size": Option("vocab_size"),
        "n_embd": Option("hidden_size"),
        "n_inner": Option("intermediate_size"),
        "n_layer": Option("num_layers"),
        "n_head": Option("num_heads"),
        "n_kv_head": Option("num_kv_heads", None, lambda fields: fields["num_heads"]),
        "n_positions": Option("max_position_embeddings", 1024),
        "scale_attn_weights": Constant((True,)),
    }
    table = (
        (r"embed/embedding", r"transformer.wte.weight", False),
        (r"layers/attn/([qkvo])/kernel", r"transformer.h.{}.attn.\1.weight", True),
        (r"layers/attn/([qk])_norm/scale", r"transformer.h.{}.attn.\1_norm.weight", False),
        (r"layers/mlp/(gate|up|down)/kernel", r"transformer.h.{}.mlp.\1.weight", False),
        (r"layers/(attn|mlp)_norm/scale", r"transformer.h.{}.\1_norm.weight", False),
        (r"norm/scale", r"transformer.ln_f.weight", False),
    )
    return _config.Family(
        options=options,
        tensors=table,
        fields={"head_dim": 6, "tie_word_embeddings": True, "qk_norm": True},
        absent=("n_ctx",),
        renamed=((r"^base\.", ""),),
        ignored=(r".*\.attn\.masked_bias",),
    )


def test_a_further_family_is_one_table(tmp_path, monkeypatch):
    monkeypatch.setitem(decoder_config.FAMILIES, "other", gpt_names())
    config = decoder.Config(
        **SIZES, num_kv_heads=1, head_dim=6, model_type="other", tie_word_embeddings=True,
        qk_norm=True, max_position_embeddings=9,
    )  # fmt: skip
    params = decoder.init(config, jax.random.key(0))
    decoder.save(tmp_path, config, params)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["n_embd"] == 12 and hf["architectures"] == ["OtherLMHeadModel"]
    # With a prefix, and a tensor that nothing reads.
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "model.safetensors"
    tensors = {f"base.{name}": array for name, array in load_file(file).items()}
    assert tensors["base.transformer.h.1.mlp.gate.weight"].shape == (12, 20)
    save_file(tensors | {"base.transformer.h.0.attn.masked_bias": np.ones(1)}, file)
    again, loaded = decoder.load(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(
        decoder.apply_fn(again)(loaded, tokens), decoder.apply_fn(config)(params, tokens)
    )
    for change, message in [
        ({"scale_attn_weights": False}, "scale_attn_weights=False, which .* must be True"),
        ({"n_ctx": 4}, "n_ctx=4, which .* must be absent, since other has no such option"),
        ({"n_layer": "two"}, "n_layer='two', but it must be a positive integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.Config.from_hf(hf | change)
    del hf["n_head"]
    with pytest.raises(ValueError, match="config.json lacks n_head"):
        decoder.Config.from_hf(hf)
    with pytest.raises(ValueError, match="of a other cannot say norm_eps=0.1"):
        dataclasses.replace(config, norm_eps=0.1).to_hf()


@pytest.mark.parametrize("model", FAMILIES, ids=lambda m: m.__name__.split(".")[-1])
def test_a_family_without_a_table_is_refused_by_name(model, tmp_path):
    base = next(config for (module, _), config in CONFIGS.items() if module is model)
    config = dataclasses.replace(base, model_type="gpt2")
    with pytest.raises(ValueError, match="model_type='gpt2', which this"):
        model.plan(config)
    with pytest.raises(ValueError, match="model_type='gpt2', which this"):
        model.save(tmp_path, config, model.init(config, jax.random.key(0)))
    assert not list(tmp_path.iterdir())


# One form ----------------------------------------------------------------------------------------


SHARED = ("apply_fn", "init", "load", "plan", "save", "shapes")


@pytest.mark.parametrize("model", FAMILIES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("name", SHARED)
def test_the_three_models_have_one_form(model, name):
    assert name in model.__all__
    function = getattr(model, name)
    assert inspect.signature(function) == inspect.signature(getattr(decoder, name))
    doc = inspect.getdoc(function)
    entries = re.findall(r"^  (\*{0,2}\w+):", doc.split("\nArgs:\n")[1].split("\nR")[0], re.M)
    assert [entry.lstrip("*") for entry in entries] == list(inspect.signature(function).parameters)
