"""The Llama family of decoders: Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen3.

Axes: B rows, T tokens, S keys (T, or the slots of a cache), D hidden size, F inner width of the
MLP, N heads, K key-value heads, G = N / K, H size of a head, V vocabulary, L layers.

Layers are stacked (every array under `layers` has a leading axis L) and run in one scan. Kernels
are (in, out). The parameters of a model are one nested dict:

    embed/embedding (V, D)              layers/mlp/{gate,up}/kernel (L, D, F)
    layers/attn_norm/scale (L, D)       layers/mlp/down/kernel (L, F, D)
    layers/attn/q/kernel (L, D, N*H)    layers/mlp_norm/scale (L, D)
    layers/attn/{k,v}/kernel (L, D, K*H)  norm/scale (D,)
    layers/attn/o/kernel (L, N*H, D)    head/kernel (D, V), unless tied

and, where the family has them, `bias` beside a `kernel` and `layers/attn/{q,k}_norm/scale` (L, H).

    config, params = decoder.load("SmolLM2-135M")
    forward = decoder.apply_fn(config, dtype=jnp.bfloat16, remat="full")
    logits = jax.jit(forward)(params, tokens)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models._architecture import Architecture
from jaxpeft.models._decoder_config import FAMILIES, Config, Rope
from jaxpeft.models._layers import (
    Embed,
    Linear,
    RMSNorm,
    check_free_slots,
    check_options,
    checkpointed,
    masked_softmax,
    stacked,
    vocab_logits,
    write_to_cache,
)

__all__ = ["Cache", "Config", "Decoder", "Rope", "TokenPositions", "apply_fn", "attention", "init"]
__all__ += ["init_cache", "load", "plan", "save", "shapes"]


# Attention ---------------------------------------------------------------------------------------


_VIRTUAL = -1  # The segment that `jp.prompts.prepend_virtual_tokens` gives to virtual tokens.


class TokenPositions(NamedTuple):
    """The positions and segments of tokens, from which attention decides what each attends to.

    A token attends to those of its own segment with `0 <= distance < window`, where distance is
    the difference of positions. Segment 0 is padding, which takes no part in attention. Tokens of
    every other segment also attend to segment -1, at any distance: to the virtual tokens of a
    prefix or a prompt, under packing and under a window.
    """

    # (B, T) or (1, T): the number of earlier tokens, of the token's own segment and of -1.
    positions: Array
    segment_ids: Array | None  # (B, T), or None where all tokens are of one segment


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in the slots `0 <= slot < used`; zeros in the rest."""

    k: Array  # (L, B, S, K, H)
    v: Array  # (L, B, S, K, H)
    positions: Array  # (B, S), as in `TokenPositions`
    segment_ids: Array  # (B, S), as in `TokenPositions`
    used: Array  # (), the number of slots


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_positions: TokenPositions,
    key_positions: TokenPositions,
    window: int | Array | None,
) -> Array:
    """Causal attention within segments, softmax(q k^T / sqrt(H)) v, softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: Queries (B, T, N, H).
      k: Keys (B, S, K, H), K a divisor of N.
      v: Values (B, S, K, H).
      query_positions: Positions of the T tokens.
      key_positions: Positions of the S tokens.
      window: A token attends to distances below this one. `None` for no limit; a traced array
        where it differs between layers.
    Returns:
      (B, T, N, H); zeros for tokens that attend to nothing.
    """
    rows, length, heads, size = q.shape
    q = q.reshape(rows, length, k.shape[2], -1, size)  # (B, T, K, G, H)
    accum_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=accum_dtype)
    mask = _attention_mask(query_positions, key_positions, window)[:, None, None]  # (B, 1, 1, T, S)
    weights = masked_softmax(scores * size**-0.5, mask).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(rows, length, heads, size)


def _attention_mask(
    queries: TokenPositions, keys: TokenPositions, window: int | Array | None
) -> Array:
    """Which keys each token attends to, (B, T, S), as `TokenPositions` says."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    near = True if window is None else distance < window
    if queries.segment_ids is None or keys.segment_ids is None:
        return (distance >= 0) & near
    mine, theirs = queries.segment_ids[:, :, None], keys.segment_ids[:, None, :]
    known = (theirs == _VIRTUAL) | (mine == theirs) & near
    return (distance >= 0) & known & (mine != 0)


def _token_positions(
    tokens: Array, segment_ids: Array | None, mask: Array | None, cache: Cache | None
) -> tuple[TokenPositions, TokenPositions, Cache | None]:
    """Positions of the new tokens and of all keys, and the cache with the new tokens entered."""
    length = tokens.shape[1]
    if segment_ids is None and mask is None and cache is None:
        new = TokenPositions(jnp.arange(length, dtype=jnp.int32)[None], None)
        return new, new, None
    segment = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    segment = segment.astype(jnp.int32)
    if mask is not None:
        segment = jnp.where(mask.astype(bool), segment, 0)
    enter = jax.lax.dynamic_update_slice_in_dim
    used = 0 if cache is None else cache.used
    every = segment if cache is None else enter(cache.segment_ids, segment, used, axis=1)  # (B, S)
    slots = jnp.arange(every.shape[1], dtype=jnp.int32)
    before = slots < used + slots[:length, None]  # (T, S)
    same = (segment[:, :, None] == every[:, None, :]) | (every[:, None, :] == _VIRTUAL)  # (B, T, S)
    new = TokenPositions(jnp.sum(same & before, axis=-1, dtype=jnp.int32), segment)
    if cache is None:
        return new, new, None
    keys = TokenPositions(enter(cache.positions, new.positions, used, axis=1), every)
    return new, keys, cache._replace(positions=keys.positions, segment_ids=every)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs `(x[i], x[i + H/2])` of each head (B, T, heads, H) in float32 or wider."""
    left, right = jnp.split(x, 2, axis=-1)
    rotated = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.config, self.attention_fn = c, attention_fn
        inner, kv_inner = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q = Linear(c.hidden_size, inner, c.qkv_bias, rngs=rngs, **dtypes)
        self.k = Linear(c.hidden_size, kv_inner, c.qkv_bias, rngs=rngs, **dtypes)
        self.v = Linear(c.hidden_size, kv_inner, c.qkv_bias, rngs=rngs, **dtypes)
        self.o = Linear(inner, c.hidden_size, c.o_bias, rngs=rngs, **dtypes)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps, param_dtype=dtypes["param_dtype"])
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps, param_dtype=dtypes["param_dtype"])

    def __call__(self, x, kv, layer, rotary, window, **positions):
        """Attention of x (B, T, D).

        `kv` is the cache of all layers and the number of used slots, `layer` the index of this
        layer in it; `rotary` are the cosines and sines (B, T, 1, H/2) of the rotary embedding.
        """
        rows, length, _ = x.shape
        q = self.q(x).reshape(rows, length, -1, self.config.head_dim)
        k = self.k(x).reshape(rows, length, -1, self.config.head_dim)
        v = self.v(x).reshape(rows, length, -1, self.config.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if kv is not None:
            *kv, used = kv
            ks = write_to_cache(kv[0], k, layer, used)
            vs = write_to_cache(kv[1], v, layer, used)
            k, v = ks[layer].astype(q.dtype), vs[layer].astype(q.dtype)
            kv = ks, vs, used
        y = self.attention_fn(q, k, v, window=window, **positions)
        return self.o(y.reshape(rows, length, -1)), kv


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.gate = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, rngs=rngs, **dtypes)
        self.up = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, rngs=rngs, **dtypes)
        self.down = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention, then MLP, each on normed input and added to the residual stream."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=dtypes["param_dtype"])
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=dtypes["param_dtype"])
        self.mlp = MLP(c, rngs=rngs, **dtypes)

    def __call__(self, x, kv, *args, **positions):
        y, kv = self.attn(self.attn_norm(x), kv, *args, **positions)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv


class Decoder(nnx.Module):
    """A decoder of the Llama family.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02 ** 2).
      param_dtype: Dtype of the weights.
      dtype: Dtype of the products. `None` means that of the weights. Norms, rotary embeddings and
        the softmax are computed in float32 or wider whatever it is.
      logits_dtype: Dtype of the logits and of their sums. `None` means `dtype`.
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
        logits_dtype: Any = None,
        remat: Any = None,
        unroll: int = 1,
        attention_fn: Callable[..., Array] = attention,
    ):
        check_options(remat=remat, param_dtype=param_dtype, dtype=dtype, logits_dtype=logits_dtype)
        self.config, self.remat, self.unroll = config, remat, unroll
        self.logits_dtype = logits_dtype
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.layers = stacked(
            lambda rngs: Layer(config, attention_fn, rngs=rngs, **dtypes), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, False, rngs=rngs, **dtypes)

    def __call__(self, tokens: Array, **kwargs: Any) -> Any:
        """Logits of the next token.

        Args:
          tokens: Ids (B, T).
          **kwargs: `positions`, `segment_ids`, `mask`, `cache` of `hidden`.
        Returns:
          Logits (B, T, V); with a cache `(logits, cache)`.
        """
        if kwargs.get("cache") is None:
            return self.logits(self.hidden(tokens, **kwargs))
        x, cache = self.hidden(tokens, **kwargs)
        return self.logits(x), cache

    def logits(self, x: Array) -> Array:
        """Logits (B, T, V) of hidden states (B, T, D), by the head or the transposed embedding."""
        head = None if self.config.tie_word_embeddings else self.head
        return vocab_logits(x, self.embed, head, self.logits_dtype)

    def hidden(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The hidden states that the head reads, for example to compute the loss in chunks.

        Args:
          tokens: Ids (B, T). With a cache, those that follow the ones in it.
          positions: (B, T), for the rotary embedding. `None` counts the earlier tokens of the
            same segment, so padding on the left and packing need nothing more, and warns where
            there are more tokens than `Config.max_length`.
          segment_ids: (B, T). Tokens attend to their own segment only, and to segment -1 in front
            of all (virtual tokens, see `jp.prompts.prepend_virtual_tokens`), whatever the window.
            0 is padding.
          mask: (B, T), true for tokens, false for padding, on whichever side.
          cache: From `init_cache`, or from the call before. It must have T free slots: otherwise
            there is an error, or under jit the result is NaN.
        Returns:
          (B, T, D) after the last norm; with a cache `(hidden, cache)`.
        Raises:
          ValueError: The cache has too few free slots.
        """
        config = self.config
        check_free_slots(tokens, cache, "tokens")
        if positions is None and cache is None and tokens.shape[1] > config.max_length:
            warnings.warn(
                f"{tokens.shape[1]} tokens are more than the {config.max_length} positions that "
                f"this {config.model_type} knows (max_position_embeddings="
                f"{config.max_position_embeddings}): its answers get worse from there on. Cut the "
                "rows; or interpolate, with Rope(rope_type='linear', factor=...), and fine-tune; "
                "or pass `positions`.",
                stacklevel=1,
            )
        queries, keys, cache = _token_positions(tokens, segment_ids, mask, cache)
        positions = queries.positions if positions is None else positions
        angles = positions[:, :, None, None].astype(jnp.float32)  # (B, T, 1, 1)
        angles = angles * config.rope.frequencies(config.head_dim)
        rotary = jnp.cos(angles), jnp.sin(angles)  # (B, T, 1, H/2)
        graphdef, stack = nnx.split(self.layers)

        def step(carry: Any, slices: Any) -> Any:
            x, kv = carry
            layer, window, weights = slices
            window = config.sliding_window if window is None else window
            run = nnx.merge(graphdef, weights)
            where = {"query_positions": queries, "key_positions": keys}
            return run(x, kv, layer, rotary, window, **where), None

        step = checkpointed(step, self.remat)
        layers = None if cache is None else jnp.arange(config.num_layers, dtype=jnp.int32)
        kv = None if cache is None else (cache.k, cache.v, cache.used)
        slices = (layers, _layer_windows(config), stack)
        start = self.embed(tokens), kv
        (x, kv), _ = jax.lax.scan(step, start, slices, unroll=self.unroll)
        x = self.norm(x)
        if cache is None or kv is None:
            return x
        # Under jit nothing can raise, and the slots of other tokens must not be overwritten
        # silently.
        x = jnp.where(cache.used + tokens.shape[1] <= cache.k.shape[2], x, jnp.nan)
        return x, cache._replace(k=kv[0], v=kv[1], used=cache.used + tokens.shape[1])


def _layer_windows(config: Config) -> Array | None:
    """The window of each layer (L,), or `None` where all layers have the same."""
    full, unlimited = config.full_attention_layers, np.iinfo(np.int32).max
    if not full:
        return None
    layers = range(config.num_layers)
    windows = [unlimited if i in full else config.sliding_window for i in layers]
    return jnp.asarray(windows, jnp.int32)


# Parameters and files ----------------------------------------------------------------------------


def init_cache(
    config: Config,
    batch_size: int,
    length: int,
    dtype: Any = jnp.float32,
    *,
    beyond_context: bool = False,
) -> Cache:
    """An empty cache with `length` slots for each row of a batch.

    Args:
      config: Shape of the model.
      batch_size: B.
      length: S; for generation the tokens of the prompt, padding included, and those to generate.
      dtype: Dtype of keys and values.
      beyond_context: Allows more slots than `Config.max_length`, whose positions the model does
        not know.
    Raises:
      ValueError: More slots than that, or a dtype that is not of floating-point numbers.
    """
    check_dtype_option("dtype", dtype)
    if length > config.max_length and not beyond_context:
        raise ValueError(
            f"A cache of {length} tokens is longer than the {config.max_length} positions that "
            f"this {config.model_type} knows (max_position_embeddings="
            f"{config.max_position_embeddings}). Shorten the prompt or generate fewer tokens, or "
            "pass beyond_context=True to init_cache."
        )
    kv = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
    slots = jnp.zeros((batch_size, length), jnp.int32)
    return Cache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), slots, slots, jnp.int32(0))


def _inspect(config: Config, tensors: Mapping[str, safetensors.Tensor]) -> Config:
    """Refuses a folder whose head is not the table that it is tied to."""
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None:
        return config
    if table is None or not np.array_equal(safetensors.read(head), safetensors.read(table)):
        raise ValueError(
            f"{head.file} has a lm_head.weight unlike its model.embed_tokens.weight, though "
            "config.json says tie_word_embeddings=True. Set it to false there to use the head."
        )
    return config


_ARCHITECTURE = Architecture(Decoder, Config, FAMILIES, "decoder", _inspect)

apply_fn = _ARCHITECTURE.apply_fn
init = _ARCHITECTURE.init
shapes = _ARCHITECTURE.shapes
plan = _ARCHITECTURE.plan
load = _ARCHITECTURE.load
save = _ARCHITECTURE.save
