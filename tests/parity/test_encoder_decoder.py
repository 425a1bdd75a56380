"""The encoder-decoder against transformers: logits to 1e-4 of their standard deviation, in float32.

Every tensor of the fixtures is random (norms 1 +- 0.3, the biases of distances too), heads *
head_dim is not the width, the two stacks differ in depth, and the sequences reach beyond the
distance from which on all are alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import encoder_decoder
from jaxpeft.models._encoder_decoder_layers import buckets
from jaxpeft.serve import _generate as generate

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
transformers = pytest.importorskip("transformers", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

SHAPE = {
    "vocab_size": 61,
    "d_model": 40,
    "d_kv": 6,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "t5": {},
    "t5 1.1": GATED,
    "t5 1.1, default buckets": GATED
    | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "ul2": GATED | {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-5},
    "t5 1.1, tied": GATED | {"tied": True},
}
INPUTS, TARGETS = 40, 30
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory):
    """A random model of transformers, and what we load from the folder that it saved."""
    options = dict(CASES[request.param])
    tied = options.pop("tied", options.get("tie_word_embeddings", True))
    config = transformers.T5Config(**SHAPE | options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not tied:
        # Transformers 5 ties every new T5, and unties what it loads.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.7, 1.3)
                if "final" in name:
                    # Of both signs, or a tied head would say again and again what it has read.
                    tensor.mul_(torch.randint(0, 2, tensor.shape) * 2 - 1)
            elif "relative_attention_bias" in name or name == "shared.weight":
                tensor.normal_(0, 1.0)
            else:
                # Attention is not scaled: q and k are, so that the softmax is not saturated.
                narrow = SHAPE["d_kv"] ** -0.25 if name.split(".")[-2] in "qk" else 1.0
                tensor.normal_(0, 1.3 * narrow / tensor.shape[1] ** 0.5)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    config, params = encoder_decoder.load(folder)
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (
        tied,
        "tie_word_embeddings" not in options,
    )
    return model, config, params


def ids(rows, length, seed=1):
    return np.random.default_rng(seed).integers(3, SHAPE["vocab_size"], (rows, length))


def theirs(model, inputs, targets, **options):
    options = {name: torch.as_tensor(value.astype(int)) for name, value in options.items()}
    ids = {"input_ids": torch.as_tensor(inputs), "decoder_input_ids": torch.as_tensor(targets)}
    with torch.no_grad():
        return model(**ids, **options).logits.numpy()


@functools.cache
def compiled(config, *call):
    return jax.jit(encoder_decoder.apply_fn(config, *call))


def check(got, want):
    """Fails unless `got` is `want` to `TOLERANCE` of the standard deviation of `want`."""
    assert got.dtype == np.float32
    ratio = np.abs(got - want).max() / want.std()
    print(f"\n  largest difference / standard deviation: {ratio:.1e}", end="")
    assert ratio < TOLERANCE


def padding(length, counts, side):
    """A mask with this many paddings per row."""
    slots, counts = np.arange(length), np.asarray(counts)[:, None]
    return slots >= counts if side == "left" else slots < length - counts


def test_logits_agree_beyond_the_farthest_distance(pair):
    model, config, params = pair
    inputs, targets = ids(2, INPUTS), ids(2, TARGETS, 2)
    check(np.asarray(compiled(config)(params, inputs, targets)), theirs(model, inputs, targets))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_agree(pair, side):
    model, config, params = pair
    inputs, targets = ids(3, INPUTS), ids(3, TARGETS, 2)
    mask, target_mask = padding(INPUTS, (0, 5, 30), side), padding(TARGETS, (11, 0, 3), side)
    got = compiled(config)(params, inputs, targets, mask=mask, target_mask=target_mask)
    masks = {"attention_mask": mask, "decoder_attention_mask": target_mask}
    want = theirs(model, inputs, targets, **masks)
    check(np.asarray(got)[target_mask], want[target_mask])


def test_steps_through_the_cache_agree(pair):
    model, config, params = pair
    inputs, targets = ids(2, INPUTS), ids(2, TARGETS, 2)
    mask = padding(INPUTS, (0, 9), "right")
    want = theirs(model, inputs, targets, attention_mask=mask)
    decode, got = compiled(config, "decode"), []
    encoded = compiled(config, "encode")(params, inputs, mask=mask)
    given = {"encoder_output": encoded, "mask": mask}
    cache = encoder_decoder.init_cache(config, 2, TARGETS + 2)
    for part in np.split(np.arange(TARGETS), [1, 20, *range(21, TARGETS)]):
        logits, cache = decode(params, targets[:, part], cache=cache, **given)
        got.append(np.asarray(logits))
        given = {}
    check(np.concatenate(got, axis=1), want)


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, config, params = pair
    encoder_decoder.save(tmp_path, config, params, shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, report = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    assert again.config.decoder_start_token_id == 0
    inputs, targets = ids(2, INPUTS), ids(2, TARGETS, 2)
    want = theirs(model, inputs, targets)
    np.testing.assert_array_equal(theirs(again.eval(), inputs, targets), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_generation_agrees(pair, side):
    model, config, params = pair
    inputs, mask = ids(4, 20), padding(20, (0, 5, 12, 17), side)
    halves = [encoder_decoder.apply_fn(config, call) for call in ("encode", "decode")]
    cache = functools.partial(encoder_decoder.init_cache, config)
    options = {"max_new_tokens": 12, "decoder_start_token_id": config.decoder_start_token_id}
    free = np.asarray(
        generate.seq2seq_generator(*halves, cache, **options)(params, inputs, mask).tokens
    )
    assert len(np.unique(free)) > 5
    # An end that some rows reach on the way.
    for eos in (None, int(free[0, 4])):
        ends = () if eos is None else (eos,)
        write = generate.seq2seq_generator(
            *halves, cache, **options, eos_token_ids=ends, pad_token_id=config.pad_token_id
        )
        want = model.generate(
            input_ids=torch.as_tensor(inputs),
            attention_mask=torch.as_tensor(mask.astype(int)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=config.pad_token_id,
            use_cache=False,  # Its cache has as many layers as the encoder, too few here.
        ).numpy()[:, 1:]
        got = np.asarray(write(params, inputs, mask).tokens)[:, : want.shape[1]]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("count, reach", [(32, 128), (8, 20), (4, 5), (32, 256), (64, 100)])
def test_every_distance_is_in_the_bucket_of_transformers(count, reach, both_ways):
    distance = np.arange(-2 * reach, 2 * reach)
    attention = transformers.models.t5.modeling_t5.T5Attention
    want = attention._relative_position_bucket(
        torch.as_tensor(-distance), both_ways, count, reach
    ).numpy()
    got = buckets(jnp.asarray(distance), count, reach, both_ways)
    np.testing.assert_array_equal(got, want)
    assert set(want) == set(range(count)) - ({count // 2} if both_ways else set())
