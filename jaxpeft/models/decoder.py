"""The Llama family of decoders: Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen3.

Axes: B rows, T tokens, S keys (T, or the slots of a cache), D width, F inner width of the MLP,
N heads, K key-value heads, G = N / K, H size of a head, V vocabulary, L layers.

Layers are stacked (every array under `layers` has a leading axis L) and run in one scan. Kernels
are (in, out). The parameters of a model are one nested dict:

    embed/embedding (V, D)              layers/mlp/{gate,up}/kernel (L, D, F)
    layers/attn_norm/scale (L, D)       layers/mlp/down/kernel (L, F, D)
    layers/attn/q/kernel (L, D, N*H)    layers/mlp_norm/scale (L, D)
    layers/attn/{k,v}/kernel (L, D, K*H)  norm/scale (D,)
    layers/attn/o/kernel (L, N*H, D)    head/kernel (D, V), unless tied

and, where the family has them, `bias` beside a `kernel` and `layers/attn/{q,k}_norm/scale` (L, H).

    config, params = decoder.load("SmolLM2-135M")
    forward = decoder.pure(config, dtype=jnp.bfloat16, remat="full")
    logits = jax.jit(forward)(params, tokens)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
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

__all__ = ["Cache", "Config", "Decoder", "Place", "Rope", "attention", "init", "init_cache", "load"]
__all__ += ["plan", "pure", "save", "shapes"]

Params = dict[str, Any]


# Configuration -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: pair i of a head turns by `theta ** (-2i / H)` radians per token."""

    theta: float = 10000.0
    kind: str = "default"  # or "linear", "llama3": slower turns, for longer contexts
    factor: float = 1.0  # how much slower
    # Only "llama3": pairs with fewer than `low` turns in `context` tokens are slowed down in full,
    # those with more than `high` not at all, in between it is interpolated.
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per token of each pair (H / 2), in float32 as when the weights were trained."""
        powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1) / np.float32(self.theta) ** powers
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / np.float32(self.factor)
        turns = self.context * plain / np.float32(2 * math.pi)
        share = np.clip((turns - self.low) / (self.high - self.low), 0, 1).astype(np.float32)
        return (1 - share) * plain / np.float32(self.factor) + share * plain


def _hf(name: str, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value config.json holds under `name`."""
    return dataclasses.field(default=default, metadata={"hf": name})


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder; `from_hf` and `to_hf` translate `config.json`."""

    vocab: int = _hf("vocab_size")
    width: int = _hf("hidden_size")
    mlp_width: int = _hf("intermediate_size")
    layers: int = _hf("num_hidden_layers")
    heads: int = _hf("num_attention_heads")
    kv_heads: int = _hf("num_key_value_heads")
    # Its own field: in Qwen3 and Mistral Nemo heads * head_dim is not the width.
    head_dim: int = _hf("head_dim")
    # Decides which of the options below config.json can express.
    family: str = _hf("model_type", "llama")
    rope: Rope = Rope()
    eps: float = _hf("rms_norm_eps", 1e-6)
    tied: bool = _hf("tie_word_embeddings", False)  # The head is the transposed embedding.
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3).
    window: int | None = None  # A token sees itself and the window - 1 tokens before it.
    full_layers: tuple[int, ...] = ()  # Layers without the window (Qwen's max_window_layers).
    # Longest sequence of pretraining. What is computed does not depend on it; see `longest`.
    context: int = _hf("max_position_embeddings", 2048)
    bos: int | None = _hf("bos_token_id", None)
    eos: tuple[int, ...] = ()
    pad: int | None = _hf("pad_token_id", None)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"`heads` must be a multiple of `kv_heads` and `head_dim` even, got heads="
                f"{self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}."
            )

    @property
    def longest(self) -> int:
        """Most tokens of a row whose positions the model knows: the context, or as many times
        that as linear RoPE interpolates."""
        return int(self.context * (self.rope.factor if self.rope.kind == "linear" else 1))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Raises:
          ValueError: A family, or an option of one, that this decoder does not compute.
        """
        family = hf.get("model_type")
        if family not in _FAMILIES:
            raise _refusal("model_type", family, f"one of {', '.join(_FAMILIES)}")
        hf = _DEFAULTS | _FAMILIES[family] | dict(hf)
        if missing := [name for name in _NAMES.values() if name not in hf]:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Copy the model's own one.")
        for name, allowed in _FIXED.items():
            if hf.get(name, allowed[0]) not in allowed:
                raise _refusal(name, hf[name], " or ".join(map(repr, allowed)))
        for name in ("attention_bias", "mlp_bias", "sliding_window"):
            if name not in _FAMILIES[family] and hf.get(name):
                raise _refusal(name, hf[name], f"absent, since {family} has no such option")
        heads, bias, eos = hf["num_attention_heads"], hf.get("attention_bias"), hf["eos_token_id"]
        hf["num_key_value_heads"] = hf["num_key_value_heads"] or heads
        hf["head_dim"] = hf["head_dim"] or hf["hidden_size"] // heads
        window, full_layers = _windows(hf)
        return cls(
            **{ours: hf[theirs] for ours, theirs in _NAMES.items()},
            rope=_rope(hf),
            qkv_bias=bool(bias) or family == "qwen2",
            o_bias=bool(bias),
            mlp_bias=bool(hf.get("mlp_bias")),
            qk_norm=family == "qwen3",
            window=window,
            full_layers=full_layers,
            eos=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again.

        Raises:
          ValueError: The family has no option for one of the fields.
        """
        full = range(self.layers) if self.window is None else self.full_layers
        kinds = ["full" if i in full else "sliding" for i in range(self.layers)]
        options = {
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "sliding_window": self.window,
            "use_sliding_window": self.window is not None,
            "max_window_layers": len(full),
            "layer_types": [f"{kind}_attention" for kind in kinds],
        }
        known = _FAMILIES.get(self.family, {})
        hf = {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            **{theirs: getattr(self, ours) for ours, theirs in _NAMES.items()},
            **{name: value for name, value in options.items() if name in known},
            "eos_token_id": self.eos[0] if len(self.eos) == 1 else list(self.eos) or None,
            "hidden_act": "silu",
            "rope_theta": self.rope.theta,
            "rope_scaling": None,
        }
        if self.rope.kind != "default":
            names = _ROPE_NAMES.items() if self.rope.kind == "llama3" else [("factor", "factor")]
            hf["rope_scaling"] = {theirs: getattr(self.rope, ours) for ours, theirs in names}
            hf["rope_scaling"]["rope_type"] = self.rope.kind
        again = Config.from_hf(hf)
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(again, field.name)
            if mine != theirs:
                raise ValueError(
                    f"config.json of a {self.family} cannot say {field.name}={mine!r}, it would be "
                    f"read as {theirs!r}. Choose another `family`, or keep the field as it says."
                )
        return hf


_NAMES = {f.name: f.metadata["hf"] for f in dataclasses.fields(Config) if f.metadata}
_ROPE_NAMES = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "context": "original_max_position_embeddings",
}
# What config.json may leave out, with the value that it then has in transformers. An option that
# decides what is computed is known to a family only if it stands here.
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
_DEFAULTS |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LLAMA: dict[str, Any] = {"num_key_value_heads": None, "max_position_embeddings": 2048}
_LLAMA |= {"attention_bias": False, "mlp_bias": False}
_MISTRAL: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_QWEN2 |= {"use_sliding_window": False, "max_window_layers": 28, "layer_types": None}
_QWEN3 = _QWEN2 | {"head_dim": 128, "attention_bias": False}
_FAMILIES = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3}
# Options of which this decoder computes one value. Dropout is one of them: a model with it would
# be trained otherwise here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def _refusal(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {name}={value!r}, which this decoder does not compute; it must be "
        f"{allowed}. Use a model without it."
    )


def _rope(hf: Mapping[str, Any]) -> Rope:
    # `rope_scaling` and a `rope_theta` of its own up to transformers 4, `rope_parameters` since.
    raw = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(raw.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = raw.pop("rope_type", None) or raw.get("type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise _refusal("rope_type", kind, "'default', 'linear' or 'llama3'")
    for name, value in raw.items():
        if name not in (*_ROPE_NAMES.values(), "type") and value not in _FIXED.get(name, ()):
            raise _refusal(f"{name} among its RoPE options", value, "absent")
    names = {"default": (), "linear": ("factor",), "llama3": tuple(_ROPE_NAMES)}[kind]
    if missing := [_ROPE_NAMES[name] for name in names if raw.get(_ROPE_NAMES[name]) is None]:
        raise ValueError(f"config.json asks for {kind} RoPE but lacks its {', '.join(missing)}.")
    return Rope(theta, kind, **{name: raw[_ROPE_NAMES[name]] for name in names})


def _windows(hf: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that do without it."""
    layers, mixes = hf["num_hidden_layers"], "layer_types" in _FAMILIES[hf["model_type"]]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    first = hf.get("max_window_layers", 0)
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if window is None:
        kinds = ["full_attention"] * layers
    given = hf.get("layer_types") or kinds
    fits = len(given) == layers and set(given) <= {"full_attention", "sliding_attention"}
    # Only Qwen mixes the two; elsewhere, or without a window, the list can only repeat the rest.
    if not fits or given != kinds and (window is None or not mixes):
        raise _refusal("layer_types", given, f"{layers} entries like {kinds}")
    full = tuple(i for i, kind in enumerate(given) if kind == "full_attention")
    return (None, ()) if len(full) == layers else (window, full)


# Attention ---------------------------------------------------------------------------------------


_VIRTUAL = -1  # the segment that `jp.prompts.prepend_virtual_tokens` gives to virtual tokens


class Place(NamedTuple):
    """Where tokens stand, as far as attention is concerned.

    A token sees those of its own segment that are not after it: `0 <= distance < window`, where
    distance is the difference of `order`. Segment 0 is padding, which sees and is seen by nothing.
    Segment -1 stands in front of all others, each of which sees it at any distance: the virtual
    tokens of a prefix or a prompt, under packing and under a window.
    """

    order: Array  # (B, T) or (1, T): how many tokens stand before it, of its segment and of -1
    segment: Array | None  # (B, T), or None where all tokens are of one segment


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in the slots `0 <= slot < used`, the rest zeros."""

    k: Array  # (L, B, S, K, H)
    v: Array  # (L, B, S, K, H)
    order: Array  # (B, S)
    segment: Array  # (B, S)
    used: Array  # ()


def attention(
    q: Array, k: Array, v: Array, *, queries: Place, keys: Place, window: int | Array | None
) -> Array:
    """Causal softmax attention within segments, the softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: (B, T, N, H).
      k: (B, S, K, H), K a divisor of N.
      v: (B, S, K, H).
      queries: Where the T tokens stand.
      keys: Where the S tokens stand.
      window: Distances from here on are not seen. `None` for no limit; traced where it differs
        between layers.
    Returns:
      (B, T, N, H); zeros for tokens that see nothing.
    """
    rows, length, heads, size = q.shape
    q = q.reshape(rows, length, k.shape[2], -1, size)  # (B, T, K, G, H)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=wide) * size**-0.5
    seen = _seen(queries, keys, window)[:, None, None]  # (B, 1, 1, T, S)
    # A finite minimum, and a second `where`: the softmax of a row that sees nothing must have
    # neither NaNs nor weight.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min))
    weights = jnp.where(seen, weights, 0).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(rows, length, heads, size)


def _seen(queries: Place, keys: Place, window: int | Array | None) -> Array:
    distance = queries.order[:, :, None] - keys.order[:, None, :]
    near = True if window is None else distance < window
    if queries.segment is None or keys.segment is None:
        return (distance >= 0) & near
    mine, theirs = queries.segment[:, :, None], keys.segment[:, None, :]
    known = (theirs == _VIRTUAL) | (mine == theirs) & near
    return (distance >= 0) & known & (mine != 0)


def _places(
    tokens: Array, segments: Array | None, mask: Array | None, cache: Cache | None
) -> tuple[Place, Place, Cache | None]:
    """Places of the new tokens and of all keys, and the cache with the new tokens entered."""
    length = tokens.shape[1]
    if segments is None and mask is None and cache is None:
        place = Place(jnp.arange(length, dtype=jnp.int32)[None], None)
        return place, place, None
    segment = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    segment = segment.astype(jnp.int32)
    if mask is not None:
        segment = jnp.where(mask.astype(bool), segment, 0)
    enter = jax.lax.dynamic_update_slice_in_dim
    used = 0 if cache is None else cache.used
    every = segment if cache is None else enter(cache.segment, segment, used, axis=1)  # (B, S)
    slots = jnp.arange(every.shape[1], dtype=jnp.int32)
    before = slots < used + slots[:length, None]  # (T, S)
    same = (segment[:, :, None] == every[:, None, :]) | (every[:, None, :] == _VIRTUAL)  # (B, T, S)
    place = Place(jnp.sum(same & before, axis=-1, dtype=jnp.int32), segment)
    if cache is None:
        return place, place, None
    keys = Place(enter(cache.order, place.order, used, axis=1), every)
    return place, keys, cache._replace(order=keys.order, segment=every)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs `(x[i], x[i + H/2])` of each head (B, T, heads, H) in float32 or wider."""
    left, right = jnp.split(x, 2, axis=-1)
    turned = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.config, self.attention_fn = c, attention_fn
        self.q = Linear(c.width, c.heads * c.head_dim, c.qkv_bias, rngs=rngs, **dtypes)
        self.k = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias, rngs=rngs, **dtypes)
        self.v = Linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias, rngs=rngs, **dtypes)
        self.o = Linear(c.heads * c.head_dim, c.width, c.o_bias, rngs=rngs, **dtypes)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.eps, param_dtype=dtypes["param_dtype"])
            self.k_norm = RMSNorm(c.head_dim, c.eps, param_dtype=dtypes["param_dtype"])

    def __call__(self, x, kv, layer, turn, window, **places):
        """Attends from x (B, T, D); `kv` is the cache of all layers, of which `layer` is this."""
        rows, length, _ = x.shape
        q = self.q(x).reshape(rows, length, -1, self.config.head_dim)
        k = self.k(x).reshape(rows, length, -1, self.config.head_dim)
        v = self.v(x).reshape(rows, length, -1, self.config.head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = _rotate(q, *turn), _rotate(k, *turn)
        if kv is not None:
            # Into the stack of all layers, so that a step writes T slots and not the whole cache.
            ks, vs, used = kv
            at = (layer, jnp.int32(0), used, jnp.int32(0), jnp.int32(0))
            ks = jax.lax.dynamic_update_slice(ks, k[None].astype(ks.dtype), at)
            vs = jax.lax.dynamic_update_slice(vs, v[None].astype(vs.dtype), at)
            k, v = ks[layer].astype(q.dtype), vs[layer].astype(q.dtype)
            kv = ks, vs, used
        y = self.attention_fn(q, k, v, window=window, **places)
        return self.o(y.reshape(rows, length, -1)), kv


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.gate = Linear(c.width, c.mlp_width, c.mlp_bias, rngs=rngs, **dtypes)
        self.up = Linear(c.width, c.mlp_width, c.mlp_bias, rngs=rngs, **dtypes)
        self.down = Linear(c.mlp_width, c.width, c.mlp_bias, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention, then MLP, each on normed input and added to the stream."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.attn_norm = RMSNorm(c.width, c.eps, param_dtype=dtypes["param_dtype"])
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.mlp_norm = RMSNorm(c.width, c.eps, param_dtype=dtypes["param_dtype"])
        self.mlp = MLP(c, rngs=rngs, **dtypes)

    def __call__(self, x, kv, *args, **places):
        y, kv = self.attn(self.attn_norm(x), kv, *args, **places)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), kv


class Decoder(nnx.Module):
    """A decoder of the Llama family.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02).
      param_dtype: Of the weights.
      dtype: Of the products. `None` means that of the weights. Norms, rotations and the softmax
        are computed in float32 or wider whatever it is.
      logits_dtype: Of the logits, summed up in it. `None` means `dtype`.
      remat: What the backward pass computes again: `None` nothing, "full" every layer from its
        input, or a policy of `jax.checkpoint_policies`.
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
        check_remat(remat)
        check_dtype_option("param_dtype", param_dtype)
        check_dtype_option("dtype", dtype)
        check_dtype_option("logits_dtype", logits_dtype)
        self.config, self.remat, self.unroll = config, remat, unroll
        self.logits_dtype = logits_dtype
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed = Embed(config.vocab, config.width, rngs=rngs, **dtypes)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = nnx.vmap(
            lambda key: Layer(config, attention_fn, rngs=nnx.Rngs(params=key), **dtypes)
        )(keys)
        self.norm = RMSNorm(config.width, config.eps, param_dtype=param_dtype)
        if not config.tied:
            self.head = Linear(config.width, config.vocab, False, rngs=rngs, **dtypes)

    def __call__(self, tokens: Array, **where: Any) -> Any:
        """Logits of the next token.

        Args:
          tokens: Ids (B, T).
          **where: `positions`, `segment_ids`, `mask`, `cache` of `hidden`.
        Returns:
          Logits (B, T, V); with a cache `(logits, cache)`.
        """
        if where.get("cache") is None:
            return self.logits(self.hidden(tokens, **where))
        x, cache = self.hidden(tokens, **where)
        return self.logits(x), cache

    def logits(self, x: Array) -> Array:
        """(B, T, V) from the hidden states (B, T, D), by the head or the transposed embedding."""
        dtype = self.embed.dtype
        if self.config.tied:
            table = cast(self.embed.embedding, dtype)
            return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=self.logits_dtype)
        kernel = cast(self.head.kernel, dtype)
        return jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=self.logits_dtype)

    def hidden(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """What the head reads, e.g. to compute the loss in pieces.

        Args:
          tokens: Ids (B, T). With a cache, those that follow the ones in it.
          positions: (B, T), for the rotary embedding. `None` counts the earlier tokens of the
            same segment, so padding on the left and packing need nothing more, and warns where
            there are more tokens than `Config.longest`.
          segment_ids: (B, T). Tokens see only their own segment, and segment -1 in front of all
            (virtual tokens, see `jp.prompts.prepend_virtual_tokens`), whatever the window. 0 is padding.
          mask: (B, T), true for tokens, false for padding, on whichever side.
          cache: From `init_cache`, or from the call before. It must have T free slots,
            else there is an error, or under jit NaNs.
        Returns:
          (B, T, D) after the last norm; with a cache `(hidden, cache)`.
        """
        room = tokens.shape[1] if cache is None else cache.k.shape[2]
        if cache is not None and not isinstance(cache.used, jax.core.Tracer):
            room -= int(cache.used)
        if tokens.shape[1] > room:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit in the {room} free slots of the cache. Make "
                "a longer one: init_cache(config, rows, length)."
            )
        if positions is None and cache is None and tokens.shape[1] > self.config.longest:
            warnings.warn(
                f"{tokens.shape[1]} tokens are more than the {self.config.longest} positions that "
                f"this {self.config.family} knows (context={self.config.context}): its answers get "
                f"worse from there on. Cut the rows; or interpolate, with "
                f"Rope(kind='linear', factor=...), and tune; or pass `positions`.",
                stacklevel=1,
            )
        queries, keys, cache = _places(tokens, segment_ids, mask, cache)
        positions = queries.order if positions is None else positions
        angles = positions[:, :, None, None].astype(jnp.float32)  # (B, T, 1, 1)
        angles = angles * self.config.rope.frequencies(self.config.head_dim)
        turn = jnp.cos(angles), jnp.sin(angles)  # (B, T, 1, H/2)
        graphdef, stack = nnx.split(self.layers)

        def step(carry: Any, slices: Any) -> Any:
            x, kv = carry
            layer, window, weights = slices
            window = self.config.window if window is None else window
            run = nnx.merge(graphdef, weights)
            return run(x, kv, layer, turn, window, queries=queries, keys=keys), None

        step = checkpointed(step, self.remat)
        layers = None if cache is None else jnp.arange(self.config.layers, dtype=jnp.int32)
        kv = None if cache is None else (cache.k, cache.v, cache.used)
        slices = (layers, _layer_windows(self.config), stack)
        start = self.embed(tokens), kv
        (x, kv), _ = jax.lax.scan(step, start, slices, unroll=self.unroll)
        x = self.norm(x)
        if cache is None or kv is None:
            return x
        # Under jit nothing can raise; slots of other tokens must not be overwritten in silence.
        x = jnp.where(cache.used + tokens.shape[1] <= cache.k.shape[2], x, jnp.nan)
        return x, cache._replace(k=kv[0], v=kv[1], used=cache.used + tokens.shape[1])


def _layer_windows(config: Config) -> Array | None:
    """The window of each layer (L,), or None where all layers have the same."""
    if not config.full_layers:
        return None
    none = np.iinfo(np.int32).max
    windows = [none if i in config.full_layers else config.window for i in range(config.layers)]
    return jnp.asarray(windows, jnp.int32)


# Parameters and files ----------------------------------------------------------------------------


def pure(config: Config, call: str = "__call__", **options: Any) -> Callable[..., Any]:
    """The model as a function `forward(params, tokens, **where) -> logits`.

    Args:
      config: Shape of the model.
      call: The method to run, where it is not the whole: `"hidden"` gives what the head reads,
        a trunk for the heads of `jaxpeft.models.heads`.
      **options: Those of `Decoder`.
    Returns:
      A function of the nested dict of arrays that `init` and `load` give, and of what
      the method takes. On a mesh with Explicit axes, wrap it in `jax.sharding.auto_axes`.
    """
    graphdef = nnx.graphdef(_abstract(config, **options))

    def forward(params: Params, tokens: Array, **where: Any) -> Any:
        return getattr(nnx.merge(graphdef, params), call)(tokens, **where)

    return forward


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init(config: Config, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters, Normal(0, 0.02) with norms at one and biases at zero."""
    model = Decoder(config, rngs=nnx.Rngs(params=key), param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(model))


def shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated, whatever the size."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, param_dtype=dtype)))


def init_cache(
    config: Config,
    rows: int,
    length: int,
    dtype: Any = jnp.float32,
    *,
    beyond_context: bool = False,
) -> Cache:
    """An empty cache with `length` slots for each of `rows` rows.

    Args:
      config: Of the model.
      rows: B.
      length: S; for generation the tokens of the prompt, padding included, and those to write.
      dtype: Of keys and values.
      beyond_context: Allows more slots than `Config.longest`, whose positions the model does not
        know.
    Raises:
      ValueError: More slots than that, or a dtype of no real floating-point numbers.
    """
    check_dtype_option("dtype", dtype)
    if length > config.longest and not beyond_context:
        raise ValueError(
            f"A cache of {length} tokens is longer than the {config.longest} positions that this "
            f"{config.family} knows (context={config.context}). Shorten the prompt or write fewer "
            f"tokens, or pass beyond_context=True to init_cache."
        )
    kv = (config.layers, rows, length, config.kv_heads, config.head_dim)
    slots = jnp.zeros((rows, length), jnp.int32)
    return Cache(jnp.zeros(kv, dtype), jnp.zeros(kv, dtype), slots, slots, jnp.int32(0))


_TABLE: folders.Table = (
    (r"embed/embedding", r"model.embed_tokens.weight", False),
    (r"layers/attn/([qkvo])/kernel", r"model.layers.{}.self_attn.\1_proj.weight", True),
    (r"layers/attn/([qkvo])/bias", r"model.layers.{}.self_attn.\1_proj.bias", False),
    (r"layers/attn/([qk])_norm/scale", r"model.layers.{}.self_attn.\1_norm.weight", False),
    (r"layers/mlp/(gate|up|down)/kernel", r"model.layers.{}.mlp.\1_proj.weight", True),
    (r"layers/mlp/(gate|up|down)/bias", r"model.layers.{}.mlp.\1_proj.bias", False),
    (r"layers/attn_norm/scale", r"model.layers.{}.input_layernorm.weight", False),
    (r"layers/mlp_norm/scale", r"model.layers.{}.post_attention_layernorm.weight", False),
    (r"norm/scale", r"model.norm.weight", False),
    (r"head/kernel", r"lm_head.weight", True),
)


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
        such as "nf4+dq", or a function from a matrix to a weight such as
        `functools.partial(jp.quant.nf4, block=128)`. A mapping chooses among all matrices, by
        pattern of path, as in `{"*mlp*": "nf4+dq", "*attn*": "int8"}`; the first match wins, and
        what none matches stays as it is.
    Returns:
      The configuration and the parameters, a nested dict of arrays and, where quantized, views;
      with these, run it as `jp.lift(pure(config))`.
    Raises:
      FileNotFoundError: The folder, its `config.json` or a weights file is not there.
      ValueError: The files are damaged, hold other tensors than `config.json` asks for (all are
        named), or describe a model that this decoder does not compute. A format is unknown, or
        does not fit `sharding`; a weight is quantized already, or not finite; `dtype` is not one
        of real floating-point numbers.
    """
    hf, tensors = folders.open(folder)
    config = Config.from_hf(hf)
    if config.tied and "lm_head.weight" in tensors:
        _check_tied(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight"))
    params = folders.read(
        folder,
        tensors,
        plan(config),
        dtype=dtype,
        sharding=sharding,
        quantize=quantize,
        ignore=_ignorable,
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


def _abstract(config: Config, **options: Any) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0), **options))


def plan(config: Config) -> dict[str, Stack]:
    """What each array is made of, by path, in terms of the tensors of a Hugging Face folder."""
    return folders.plan(shapes(config), _TABLE)


def _ignorable(name: str) -> bool:
    # Old Llama folders store the rotary frequencies, which follow from the configuration. A tied
    # head is checked on its own.
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _check_tied(head: safetensors.Tensor, table: safetensors.Tensor | None) -> None:
    if table is None or not np.array_equal(safetensors.read(head), safetensors.read(table)):
        raise ValueError(
            f"{head.file} has a lm_head.weight unlike its model.embed_tokens.weight, though "
            "config.json says tie_word_embeddings=True. Set it to false there to use the head."
        )
