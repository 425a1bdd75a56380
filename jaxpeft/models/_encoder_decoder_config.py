"""The shape of an encoder-decoder, and the families whose folders describe one, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpeft.models import _config
from jaxpeft.models import _hf_folder as folders
from jaxpeft.models._config import Constant, Family, Group, Option, Reading, field

__all__ = ["FAMILIES", "REPEATED_TABLES", "Config"]

_MODEL = "encoder-decoder"

# The values of `feed_forward_proj`, and the activation of each as config.json repeats it.
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an encoder-decoder; `from_hf` and `to_hf` translate `config.json`.

    Raises:
      ValueError: A field of another kind, `num_buckets` odd or below 4, or `max_distance` at most
        half of it.
    """

    vocab_size: int = field(_config.SIZE)
    hidden_size: int = field(_config.SIZE)
    intermediate_size: int = field(_config.SIZE)  # The inner width of the MLPs.
    num_layers: int = field(_config.SIZE)  # Of the encoder.
    num_decoder_layers: int = field(_config.SIZE)
    num_heads: int = field(_config.SIZE)
    # Its own field: in T5 11B and in small T5 1.1 num_heads * head_dim is not the hidden size.
    head_dim: int = field(_config.SIZE)
    feed_forward_proj: str = field(_config.choice(*_ACTIVATIONS), "relu")
    num_buckets: int = field(_config.SIZE, 32)  # Of relative positions.
    max_distance: int = field(_config.SIZE, 128)  # From here on all share the last bucket.
    norm_eps: float = field(_config.NON_NEGATIVE, 1e-6)
    # Whether the head is the transposed embedding.
    tie_word_embeddings: bool = field(_config.FLAG, True)
    # Whether the head reads hidden states times hidden_size ** -0.5.
    scale_decoder_outputs: bool = field(_config.FLAG, True)
    decoder_start_token_id: int = field(_config.TOKEN_ID, 0)  # Every target begins with it.
    eos_token_ids: tuple[int, ...] = field(_config.TOKEN_IDS, (1,))
    pad_token_id: int | None = field(_config.optional(_config.TOKEN_ID), 0)
    # Of pretraining and of fine-tuning elsewhere. Nothing here depends on it.
    dropout_rate: float = field(_config.NON_NEGATIVE, 0.1)
    model_type: str = field(_config.TEXT, "t5")

    def __post_init__(self) -> None:
        _config.check(self)
        odd = self.num_buckets < 4 or self.num_buckets % 2
        if odd or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                "`num_buckets` must be even and at least 4, and `max_distance` more than half of "
                f"it, got num_buckets={self.num_buckets}, max_distance={self.max_distance}."
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Raises:
          ValueError: An option is missing, of another kind, or not computed by this model.
        """
        return _config.read(cls, hf, FAMILIES, _MODEL)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again.

        Raises:
          ValueError: The family has no option for the value of a field.
        """
        return _config.write(self, FAMILIES, _MODEL)


# Families ----------------------------------------------------------------------------------------


def _read_activation(reading: Reading) -> dict[str, Any]:
    # config.json says twice what `feed_forward_proj` says alone.
    activation = _ACTIVATIONS[reading.fields["feed_forward_proj"]]
    given = reading.options.get("dense_act_fn", activation)
    if given != activation:
        raise _config.refusal(_MODEL, "dense_act_fn", given, f"{activation!r} or absent")
    return {}


def _write_activation(config: Config) -> dict[str, Any]:
    gated = config.feed_forward_proj.startswith("gated")
    return {"dense_act_fn": _ACTIVATIONS[config.feed_forward_proj], "is_gated_act": gated}


def _as_the_encoder(fields: Mapping[str, Any]) -> int:
    return fields["num_layers"]


def _padding_or_zero(fields: Mapping[str, Any]) -> int:
    pad = fields["pad_token_id"]
    return 0 if pad is None else pad


def _as_tied(fields: Mapping[str, Any]) -> bool:
    # T5 1.0 scales, T5 1.1 does not; before transformers 5 only the tie told which it is.
    return fields["tie_word_embeddings"]


_T5_OPTIONS: dict[str, Option | Constant | Group] = {
    "architectures": Constant(written=["T5ForConditionalGeneration"]),
    "model_type": Option("model_type"),
    "is_encoder_decoder": Constant((True,), written=True),
    "vocab_size": Option("vocab_size"),
    "d_model": Option("hidden_size"),
    "d_ff": Option("intermediate_size"),
    "num_layers": Option("num_layers"),
    "num_decoder_layers": Option("num_decoder_layers", None, _as_the_encoder),
    "num_heads": Option("num_heads"),
    "d_kv": Option("head_dim"),
    "feed_forward_proj": Option("feed_forward_proj", "relu"),
    "relative_attention_num_buckets": Option("num_buckets", 32),
    "relative_attention_max_distance": Option("max_distance", 128),
    "layer_norm_epsilon": Option("norm_eps", 1e-6),
    "tie_word_embeddings": Option("tie_word_embeddings", True),
    "scale_decoder_outputs": Option("scale_decoder_outputs", None, _as_tied),
    "decoder_start_token_id": Option("decoder_start_token_id", None, _padding_or_zero),
    "pad_token_id": Option("pad_token_id", 0),
    "dropout_rate": Option("dropout_rate", 0.1),
    "dense_act_fn": Group(_read_activation, _write_activation),
    "eos_token_id": Option("eos_token_ids", 1),
    "is_decoder": Constant((False,)),
    "quantization_config": Constant((None,)),
}

_SELF = r"\1.block.{}.layer.0"
_CROSS = r"decoder.block.{}.layer.1"
_T5_TENSORS: folders.Table = (
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


def _t5_tensors(config: Config) -> folders.Table:
    """`_T5_TENSORS` and the rows of the MLPs, whose names depend on their kind and stack."""
    names = {"up": "wi", "down": "wo"}
    if config.feed_forward_proj != "relu":
        names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    rows = []
    for stack, index in (("encoder", 1), ("decoder", 2)):  # Cross attention comes before.
        layer = f"{stack}.block.{{}}.layer.{index}"
        rows += [(f"{stack}/layers/mlp_norm/scale", f"{layer}.layer_norm.weight", False)]
        for ours, theirs in names.items():
            ours = f"{stack}/layers/mlp/{ours}/kernel"
            rows += [(ours, f"{layer}.DenseReluDense.{theirs}.weight", True)]
    return (*rows, *_T5_TENSORS)


#: Tensors of older folders that repeat the table of embeddings.
REPEATED_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

#: By `model_type`.
FAMILIES: dict[str, Family] = {
    "t5": Family(
        options=_T5_OPTIONS,
        tensors=_t5_tensors,
        ignored=(
            # Checked on their own.
            *(r"encoder\.embed_tokens\.weight", r"decoder\.embed_tokens\.weight"),
            r"lm_head\.weight",
            # Older folders hold a bias of the cross attention that nothing reads.
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ),
    ),
}
