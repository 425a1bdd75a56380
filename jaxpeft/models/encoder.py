"""The BERT family of encoders: BERT, MiniLM, RoBERTa, DistilBERT.

Axes: B rows, T tokens, S keys (= T), D hidden size, F inner width of the MLP, N heads, H size of a
head (N * H = D), V vocabulary, P positions, Y token types, L layers.

Layers are stacked (every array under `layers` has a leading axis L) and run in one scan. Kernels
are (in, out). The parameters of a model are one nested dict:

    embed/embedding (V, D)            layers/attn/{q,k,v,o}/{kernel,bias} (L, D, D), (L, D)
    positions/embedding (P, D)        layers/attn_norm/{scale,bias} (L, D)
    types/embedding (Y, D)            layers/mlp/up/{kernel,bias} (L, D, F), (L, F)
    embed_norm/{scale,bias} (D,)      layers/mlp/down/{kernel,bias} (L, F, D), (L, D)
    pooler/{kernel,bias} (D, D), (D,) layers/mlp_norm/{scale,bias} (L, D)

DistilBERT has no `types`, and `pooler` is there where the folder has it.

    config, params = encoder.load("all-MiniLM-L6-v2")
    hidden = jax.jit(encoder.apply_fn(config))(params, tokens, mask=mask)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models._architecture import Architecture
from jaxpeft.models._encoder_config import ACTIVATIONS, FAMILIES, Config
from jaxpeft.models._layers import (
    Embed,
    LayerNorm,
    Linear,
    check_options,
    checkpointed,
    masked_softmax,
    stacked,
)

__all__ = ["Config", "Encoder", "apply_fn", "attention", "init", "load", "plan", "save", "shapes"]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,  # by tanh
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
assert tuple(_ACTIVATIONS) == ACTIVATIONS


# Attention ---------------------------------------------------------------------------------------


def attention(q: Array, k: Array, v: Array, *, mask: Array | None) -> Array:
    """Attention to all keys of the mask, softmax(q k^T / sqrt(H)) v, softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: Queries (B, T, N, H).
      k: Keys (B, S, N, H).
      v: Values (B, S, N, H).
      mask: (B, S), true for keys that are attended to; `None` for all of them.
    Returns:
      (B, T, N, H); zeros in rows whose mask is false everywhere.
    """
    accum_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=accum_dtype)
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, S)
    weights = masked_softmax(scores * q.shape[-1] ** -0.5, mask)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Bidirectional multi-head attention."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.head_dim, self.attention_fn = c.head_dim, attention_fn
        self.q = Linear(c.hidden_size, c.hidden_size, True, rngs=rngs, **dtypes)
        self.k = Linear(c.hidden_size, c.hidden_size, True, rngs=rngs, **dtypes)
        self.v = Linear(c.hidden_size, c.hidden_size, True, rngs=rngs, **dtypes)
        self.o = Linear(c.hidden_size, c.hidden_size, True, rngs=rngs, **dtypes)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        rows, length, width = x.shape
        q = self.q(x).reshape(rows, length, -1, self.head_dim)
        k = self.k(x).reshape(rows, length, -1, self.head_dim)
        v = self.v(x).reshape(rows, length, -1, self.head_dim)
        return self.o(self.attention_fn(q, k, v, mask=mask).reshape(rows, length, width))


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.act = _ACTIVATIONS[c.hidden_act]
        self.up = Linear(c.hidden_size, c.intermediate_size, True, rngs=rngs, **dtypes)
        self.down = Linear(c.intermediate_size, c.hidden_size, True, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention, then MLP, each followed by a residual connection and a norm."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.attn_norm = LayerNorm(c.hidden_size, c.norm_eps, param_dtype=dtypes["param_dtype"])
        self.mlp = MLP(c, rngs=rngs, **dtypes)
        self.mlp_norm = LayerNorm(c.hidden_size, c.norm_eps, param_dtype=dtypes["param_dtype"])

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class Encoder(nnx.Module):
    """An encoder of the BERT family. It has no dropout, whatever rates config.json gives.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02 ** 2).
      param_dtype: Dtype of the weights.
      dtype: Dtype of the products. `None` means that of the weights. Norms and the softmax are
        computed in float32 or wider whatever it is.
      remat: What the backward pass rematerializes: `None` nothing, "full" every layer from its
        input, or what a policy of `jax.checkpoint_policies` does not save.
      unroll: Layers per step of the scan.
      attention_fn: Replaces `attention`.
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
        remat: Any = None,
        unroll: int = 1,
        attention_fn: Callable[..., Array] = attention,
    ):
        check_options(remat=remat, param_dtype=param_dtype, dtype=dtype)
        self.config, self.remat, self.unroll = config, remat, unroll
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        size = config.hidden_size
        self.embed = Embed(config.vocab_size, size, rngs=rngs, **dtypes)
        self.positions = Embed(config.max_position_embeddings, size, rngs=rngs, **dtypes)
        if config.type_vocab_size:
            self.types = Embed(config.type_vocab_size, size, rngs=rngs, **dtypes)
        self.embed_norm = LayerNorm(size, config.norm_eps, param_dtype=param_dtype)
        self.layers = stacked(
            lambda rngs: Layer(config, attention_fn, rngs=rngs, **dtypes), config.num_layers, rngs
        )
        if config.pooler:
            self.pooler = Linear(size, size, True, rngs=rngs, **dtypes)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        token_type_ids: Array | None = None,
        positions: Array | None = None,
    ) -> Array:
        """Hidden states after the last layer.

        Args:
          tokens: Ids (B, T).
          mask: (B, T), true for tokens, false for padding, on whichever side. `None` for tokens
            everywhere.
          token_type_ids: (B, T), for models that have token types. `None` for type 0.
          positions: (B, T) or (1, T), rows of the table of positions. `None` does as transformers
            does: BERT and DistilBERT count all positions from 0, padding too; RoBERTa counts
            tokens from pad_token_id + 1 and gives padding the row `pad_token_id` (tokens are those
            of the mask, without one those other than `pad_token_id`).
        Returns:
          (B, T, D), finite also at padding, where they mean nothing.
        Raises:
          ValueError: There are more tokens than positions, or token types for a model without
            them.
        """
        if positions is None:
            positions = self._default_positions(tokens, mask)
        x = self.embed(tokens)
        if self.config.type_vocab_size:
            if token_type_ids is None:
                token_type_ids = jnp.zeros_like(tokens)
            x = x + self.types(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError(
                f"A {self.config.model_type} has no token types, got token_type_ids of shape "
                f"{token_type_ids.shape}. Leave them out."
            )
        x = self.embed_norm(x + self.positions(positions))
        mask = None if mask is None else jnp.asarray(mask, bool)
        graphdef, stack = nnx.split(self.layers)

        def step(x: Array, weights: Any) -> Any:
            return nnx.merge(graphdef, weights)(x, mask), None

        step = checkpointed(step, self.remat)
        return jax.lax.scan(step, x, stack, unroll=self.unroll)[0]

    def pooled(self, tokens: Array, *, virtual: int = 0, **kwargs: Any) -> Array:
        """tanh(pooler(x)) (B, D) of the first token's hidden state x.

        Args:
          tokens: Ids (B, T).
          virtual: The number of virtual positions in front of the tokens (of a prompt or a
            prefix).
          **kwargs: `mask`, `token_type_ids`, `positions` of `__call__`.
        Raises:
          ValueError: The model has no pooler.
        """
        if not self.config.pooler:
            raise ValueError(
                f"This {self.config.model_type} has no pooler (pooler=False). Pool its hidden "
                "states."
            )
        return jnp.tanh(self.pooler(self(tokens, **kwargs)[:, virtual]))

    def _default_positions(self, tokens: Array, mask: Array | None) -> Array:
        """Each token's row of the table of positions, (B, T) or (1, T)."""
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"{length} tokens do not fit in the {self.config.max_length} positions of this "
                f"{self.config.model_type}. Cut them, or give fewer virtual tokens."
            )
        pad = self.config.pad_token_id
        if self.config.model_type != "roberta" or pad is None:
            return jnp.arange(length, dtype=jnp.int32)[None]
        counted = jnp.asarray(tokens != pad if mask is None else mask, bool).astype(jnp.int32)
        return jnp.cumsum(counted, axis=1, dtype=jnp.int32) * counted + pad


# Parameters and files ----------------------------------------------------------------------------


def _inspect(config: Config, tensors: Mapping[str, safetensors.Tensor]) -> Config:
    """Sees whether the folder has a pooler."""
    return dataclasses.replace(config, pooler="pooler.dense.weight" in tensors)


_ARCHITECTURE = Architecture(Encoder, Config, FAMILIES, "encoder", _inspect)

apply_fn = _ARCHITECTURE.apply_fn
init = _ARCHITECTURE.init
shapes = _ARCHITECTURE.shapes
plan = _ARCHITECTURE.plan
load = _ARCHITECTURE.load
save = _ARCHITECTURE.save
