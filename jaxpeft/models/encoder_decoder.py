"""The T5 family of encoder-decoders: T5 (1.0), T5 1.1, FLAN-T5, and the T5-shaped UL2.

Axes: B rows, S input tokens, T target tokens, D hidden size, F inner width of the MLP, N heads, H
size of a head, R buckets of relative positions, V vocabulary, E encoder layers, L decoder layers.
In attention, T queries meet S keys, of inputs or of targets.

Layers are stacked (every array under `layers` has a leading axis E or L), and each stack runs in
one scan. Kernels are (in, out), nothing has a bias. The parameters are one nested dict:

    embed/embedding (V, D), of both stacks           head/kernel (D, V), unless tied
    {encoder,decoder}/bias/embedding (R, N)          {encoder,decoder}/norm/scale (D,)
    {encoder,decoder}/layers/attn_norm/scale         decoder/layers/cross_norm/scale
    {encoder,decoder}/layers/attn/{q,k,v}/kernel     decoder/layers/cross/{q,k,v}/kernel (L, D, N*H)
    {encoder,decoder}/layers/attn/o/kernel           decoder/layers/cross/o/kernel (L, N*H, D)
    {encoder,decoder}/layers/mlp_norm/scale (., D)
    {encoder,decoder}/layers/mlp/{up[,gate]}/kernel (., D, F), mlp/down/kernel (., F, D)

    config, params = encoder_decoder.load("flan-t5-small")
    forward = encoder_decoder.apply_fn(config, dtype=jnp.bfloat16, remat="full")
    known = encoder_decoder.shift_right(targets, config.decoder_start_token_id)
    logits = jax.jit(forward)(params, inputs, known, mask=inputs != config.pad_token_id)

References:
  Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer,
  2020, section 2.1. https://arxiv.org/abs/1910.10683
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models._architecture import Architecture
from jaxpeft.models._encoder_decoder_config import FAMILIES, REPEATED_TABLES, Config
from jaxpeft.models._encoder_decoder_layers import Cache, LayerStack, attention, causal_positions
from jaxpeft.models._layers import (
    Embed,
    Linear,
    check_free_slots,
    check_options,
    vocab_logits,
)

__all__ = ["Cache", "Config", "EncoderDecoder", "apply_fn", "attention", "init", "init_cache"]
__all__ += ["load", "plan", "save", "shapes", "shift_right"]


# The model ---------------------------------------------------------------------------------------


class EncoderDecoder(nnx.Module):
    """An encoder-decoder of the T5 family. It has no dropout.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02 ** 2).
      param_dtype: Dtype of the weights.
      dtype: Dtype of the products. `None` means that of the weights. Norms and the softmax are
        computed in float32 or wider whatever it is.
      logits_dtype: Dtype of the logits and of their sums. `None` means `dtype`.
      remat: What the backward pass rematerializes: `None` nothing, "full" every layer from its
        input, or what a policy of `jax.checkpoint_policies` does not save.
      unroll: Layers per step of the scans.
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
        self.config, self.logits_dtype = config, logits_dtype
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        how = {"attention_fn": attention_fn, "remat": remat, "unroll": unroll}
        self.embed = Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.encoder = LayerStack(config, False, rngs=rngs, **how, **dtypes)
        self.decoder = LayerStack(config, True, rngs=rngs, **how, **dtypes)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, False, rngs=rngs, **dtypes)

    def __call__(self, inputs: Array, targets: Array, **kwargs: Any) -> Array:
        """Logits of the next target.

        Args:
          inputs: Ids (B, S).
          targets: Ids (B, T) that are known so far: `shift_right` of those to predict.
          **kwargs: `mask` and `target_mask` of `hidden`.
        Returns:
          Logits (B, T, V).
        """
        return self.logits(self.hidden(inputs, targets, **kwargs))

    def hidden(
        self,
        inputs: Array,
        targets: Array,
        *,
        mask: Array | None = None,
        target_mask: Array | None = None,
    ) -> Array:
        """The hidden states that the head reads, for example to compute the loss in chunks.

        Args:
          inputs: Ids (B, S).
          targets: Ids (B, T).
          mask: (B, S), true for tokens, false for padding, on whichever side. Distances count
            tokens only, not padding.
          target_mask: The same of the targets (B, T). Padding behind them needs none, since no
            target attends to a later one.
        Returns:
          (B, T, D) after the last norm of the decoder.
        """
        encoder_output = self.encode(inputs, mask=mask)
        return self._decoded(targets, encoder_output, mask, target_mask, None)[0]

    def encode(self, inputs: Array, *, mask: Array | None = None) -> Array:
        """The encoder's output (B, S, D) for ids (B, S), with `mask` as in `hidden`."""
        if mask is None:
            positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
        else:
            mask = mask.astype(bool)
            positions = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
            mask = mask[:, None]  # (B, 1, S)
        x = self.embed(inputs)
        return self.encoder(x, query_positions=positions, key_positions=positions, mask=mask)[0]

    def decode(
        self,
        targets: Array,
        encoder_output: Array | None = None,
        *,
        mask: Array | None = None,
        target_mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the next target, given the output of `encode` for the input.

        Args:
          targets: Ids (B, T). With a cache, those that follow the ones in it.
          encoder_output: (B, S, D) of `encode`. A cache keeps its keys and values: only the first
            call needs it.
          mask: (B, S) of the input, with `encoder_output`.
          target_mask: (B, T), as in `hidden`.
          cache: From `init_cache`, or from the call before. It must have T free slots: otherwise
            there is an error, or under jit the result is NaN.
        Returns:
          Logits (B, T, V); with a cache `(logits, cache)`.
        Raises:
          ValueError: There is no `encoder_output`, neither given nor in the cache; a mask without
            it; a cache with too few free slots.
        """
        if encoder_output is None and (cache is None or cache.encoder_kv is None):
            state = "no cache" if cache is None else "an empty cache"
            raise ValueError(
                f"`decode` needs the encoder's output, got encoder_output=None and {state}. Pass "
                "the result of `encode` to the first call."
            )
        if encoder_output is None and mask is not None:
            raise ValueError(
                f"`decode` got a mask {mask.shape} without the encoder_output that it belongs to. "
                "Pass both to the first call, and neither later: the cache keeps them."
            )
        check_free_slots(targets, cache, "targets")
        x, cache = self._decoded(targets, encoder_output, mask, target_mask, cache)
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def logits(self, x: Array) -> Array:
        """Logits (B, T, V) of hidden states (B, T, D), by the head or the transposed embedding."""
        if self.config.scale_decoder_outputs:
            x = x * self.config.hidden_size**-0.5
        head = None if self.config.tie_word_embeddings else self.head
        return vocab_logits(x, self.embed, head, self.logits_dtype)

    def _decoded(
        self,
        targets: Array,
        encoder_output: Array | None,
        encoder_mask: Array | None,
        target_mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """The decoder's hidden states (B, T, D), and the cache with the targets entered."""
        if encoder_output is None and cache is not None:
            encoder_mask = cache.encoder_mask
        queries, keys, causal, cache = causal_positions(targets.shape, target_mask, cache)
        x, cache = self.decoder(
            self.embed(targets),
            query_positions=queries,
            key_positions=keys,
            mask=causal,
            encoder_output=encoder_output,
            encoder_mask=None if encoder_mask is None else encoder_mask.astype(bool)[:, None],
            cache=cache,
        )
        if cache is None:
            return x, None
        used = cache.used + targets.shape[1]
        # Under jit nothing can raise, and the slots of other tokens must not be overwritten
        # silently.
        x = jnp.where(used <= cache.k.shape[2], x, jnp.nan)
        return x, cache._replace(used=used, encoder_mask=encoder_mask)


# Parameters and files ----------------------------------------------------------------------------


def init_cache(config: Config, batch_size: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache with `length` slots for the targets of each row of a batch.

    Args:
      config: Shape of the model.
      batch_size: B.
      length: The number of slots: the start token, and the targets to generate but the last.
      dtype: Dtype of keys and values.
    Raises:
      ValueError: A dtype that is not of floating-point numbers.
    """
    check_dtype_option("dtype", dtype)
    kv = (config.num_decoder_layers, batch_size, length, config.num_heads, config.head_dim)
    slots = (batch_size, length)
    return Cache(
        k=jnp.zeros(kv, dtype),
        v=jnp.zeros(kv, dtype),
        positions=jnp.zeros(slots, jnp.int32),
        mask=jnp.zeros(slots, bool),
        used=jnp.int32(0),
        encoder_kv=None,
        encoder_mask=None,
    )


def shift_right(targets: Array, start: int, pad: int = 0) -> Array:
    """The decoder's input for each target: `start`, then the targets before it.

    Args:
      targets: Ids (B, T) to predict. Negative ones, which losses leave out, become `pad`.
      start: `Config.decoder_start_token_id`.
      pad: Any id of the table; where such targets come last, no target that counts attends to it.
    Returns:
      Ids (B, T).
    Example:
      >>> print(shift_right(jnp.array([[5, 6, 1, -100, -100]]), start=0))
      [[0 5 6 1 0]]
    """
    known = jnp.roll(targets, 1, axis=1).at[:, 0].set(start)
    return jnp.where(known < 0, pad, known)


def _inspect(config: Config, tensors: Mapping[str, safetensors.Tensor]) -> Config:
    """Refuses a table of embeddings for one stack alone, and sees which head the folder has."""
    for name in REPEATED_TABLES:
        if not _repeats_table(tensors, name):
            raise _unlike(tensors[name].file, name, "Only a table shared by both stacks is known.")
    if not config.tie_word_embeddings or _repeats_table(tensors, "lm_head.weight"):
        return config
    if config.scale_decoder_outputs:
        advice = "config.json says tie_word_embeddings=True: false there uses the head."
        raise _unlike(tensors["lm_head.weight"].file, "lm_head.weight", advice)
    # Transformers 5 writes tie_word_embeddings=true for every T5, and goes by the tensors.
    return dataclasses.replace(config, tie_word_embeddings=False)


def _repeats_table(tensors: Mapping[str, safetensors.Tensor], name: str) -> bool:
    """Whether a tensor repeats the table of embeddings, or is not there."""
    if name not in tensors or "shared.weight" not in tensors:
        return True  # A missing table is refused with all else that is missing.
    pair = safetensors.read(tensors[name]), safetensors.read(tensors["shared.weight"])
    return np.array_equal(*pair)


def _unlike(file: Any, name: str, advice: str) -> ValueError:
    return ValueError(f"{file} has a {name} unlike its shared.weight. {advice}")


_ARCHITECTURE = Architecture(EncoderDecoder, Config, FAMILIES, "encoder-decoder", _inspect)

apply_fn = _ARCHITECTURE.apply_fn
init = _ARCHITECTURE.init
shapes = _ARCHITECTURE.shapes
plan = _ARCHITECTURE.plan
load = _ARCHITECTURE.load
save = _ARCHITECTURE.save
