"""The layers of an encoder-decoder: attention with relative positions, MLPs, stacks of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft.models._encoder_decoder_config import Config
from jaxpeft.models._layers import (
    Embed,
    Linear,
    RMSNorm,
    checkpointed,
    masked_softmax,
    stacked,
    write_to_cache,
)

__all__ = ["Cache", "LayerStack", "attention", "causal_positions"]


# Attention ---------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values of the targets so far, in the slots `0 <= slot < used`, and of the input."""

    k: Array  # (L, B, slots, N, H), zeros where not used
    v: Array  # (L, B, slots, N, H)
    positions: Array  # (B, slots), the number of earlier targets of the row
    mask: Array  # (B, slots), false for padding and for unused slots
    used: Array  # (), the number of slots
    encoder_kv: tuple[Array, Array] | None  # Each (L, B, S, N, H), once the input is known.
    encoder_mask: Array | None  # (B, S) of the input, or None where it has no padding


def attention(q: Array, k: Array, v: Array, *, mask: Array | None, bias: Array | None) -> Array:
    """softmax(q k^T + bias) v, not scaled by H, the softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: Queries (B, T, N, H).
      k: Keys (B, S, N, H).
      v: Values (B, S, N, H).
      mask: Which keys a query attends to, a bool that broadcasts to (B, T, S). `None` for all.
      bias: For each pair and head, broadcasts to (B, N, T, S). `None` for none.
    Returns:
      (B, T, N, H); zeros for queries that attend to nothing.
    """
    accum_dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=accum_dtype)
    if bias is not None:
        scores = scores + bias.astype(accum_dtype)
    weights = masked_softmax(scores, None if mask is None else mask[:, None])  # (B, 1, T, S)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def buckets(distance: Array, num_buckets: int, max_distance: int, bidirectional: bool) -> Array:
    """The bucket of each distance (query - key), as in section 2.1 of the paper.

    Short distances have a bucket each, longer ones share buckets of logarithmic width, and all
    from `max_distance` on share the last. If `bidirectional`, the upper half of the buckets is for
    keys after the query.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    steps = np.arange(max_distance + 1)
    # In float32, as when the weights were trained: some borders are at whole numbers.
    far = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    table = np.where(steps < exact, steps, np.minimum(exact + far.astype(int), side - 1))
    size = jnp.abs(distance) if bidirectional else jnp.maximum(distance, 0)
    bucket = jnp.asarray(table, jnp.int32)[jnp.minimum(size, max_distance)]
    return bucket + side * (distance < 0) if bidirectional else bucket


def causal_positions(
    shape: tuple[int, ...], mask: Array | None, cache: Cache | None
) -> tuple[Array, Array, Array, Cache | None]:
    """Positions of the new targets and of all keys, the causal mask (B, T, S), and the cache with
    the new targets entered."""
    new = jnp.arange(shape[1], dtype=jnp.int32)
    if mask is None and cache is None:
        return new[None], new[None], (new[:, None] >= new)[None], None
    mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
    enter = jax.lax.dynamic_update_slice_in_dim
    used = 0 if cache is None else cache.used
    every = mask if cache is None else enter(cache.mask, mask, used, axis=1)
    slots = jnp.arange(every.shape[1], dtype=jnp.int32)
    new = used + new[:, None]  # (T, 1), their slots
    positions = jnp.sum(every[:, None] & (slots < new), axis=-1, dtype=jnp.int32)
    causal = every[:, None] & (slots <= new)
    if cache is None:
        return positions, positions, causal, None
    keys = enter(cache.positions, positions, used, axis=1)
    return positions, keys, causal, cache._replace(positions=keys, mask=every)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Multi-head attention, to the tokens themselves or to the encoder's output."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.head_dim, self.attention_fn = c.head_dim, attention_fn
        inner = c.num_heads * c.head_dim
        self.q = Linear(c.hidden_size, inner, False, rngs=rngs, **dtypes)
        self.k = Linear(c.hidden_size, inner, False, rngs=rngs, **dtypes)
        self.v = Linear(c.hidden_size, inner, False, rngs=rngs, **dtypes)
        self.o = Linear(inner, c.hidden_size, False, rngs=rngs, **dtypes)

    def keys_and_values(self, x: Array) -> tuple[Array, Array]:
        """Keys and values (B, S, N, H) of x (B, S, D)."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def __call__(self, x: Array, kv: tuple[Array, Array], **kwargs: Any) -> Array:
        """Attention of x (B, T, D) to `kv`, with `mask` and `bias` of `attention`."""
        q = self._heads(self.q(x))
        k, v = (part.astype(q.dtype) for part in kv)
        return self.o(self.attention_fn(q, k, v, **kwargs).reshape(*x.shape[:2], -1))

    def _heads(self, y: Array) -> Array:
        return y.reshape(*y.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """down(relu(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.kind = c.feed_forward_proj
        if self.kind != "relu":
            self.gate = Linear(c.hidden_size, c.intermediate_size, False, rngs=rngs, **dtypes)
        self.up = Linear(c.hidden_size, c.intermediate_size, False, rngs=rngs, **dtypes)
        self.down = Linear(c.intermediate_size, c.hidden_size, False, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        if self.kind == "relu":
            return self.down(jax.nn.relu(self.up(x)))
        # The GELU is the one by tanh.
        act = jax.nn.gelu if self.kind == "gated-gelu" else jax.nn.silu
        return self.down(act(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Self-attention, in the decoder cross-attention, then MLP, each with a norm in front and a
    residual connection."""

    def __init__(
        self,
        c: Config,
        is_decoder: bool,
        attention_fn: Callable[..., Array],
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        param_dtype = dtypes["param_dtype"]
        self.attn_norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=param_dtype)
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        if is_decoder:
            self.cross_norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=param_dtype)
            self.cross = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=param_dtype)
        self.mlp = MLP(c, rngs=rngs, **dtypes)

    def __call__(self, x, kv, layer, encoder_kv, encoder_output, *, mask, bias, encoder_mask):
        """One layer on x (B, T, D).

        `kv` is the cache of all layers and the number of used slots, `layer` the index of this
        layer in it. `encoder_kv` are the keys and values of the input, computed from
        `encoder_output` (B, S, D) where it is given.
        """
        y = self.attn_norm(x)
        new = self.attn.keys_and_values(y)
        if kv is not None:
            *cached, used = kv
            pairs = zip(cached, new, strict=True)
            cached = [write_to_cache(cache, array, layer, used) for cache, array in pairs]
            new, kv = (cached[0][layer], cached[1][layer]), (*cached, used)
        x = x + self.attn(y, new, mask=mask, bias=bias)
        if encoder_output is not None:
            encoder_kv = self.cross.keys_and_values(encoder_output)
        if encoder_kv is not None:
            x = x + self.cross(self.cross_norm(x), encoder_kv, mask=encoder_mask, bias=None)
        return x + self.mlp(self.mlp_norm(x)), kv, encoder_kv


class LayerStack(nnx.Module):
    """A stack of layers, the relative position biases that they share, and the norm at its end."""

    def __init__(
        self,
        c: Config,
        is_decoder: bool,
        *,
        rngs: nnx.Rngs,
        attention_fn: Callable[..., Array],
        remat: Any,
        unroll: int,
        **dtypes: Any,
    ):
        self.config, self.is_decoder, self.remat, self.unroll = c, is_decoder, remat, unroll
        self.depth = c.num_decoder_layers if is_decoder else c.num_layers
        self.layers = stacked(
            lambda rngs: Layer(c, is_decoder, attention_fn, rngs=rngs, **dtypes), self.depth, rngs
        )
        self.bias = Embed(
            c.num_buckets, c.num_heads, dtype=None, param_dtype=dtypes["param_dtype"], rngs=rngs
        )
        self.norm = RMSNorm(c.hidden_size, c.norm_eps, param_dtype=dtypes["param_dtype"])

    def __call__(
        self,
        x: Array,
        *,
        query_positions: Array,
        key_positions: Array,
        mask: Array | None,
        encoder_output: Array | None = None,
        encoder_mask: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """Applies all layers to x (B, T, D).

        Args:
          x: Embedded tokens.
          query_positions: Positions of the tokens, (B, T) or (1, T).
          key_positions: Positions of the keys, (B, S) or (1, S).
          mask: As in `attention`.
          encoder_output: (B, S, D).
          encoder_mask: Mask of the encoder's output, as `mask`.
          cache: With the new tokens entered in all but `k`, `v`, `used`.
        Returns:
          (B, T, D) after the last norm, and the cache.
        """
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        c, bidirectional = self.config, not self.is_decoder
        bucket_ids = buckets(distance, c.num_buckets, c.max_distance, bidirectional)
        bias = jnp.moveaxis(self.bias(bucket_ids), -1, 1)  # (B or 1, N, T, S)
        graphdef, stack = nnx.split(self.layers)
        how = {"mask": mask, "bias": bias, "encoder_mask": encoder_mask}

        def step(carry: Any, slices: Any) -> Any:
            x, kv = carry
            layer, encoder_kv, weights = slices
            run = nnx.merge(graphdef, weights)
            x, kv, encoder_kv = run(x, kv, layer, encoder_kv, encoder_output, **how)
            # Only later calls need the keys of the input; training does not.
            return (x, kv), None if cache is None else encoder_kv

        step = checkpointed(step, self.remat)
        layers = None if cache is None else jnp.arange(self.depth, dtype=jnp.int32)
        kv = None if cache is None else (cache.k, cache.v, cache.used)
        encoder_kv = None if cache is None or encoder_output is not None else cache.encoder_kv
        slices = (layers, encoder_kv, stack)
        (x, kv), encoder_kv = jax.lax.scan(step, (x, kv), slices, unroll=self.unroll)
        x = self.norm(x)
        if cache is None or kv is None:
            return x, None
        encoder_kv = jax.tree.map(lambda part: part.astype(cache.k.dtype), encoder_kv)
        return x, cache._replace(k=kv[0], v=kv[1], encoder_kv=encoder_kv)
