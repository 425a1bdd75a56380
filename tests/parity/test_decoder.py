"""The decoder against transformers: logits to 1e-4 of their standard deviation, in float32.

Every tensor of the fixtures is random (norms 1 +- 0.3, biases +- 0.3), heads * head_dim is not the
width, and the sequences are longer than the window and than the context before RoPE scaling.
"""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import decoder
from jaxpeft.serve import _generate as generate

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
transformers = pytest.importorskip("transformers", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6}
CASES = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama, linear rope, biases": (
        "llama",
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm": ("llama", {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral without a window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in the upper layers": ("qwen2", QWEN_WINDOW | {"max_window_layers": 1}),
    "qwen2, window in all layers": ("qwen2", QWEN_WINDOW | {"max_window_layers": 0}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN}),
    "qwen3, mixed layers, biases": (
        "qwen3",
        QWEN_WINDOW | {"layer_types": MIXED, "attention_bias": True, "tie_word_embeddings": True},
    ),
}
LENGTH = 48
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory):
    """A random model of transformers, and what we load from the folder that it saved."""
    family, options = CASES[request.param]
    config = transformers.AutoConfig.for_model(family, **SHAPE | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
            elif "norm" in name:
                tensor.uniform_(0.7, 1.3)
            else:
                tensor.normal_(0, 1.5 / tensor.shape[1] ** 0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, *decoder.load(folder)


def ids(rows, length=LENGTH, seed=1, vocab=SHAPE["vocab_size"]):
    return np.random.default_rng(seed).integers(3, vocab, (rows, length))


def theirs(model, tokens, **options):
    options = {name: torch.as_tensor(np.asarray(value)) for name, value in options.items()}
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(tokens)), **options).logits.numpy()


def ours(config, params, tokens, **where):
    return np.asarray(jax.jit(decoder.pure(config))(params, jnp.asarray(tokens), **where))


def check(got, want):
    """Fails unless `got` is `want` to `TOLERANCE` of the standard deviation of `want`."""
    assert got.dtype == np.float32
    ratio = np.abs(got - want).max() / want.std()
    print(f"\n  largest difference / standard deviation: {ratio:.1e}", end="")
    assert ratio < TOLERANCE


def test_logits_agree_past_window_and_context(pair):
    model, config, params = pair
    tokens = ids(2)
    check(ours(config, params, tokens), theirs(model, tokens))


def test_left_padded_rows_agree(pair):
    model, config, params = pair
    tokens = ids(3)
    mask = np.arange(LENGTH) >= np.array([[0], [5], [30]])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    want = theirs(model, tokens, attention_mask=mask.astype(int), position_ids=positions)
    got = ours(config, params, tokens, mask=jnp.asarray(mask))
    check(got[mask], want[mask])


def test_packed_rows_agree_with_separate_rows(pair):
    model, config, params = pair
    tokens, lengths = ids(1), (20, 9, 15)
    segments = np.repeat((1, 2, 3, 0), (*lengths, LENGTH - sum(lengths)))[None]
    got = ours(config, params, tokens, segment_ids=jnp.asarray(segments))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        check(got[:, part], theirs(model, tokens[:, part]))
        start += length


def test_steps_through_the_cache_agree(pair):
    model, config, params = pair
    tokens = ids(2)
    mask = np.arange(LENGTH) >= np.array([[0], [4]])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    want = theirs(model, tokens, attention_mask=mask.astype(int), position_ids=positions)
    forward = jax.jit(decoder.pure(config))
    cache, got = decoder.init_cache(config, 2, LENGTH + 3), []
    for part in np.split(np.arange(LENGTH), [30, 41, *range(42, LENGTH)]):
        where = {"mask": jnp.asarray(mask[:, part]), "cache": cache}
        logits, cache = forward(params, jnp.asarray(tokens[:, part]), **where)
        got.append(np.asarray(logits))
    check(np.concatenate(got, axis=1)[mask], want[mask])


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, config, params = pair
    decoder.save(tmp_path, config, params, shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    tokens = ids(2)
    np.testing.assert_array_equal(theirs(again.eval(), tokens), theirs(model, tokens))


@pytest.mark.parametrize("pair", ["llama 3", "mistral"], indirect=True)
def test_greedy_generation_from_left_padded_prompts_agrees(pair):
    model, config, params = pair
    tokens = ids(3, 20)
    mask = np.arange(20) >= np.array([[0], [5], [19]])
    write = generate.generator(
        decoder.pure(config), functools.partial(decoder.init_cache, config), max_new=12
    )
    got = np.asarray(write(params, tokens, mask).tokens)
    want = model.generate(
        input_ids=torch.as_tensor(tokens),
        attention_mask=torch.as_tensor(mask.astype(int)),
        min_new_tokens=12,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(got, want[:, 20:].numpy())
    assert len(np.unique(got)) > 5


def test_real_weights_agree():
    data = os.environ.get("JAXPEFT_DATA", Path(__file__).parents[3] / "shared" / "data")
    folder = Path(data) / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set JAXPEFT_DATA to the folder that holds stories260k")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config, params = decoder.load(folder)
    tokens = ids(2, 128, vocab=config.vocab)
    check(ours(config, params, tokens), theirs(model.eval(), tokens))
