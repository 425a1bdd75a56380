"""The Flax classes of transformers 4.49; version 5 has none."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from .harness import (
    PAD,
    VOCAB,
    Client,
    Model,
    cases,
    hold,
    random,
    random_params,
    tokens,
)

pytest.importorskip(
    "transformers.modeling_flax_utils", reason="make clients installs transformers 4.49"
)
import transformers  # noqa: E402

from . import shims  # noqa: E402

WIDTH = 16
NORMS = r"(norm\w*|ln_\w+|LayerNorm)/(scale|bias|weight)$"


@contextlib.contextmanager
def rows(of: dict[str, tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """Rows at the outputs of linen's Dense layers, by the path of their kernel."""

    def intercept(call, args, kwargs, context):
        y = call(*args, **kwargs)
        found = of.get("/".join((*context.module.path, "kernel")))
        if found is None or context.method_name != "__call__":
            return y
        values, virtual_positions = found
        return jnp.where(
            virtual_positions[..., None] >= 0,
            values[jnp.maximum(virtual_positions, 0)].astype(y.dtype),
            y,
        )

    with nn.intercept_methods(intercept):
        yield


def built(name: str, config: Any, call: Callable, args: tuple) -> Model:
    """A class of transformers as a function: what `call(model, *args)` reads of its outputs."""
    model = getattr(transformers, name)(config, dtype=jnp.float64, _do_init=False)

    def fn(params, *args):
        with shims.in_place():
            return call(functools.partial(model, params=params), *args)

    return Model(fn, random_params(model.params_shape_tree), args)


def client(
    name: str,
    config: Callable[[], Any],
    kernels: str,
    keys: str,
    values: str,
    feedforward: str | None = None,
    *,
    call: Callable = lambda model, ids: hidden(model, ids),
    args: Callable[[], tuple] = lambda: (tokens(0),),
    **rest: Any,
) -> Client:
    def build():
        with shims.in_place():
            return built(name, config(), call, args())

    roles = dict(norms=NORMS, biases=r"bias$")
    return Client(name, build, kernels, keys, values, feedforward, rows=rows, **roles | rest)


# --- What is read of the outputs: entries of padding are of no interest to anyone, but stay ------


def mask(ids):
    return (ids != PAD).astype(jnp.int32)


def hidden(model, ids):
    return model(ids, attention_mask=mask(ids)).last_hidden_state


def logits(model, ids):
    return model(ids, attention_mask=mask(ids)).logits


def seq2seq(output: str):
    def call(model, ids, targets):
        return model(ids, decoder_input_ids=targets, attention_mask=mask(ids))[output]

    return call


def image(model, pixels):
    return model(pixels).last_hidden_state


# --- Encoders --------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
)
BERT = dict(
    kernels=r"kernel",
    keys=r"/key/kernel",
    values=r"/value/kernel",
    feedforward=r"layer/./output/dense/kernel",
    tables=r"embeddings/embedding",
)


ENCODERS = [
    client("FlaxBertModel", lambda: transformers.BertConfig(**SMALL), **BERT),
    client(
        "FlaxBertForSequenceClassification",
        lambda: transformers.BertConfig(**SMALL, num_labels=4),
        **BERT
        | dict(
            kernels=r"kernel",
            tables=r"embeddings/embedding",
        ),
        call=logits,
    ),
    client(
        "FlaxRobertaModel", lambda: transformers.RobertaConfig(**SMALL, pad_token_id=PAD), **BERT
    ),
    client(
        "FlaxRobertaPreLayerNormModel",
        lambda: transformers.RobertaPreLayerNormConfig(**SMALL, pad_token_id=PAD),
        **BERT,
    ),
    client(
        "FlaxElectraModel",
        lambda: transformers.ElectraConfig(**SMALL, embedding_size=8),
        **BERT | dict(kernels=r"kernel"),
    ),
    client(
        "FlaxBigBirdModel",
        lambda: transformers.BigBirdConfig(**SMALL, attention_type="original_full"),
        **BERT,
    ),
    client(
        "FlaxDistilBertModel",
        lambda: transformers.DistilBertConfig(
            vocab_size=VOCAB,
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=32,
        ),
        r"layer/.*kernel",
        r"k_lin/kernel",
        r"v_lin/kernel",
        r"lin2/kernel",
        tables=r"embedding$",
    ),
    client(
        "FlaxAlbertModel",
        lambda: transformers.AlbertConfig(**SMALL, embedding_size=8),
        r"kernel",
        r"/key/kernel",
        r"/value/kernel",
        r"ffn_output/kernel",
        tables=r"embedding$",
    ),
]

# --- Decoders --------------------------------------------------------------------------------

LLAMA = dict(
    kernels=r"proj/kernel|lm_head/kernel",
    keys=r"k_proj/kernel",
    values=r"v_proj/kernel",
    feedforward=r"down_proj/kernel",
    tables=r"embed_tokens",
    heads=r"lm_head",
    call=logits,
)
DECODERS = [
    client(
        "FlaxGPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32
        ),
        r"h/.*kernel",
        r"c_attn/kernel",
        r"c_attn/kernel",
        r"mlp/c_proj/kernel",
        tables=r"embedding$",
        scaled=lambda sites: sites.match("*c_attn/kernel").output_slice(2, 3),
        call=logits,
    ),
    client(
        "FlaxGPTNeoForCausalLM",
        lambda: transformers.GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            intermediate_size=24,
            max_position_embeddings=32,
        ),
        r"h/.*kernel",
        r"k_proj/kernel",
        r"v_proj/kernel",
        r"mlp/c_proj/kernel",
        tables=r"embedding$",
        call=logits,
    ),
    client(
        "FlaxGPTJForCausalLM",
        lambda: transformers.GPTJConfig(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=2,
            n_head=2,
            n_positions=32,
            rotary_dim=4,
            n_inner=24,
        ),
        r"h/.*kernel|lm_head/kernel",
        r"k_proj/kernel",
        r"v_proj/kernel",
        r"fc_out/kernel",
        tables=r"embedding$",
        heads=r"lm_head",
        call=logits,
    ),
    client(
        "FlaxOPTForCausalLM",
        lambda: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
            word_embed_proj_dim=8,
            pad_token_id=PAD,
        ),
        r"kernel",
        r"k_proj/kernel",
        r"v_proj/kernel",
        r"fc2/kernel",
        tables=r"embedding$",
        call=logits,
    ),
    client(
        "FlaxBloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=2),
        r"kernel",
        r"query_key_value/kernel",
        r"query_key_value/kernel",
        r"dense_4h_to_h/kernel",
        tables=r"embedding$",
        scaled=lambda sites: sites.match("*query_key_value/kernel").output_slice(2, 3, groups=2),
        call=logits,
    ),
    client(
        "FlaxXGLMForCausalLM",
        lambda: transformers.XGLMConfig(
            vocab_size=VOCAB,
            d_model=WIDTH,
            num_layers=2,
            attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=PAD,
        ),
        r"kernel",
        r"k_proj/kernel",
        r"v_proj/kernel",
        r"fc2/kernel",
        tables=r"embedding$",
        call=logits,
    ),
    client(
        "FlaxLlamaForCausalLM",
        lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=1),
        **LLAMA,
    ),
    client(
        "FlaxGemmaForCausalLM",
        lambda: transformers.GemmaConfig(
            **SMALL, num_key_value_heads=1, head_dim=8, hidden_activation="gelu_pytorch_tanh"
        ),
        **LLAMA | dict(heads=None),
    ),
    client(
        "FlaxMistralForCausalLM",
        lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=32),
        **LLAMA,
    ),
]

# --- Encoder-decoders ------------------------------------------------------------------------


def cross(path: str) -> str:
    """The decoder's own attention has targets in front of it, all others the encoder's inputs."""
    own = "decoder/" in path and ("self_attn" in path or "SelfAttention" in path)
    return "virtual_target_positions" if own else "virtual_positions"


PAIRS = dict(
    args=lambda: (tokens(0), tokens(1, 5)),
    virtual={0: "virtual_positions", 1: "virtual_target_positions"},
    virtual_positions=cross,
    tables=r"embedding$",
)
T5 = dict(
    vocab_size=VOCAB,
    d_model=WIDTH,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
)
BART = dict(
    vocab_size=VOCAB,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
BART_PATHS = (r"kernel", r"k_proj/kernel", r"v_proj/kernel", r"fc2/kernel")
SEQ2SEQ = [
    client(
        "FlaxT5ForConditionalGeneration",
        lambda: transformers.T5Config(**T5),
        r"kernel",
        r"/k/kernel",
        r"/v/kernel",
        r"/wo/kernel",
        call=seq2seq("logits"),
        **PAIRS,
    ),
    client(
        "FlaxLongT5Model",
        lambda: transformers.LongT5Config(**T5, local_radius=3),
        r"kernel",
        r"/k/kernel",
        r"/v/kernel",
        r"/wo/kernel",
        call=seq2seq("last_hidden_state"),
        **PAIRS,
    ),
    client(
        "FlaxBartForConditionalGeneration",
        lambda: transformers.BartConfig(**BART),
        *BART_PATHS,
        call=seq2seq("logits"),
        **PAIRS,
    ),
    client(
        "FlaxPegasusModel",
        lambda: transformers.PegasusConfig(**BART),
        *BART_PATHS,
        call=seq2seq("last_hidden_state"),
        **PAIRS,
    ),
    client(
        "FlaxMarianMTModel",
        lambda: transformers.MarianConfig(**BART),
        *BART_PATHS,
        call=seq2seq("logits"),
        **PAIRS,
    ),
]

# --- Sound and images ------------------------------------------------------------------------

VIT = dict(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
)
VIT_PATHS = (
    r"kernel",
    r"/key/kernel",
    r"/value/kernel",
    r"layer/./output/dense/kernel|mlp/fc2/kernel",
)


def pixels() -> tuple:
    return (random(3, 2, 3, 8, 8),)


OTHERS = [
    client(
        "FlaxWhisperForConditionalGeneration",
        lambda: transformers.WhisperConfig(
            **BART | dict(max_source_positions=6, max_target_positions=32, num_mel_bins=5)
        ),
        r"kernel",
        r"decoder/.*self_attn/k_proj/kernel",
        r"decoder/.*self_attn/v_proj/kernel",
        r"fc2/kernel",
        tables=r"/embedding$",
        call=lambda model, sound, ids: model(sound, decoder_input_ids=ids).logits,
        args=lambda: (random(2, 2, 5, 12), tokens(1)),
        virtual={1: "virtual_positions"},
    ),
    client(
        "FlaxWav2Vec2Model",
        lambda: transformers.Wav2Vec2Config(
            **{k: v for k, v in SMALL.items() if k != "max_position_embeddings"},
            conv_dim=(8, 8),
            conv_kernel=(4, 3),
            conv_stride=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
        ),
        r"kernel|weight_v",
        r"k_proj/kernel",
        r"v_proj/kernel",
        r"output_dense/kernel",
        call=lambda model, sound: model(sound).last_hidden_state,
        args=lambda: (random(2, 2, 40),),
        virtual={},
    ),
    client(
        "FlaxViTModel",
        lambda: transformers.ViTConfig(**VIT),
        *VIT_PATHS,
        call=image,
        args=pixels,
        virtual={},
    ),
    client(
        "FlaxBeitModel",
        lambda: transformers.BeitConfig(**VIT, use_relative_position_bias=True),
        *VIT_PATHS,
        tables=r"bias_table",
        call=image,
        args=pixels,
        virtual={},
    ),
    client(
        "FlaxDinov2Model",
        lambda: transformers.Dinov2Config(**VIT),
        *VIT_PATHS,
        call=image,
        args=pixels,
        virtual={},
    ),
    client(
        "FlaxCLIPModel",
        lambda: transformers.CLIPConfig(
            text_config=dict(**SMALL, eos_token_id=2, projection_dim=8),
            vision_config=dict(**VIT, projection_dim=8),
            projection_dim=8,
        ),
        r"kernel",
        r"text_model/.*k_proj/kernel",
        r"text_model/.*v_proj/kernel",
        r"fc2/kernel",
        tables=r"/embedding$",
        call=lambda model, ids, pixels: {
            key: model(ids, pixels, attention_mask=mask(ids))[key]
            for key in ("text_embeds", "image_embeds")
        },
        args=lambda: (tokens(0), *pixels()),
    ),
    client(
        "FlaxResNetModel",
        lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
        ),
        r"kernel",
        r"layer_0/convolution/kernel",
        r"layer_1/convolution/kernel",
        call=image,
        args=pixels,
        virtual={},
    ),
    client(
        "FlaxRegNetModel",
        lambda: transformers.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4
        ),
        r"kernel",
        r"layer/0/convolution/kernel",
        r"layer/3/convolution/kernel",
        call=image,
        args=pixels,
        virtual={},
    ),
]

CLIENTS = [*ENCODERS, *DECODERS, *SEQ2SEQ, *OTHERS]


@cases(CLIENTS)
def test_what_a_client_is_held_to(client, column):
    hold(client, column)
