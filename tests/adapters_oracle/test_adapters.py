"""Adapters, prefixes and hybrids against the `adapters` package (1.3.0), on BERT and Llama.

Every tensor of the models and of the adapters is random: biases, norms and gates too. The batch
has rows without padding, padded on the right and (BERT) on the left, and hidden states are
compared where there is none. In float64 BERT agrees to rounding; Llama to that of float32, in
which transformers computes norms, rotations and the softmax whatever the model's dtype.

The package concatenates a prefix inside attention, behind the rotation, and real tokens keep their
positions; here virtual tokens stand in front, so real ones are told to count from 0 all the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder, encoder

torch = pytest.importorskip("torch", reason="the oracle is PyTorch: make adapters installs it")
adapters = pytest.importorskip("adapters", reason="make adapters installs the oracle")
transformers = pytest.importorskip("transformers", reason="make adapters installs the oracle")

pytestmark = pytest.mark.parity

LAYERS, WIDTH, LENGTH, VOCAB = 3, 48, 9, 61
F8 = jnp.float64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
}
# A norm's epsilon that is seen, and a table of positions as long as the rows.
BERT = {"layer_norm_eps": 0.1, "max_position_embeddings": LENGTH}
LLAMA = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "rope_theta": 50.0}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model in both libraries, and where the package keeps its adapters in it."""

    theirs: Callable[[], Any]  # with the head that a folder of its family has
    ours: ModuleType
    call: str
    layer: str
    projections: str
    q: str
    v: str
    after_attention: str
    after_mlp: str
    tolerance: float


KINDS = {
    "bert": Kind(
        lambda: transformers.BertModel(transformers.BertConfig(**SHAPE, **BERT)),
        encoder,
        "__call__",
        "encoder.layer.{}",
        "attention.self",
        "query",
        "value",
        "attention.output",
        "output",
        1e-11,
    ),
    "llama": Kind(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **LLAMA)),
        decoder,
        "hidden",
        "layers.{}",
        "self_attn",
        "q_proj",
        "v_proj",
        "attention_adapters",
        "output_adapters",
        1e-5,
    ),
}


def draw(named):
    """Every tensor at random, so that each of them matters."""
    with torch.no_grad():
        for name, tensor in named:
            if name.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
            elif "norm" in name.lower():
                tensor.uniform_(0.7, 1.3)
            elif "gate" in name:
                tensor.normal_(0, 0.5)
            elif tensor.ndim == 1:  # a flat prefix
                tensor.normal_()
            else:
                tensor.normal_(0, tensor.shape[1] ** -0.5)


class Pair:
    """A random model of the package, the same here, and a batch for both."""

    def __init__(self, name, folder):
        self.name, self.kind = name, KINDS[name]
        torch.manual_seed(0)
        whole = self.kind.theirs().double().eval()
        draw(whole.named_parameters())
        whole.save_pretrained(folder)
        self.model = whole.base_model
        adapters.init(self.model)
        self.config, self.params = self.kind.ours.load(folder)
        self.forward = self.kind.ours.apply_fn(self.config, self.kind.call)
        rng = np.random.default_rng(1)
        self.tokens = rng.integers(0, VOCAB, (3, LENGTH))
        places = np.arange(LENGTH)
        # Where a row begins with padding, transformers' Llama gives NaNs in float64.
        short = places >= 4 if name == "bert" else places < 5
        self.mask = np.stack([places >= 0, places < LENGTH - 3, short])
        self.sites = jp.sites(self.forward, self.params, jnp.asarray(self.tokens))

    @property
    def rope(self):
        """Of the prefixes here, whose trained keys are those after the rotation."""
        if self.name == "bert":
            return None
        return self.config.rope.frequencies(self.config.head_dim)

    @property
    def norms(self):
        """What Pfeiffer's adapter reads through: in Llama, no norm follows the sum."""
        if self.name == "llama":
            return {}
        return {"norms": self.sites.match("layers/mlp_norm/*"), "eps": BERT["layer_norm_eps"]}

    def theirs(self, config):
        """Hidden states under an adapter with random weights, and those by name."""
        self.model.add_adapter("a", config=config, set_active=True)
        self.model.double().eval()
        base = self.hidden()
        named = {n: p for n, p in self.model.named_parameters() if ".a." in n}
        draw(named.items())
        out = self.hidden()
        assert np.abs(out - base)[self.mask].max() > 0.1
        return out, Tensors(named, self.kind)

    def hidden(self):
        with torch.no_grad():
            out = self.model(
                input_ids=torch.as_tensor(self.tokens),
                attention_mask=torch.as_tensor(self.mask.astype(int)),
            )
        return out.last_hidden_state.numpy()

    def ours(self, method, adapter, length=0):
        """Hidden states at the real positions, behind `length` virtual ones."""
        frozen, start = jp.split(method(jax.random.key(0), self.params))
        shapes = {path: x.shape for path, x in start.items()}
        assert {path: x.shape for path, x in adapter.items()} == shapes
        tokens, virtual_positions = jp.prompts.prepend_virtual_tokens(
            jnp.asarray(self.tokens), length
        )
        rows = len(tokens)
        mask = np.concatenate([np.ones((rows, length), bool), self.mask], axis=1)
        positions = np.concatenate([np.arange(length), np.arange(LENGTH)])[None]
        call = {"virtual_positions": virtual_positions} if length else {}
        out = jax.jit(jp.lift(self.forward))(
            jp.combine(frozen, adapter, **call),
            tokens,
            mask=jnp.asarray(mask),
            positions=jnp.asarray(np.broadcast_to(positions, tokens.shape)),
        )
        return np.asarray(jp.prompts.drop_virtual_positions(out, length))

    def check(self, got, want):
        """Fails unless the two agree where there is no padding."""
        assert got.dtype == want.dtype == np.float64
        worst = np.abs(got - want)[self.mask].max()
        print(f"\n  {self.name}: largest difference {worst:.1e}", end="")
        assert worst < self.kind.tolerance


class Tensors:
    """The package's tensors as arrays here: those of all layers on axis 0, kernels (in, out)."""

    def __init__(self, named, kind):
        self.named, self.kind, self.left = named, kind, set(named)

    def one(self, name):
        self.left.discard(name)
        x = self.named[name].detach().numpy()
        return jnp.asarray(x.T if x.ndim == 2 else x)

    def stacked(self, name):
        return jnp.stack([self.one(f"{self.kind.layer.format(i)}.{name}") for i in range(LAYERS)])

    def bottleneck(self, place, first, last):
        """A network that begins at the kernel `first` and ends at `last`, maybe the same."""
        down, up = (f"{place}.adapters.a.adapter_{name}" for name in ("down.0", "up"))
        return {
            f"{first}/down": self.stacked(f"{down}.weight"),
            f"{first}/down_bias": self.stacked(f"{down}.bias"),
            f"{last}/up": self.stacked(f"{up}.weight"),
            f"{last}/up_bias": self.stacked(f"{up}.bias"),
        }

    def lora(self, projection, path, name):
        loras = f"{self.kind.projections}.{projection}.loras.a"
        return {
            f"{path}/a": self.stacked(f"{loras}.lora_A"),
            f"{path}/b": self.stacked(f"{loras}.lora_B"),
        } | self.gate(f"{loras}.gate", name)

    def gate(self, place, name):
        return {
            f"{name}/gate": self.stacked(f"{place}.weight")[..., 0],
            f"{name}/gate_bias": self.stacked(f"{place}.bias"),
        }

    def encoded_prefix(self):
        """The network that makes a prefix, its last layer cut by layer, into keys and values."""
        table, down, c, up, e = self._network()
        ups, biases = _cut(up), _cut(e[None])
        return {
            f"{K}/table": table,
            f"{K}/down": down,
            f"{K}/down_bias": c,
            f"{K}/up": ups[0],
            f"{K}/up_bias": biases[0, :, 0],
            f"{V}/up": ups[1],
            f"{V}/up_bias": biases[1, :, 0],
        }

    def prefix(self):
        """The rows that the network makes."""
        table, down, c, up, e = self._network()
        return _rows(jnp.tanh(table @ down + c) @ up + e)

    def flat_prefix(self, length):
        return _rows(self.one(f"{self._prefix}.control_trans").reshape(length, -1))

    def _network(self):
        linear = (f"{self._prefix}.control_trans.{i}" for i in (0, 2))
        # An embedding lies in torch as it does here.
        yield self.one(f"{self._prefix}.wte.weight").T
        for name in linear:
            yield self.one(f"{name}.weight")
            yield self.one(f"{name}.bias")

    @property
    def _prefix(self):
        # All layers hold the one pool; torch names it where it finds it first.
        first = self.kind.layer.format(0)
        pool = f"{first}.{self.kind.projections}.prefix_tuning.pool"
        return f"{pool}.prefix_tunings.a.self_prefix"


def _cut(x):
    """(n, layers * 2 * out) as (2, layers, n, out), keys and values."""
    return jnp.moveaxis(x.reshape(len(x), LAYERS, 2, -1), 0, 2).swapaxes(0, 1)


def _rows(x):
    keys, values = _cut(x)
    return {f"{K}/rows": keys, f"{V}/rows": values}


Q, K, V, OUT = (f"layers/attn/{name}/kernel" for name in "qkvo")
UP, DOWN = "layers/mlp/up/kernel", "layers/mlp/down/kernel"


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    return Pair(request.param, tmp_path)


only = functools.partial(pytest.mark.parametrize, "pair", indirect=True)


def test_houlsby_behind_attention_and_feed_forward(pair):
    want, tensors = pair.theirs(adapters.DoubleSeqBnConfig())
    method = jp.bottleneck_adapter(
        WIDTH // 16, pair.sites.match(OUT, DOWN), activation="silu", dtype=F8
    )
    adapter = tensors.bottleneck(pair.kind.after_attention, OUT, OUT)
    adapter |= tensors.bottleneck(pair.kind.after_mlp, DOWN, DOWN)
    assert not tensors.left
    pair.check(pair.ours(method, adapter), want)


def test_pfeiffer_takes_the_sum_as_input(pair):
    want, tensors = pair.theirs(adapters.SeqBnConfig())
    method = jp.bottleneck_adapter(
        WIDTH // 16,
        pair.sites.match(DOWN),
        adapter_input="output_plus_residual",
        dtype=F8,
        **pair.norms,
    )
    adapter = tensors.bottleneck(pair.kind.after_mlp, DOWN, DOWN)
    assert not tensors.left
    pair.check(pair.ours(method, adapter), want)


def test_a_scaled_parallel_adapter_takes_the_residual_as_input(pair):
    want, tensors = pair.theirs(adapters.ParBnConfig())
    method = jp.bottleneck_adapter(
        WIDTH // 2, pair.sites.match(DOWN), adapter_input="residual", scale=4.0, dtype=F8
    )
    adapter = tensors.bottleneck(pair.kind.after_mlp, DOWN, DOWN)
    assert not tensors.left
    pair.check(pair.ours(method, adapter), want)


@only(["bert"])
def test_a_scaled_parallel_adapter_goes_around_the_feed_forward_block(pair):
    """In BERT the stream is the input of the block; in Llama a norm lies between."""
    want, tensors = pair.theirs(adapters.ParBnConfig())
    up, down = pair.sites.match(UP), pair.sites.match(DOWN)
    method = jp.parallel_adapter(WIDTH // 2, up, down, scale=4.0, dtype=F8)
    adapter = tensors.bottleneck(pair.kind.after_mlp, UP, DOWN)
    pair.check(pair.ours(method, adapter), want)


@pytest.mark.parametrize("flat", [False, True], ids=["encoded", "flat"])
def test_mix_and_match(pair, flat):
    length = 5 if flat else 30
    config = adapters.MAMConfig(adapters.PrefixTuningConfig(flat=True, prefix_length=5))
    want, tensors = pair.theirs(config if flat else adapters.MAMConfig())
    sites, hidden = pair.sites, None if flat else 800
    keys, values, down = sites.match(K), sites.match(V), sites.match(DOWN)
    if pair.name == "bert":
        first = UP
        method = jp.mam(
            length, WIDTH // 2, keys, values, sites.match(UP), down, hidden=hidden, dtype=F8
        )
    else:  # as the package does, the adapter reads the stream, which is no input of the block
        first = DOWN
        method = jp.chain(
            jp.prefix_tuning(length, keys, values, hidden=hidden, rope=pair.rope, dtype=F8),
            jp.bottleneck_adapter(WIDTH // 2, down, adapter_input="residual", scale=4.0, dtype=F8),
        )
    adapter = tensors.flat_prefix(length) if flat else tensors.encoded_prefix()
    adapter |= tensors.bottleneck(pair.kind.after_mlp, first, DOWN)
    assert not tensors.left
    pair.check(pair.ours(method, adapter, length), want)


def test_unipelt(pair):
    """The rows here are free: those that the package's network makes are copied."""
    if pair.name == "llama":
        # Gates count padding, and what a causal model computes there differs.
        pair.mask = np.ones_like(pair.mask)
    want, tensors = pair.theirs(adapters.UniPELTConfig())
    sites = pair.sites
    method = jp.unipelt(
        sites.match(Q, V),
        sites.match(K),
        sites.match(V),
        sites.match(DOWN),
        bottleneck_dim=WIDTH // 16,
        rope=pair.rope,
        dtype=F8,
        **pair.norms,
    )
    after, attention = pair.kind.after_mlp, pair.kind.projections
    adapter = tensors.bottleneck(after, DOWN, DOWN)
    adapter |= tensors.gate(f"{after}.adapters.a.gate", f"{DOWN}/bottleneck")
    adapter |= tensors.prefix()
    adapter |= tensors.gate(f"{attention}.prefix_tuning.prefix_gates.a", f"{K}/prefix")
    adapter |= tensors.lora(pair.kind.q, Q, f"{Q}/lora")
    adapter |= tensors.lora(pair.kind.v, f"{V}/w", f"{V}/lora")
    assert not tensors.left
    pair.check(pair.ours(method, adapter, 10), want)
