"""The shape of a decoder, and the families whose folders describe one, a table for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.models import _config
from jaxpeft.models._config import Constant, Family, Group, Option, Reading, field

__all__ = ["FAMILIES", "Config", "Rope"]

_MODEL = "decoder"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: pair i of a head rotates by `theta ** (-2i / H)` radians per token.

    Attributes:
      theta: The base of the frequencies.
      rope_type: "default"; or for contexts longer than those of pretraining "linear", which
        divides all frequencies by `factor`, or "llama3", which does so for the low ones.
      factor: By how much.
      low_freq_factor: Only for "llama3": a pair that rotates fewer times than this in
        `original_max_position_embeddings` tokens has its frequency divided by `factor`.
      high_freq_factor: Only for "llama3": one that rotates more often keeps it. Between the two it
        is interpolated.
      original_max_position_embeddings: Only for "llama3": the length of pretraining in tokens.
    Raises:
      ValueError: A field of another kind, or a `high_freq_factor` not above the low one.
    """

    theta: float = field(_config.NUMBER, 10000.0)
    rope_type: str = field(_config.choice("default", "linear", "llama3"), "default")
    factor: float = field(_config.NUMBER, 1.0)
    low_freq_factor: float = field(_config.NUMBER, 1.0)
    high_freq_factor: float = field(_config.NUMBER, 4.0)
    original_max_position_embeddings: int = field(_config.NUMBER, 8192)

    def __post_init__(self) -> None:
        _config.check(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "RoPE needs a high_freq_factor above its low_freq_factor, got high_freq_factor="
                f"{self.high_freq_factor}, low_freq_factor={self.low_freq_factor}."
            )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per token of each pair (H / 2), in float32 as when the weights were trained."""
        powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = np.float32(1) / np.float32(self.theta) ** powers
        if self.rope_type == "default":
            return plain
        if self.rope_type == "linear":
            return plain / np.float32(self.factor)
        low, high = self.low_freq_factor, self.high_freq_factor
        rotations = self.original_max_position_embeddings * plain / np.float32(2 * math.pi)
        keep = np.clip((rotations - low) / (high - low), 0, 1).astype(np.float32)
        return (1 - keep) * plain / np.float32(self.factor) + keep * plain


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder; `from_hf` and `to_hf` translate `config.json`.

    Raises:
      ValueError: A field of another kind, `num_heads` that is not a multiple of `num_kv_heads`, or
        an odd `head_dim`.
    """

    vocab_size: int = field(_config.SIZE)
    hidden_size: int = field(_config.SIZE)
    intermediate_size: int = field(_config.SIZE)  # The inner width of the MLP.
    num_layers: int = field(_config.SIZE)
    num_heads: int = field(_config.SIZE)
    num_kv_heads: int = field(_config.SIZE)
    # Its own field: in Qwen3 and Mistral Nemo num_heads * head_dim is not the hidden size.
    head_dim: int = field(_config.SIZE)
    # Decides which of the fields below config.json can express.
    model_type: str = field(_config.TEXT, "llama")
    rope: Rope = Rope()
    norm_eps: float = field(_config.NON_NEGATIVE, 1e-6)
    # Whether the head is the transposed embedding.
    tie_word_embeddings: bool = field(_config.FLAG, False)
    qkv_bias: bool = field(_config.FLAG, False)
    o_bias: bool = field(_config.FLAG, False)
    mlp_bias: bool = field(_config.FLAG, False)
    qk_norm: bool = field(_config.FLAG, False)  # RMS norm of each query and key head (Qwen3).
    # A token attends to itself and to the sliding_window - 1 tokens before it.
    sliding_window: int | None = field(_config.optional(_config.SIZE), None)
    # Indices of the layers without the window (Qwen's max_window_layers).
    full_attention_layers: tuple[int, ...] = field(_config.INTEGERS, ())
    # Longest sequence of pretraining. What is computed does not depend on it; see `max_length`.
    max_position_embeddings: int = field(_config.SIZE, 2048)
    bos_token_id: int | None = field(_config.optional(_config.TOKEN_ID), None)
    eos_token_ids: tuple[int, ...] = field(_config.TOKEN_IDS, ())
    pad_token_id: int | None = field(_config.optional(_config.TOKEN_ID), None)

    def __post_init__(self) -> None:
        _config.check(self)
        if not isinstance(self.rope, Rope):
            raise ValueError(f"`Config(rope={self.rope!r})`: `rope` must be a `Rope`.")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_kv_heads` and `head_dim` even, got "
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"head_dim={self.head_dim}."
            )

    @property
    def max_length(self) -> int:
        """Most tokens of a row whose positions the model knows: `max_position_embeddings`, or as
        many times that as linear RoPE interpolates."""
        factor = self.rope.factor if self.rope.rope_type == "linear" else 1
        return int(self.max_position_embeddings * factor)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Raises:
          ValueError: An option is missing, of another kind, or not computed by this decoder.
        """
        return _config.read(cls, hf, FAMILIES, _MODEL)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again.

        Raises:
          ValueError: The family has no option for the value of a field.
        """
        return _config.write(self, FAMILIES, _MODEL)


# RoPE --------------------------------------------------------------------------------------------


_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Options inside those of RoPE that only say what is computed anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (1, None)}
_DICT = _config.Kind("an object of options", lambda value: isinstance(value, Mapping))


def _read_rope(reading: Reading) -> dict[str, Any]:
    # `rope_scaling` and a `rope_theta` of its own up to transformers 4, `rope_parameters` since.
    raw = {
        **reading.value("rope_scaling", _DICT, {}),
        **reading.value("rope_parameters", _DICT, {}),
    }
    inner = reading._replace(options=raw)
    theta = reading.value("rope_theta", _config.NUMBER) or 10000.0
    theta = float(inner.value("rope_theta", _config.NUMBER) or theta)
    rope_type = raw.get("rope_type") or raw.get("type", "default")
    types = ("default", "linear", "llama3")
    if rope_type not in types:
        raise _config.refusal(_MODEL, "rope_type", rope_type, "'default', 'linear' or 'llama3'")
    for name, value in raw.items():
        known = name in (*_SCALING, "rope_theta", "rope_type", "type")
        if not known and value not in _NEUTRAL.get(name, ()):
            raise _config.refusal(_MODEL, f"{name} among its RoPE options", value, "absent")
    names = {"default": (), "linear": _SCALING[:1], "llama3": _SCALING}[rope_type]
    if missing := [name for name in names if raw.get(name) is None]:
        raise ValueError(
            f"config.json asks for {rope_type} RoPE but lacks its {', '.join(missing)}. Copy the "
            "model's own one."
        )
    scaling = {name: inner.value(name, _config.NUMBER) for name in names}
    return {"rope": Rope(theta, rope_type, **scaling)}


def _write_rope(config: Config) -> dict[str, Any]:
    rope, scaling = config.rope, None
    if rope.rope_type != "default":
        names = _SCALING if rope.rope_type == "llama3" else _SCALING[:1]
        scaling = {name: getattr(rope, name) for name in names} | {"rope_type": rope.rope_type}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


# Windows -----------------------------------------------------------------------------------------


_FULL, _SLIDING = "full_attention", "sliding_attention"
_KINDS = _config.Kind(
    "a list of strings",
    lambda value: isinstance(value, list) and all(isinstance(kind, str) for kind in value),
)


def _layer_types(config: Config) -> list[str]:
    if config.sliding_window is None:
        return [_FULL] * config.num_layers
    full = config.full_attention_layers
    return [_FULL if i in full else _SLIDING for i in range(config.num_layers)]


def _windows(*written: str, size: int | None = None, in_use: bool = True, first: int = 0) -> Group:
    """The row of the options that say which layers have which window.

    Args:
      *written: Those that the family has. Only with `layer_types` may it mix layers with and
        without a window.
      size: What an absent `sliding_window` means.
      in_use: What an absent `use_sliding_window` means.
      first: What an absent `max_window_layers` means: layers in front that have no window.
    """

    def read(reading: Reading) -> dict[str, Any]:
        layers = reading.fields["num_layers"]
        window = None
        if written:
            absent = size if "sliding_window" not in reading.options else None
            window = reading.value("sliding_window", _config.SIZE, absent)
        if not reading.value("use_sliding_window", _config.FLAG, in_use):
            window = None
        start = reading.value("max_window_layers", _config.COUNT, first)
        kinds = [_FULL if i < start or window is None else _SLIDING for i in range(layers)]
        given = reading.value("layer_types", _KINDS) or kinds
        fits = len(given) == layers and set(given) <= {_FULL, _SLIDING}
        # Without a window, or in a family that cannot mix, the list can only repeat the rest.
        mixes = window is not None and "layer_types" in written
        if not fits or given != kinds and not mixes:
            raise _config.refusal(_MODEL, "layer_types", given, f"{layers} entries like {kinds}")
        full = tuple(i for i, kind in enumerate(given) if kind == _FULL)
        all_full = len(full) == layers
        return {
            "sliding_window": None if all_full else window,
            "full_attention_layers": () if all_full else full,
        }

    def write(config: Config) -> dict[str, Any]:
        kinds = _layer_types(config)
        options = {
            "sliding_window": config.sliding_window,
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": kinds.count(_FULL),
            "layer_types": kinds,
        }
        return {name: options[name] for name in written}

    return Group(read, write)


# Families ----------------------------------------------------------------------------------------


def _no(fields: Mapping[str, Any]) -> bool:
    return False


def _as_many_as_heads(fields: Mapping[str, Any]) -> int:
    return fields["num_heads"]


def _part_of_hidden(fields: Mapping[str, Any]) -> int:
    return fields["hidden_size"] // fields["num_heads"]


def _options(
    architecture: str,
    *own: tuple[str, Option | Group],
    num_key_value_heads: int | None,
    max_position_embeddings: int,
    head_dim: int | None = None,
) -> dict[str, Option | Constant | Group]:
    """The rows of a family: those of all, with its defaults of transformers, and its own.

    Dropout is one of the constants: a model with it would be trained otherwise here.
    """
    return {
        "architectures": Constant(written=[architecture]),
        "vocab_size": Option("vocab_size"),
        "hidden_size": Option("hidden_size"),
        "intermediate_size": Option("intermediate_size"),
        "num_hidden_layers": Option("num_layers"),
        "num_attention_heads": Option("num_heads"),
        "num_key_value_heads": Option("num_kv_heads", num_key_value_heads, _as_many_as_heads),
        "head_dim": Option("head_dim", head_dim, _part_of_hidden),
        "model_type": Option("model_type"),
        "rms_norm_eps": Option("norm_eps", 1e-6),
        "tie_word_embeddings": Option("tie_word_embeddings", False, _no),
        "max_position_embeddings": Option("max_position_embeddings", max_position_embeddings),
        "bos_token_id": Option("bos_token_id", None),
        "pad_token_id": Option("pad_token_id", None),
        **dict(own),
        "eos_token_id": Option("eos_token_ids", None),
        "hidden_act": Constant(("silu", "swish"), written="silu"),
        "rope_theta": Group(_read_rope, _write_rope),
        "attention_dropout": Constant((0, None)),
        "partial_rotary_factor": Constant((1, None)),
        "quantization_config": Constant((None,)),
    }


_TENSORS = (
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
# Old Llama folders store the rotary frequencies, which follow from the configuration. A tied head
# is checked on its own.
_IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")
_ATTENTION_BIAS = ("attention_bias", Option(("qkv_bias", "o_bias"), False, _no))
_QWEN_WINDOWS = _windows(
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    size=4096,
    in_use=False,
    first=28,
)

#: By `model_type`.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        options=_options(
            "LlamaForCausalLM",
            _ATTENTION_BIAS,
            ("mlp_bias", Option("mlp_bias", False, _no)),
            ("layer_types", _windows()),
            num_key_value_heads=None,
            max_position_embeddings=2048,
        ),
        tensors=_TENSORS,
        absent=("sliding_window",),
        ignored=_IGNORED,
    ),
    "mistral": Family(
        options=_options(
            "MistralForCausalLM",
            ("sliding_window", _windows("sliding_window", size=4096)),
            num_key_value_heads=8,
            max_position_embeddings=131072,
        ),
        tensors=_TENSORS,
        absent=("attention_bias", "mlp_bias"),
        ignored=_IGNORED,
    ),
    "qwen2": Family(
        options=_options(
            "Qwen2ForCausalLM",
            ("sliding_window", _QWEN_WINDOWS),
            num_key_value_heads=32,
            max_position_embeddings=32768,
        ),
        tensors=_TENSORS,
        fields={"qkv_bias": True},
        absent=("attention_bias", "mlp_bias"),
        ignored=_IGNORED,
    ),
    "qwen3": Family(
        options=_options(
            "Qwen3ForCausalLM",
            _ATTENTION_BIAS,
            ("sliding_window", _QWEN_WINDOWS),
            num_key_value_heads=32,
            max_position_embeddings=32768,
            head_dim=128,
        ),
        tensors=_TENSORS,
        fields={"qk_norm": True},
        absent=("mlp_bias",),
        ignored=_IGNORED,
    ),
}
