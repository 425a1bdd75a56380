"""Prompts, prefixes, IA3 and trainable tokens against `peft`, on models with random weights.

Arrays are copied from `peft`'s modules into our adapters. Logits agree to 1e-5 of their standard
deviation in float32, what an encoder makes of its embeddings to 1e-12 in float64.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder, encoder_decoder
from jaxpeft.serve import _generate as generate

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make parity installs it")
transformers = pytest.importorskip("transformers", reason="make parity installs the oracle")
peft = pytest.importorskip("peft", reason="make parity installs the oracle")

pytestmark = [
    pytest.mark.parity,
    # Their own: renamed options of transformers, and position ids that generate() always gives.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Position ids are not"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

VOCAB, LAYERS, KV = 61, 2, 12
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": KV // 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 20,
    "d_kv": 5,  # peft takes d_model for heads * d_kv
    "d_ff": 28,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,  # peft takes the encoder's number for both
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
N, TIME, NEW = 5, 9, 8
TOLERANCE = 1e-5


def random_(module):
    """Every tensor drawn, so large that what stands in front of the input is felt."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.7, 1.3)
                if "final" in name or name.endswith("model.norm.weight"):
                    # Of both signs, or a tied head would say again and again what it has read.
                    tensor.mul_(torch.randint(0, 2, tensor.shape) * 2 - 1)
            else:
                wide = any(part in name for part in ("embed", "shared", "bias"))
                # Attention of T5 is not scaled: q and k are, so that the softmax is not saturated.
                narrow = T5["d_kv"] ** -0.25 if name.split(".")[-2] in "qk" else 1.0
                tensor.normal_(0, 1.0 if wide else 1.3 * narrow / tensor.shape[-1] ** 0.5)
    return module


class Pair:
    """A model of transformers, and ours with the same weights."""

    def __init__(self, model, family, folder, *inputs):
        self.model = random_(model.eval())
        self.model.save_pretrained(folder)
        self.config, self.params = family.load(folder)
        self.forward = family.apply_fn(self.config)
        self.sites = jp.sites(self.forward, self.params, *inputs)

    def split(self, method):
        return jp.split(method(jax.random.key(0), self.params))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path_factory):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=request.param)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return Pair(model, decoder, tmp_path_factory.mktemp("llama"), ids())


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    config = transformers.T5Config(**T5)
    config._attn_implementation = "eager"
    model = transformers.T5ForConditionalGeneration(config)
    return Pair(model, encoder_decoder, tmp_path_factory.mktemp("t5"), ids(), ids(3))


def ids(seed=1):
    return np.random.default_rng(seed).integers(3, VOCAB, (2, TIME))


def adapted(model, kind, **options):
    """The model with an adapter of `peft` in it, drawn at random."""
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    theirs = peft.get_peft_model(
        copy.deepcopy(model), getattr(peft, kind)(task_type=task, **options)
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.4)
    return theirs.eval()


def logits(model, tokens, **options):
    options = {name: torch.as_tensor(np.asarray(x)) for name, x in options.items()}
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens), **options).logits.numpy()


def check(got, want, base=None):
    """Fails unless the outputs agree, and are others than those of the base."""
    got = np.asarray(got)
    ratio = np.abs(got - want).max() / want.std()
    print(f"\n  largest difference / standard deviation: {ratio:.1e}", end="")
    assert ratio < TOLERANCE
    if base is not None:
        assert np.abs(want - base).max() > want.std() / 10


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def encoder_of(theirs):
    return theirs.prompt_encoder["default"]


def network_of(module):
    """Our names and layout for the arrays of `peft`'s prompt encoder."""
    found = {}
    linears = [part for part in module.mlp_head if isinstance(part, torch.nn.Linear)]
    for i, linear in enumerate(linears):
        found |= {f"mlp{i}/kernel": array(linear.weight).T, f"mlp{i}/bias": array(linear.bias)}
    lstm = getattr(module, "lstm_head", None)
    for layer in range(0 if lstm is None else lstm.num_layers):
        for way, suffix in (("forward", ""), ("backward", "_reverse")):
            for ours, name in (("input", "ih"), ("hidden", "hh")):
                at = f"l{layer}{suffix}"
                start = f"lstm{layer}/{way}/{ours}"
                found[start] = array(getattr(lstm, f"weight_{name}_{at}")).T
                found[f"{start}_bias"] = array(getattr(lstm, f"bias_{name}_{at}"))
    return found


def copied(adapter, arrays):
    """The adapter with these arrays in the place of its own, of which none is left."""
    assert adapter.keys() == arrays.keys()
    assert {k: v.shape for k, v in adapter.items()} == {k: v.shape for k, v in arrays.items()}
    return arrays


# Prompts -----------------------------------------------------------------------------------------

TABLE = "embed/embedding"


def behind(pair, tokens, length=N):
    virtual = jp.prompts.virtual_token_ids(pair.sites[TABLE], length)
    return np.concatenate([np.tile(virtual, (len(tokens), 1)), tokens], axis=1)


def generator(pair, forward, **options):
    cache = functools.partial(decoder.init_cache, pair.config)
    return generate.generator(forward, cache, max_new_tokens=NEW, **options)


def written(theirs, tokens):
    """What greedy generation says behind tokens, each token by `peft`'s forward pass on all before.

    Not by its `generate`: peft 0.21.2 hands the cache over under a name that transformers 5.24 has
    replaced, so what it says there is not what its own forward pass says.
    """
    said = tokens
    for _ in range(NEW):
        following = logits(theirs, said)[:, -1].argmax(axis=-1)
        said = np.concatenate([said, following[:, None]], axis=1)
    return said[:, tokens.shape[1] :]


def check_prompt(pair, theirs, tree, tokens):
    lifted, full = jp.lift(pair.forward), behind(pair, tokens)
    got = jax.jit(lifted)(tree, full)
    # All of them: those at virtual positions are computed alike too.
    check(got, logits(theirs, tokens))
    check(got[:, N:], logits(theirs, tokens)[:, N:], logits(pair.model, tokens))
    mask = np.arange(TIME) < np.array([[TIME], [4]])
    want = logits(theirs, tokens, attention_mask=mask.astype(int))
    whole = np.concatenate([np.ones((2, N), bool), mask], axis=1)
    check(np.asarray(jax.jit(lifted)(tree, full, mask=whole))[whole], want[whole])
    said = generator(pair, lifted)(tree, full).tokens
    np.testing.assert_array_equal(said, written(theirs, tokens))
    assert len(np.unique(said)) > 2


def test_prompt_tuning(llama):
    theirs = adapted(llama.model, "PromptTuningConfig", num_virtual_tokens=N)
    frozen, adapter = llama.split(jp.prompt_tuning(N, llama.sites.match(TABLE)))
    rows = array(encoder_of(theirs).embedding.weight)
    tree = jp.combine(frozen, copied(adapter, {f"{TABLE}/rows": rows}))
    check_prompt(llama, theirs, tree, ids())


TEXT = "say what the tone of this review is"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", *TEXT.split(), "good", "bad"]
    ours = Tokenizer(models.WordLevel({w: 2 * i for i, w in enumerate(words)}, "<unk>"))
    ours.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours, unk_token="<unk>")
    theirs.save_pretrained(folder)
    return ours, str(folder)


@pytest.mark.parametrize("length", [3, 8, 20])
def test_rows_start_at_the_tokens_of_a_text(llama, tokenizer, length):
    """Cut, as long, and repeated."""
    ours, folder = tokenizer
    assert len(ours.encode(TEXT).ids) == 8
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        tokenizer_name_or_path=folder,
    )
    theirs = peft.get_peft_model(copy.deepcopy(llama.model), config)
    method = jp.prompt_tuning(length, llama.sites.match(TABLE), init_text=TEXT, tokenizer=ours)
    _, adapter = llama.split(method)
    want = array(encoder_of(theirs).embedding.weight)
    np.testing.assert_array_equal(adapter[f"{TABLE}/rows"], want)


def test_rows_of_the_vocabulary_are_rows_of_the_table_on_both_sides(llama):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=30, prompt_tuning_init="SAMPLE_VOCAB"
    )
    theirs = peft.get_peft_model(copy.deepcopy(llama.model), config)
    _, adapter = llama.split(jp.prompt_tuning(30, llama.sites.match(TABLE), init="vocabulary"))
    table = np.asarray(llama.params["embed"]["embedding"])
    for rows in (adapter[f"{TABLE}/rows"], array(encoder_of(theirs).embedding.weight)):
        drawn = [int(np.flatnonzero((table == row).all(1))[0]) for row in np.asarray(rows)]
        assert len(set(drawn)) > 15


ENCODERS = {
    "lstm": dict(encoder_reparameterization_type="LSTM", encoder_num_layers=2),
    "lstm of 3 layers": dict(encoder_reparameterization_type="LSTM", encoder_num_layers=3),
    "mlp": dict(encoder_reparameterization_type="MLP"),
}


def p_tuning(pair, name, theirs, hidden):
    layers = ENCODERS[name].get("encoder_num_layers", 2)
    method = jp.p_tuning(
        N, pair.sites.match(TABLE), encoder=name.split()[0], hidden=hidden, layers=layers
    )
    frozen, adapter = pair.split(method)
    arrays = {f"{TABLE}/encoder/{k}": v for k, v in network_of(encoder_of(theirs)).items()}
    rows = array(encoder_of(theirs).embedding.weight)
    return frozen, copied(adapter, {f"{TABLE}/rows": rows} | arrays)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.filterwarnings("ignore:for MLP, the argument")
def test_p_tuning(llama, name):
    theirs = adapted(
        llama.model,
        "PromptEncoderConfig",
        num_virtual_tokens=N,
        encoder_hidden_size=7,
        **ENCODERS[name],
    )
    frozen, adapter = p_tuning(llama, name, theirs, 7)
    check_prompt(llama, theirs, jp.combine(frozen, adapter), ids())
    folded, plain = jp.adapters.drop_reparameterization(frozen, adapter)
    got = jax.jit(jp.lift(llama.forward))(jp.combine(folded, plain), behind(llama, ids()))
    check(got, logits(theirs, ids()))
    # The rows by themselves, in float64.
    module = encoder_of(theirs).double()
    with torch.no_grad():
        want = module(torch.arange(N)[None])[0].numpy()
    _, exact = p_tuning(llama, name, theirs, 7)
    assert {x.dtype for x in exact.values()} == {jnp.dtype("float64")}
    _, rows = jp.adapters.drop_reparameterization(frozen, exact)
    np.testing.assert_allclose(rows[f"{TABLE}/rows"], want, rtol=1e-12, atol=1e-12)


# Prefixes ----------------------------------------------------------------------------------------


def projections(pair):
    return pair.sites.match("*/attn/k/kernel"), pair.sites.match("*/attn/v/kernel")


def by_layer(flat, start):
    """(..., 2 * layers * width) as (layers, ..., width), of keys (start=0) or values (start=1)."""
    parts = jnp.split(flat, 2 * LAYERS, axis=-1)
    return jnp.stack(parts[start::2])


def prefix(pair, theirs, hidden, **options):
    keys, values = projections(pair)
    frozen, adapter = pair.split(
        jp.prefix_tuning(N, keys, values, hidden=hidden, embed=hidden and KV, **options)
    )
    module, arrays = encoder_of(theirs), {}
    if hidden is None:
        flat = array(module.embedding.weight)
        arrays = {f"layers/attn/{n}/kernel/rows": by_layer(flat, i) for i, n in enumerate("kv")}
    else:
        first, last = module.transform[0], module.transform[2]
        arrays = {
            "table": array(module.embedding.weight),
            "down": array(first.weight).T,
            "down_bias": array(first.bias),
        }
        arrays = {f"layers/attn/k/kernel/{name}": x for name, x in arrays.items()}
        for i, n in enumerate("kv"):
            arrays[f"layers/attn/{n}/kernel/up"] = by_layer(array(last.weight).T, i)
            arrays[f"layers/attn/{n}/kernel/up_bias"] = by_layer(array(last.bias), i)
    return frozen, copied(adapter, arrays)


@pytest.mark.parametrize("hidden", [None, 7], ids=["rows", "projected"])
def test_prefix_tuning(llama, hidden):
    options = {} if hidden is None else dict(prefix_projection=True, encoder_hidden_size=hidden)
    theirs = adapted(llama.model, "PrefixTuningConfig", num_virtual_tokens=N, **options)
    rope = llama.config.rope.frequencies(llama.config.head_dim)
    frozen, adapter = prefix(llama, theirs, hidden, rope=rope)
    tokens = ids()
    full, virtual_positions = jp.prompts.prepend_virtual_tokens(jnp.asarray(tokens), N)
    lifted = jp.lift(llama.forward)
    sides = [(frozen, adapter)] + (
        [] if hidden is None else [jp.adapters.drop_reparameterization(frozen, adapter)]
    )
    for side in sides:
        got = jax.jit(lifted)(jp.combine(*side, virtual_positions=virtual_positions), full)
        got = jp.prompts.drop_virtual_positions(got, N)
        check(got, logits(theirs, tokens), logits(llama.model, tokens))
        mask = np.arange(TIME) < np.array([[TIME], [4]])
        want = logits(theirs, tokens, attention_mask=mask.astype(int))
        whole = np.concatenate([np.ones((2, N), bool), mask], axis=1)
        got = jax.jit(lifted)(
            jp.combine(*side, virtual_positions=virtual_positions), full, mask=whole
        )
        check(np.asarray(jp.prompts.drop_virtual_positions(got, N))[mask], want[mask])

    def forward(parts, tokens, **where):
        # A decoding step has no virtual position: the cache holds the prefix.
        frozen, adapter, virtual_positions = parts
        here = (
            virtual_positions
            if virtual_positions.shape == tokens.shape
            else jnp.full(tokens.shape, -1)
        )
        return lifted(jp.combine(frozen, adapter, virtual_positions=here), tokens, **where)

    said = generator(llama, forward)((frozen, adapter, virtual_positions), full).tokens
    np.testing.assert_array_equal(said, written(theirs, tokens))
    assert len(np.unique(said)) > 2


# Encoder-decoders --------------------------------------------------------------------------------


def test_a_prompt_in_front_of_the_encoder(t5):
    theirs = adapted(t5.model, "PromptTuningConfig", num_virtual_tokens=N)
    frozen, adapter = t5.split(jp.prompt_tuning(N, t5.sites.match(TABLE)))
    rows = array(encoder_of(theirs).embedding.weight)
    assert rows.shape == (2 * N, T5["d_model"])  # The second half is used nowhere.
    tree = jp.combine(frozen, copied(adapter, {f"{TABLE}/rows": rows[:N]}))
    inputs, targets = ids(), ids(3)
    mask = np.arange(TIME) < np.array([[TIME], [5]])
    options = {"decoder_input_ids": targets, "attention_mask": mask.astype(int)}
    whole = np.concatenate([np.ones((2, N), bool), mask], axis=1)
    got = jax.jit(jp.lift(t5.forward))(tree, behind(t5, inputs), targets, mask=whole)
    want = logits(theirs, inputs, **options)
    check(got, want, logits(t5.model, inputs, **options))


def test_a_prefix_of_the_decoder(t5):
    """Theirs stands before the targets alone, in the decoder's attention to itself."""
    theirs = adapted(t5.model, "PrefixTuningConfig", num_virtual_tokens=N)
    flat = array(encoder_of(theirs).embedding.weight)
    keys, values = (t5.sites.match(f"decoder/layers/attn/{n}/kernel") for n in "kv")
    frozen, adapter = t5.split(
        jp.prefix_tuning(N, keys, values, positions_name="virtual_target_positions")
    )
    # It doubles the 2 L parts and deals them out by four, of which cross-attention gets the last
    # two and drops them: half of the parts are used, each in two layers.
    parts = jnp.split(flat, 2 * LAYERS, axis=1)
    arrays = {
        f"decoder/layers/attn/{n}/kernel/rows": jnp.stack(
            [parts[(4 * layer + i) % (2 * LAYERS)] for layer in range(LAYERS)]
        )
        for i, n in enumerate("kv")
    }
    inputs, targets = ids(), ids(3)
    full, virtual_positions = jp.prompts.prepend_virtual_tokens(jnp.asarray(targets), N)
    tree = jp.combine(frozen, copied(adapter, arrays), virtual_target_positions=virtual_positions)
    got = jp.prompts.drop_virtual_positions(jax.jit(jp.lift(t5.forward))(tree, inputs, full), N)
    options = {"decoder_input_ids": targets, "attention_mask": np.ones((2, TIME), int)}
    want = logits(theirs, inputs, **options)
    check(got, want, logits(t5.model, inputs, **options))


# IA3 and trainable tokens ------------------------------------------------------------------------


def named(theirs, suffix):
    """{name: array} of the trained tensors whose names end in it, in the order of the layers."""
    return {n: array(w) for n, w in theirs.named_parameters() if n.endswith(suffix)}


def test_ia3(llama):
    theirs = adapted(
        llama.model,
        "IA3Config",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    sites = llama.sites
    method = jp.ia3(sites.match("*/attn/[kv]/kernel"), sites.match("*/mlp/down/kernel"))
    frozen, adapter = llama.split(method)
    arrays = {}
    for ours, name in (("attn/k", "k_proj"), ("attn/v", "v_proj"), ("mlp/down", "down_proj")):
        scales = [x.reshape(-1) for x in named(theirs, f"{name}.ia3_l.default").values()]
        arrays[f"layers/{ours}/kernel/scale"] = jnp.stack(scales)
    tree, tokens = jp.combine(frozen, copied(adapter, arrays)), ids()
    want = logits(theirs, tokens)
    check(jax.jit(jp.lift(llama.forward))(tree, tokens), want, logits(llama.model, tokens))
    check(jax.jit(llama.forward)(jp.merge(tree), tokens), want)


def test_trainable_tokens(llama):
    """A tied head has the new rows on both sides."""
    chosen = [3, 17, 42]
    theirs = adapted(
        llama.model, "TrainableTokensConfig", token_indices=chosen, target_modules=["embed_tokens"]
    )
    frozen, adapter = llama.split(jp.trainable_tokens(chosen, llama.sites.match(TABLE)))
    rows = next(iter(named(theirs, "_delta.default").values()))
    tree = jp.combine(frozen, copied(adapter, {f"{TABLE}/rows": rows}))
    tokens = ids()
    tokens[:, 2:5] = chosen
    want = logits(theirs, tokens)
    check(jax.jit(jp.lift(llama.forward))(tree, tokens), want, logits(llama.model, tokens))
    check(jax.jit(llama.forward)(jp.merge(tree), tokens), want)


# Counts ------------------------------------------------------------------------------------------

WIDTHS = {
    "lstm of 64 units, width 96": ("LSTM", 96, 64, 2, 20),
    "lstm of 300 units in one layer, width 128": ("LSTM", 128, 300, 1, 7),
    "lstm of 48 units in three layers, width 40": ("LSTM", 40, 48, 3, 1),
    "mlp of 300 units, width 96": ("MLP", 96, 300, 2, 20),
    "the paper's": ("LSTM", 1024, 128, 2, 20),
}


@pytest.mark.parametrize("kind, width, hidden, layers, length", WIDTHS.values(), ids=WIDTHS)
def test_p_tuning_trains_as_many_numbers(kind, width, hidden, layers, length):
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        token_dim=width,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
    )
    theirs = sum(x.numel() for x in peft.PromptEncoder(config).parameters())
    table = {"table": jax.ShapeDtypeStruct((50, width), jnp.float32)}
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    sites = jp.sites(lambda p, tokens: p["table"][tokens], table, tokens)
    method = jp.p_tuning(
        length, sites.match("table"), encoder=kind.lower(), hidden=hidden, layers=layers
    )
    adapter = jax.eval_shape(lambda key: jp.split(method(key, table))[1], jax.random.key(0))
    assert sum(x.size for x in adapter.values()) == theirs
