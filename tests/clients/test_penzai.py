"""The transformers of Penzai, whose parameters are arrays with names for axes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from .harness import VOCAB, Client, Model, cases, hold, random_params, tokens

pytest.importorskip("penzai", reason="make clients installs penzai")
from penzai import pz  # noqa: E402
from penzai.models.transformer.variants import gpt_neox, llamalike_common  # noqa: E402

SMALL = dict(
    embedding_dim=16,
    projection_dim=8,
    mlp_hidden_dim=24,
    num_decoder_blocks=2,
    vocab_size=VOCAB,
    parameter_dtype=jnp.float64,
    activation_dtype=jnp.float64,
)


def built(make: Callable[[jax.Array], Any]) -> Model:
    """A model without its parameters, which are found by their labels."""
    skeleton, values = pz.unbind_params(make(jax.random.key(0)), freeze=True)
    params = random_params({value.label: value.value for value in values})

    def fn(params, ids):
        bound = pz.bind_variables(
            skeleton, [pz.ParameterValue(label=k, value=v) for k, v in params.items()]
        )
        return bound(pz.nx.wrap(ids).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return Model(fn, params, (tokens(0),))


@contextlib.contextmanager
def rows(of: dict[str, tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """Rows at the outputs of Penzai's linear layers, by the label of their weights.

    Where a layer adds a bias, its output is behind it; layers of a stack are told apart.
    """
    by_label = {}
    for path, (values, virtual_positions) in of.items():
        label = path.removesuffix("/data_array").replace("Linear.weights", "AddBias.bias")
        layers = values if values.ndim == 3 else [values]
        for i, layer in enumerate(layers):
            by_label[label.replace("/blocks/", f"/block_{i}/")] = layer, virtual_positions

    def patched(kind, field):
        plain = kind.__call__

        def call(self, x, **side):
            y = plain(self, x, **side)
            found = by_label.get(getattr(self, field).label)
            return y if found is None else _with_rows(y, *found)

        patch.setattr(kind, "__call__", call)

    with pytest.MonkeyPatch.context() as patch:
        patched(pz.nn.Linear, "weights")
        patched(pz.nn.AddBias, "bias")
        yield


def _with_rows(y: Any, values: jax.Array, virtual_positions: jax.Array) -> Any:
    outputs = {n: size for n, size in y.named_shape.items() if n not in ("batch", "seq")}
    there = values[jnp.maximum(virtual_positions, 0)].reshape(
        *virtual_positions.shape, *outputs.values()
    )
    there = pz.nx.wrap(there).tag("batch", "seq", *outputs)
    return pz.nx.nmap(jnp.where)(pz.nx.wrap(virtual_positions >= 0).tag("batch", "seq"), there, y)


def one_by_one(make: Callable[[jax.Array], Any]) -> Callable:
    """The model without its stack, as a function of the stack's params."""
    fn = built(make).fn

    def called(params, ids):
        apart = {}
        for label, value in params.items():
            layers = value.named_shape.get("blocks", 1)
            for i in range(layers):
                layer = value[{"blocks": i}] if layers > 1 else value
                apart[label.replace("/blocks/", f"/block_{i}/")] = layer
        return fn(apart, ids)

    return called


def llama(key, **options):
    common = dict(num_kv_heads=2, query_head_multiplier=1, mlp_variant="swiglu")
    common["tie_embedder_and_logits"] = False
    config = llamalike_common.LlamalikeTransformerConfig(**SMALL, **common | options)
    return llamalike_common.build_llamalike_transformer(config, key)


def neox(key):
    config = gpt_neox.GPTNeoXTransformerConfig(
        **SMALL,
        num_attention_heads=2,
        activation_fn="gelu_exact",
        rope_subset_size=4,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-5,
    )
    return gpt_neox.build_gpt_neox_transformer(config, key)


def client(name: str, make: Callable, **rest: Any) -> Client:
    options = dict(
        kernels=r"(query|key|value|output|[lL]inear|lm_head).*weights",
        keys=r"key.*weights",
        values=r"value.*weights",
        tables=r"embedder",
        heads=r"lm_head",
        norms=r"norm",
        rows=rows,
    )
    return Client(name, lambda: built(make), **options | rest)


CLIENTS = [
    client("Penzai Llama", llama),
    client(
        "Penzai Gemma",
        lambda key: llama(
            key,
            tie_embedder_and_logits=True,
            mlp_variant="geglu_approx",
            num_kv_heads=1,
            query_head_multiplier=2,
            use_post_attn_norm=True,
            final_logit_softcap=30.0,
        ),
    ),
    client(
        "Penzai Mistral, stacked",
        lambda key: llama(key, use_layer_stack=True),
        unrolled=one_by_one(llama),
    ),
    client("Penzai GPT-NeoX", neox, biases=r"bias|shift"),
]


@cases(CLIENTS)
def test_what_a_client_is_held_to(client, column):
    hold(client, column)
