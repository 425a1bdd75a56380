"""The decoders of Tunix. `__init__` of its packages is passed by: it would import trainers."""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxpeft.bridge import from_nnx

from .harness import Client, Model, cases, hold, random_params, tokens

found = importlib.util.find_spec("tunix")
if found is None:
    pytest.skip("make clients installs google-tunix", allow_module_level=True)
FAMILIES = ("llama3", "qwen2", "qwen3", "gemma", "gemma3")
for name in ("tunix", "tunix.generate", *(f"tunix.models.{family}" for family in FAMILIES)):
    module = types.ModuleType(name)
    folder = os.path.join(found.submodule_search_locations[0], *name.split(".")[1:])
    module.__path__ = [folder]  # type: ignore[attr-defined]
    sys.modules.setdefault(name, module)
llama3, qwen2, qwen3, gemma, gemma3 = (
    importlib.import_module(f"tunix.models.{family}.model") for family in FAMILIES
)

VOCAB, WIDTH = 37, 16
SMALL = dict(num_layers=2, embed_dim=WIDTH, hidden_dim=24, num_heads=2, num_kv_heads=1, head_dim=8)


def built(make: Callable[[], nnx.Module], gemma_like: bool = False) -> Model:
    """A decoder as a function of its params and tokens, which counts positions from 0."""
    module = nnx.eval_shape(make)
    fn, shapes, rest, _ = from_nnx(module)
    params = random_params(shapes)
    rest = random_params(rest)

    def model(params, ids):
        time = ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(time), ids.shape)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), (len(ids), time, time))
        (logits, _), _ = fn(params, rest, ids, positions, None, causal)
        return logits

    return Model(model, params, (tokens(0),))


@contextlib.contextmanager
def rows(of: dict[str, tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """Rows at the outputs of the projections, which are Einsums told apart by their places."""
    with contextlib.ExitStack() as stack:
        for family in (llama3, qwen2, qwen3, gemma, gemma3):
            stack.enter_context(_rows_of(family, of))
        yield


def _rows_of(family: Any, of: dict[str, tuple[jax.Array, jax.Array]]) -> Any:
    attention = family.Attention
    plain = attention.block if hasattr(attention, "block") else attention.__call__
    layer = iter(range(100))

    def block(self, *args, **kwargs):
        i = next(layer)
        for name in ("k_proj", "v_proj"):
            values = next(
                (v for path, v in of.items() if path.startswith(f"layers/{i}/attn/{name}/")), None
            )
            if values is not None:
                bias = getattr(self, f"{name[0]}_bias", None)
                setattr(self, name, _WithRows(getattr(self, name), *values, bias))
        return plain(self, *args, **kwargs)

    return mock.patch.object(attention, plain.__name__, block)


class _WithRows(nnx.Module):
    """A projection with rows at virtual positions, less the bias that is added to them."""

    def __init__(self, inner: Any, values: jax.Array, virtual_positions: jax.Array, bias: Any):
        self.inner, self.values, self.virtual_positions, self.bias = (
            inner,
            values,
            virtual_positions,
            bias,
        )

    def __call__(self, x):
        y = self.inner(x)
        there = self.values[jnp.maximum(self.virtual_positions, 0)]
        there = there if self.bias is None else there - self.bias[...]
        return jnp.where(self.virtual_positions[..., None, None] >= 0, there.reshape(y.shape), y)

    @property
    def shape(self):
        return self.inner.shape


def client(name: str, make: Callable[[nnx.Rngs], nnx.Module], **rest: Any) -> Client:
    options = dict(
        kernels=r"proj/(w|kernel)|lm_head/w",
        keys=r"k_proj/w",
        values=r"v_proj/w",
        feedforward=r"down_proj/kernel",
        tables=r"embedder",
        heads=r"lm_head",
        norms=r"norm/(w|scale)",
        biases=r"bias",
        rows=rows,
        tolerance=1e-5,  # the softmax and the norms are in float32
    )
    return Client(name, lambda: built(lambda: make(rngs=nnx.Rngs(0))), **options | rest)


LLAMA = dict(vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-5)
FUSED = dict(
    kernels=r"einsum/w|proj/kernel",
    keys=r"kv_einsum/w",
    values=r"kv_einsum/w",
    heads=None,
)


def gemma_config(family: Any, **kw: Any) -> Any:
    options = dict(num_embed=VOCAB, use_post_attn_norm=True, use_post_ffw_norm=True)
    return family.ModelConfig(**SMALL, **options | kw)


CLIENTS = [
    client(
        "Tunix Llama 3",
        lambda rngs: llama3.Llama3(llama3.ModelConfig(**SMALL, **LLAMA), rngs=rngs),
    ),
    client(
        "Tunix Llama 3, tied and rematerialized",
        lambda rngs: llama3.Llama3(
            llama3.ModelConfig(
                **SMALL, **LLAMA, weight_tying=True, remat_config=llama3.RematConfig.DECODER
            ),
            rngs=rngs,
        ),
        heads=None,
    ),
    client(
        "Tunix Qwen 2",
        lambda rngs: qwen2.Qwen2(
            qwen2.ModelConfig(**SMALL, **LLAMA, dtype=jnp.float64, param_dtype=jnp.float64),
            rngs=rngs,
        ),
    ),
    client(
        "Tunix Qwen 3",
        lambda rngs: qwen3.Qwen3(
            qwen3.ModelConfig(**SMALL, **LLAMA, dtype=jnp.float64, param_dtype=jnp.float64),
            rngs=rngs,
        ),
    ),
    client(
        "Tunix Qwen 3, mixture of experts",
        lambda rngs: qwen3.Qwen3(
            qwen3.ModelConfig(
                **SMALL,
                **LLAMA,
                dtype=jnp.float64,
                param_dtype=jnp.float64,
                num_experts=3,
                num_experts_per_tok=2,
            ),
            rngs=rngs,
        ),
        kernels=r"proj(/(w|kernel))?$|router/kernel|lm_head/w",
        feedforward=None,
    ),
    client(
        "Tunix Gemma 2",
        lambda rngs: gemma.Gemma(
            gemma_config(
                gemma,
                final_logit_softcap=30.0,
                attn_logits_soft_cap=50.0,
                sliding_window_size=16,
                attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
            ),
            rngs=rngs,
        ),
        **FUSED,
        tolerance=1e-10,
    ),
    client(
        "Tunix Gemma 3",
        lambda rngs: gemma3.Gemma3(
            gemma3.ModelConfig(
                **SMALL, num_embed=VOCAB, sliding_window_size=16, param_dtype=jnp.float64
            ),
            rngs=rngs,
        ),
        **FUSED,
    ),
]


@cases(CLIENTS)
def test_what_a_client_is_held_to(client, column):
    hold(client, column)
