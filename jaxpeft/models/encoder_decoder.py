"""The T5 family of encoder-decoders: T5 (1.0), T5 1.1, FLAN-T5, and the T5-shaped UL2.

Axes: B rows, S input tokens, T target tokens, D width, F inner width of the MLP, N heads, H size of
a head, R buckets of distances, V vocabulary, E encoder layers, L decoder layers. In attention, T
queries meet S keys, whosever they are.

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
    forward = encoder_decoder.pure(config, dtype=jnp.bfloat16, remat="full")
    starts = encoder_decoder.shift_right(targets, config.start)
    logits = jax.jit(forward)(params, inputs, starts, mask=inputs != config.pad)

References:
  Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer,
  2020, section 2.1. https://arxiv.org/abs/1910.10683
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.io._stacked import Formats, Stack
from jaxpeft.models import _hf_folder as folders
from jaxpeft.models._layers import (
    Embed,
    Linear,
    RMSNorm,
    cast,
    check_remat,
    checkpointed,
)

__all__ = ["Cache", "Config", "EncoderDecoder", "attention", "init", "init_cache", "load", "plan"]
__all__ += ["pure", "save", "shapes", "shift_right"]

Params = dict[str, Any]


# Configuration -----------------------------------------------------------------------------------


def _hf(name: str, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value config.json holds under `name`."""
    return dataclasses.field(default=default, metadata={"hf": name})


# Kinds of MLP, and the activation of each as config.json repeats it.
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an encoder-decoder; `from_hf` and `to_hf` translate `config.json`."""

    vocab: int = _hf("vocab_size")
    width: int = _hf("d_model")
    mlp_width: int = _hf("d_ff")
    layers: int = _hf("num_layers")  # Of the encoder.
    decoder_layers: int = _hf("num_decoder_layers")
    heads: int = _hf("num_heads")
    # Its own field: in T5 11B and in small T5 1.1 heads * head_dim is not the width.
    head_dim: int = _hf("d_kv")
    mlp: str = _hf("feed_forward_proj", "relu")  # or "gated-gelu", "gated-silu"
    buckets: int = _hf("relative_attention_num_buckets", 32)  # Kinds of distance.
    reach: int = _hf("relative_attention_max_distance", 128)  # From here on all are alike.
    eps: float = _hf("layer_norm_epsilon", 1e-6)
    tied: bool = _hf("tie_word_embeddings", True)  # The head is the transposed embedding,
    scaled: bool = _hf("scale_decoder_outputs", True)  # and what it reads is times D ** -0.5.
    start: int = _hf("decoder_start_token_id", 0)  # What every target sequence begins with.
    eos: tuple[int, ...] = (1,)
    pad: int | None = _hf("pad_token_id", 0)
    # Of pretraining and of fine-tuning elsewhere. Nothing here depends on it.
    dropout: float = _hf("dropout_rate", 0.1)

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 2 or self.reach <= self.buckets // 2:
            raise ValueError(
                "`buckets` must be even and at least 4, and `reach` more than half of it, got "
                f"buckets={self.buckets}, reach={self.reach}."
            )
        if self.mlp not in _ACTIVATIONS:
            raise ValueError(f"`mlp` must be one of {', '.join(_ACTIVATIONS)}, got {self.mlp!r}.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Raises:
          ValueError: A family, or an option of one, that this model does not compute.
        """
        if hf.get("model_type") != "t5":
            raise _refusal("model_type", hf.get("model_type"), "'t5'")
        # T5 1.0 scales, T5 1.1 does not; before transformers 5 only the tie told which it is.
        hf = {"scale_decoder_outputs": hf.get("tie_word_embeddings", True), **_DEFAULTS, **hf}
        if missing := [name for name in _NAMES.values() if name not in hf]:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Copy the model's own one.")
        for name, allowed in _FIXED.items():
            if hf.get(name, allowed[0]) not in allowed:
                raise _refusal(name, hf[name], " or ".join(map(repr, allowed)))
        activation = _ACTIVATIONS[hf["feed_forward_proj"]]
        if hf.get("dense_act_fn", activation) != activation:
            raise _refusal("dense_act_fn", hf["dense_act_fn"], f"{activation!r} or absent")
        eos, pad = hf["eos_token_id"], hf["pad_token_id"]
        if hf["num_decoder_layers"] is None:
            hf["num_decoder_layers"] = hf["num_layers"]
        if hf["decoder_start_token_id"] is None:
            hf["decoder_start_token_id"] = 0 if pad is None else pad
        return cls(
            **{ours: hf[theirs] for ours, theirs in _NAMES.items()},
            eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            **{theirs: getattr(self, ours) for ours, theirs in _NAMES.items()},
            "dense_act_fn": _ACTIVATIONS[self.mlp],
            "is_gated_act": self.mlp.startswith("gated"),
            "eos_token_id": self.eos[0] if len(self.eos) == 1 else list(self.eos) or None,
        }


_NAMES = {f.name: f.metadata["hf"] for f in dataclasses.fields(Config) if f.metadata}
# What config.json may leave out, with the value that it then has in transformers.
_DEFAULTS: dict[str, Any] = {
    "num_decoder_layers": None,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
    "decoder_start_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dropout_rate": 0.1,
}
# Options of which this model computes these values only; the first is that of an absent one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "feed_forward_proj": tuple(_ACTIVATIONS),
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "quantization_config": (None,),
}


def _refusal(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {name}={value!r}, which this encoder-decoder does not compute; it must "
        f"be {allowed}. Use a model without it."
    )


# Attention ---------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values of the targets so far, in the slots `0 <= slot < used`, and of the input."""

    k: Array  # (L, B, slots, N, H), zeros where not used
    v: Array  # (L, B, slots, N, H)
    order: Array  # (B, slots): how many targets of the row stand before it
    real: Array  # (B, slots), false for padding and for what is not used
    used: Array  # ()
    cross: tuple[Array, Array] | None  # Each (L, B, S, N, H), once the input is known.
    mask: Array | None  # (B, S) of the input, or None where all of it is seen


def attention(q: Array, k: Array, v: Array, *, seen: Array | None, bias: Array | None) -> Array:
    """softmax(q k^T + bias) v, not scaled, the softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: (B, T, N, H).
      k: (B, S, N, H).
      v: (B, S, N, H).
      seen: Which keys a query sees, a bool that broadcasts to (B, T, S). `None` for all.
      bias: For each pair and head, broadcasts to (B, N, T, S). `None` for none.
    Returns:
      (B, T, N, H); zeros for queries that see nothing.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=wide)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if seen is None:
        weights = jax.nn.softmax(scores)
    else:
        seen = seen[:, None]  # (B, 1, T, S)
        # A finite minimum, and a second `where`: the softmax of a row that sees nothing must have
        # neither NaNs nor weight.
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min))
        weights = jnp.where(seen, weights, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def _buckets(distance: Array, count: int, reach: int, both_ways: bool) -> Array:
    """The kind of each distance (query - key): one each for near ones, wider and wider ones beyond.

    With `both_ways` the upper half of the `count` is for keys that stand behind the query.
    """
    side = count // 2 if both_ways else count
    exact = side // 2
    steps = np.arange(reach + 1)
    # In float32, as when the weights were trained: some borders are at whole numbers.
    far = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(reach / exact)) * np.float32(side - exact)
    kinds = np.where(steps < exact, steps, np.minimum(exact + far.astype(int), side - 1))
    size = jnp.abs(distance) if both_ways else jnp.maximum(distance, 0)
    kind = jnp.asarray(kinds, jnp.int32)[jnp.minimum(size, reach)]
    return kind + side * (distance < 0) if both_ways else kind


def _causal(
    shape: tuple[int, ...], mask: Array | None, cache: Cache | None
) -> tuple[Array, Array, Array, Cache | None]:
    """Order of the new targets and of all keys, what sees what, and the cache with them entered."""
    new = jnp.arange(shape[1], dtype=jnp.int32)
    if mask is None and cache is None:
        return new[None], new[None], (new[:, None] >= new)[None], None
    real = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
    enter = jax.lax.dynamic_update_slice_in_dim
    used = 0 if cache is None else cache.used
    every = real if cache is None else enter(cache.real, real, used, axis=1)
    slots = jnp.arange(every.shape[1], dtype=jnp.int32)
    new = used + new[:, None]  # (T, 1), their slots
    order = jnp.sum(every[:, None] & (slots < new), axis=-1, dtype=jnp.int32)
    seen = every[:, None] & (slots <= new)
    if cache is None:
        return order, order, seen, None
    keys = enter(cache.order, order, used, axis=1)
    return order, keys, seen, cache._replace(order=keys, real=every)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Projections to heads and back."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.head_dim, self.attention_fn = c.head_dim, attention_fn
        inner = c.heads * c.head_dim
        self.q = Linear(c.width, inner, False, rngs=rngs, **dtypes)
        self.k = Linear(c.width, inner, False, rngs=rngs, **dtypes)
        self.v = Linear(c.width, inner, False, rngs=rngs, **dtypes)
        self.o = Linear(inner, c.width, False, rngs=rngs, **dtypes)

    def keys(self, x: Array) -> tuple[Array, Array]:
        """Keys and values (B, S, N, H) of x (B, S, D)."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def __call__(self, x: Array, keys: tuple[Array, Array], **how: Any) -> Array:
        """What x (B, T, D) finds among `keys`, with `seen` and `bias` of `attention`."""
        q = self._heads(self.q(x))
        k, v = (part.astype(q.dtype) for part in keys)
        return self.o(self.attention_fn(q, k, v, **how).reshape(*x.shape[:2], -1))

    def _heads(self, y: Array) -> Array:
        return y.reshape(*y.shape[:2], -1, self.head_dim)


class MLP(nnx.Module):
    """down(relu(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.kind = c.mlp
        if c.mlp != "relu":
            self.gate = Linear(c.width, c.mlp_width, False, rngs=rngs, **dtypes)
        self.up = Linear(c.width, c.mlp_width, False, rngs=rngs, **dtypes)
        self.down = Linear(c.mlp_width, c.width, False, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        if self.kind == "relu":
            return self.down(jax.nn.relu(self.up(x)))
        # The GELU is the one by tanh.
        act = jax.nn.gelu if self.kind == "gated-gelu" else jax.nn.silu
        return self.down(act(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention, in the decoder attention to the input, then MLP; each normed first, then added."""

    def __init__(
        self,
        c: Config,
        crosses: bool,
        attention_fn: Callable[..., Array],
        *,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        param_dtype = dtypes["param_dtype"]
        self.attn_norm = RMSNorm(c.width, c.eps, param_dtype=param_dtype)
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        if crosses:
            self.cross_norm = RMSNorm(c.width, c.eps, param_dtype=param_dtype)
            self.cross = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.mlp_norm = RMSNorm(c.width, c.eps, param_dtype=param_dtype)
        self.mlp = MLP(c, rngs=rngs, **dtypes)

    def __call__(self, x, kv, layer, cross, memory, *, seen, bias, mask):
        """One layer on x (B, T, D).

        `kv` is the cache of all layers, of which `layer` is this; `cross` are the keys of the
        input, computed from `memory` (B, S, D) where it is given, else taken as they are.
        """
        y = self.attn_norm(x)
        keys = self.attn.keys(y)
        if kv is not None:
            # Into the stack of all layers, so that a step writes T slots and not the whole cache.
            *stacks, used = kv
            at = (layer, jnp.int32(0), used, jnp.int32(0), jnp.int32(0))
            stacks = [
                jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), at)
                for stack, new in zip(stacks, keys, strict=True)
            ]
            keys, kv = (stacks[0][layer], stacks[1][layer]), (*stacks, used)
        x = x + self.attn(y, keys, seen=seen, bias=bias)
        if memory is not None:
            cross = self.cross.keys(memory)
        if cross is not None:
            x = x + self.cross(self.cross_norm(x), cross, seen=mask, bias=None)
        return x + self.mlp(self.mlp_norm(x)), kv, cross


class Tower(nnx.Module):
    """A stack of layers, the table of distances that they share, and the norm at its end."""

    def __init__(
        self,
        c: Config,
        crosses: bool,
        *,
        rngs: nnx.Rngs,
        attention_fn: Callable[..., Array],
        remat: Any,
        unroll: int,
        **dtypes: Any,
    ):
        self.config, self.crosses, self.remat, self.unroll = c, crosses, remat, unroll
        self.depth = c.decoder_layers if crosses else c.layers
        keys = jax.random.split(rngs.params(), self.depth)
        self.layers = nnx.vmap(
            lambda key: Layer(c, crosses, attention_fn, rngs=nnx.Rngs(params=key), **dtypes)
        )(keys)
        self.bias = Embed(
            c.buckets, c.heads, dtype=None, param_dtype=dtypes["param_dtype"], rngs=rngs
        )
        self.norm = RMSNorm(c.width, c.eps, param_dtype=dtypes["param_dtype"])

    def __call__(
        self,
        x: Array,
        *,
        queries: Array,
        keys: Array,
        seen: Array | None,
        memory: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """x (B, T, D) through all layers.

        Args:
          x: Embedded tokens.
          queries: Order of the tokens (B, T) or (1, T).
          keys: Order of the keys (B, S) or (1, S).
          seen: As in `attention`.
          memory: (B, S, D) of the encoder.
          mask: Of the memory, as `seen`.
          cache: With the new tokens entered in all but `k`, `v`, `used`.
        Returns:
          (B, T, D) after the last norm, and the cache.
        """
        distance = queries[:, :, None] - keys[:, None, :]
        c = self.config
        kinds = _buckets(distance, c.buckets, c.reach, both_ways=not self.crosses)
        bias = jnp.moveaxis(self.bias(kinds), -1, 1)  # (B or 1, N, T, S)
        graphdef, stack = nnx.split(self.layers)

        def step(carry: Any, slices: Any) -> Any:
            x, kv = carry
            layer, cross, weights = slices
            run = nnx.merge(graphdef, weights)
            x, kv, cross = run(x, kv, layer, cross, memory, seen=seen, bias=bias, mask=mask)
            # Kept only for later calls; training has no use for them.
            return (x, kv), None if cache is None else cross

        step = checkpointed(step, self.remat)
        layers = None if cache is None else jnp.arange(self.depth, dtype=jnp.int32)
        kv = None if cache is None else (cache.k, cache.v, cache.used)
        cross = None if cache is None or memory is not None else cache.cross
        (x, kv), cross = jax.lax.scan(step, (x, kv), (layers, cross, stack), unroll=self.unroll)
        x = self.norm(x)
        if cache is None or kv is None:
            return x, None
        cross = jax.tree.map(lambda part: part.astype(cache.k.dtype), cross)
        return x, cache._replace(k=kv[0], v=kv[1], cross=cross)


class EncoderDecoder(nnx.Module):
    """An encoder-decoder of the T5 family. It has no dropout.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02).
      param_dtype: Of the weights.
      dtype: Of the products. `None` means that of the weights. Norms and the softmax are computed
        in float32 or wider whatever it is.
      logits_dtype: Of the logits, summed up in it. `None` means `dtype`.
      remat: What the backward pass computes again: `None` nothing, "full" every layer from its
        input, or a policy of `jax.checkpoint_policies`.
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
        check_remat(remat)
        check_dtype_option("param_dtype", param_dtype)
        check_dtype_option("dtype", dtype)
        check_dtype_option("logits_dtype", logits_dtype)
        self.config, self.logits_dtype = config, logits_dtype
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        how = {"attention_fn": attention_fn, "remat": remat, "unroll": unroll}
        self.embed = Embed(config.vocab, config.width, rngs=rngs, **dtypes)
        self.encoder = Tower(config, False, rngs=rngs, **how, **dtypes)
        self.decoder = Tower(config, True, rngs=rngs, **how, **dtypes)
        if not config.tied:
            self.head = Linear(config.width, config.vocab, False, rngs=rngs, **dtypes)

    def __call__(self, inputs: Array, targets: Array, **where: Any) -> Array:
        """Logits of the next target.

        Args:
          inputs: Ids (B, S).
          targets: Ids (B, T) that are known so far: `shift_right` of those to predict.
          **where: `mask` and `target_mask` of `hidden`.
        Returns:
          Logits (B, T, V).
        """
        return self.logits(self.hidden(inputs, targets, **where))

    def hidden(
        self,
        inputs: Array,
        targets: Array,
        *,
        mask: Array | None = None,
        target_mask: Array | None = None,
    ) -> Array:
        """What the head reads, e.g. to compute the loss in pieces.

        Args:
          inputs: Ids (B, S).
          targets: Ids (B, T).
          mask: (B, S), true for tokens, false for padding, on whichever side. Padding takes no
            place: distances count real tokens only.
          target_mask: The same of the targets (B, T). Padding behind them needs none, since no
            target sees a later one.
        Returns:
          (B, T, D) after the last norm of the decoder.
        """
        memory = self.encode(inputs, mask=mask)
        return self._decoded(targets, memory, mask, target_mask, None)[0]

    def encode(self, inputs: Array, *, mask: Array | None = None) -> Array:
        """The encoder's states (B, S, D) of ids (B, S), `mask` as in `hidden`."""
        if mask is None:
            order, seen = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None], None
        else:
            seen = mask.astype(bool)
            order = jnp.cumsum(seen, axis=1, dtype=jnp.int32)
            seen = seen[:, None]  # (B, 1, S)
        return self.encoder(self.embed(inputs), queries=order, keys=order, seen=seen)[0]

    def decode(
        self,
        targets: Array,
        memory: Array | None = None,
        *,
        mask: Array | None = None,
        target_mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the next target, given what `encode` has made of the input.

        Args:
          targets: Ids (B, T). With a cache, those that follow the ones in it.
          memory: (B, S, D) of `encode`. A cache keeps its keys and values: only the first call
            needs it.
          mask: (B, S) of the input, beside its memory.
          target_mask: (B, T), as in `hidden`.
          cache: From `init_cache`, or from the call before. It must have T free slots, else there
            is an error, or under jit NaNs.
        Returns:
          Logits (B, T, V); with a cache `(logits, cache)`.
        """
        if memory is None and (cache is None or cache.cross is None):
            state = "no cache" if cache is None else "a cache that has seen none"
            raise ValueError(
                f"`decode` needs the memory of the input, got memory=None and {state}. Pass what "
                "`encode` gave to the first call."
            )
        if memory is None and mask is not None:
            raise ValueError(
                f"`decode` got a mask {mask.shape} without the memory that it belongs to. Pass "
                "both to the first call, and neither later: the cache keeps them."
            )
        room = targets.shape[1] if cache is None else cache.k.shape[2]
        if cache is not None and not isinstance(cache.used, jax.core.Tracer):
            room -= int(cache.used)
        if targets.shape[1] > room:
            raise ValueError(
                f"{targets.shape[1]} targets do not fit in the {room} free slots of the cache. "
                "Make a longer one: init_cache(config, rows, length)."
            )
        x, cache = self._decoded(targets, memory, mask, target_mask, cache)
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def logits(self, x: Array) -> Array:
        """(B, T, V) from the hidden states (B, T, D), by the head or the transposed embedding."""
        dtype = self.embed.dtype
        if self.config.scaled:
            x = x * self.config.width**-0.5
        if self.config.tied:
            table = cast(self.embed.embedding, dtype)
            return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=self.logits_dtype)
        kernel = cast(self.head.kernel, dtype)
        return jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=self.logits_dtype)

    def _decoded(
        self,
        targets: Array,
        memory: Array | None,
        mask: Array | None,
        target_mask: Array | None,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        if memory is None and cache is not None:
            mask = cache.mask
        queries, keys, seen, cache = _causal(targets.shape, target_mask, cache)
        x, cache = self.decoder(
            self.embed(targets),
            queries=queries,
            keys=keys,
            seen=seen,
            memory=memory,
            mask=None if mask is None else mask.astype(bool)[:, None],
            cache=cache,
        )
        if cache is None:
            return x, None
        used = cache.used + targets.shape[1]
        # Under jit nothing can raise; slots of other tokens must not be overwritten in silence.
        x = jnp.where(used <= cache.k.shape[2], x, jnp.nan)
        return x, cache._replace(used=used, mask=mask)


# Parameters and files ----------------------------------------------------------------------------


def pure(config: Config, call: str = "__call__", **options: Any) -> Callable[..., Any]:
    """The model as a function `forward(params, inputs, targets, **where) -> logits`.

    Args:
      config: Shape of the model.
      call: The method to run, where it is not the whole: `"encode"` gives
        `encode(params, inputs, **where) -> memory`, `"decode"` gives
        `decode(params, targets, memory, **where) -> logits`, `"hidden"` what the head reads.
      **options: Those of `EncoderDecoder`.
    Returns:
      A function of the nested dict of arrays that `init` and `load` give, and of what the method
      takes. On a mesh with Explicit axes, wrap it in `jax.sharding.auto_axes`.
    """
    graphdef = nnx.graphdef(_abstract(config, **options))

    def forward(params: Params, *args: Any, **where: Any) -> Any:
        return getattr(nnx.merge(graphdef, params), call)(*args, **where)

    return forward


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init(config: Config, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters, Normal(0, 0.02) with norms at one."""
    model = EncoderDecoder(config, rngs=nnx.Rngs(params=key), param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(model))


def shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated, whatever the size."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, param_dtype=dtype)))


def init_cache(config: Config, rows: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache with `length` slots for the targets of each of `rows` rows."""
    check_dtype_option("dtype", dtype)
    kv = (config.decoder_layers, rows, length, config.heads, config.head_dim)
    order, real = jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), bool)
    return Cache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), order, real, jnp.int32(0), None, None)


def shift_right(targets: Array, start: int, pad: int = 0) -> Array:
    """What the decoder knows when it predicts each target: `start`, then those before.

    Args:
      targets: Ids (B, T) to predict. Negative ones, which losses leave out, become `pad`.
      start: `Config.start`.
      pad: Any id of the table; nothing that counts sees it where such targets come last.
    Returns:
      Ids (B, T).
    Example:
      >>> print(shift_right(jnp.array([[5, 6, 1, -100, -100]]), start=0))
      [[0 5 6 1 0]]
    """
    known = jnp.roll(targets, 1, axis=1).at[:, 0].set(start)
    return jnp.where(known < 0, pad, known)


_SELF = r"\1.block.{}.layer.0"
_CROSS = r"decoder.block.{}.layer.1"
_TABLE: folders.Table = (
    (r"embed/embedding", r"shared.weight", False),
    (r"(.+)/layers/attn/([qkvo])/kernel", _SELF + r".SelfAttention.\2.weight", True),
    (r"(.+)/layers/attn_norm/scale", _SELF + r".layer_norm.weight", False),
    (r"decoder/layers/cross/([qkvo])/kernel", _CROSS + r".EncDecAttention.\1.weight", True),
    (r"decoder/layers/cross_norm/scale", _CROSS + r".layer_norm.weight", False),
    # Stored with the first layer, used by all.
    (
        r"(.+)/bias/embedding",
        r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        False,
    ),
    (r"(.+)/norm/scale", r"\1.final_layer_norm.weight", False),
    (r"head/kernel", r"lm_head.weight", True),
)


def _table(config: Config) -> folders.Table:
    """`_TABLE` and the rows of the MLPs, whose names depend on kind and stack."""
    names = {"up": "wi", "down": "wo"}
    if config.mlp != "relu":
        names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    rows = []
    for tower, index in (("encoder", 1), ("decoder", 2)):  # Cross attention comes before.
        layer = f"{tower}.block.{{}}.layer.{index}"
        rows += [(f"{tower}/layers/mlp_norm/scale", f"{layer}.layer_norm.weight", False)]
        for ours, theirs in names.items():
            ours = f"{tower}/layers/mlp/{ours}/kernel"
            rows += [(ours, f"{layer}.DenseReluDense.{theirs}.weight", True)]
    return (*rows, *_TABLE)


def load(
    folder: str | Path, dtype: Any = None, sharding: Any = None, quantize: Formats = None
) -> tuple[Config, Params]:
    """A model from a Hugging Face folder, read straight into stacked arrays.

    The memory it takes is that of the parameters, in codes where they are quantized, and little
    more: room to encode one tensor, and its scales in the whole stack.

    Linear weights that bitsandbytes has stored in four bits stay what they are, codes and scales.

    Args:
      folder: With `config.json` and `model.safetensors`, or several files and their index.
      dtype: Of the parameters; of quantized ones, what the program sees. `None` keeps that of
        the file.
      sharding: One `jax.sharding.Sharding` for all arrays, or a dict of them like the
        parameters. Each process then reads only its own shards. The fields of a quantized weight
        are cut as the array that it stands for. `None` is the default device.
      quantize: A format, for the linear weights of the layers: what
        `jp.quantize(format, sites.hidden)` makes of the loaded model, bit for bit. Either a name
        such as "nf4+dq", or a function from a matrix to a weight. A mapping chooses among all
        matrices, by pattern of path, as in `{"*mlp*": "nf4+dq", "*attn*": "int8"}`; the first
        match wins, and what none matches stays as it is.
    Returns:
      The configuration and the parameters, a nested dict of arrays and, where quantized, views;
      with these, run it as `jp.lift(pure(config))`.
    Raises:
      FileNotFoundError: The folder, its `config.json` or a weights file is not there.
      ValueError: The files are damaged, hold other tensors than `config.json` asks for (all are
        named), or describe a model that this one does not compute. A format is unknown, or does
        not fit `sharding`; a weight is quantized already, or not finite; `dtype` is not one of
        real floating-point numbers.
    """
    hf, tensors = folders.open(folder)
    config = Config.from_hf(hf)
    for copy in _COPIES:
        if not _same(tensors, copy):
            raise _unlike(tensors[copy].file, copy, "Only a table shared by both stacks is known.")
    if config.tied and not _same(tensors, "lm_head.weight"):
        # Transformers 5 writes tie_word_embeddings=true for every T5, and goes by the tensors.
        if config.scaled:
            advice = "config.json says tie_word_embeddings=True: false there uses the head."
            raise _unlike(tensors["lm_head.weight"].file, "lm_head.weight", advice)
        config = dataclasses.replace(config, tied=False)
    params = folders.read(
        folder,
        tensors,
        plan(config),
        dtype=dtype,
        sharding=sharding,
        quantize=quantize,
        ignore=lambda name: name in (*_COPIES, _UNUSED, "lm_head.weight"),
    )
    return config, params


def save(
    folder: str | Path,
    config: Config,
    params: Params,
    *,
    shard_bytes: int = 5_000_000_000,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Writes a Hugging Face folder that `load` and transformers read.

    Args:
      folder: Where to. Other files in it stay, weights of an earlier save do not.
      config: Of the model.
      params: Plain arrays; what a method made of them must be merged first. Weights in NF4 or FP4
        of layout "flat" are written as they are, for bitsandbytes.
      shard_bytes: Size at which a file ends and the next begins.
      tokenizer_from: The folder whose tokenizer, chat template and generation config are copied,
        in the place of those there: the one that the model was loaded from. Without them the
        folder cannot be trained on text again.
    Raises:
      FileNotFoundError: `tokenizer_from` holds no tokenizer.
      ValueError: The arrays are not those that `config` asks for, or are weights that no such
        folder holds (all are named).
      OSError: The disk is full.
    """
    hf = config.to_hf() | {"torch_dtype": np.dtype(params["embed"]["embedding"].dtype).name}
    folders.write(
        folder,
        hf,
        params,
        plan(config),
        shard_bytes=shard_bytes,
        tokenizer_from=tokenizer_from,
    )


def plan(config: Config) -> dict[str, Stack]:
    """What each array is made of, by path, in terms of the tensors of a Hugging Face folder."""
    return folders.plan(shapes(config), _table(config))


def _abstract(config: Config, **options: Any) -> EncoderDecoder:
    return nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(params=0), **options))


# Older folders repeat the table, and hold a bias of the cross attention that nothing reads.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def _same(tensors: Mapping[str, safetensors.Tensor], name: str) -> bool:
    """Whether a tensor repeats the table, or is not there."""
    if name not in tensors or "shared.weight" not in tensors:
        return True  # A missing table is refused with all else that is missing.
    pair = safetensors.read(tensors[name]), safetensors.read(tensors["shared.weight"])
    return np.array_equal(*pair)


def _unlike(file: Any, name: str, advice: str) -> ValueError:
    return ValueError(f"{file} has a {name} unlike its shared.weight. {advice}")
