"""The encoder against transformers: hidden states to 1e-4 of their standard deviation, in float32.

Every tensor of the fixtures is random (norms 1 +- 0.3, biases +- 0.3), the table of positions is
as long as the rows, and padding tokens stand in for tokens, too.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models import encoder

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
transformers = pytest.importorskip("transformers", reason="make parity installs the oracle")

pytestmark = pytest.mark.parity

LENGTH, VOCAB = 24, 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 3,
    "pad_token_id": 0,
}
ROBERTA = {"max_position_embeddings": LENGTH + 3, "pad_token_id": 2, "bos_token_id": 0}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": 40,
    "hidden_dim": 56,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": LENGTH,
}
CASES = {
    "bert": ("bert", SHAPE),
    "bert, other norm and activation": (
        "bert",
        SHAPE | {"layer_norm_eps": 0.1, "hidden_act": "gelu_new"},
    ),
    "bert, relu": ("bert", SHAPE | {"hidden_act": "relu"}),
    "bert, silu": ("bert", SHAPE | {"hidden_act": "silu"}),
    "roberta": ("roberta", SHAPE | ROBERTA),
    "distilbert": ("distilbert", DISTIL),
    "distilbert, sines": ("distilbert", DISTIL | {"sinusoidal_pos_embds": True}),
}
TOLERANCE = 1e-4


def draw(model):
    """Every tensor at random, so that each part of the model matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
            elif "norm" in name.lower():
                tensor.uniform_(0.7, 1.3)
            else:
                tensor.normal_(0, 1.5 / tensor.shape[1] ** 0.5)
    return model.eval()


def random_model(case, auto=None, **options):
    family, shape = CASES[case]
    config = transformers.AutoConfig.for_model(family, **shape)
    make = (auto or transformers.AutoModel).from_config
    return draw(make(config, dtype=torch.float32, attn_implementation="eager", **options))


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory):
    """A random model of transformers, and what we load from the folder that it saved."""
    model = random_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, *encoder.load(folder)


def ids(rows, length=LENGTH, seed=1, vocab=VOCAB):
    return np.random.default_rng(seed).integers(3, vocab, (rows, length))


def theirs(model, tokens, **options):
    options = {name: torch.as_tensor(np.asarray(value)) for name, value in options.items()}
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(tokens)), **options)


def ours(config, params, tokens, **where):
    return np.asarray(jax.jit(encoder.apply_fn(config))(params, jnp.asarray(tokens), **where))


def check(got, want):
    """Fails unless `got` is `want` to `TOLERANCE` of the standard deviation of `want`."""
    assert got.dtype == np.float32
    want = want.numpy() if torch.is_tensor(want) else want
    ratio = np.abs(got - want).max() / want.std()
    print(f"\n  largest difference / standard deviation: {ratio:.1e}", end="")
    assert ratio < TOLERANCE


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_hidden_states_agree(pair, side):
    model, config, params = pair
    tokens, places = ids(3), np.arange(LENGTH)
    padding = np.array([[0], [5], [17]])
    mask = {
        "none": np.ones((3, LENGTH), bool),
        "left": places >= padding,
        "right": places < LENGTH - padding,
    }[side]
    tokens = np.where(mask, tokens, model.config.pad_token_id)
    want = theirs(model, tokens, attention_mask=mask.astype(int)).last_hidden_state.numpy()
    got = ours(config, params, tokens, mask=jnp.asarray(mask))
    check(got[mask], want[mask])
    if side == "none":
        check(ours(config, params, tokens), want)


def test_padding_tokens_without_a_mask_are_counted_alike(pair):
    model, config, params = pair
    tokens = ids(2)
    tokens[0, 3:6] = model.config.pad_token_id
    tokens[1, :4] = model.config.pad_token_id
    ones = np.ones_like(tokens)  # transformers would make a mask of its own in some versions
    want = theirs(model, tokens, attention_mask=ones).last_hidden_state
    check(ours(config, params, tokens), want)


@pytest.mark.parametrize("pair", ["bert", "roberta"], indirect=True)
def test_token_types_and_pooler_agree(pair):
    model, config, params = pair
    tokens = ids(2)
    types = np.random.default_rng(2).integers(0, 3, tokens.shape)
    want = theirs(model, tokens, token_type_ids=types)
    check(ours(config, params, tokens, token_type_ids=types), want.last_hidden_state)
    assert config.pooler
    pooled = jax.jit(encoder.apply_fn(config, method="pooled"))(
        params, tokens, token_type_ids=types
    )
    check(np.asarray(pooled), want.pooler_output)


@pytest.mark.parametrize("pair", ["bert", "roberta"], indirect=True)
def test_given_positions_agree(pair):
    model, config, params = pair
    positions = np.random.default_rng(2).integers(0, LENGTH, (2, LENGTH))
    want = theirs(model, ids(2), position_ids=positions).last_hidden_state
    check(ours(config, params, ids(2), positions=positions), want)


def test_transformers_loads_what_we_save(pair, tmp_path):
    model, config, params = pair
    encoder.save(tmp_path, config, params, shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again, report = transformers.AutoModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is type(model)
    got, want = (theirs(m.eval(), ids(2)).last_hidden_state for m in (again, model))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert"])
def test_the_trunk_of_a_masked_language_model_is_loaded(case, tmp_path):
    model = random_model(case, transformers.AutoModelForMaskedLM)
    model.save_pretrained(tmp_path)
    config, params = encoder.load(tmp_path)
    assert not config.pooler and "pooler" not in params
    check(ours(config, params, ids(2)), theirs(model.base_model, ids(2)).last_hidden_state)
    encoder.save(tmp_path / "again", config, params)
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    check(ours(config, params, ids(2)), theirs(again.eval(), ids(2)).last_hidden_state)


def test_real_weights_agree():
    data = os.environ.get("JAXPEFT_DATA", Path(__file__).parents[3] / "shared" / "data")
    folder = Path(data) / "minilm-l6"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set JAXPEFT_DATA to the folder that holds minilm-l6")
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config, params = encoder.load(folder, jnp.float32)
    tokens = ids(3, 64, vocab=config.vocab_size)
    mask = np.arange(64) < np.array([[64], [20], [3]])
    want = theirs(model, tokens, attention_mask=mask.astype(int))
    got = ours(config, params, tokens, mask=jnp.asarray(mask))
    check(got[mask], want.last_hidden_state.numpy()[mask])
    pooled = encoder.apply_fn(config, method="pooled")(params, jnp.asarray(tokens), mask=mask)
    check(np.asarray(pooled), want.pooler_output)
