"""The shape of an encoder, and the families whose folders describe one, a table for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpeft.models import _config
from jaxpeft.models import _hf_folder as folders
from jaxpeft.models._config import Constant, Family, Option, field

__all__ = ["ACTIVATIONS", "FAMILIES", "Config"]

_MODEL = "encoder"

#: The values of `Config.hidden_act`.
ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an encoder; `from_hf` and `to_hf` translate `config.json`.

    Raises:
      ValueError: A field of another kind, a `hidden_size` that is not a multiple of `num_heads`, or
        a RoBERTa without `pad_token_id`.
    """

    vocab_size: int = field(_config.SIZE)
    hidden_size: int = field(_config.SIZE)
    intermediate_size: int = field(_config.SIZE)  # The inner width of the MLP.
    num_layers: int = field(_config.SIZE)
    num_heads: int = field(_config.SIZE)
    model_type: str = field(_config.TEXT, "bert")
    # Rows of the table of positions. RoBERTa uses the first pad_token_id + 1 of them for no token.
    max_position_embeddings: int = field(_config.SIZE, 512)
    # Rows of the table of token types, 0 for no such table.
    type_vocab_size: int = field(_config.COUNT, 2)
    norm_eps: float = field(_config.NON_NEGATIVE, 1e-12)
    hidden_act: str = field(_config.choice(*ACTIVATIONS), "gelu")
    pad_token_id: int | None = field(_config.optional(_config.TOKEN_ID), 0)
    # No config.json tells it: `load` sees in the folder whether there is one.
    pooler: bool = field(_config.FLAG, False, in_json=False)

    def __post_init__(self) -> None:
        _config.check(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                "`hidden_size` must be a multiple of `num_heads`, got "
                f"hidden_size={self.hidden_size}, num_heads={self.num_heads}."
            )
        if self.model_type == "roberta" and self.pad_token_id is None:
            raise ValueError(
                "RoBERTa counts positions from pad_token_id + 1, got pad_token_id=None. Give the "
                "id of its padding token, usually 1 (pad_token_id in config.json)."
            )
        if self.max_length < 1:
            raise ValueError(
                "`max_position_embeddings` must leave a row for at least one token, got "
                f"max_position_embeddings={self.max_position_embeddings}, of which RoBERTa uses "
                f"pad_token_id + 1 = {self.first_position} for none."
            )

    @property
    def head_dim(self) -> int:
        """Size of a head, H."""
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""
        return self.max_position_embeddings - self.first_position

    @property
    def first_position(self) -> int:
        """The row of the first token in the table of positions."""
        if self.model_type != "roberta" or self.pad_token_id is None:
            return 0
        return self.pad_token_id + 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Rates of dropout are passed over: this encoder has none.

        Raises:
          ValueError: An option is missing, of another kind, or not computed by this encoder.
        """
        return _config.read(cls, hf, FAMILIES, _MODEL)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again.

        Raises:
          ValueError: The family has no option for the value of a field.
        """
        return _config.write(self, FAMILIES, _MODEL)


# Families ----------------------------------------------------------------------------------------


_COMMON: dict[str, Constant] = {
    "is_decoder": Constant((False, None)),
    "add_cross_attention": Constant((False, None)),
    "position_embedding_type": Constant(("absolute", None)),
    "pruned_heads": Constant(({}, None)),
    "quantization_config": Constant((None,)),
}


def _bert_options(architecture: str, *, pad_token_id: int) -> dict[str, Option | Constant]:
    return {
        "vocab_size": Option("vocab_size"),
        "hidden_size": Option("hidden_size"),
        "intermediate_size": Option("intermediate_size"),
        "num_hidden_layers": Option("num_layers"),
        "num_attention_heads": Option("num_heads"),
        "model_type": Option("model_type"),
        "max_position_embeddings": Option("max_position_embeddings", 512),
        "type_vocab_size": Option("type_vocab_size", 2),
        "layer_norm_eps": Option("norm_eps", 1e-12),
        "hidden_act": Option("hidden_act", "gelu"),
        "pad_token_id": Option("pad_token_id", pad_token_id),
        "architectures": Constant(written=[architecture]),
        **_COMMON,
    }


_DISTILBERT_OPTIONS: dict[str, Option | Constant] = {
    "vocab_size": Option("vocab_size"),
    "dim": Option("hidden_size"),
    "hidden_dim": Option("intermediate_size"),
    "n_layers": Option("num_layers"),
    "n_heads": Option("num_heads"),
    "model_type": Option("model_type"),
    "max_position_embeddings": Option("max_position_embeddings", 512),
    "activation": Option("hidden_act", "gelu"),
    "pad_token_id": Option("pad_token_id", 0),
    "architectures": Constant(written=["DistilBertModel"]),
    **_COMMON,
}


def _tensors(layer: str, linear: Mapping[str, str], norms: Mapping[str, str]) -> folders.Table:
    """The names of all tensors.

    Args:
      layer: The name of a layer, `{}` for its number.
      linear: The names of its linear maps, from ours to those of the file.
      norms: The same of its norms.
    """
    rows: list[tuple[str, str, bool]] = [
        (r"embed/embedding", r"embeddings.word_embeddings.weight", False),
        (r"positions/embedding", r"embeddings.position_embeddings.weight", False),
        (r"types/embedding", r"embeddings.token_type_embeddings.weight", False),
        (r"embed_norm/scale", r"embeddings.LayerNorm.weight", False),
        (r"embed_norm/bias", r"embeddings.LayerNorm.bias", False),
        (r"pooler/kernel", "pooler.dense.weight", True),
        (r"pooler/bias", "pooler.dense.bias", False),
    ]
    for ours, theirs in linear.items():
        rows.append((rf"layers/{ours}/kernel", f"{layer}.{theirs}.weight", True))
        rows.append((rf"layers/{ours}/bias", f"{layer}.{theirs}.bias", False))
    for ours, theirs in norms.items():
        rows.append((rf"layers/{ours}/scale", f"{layer}.{theirs}.weight", False))
        rows.append((rf"layers/{ours}/bias", f"{layer}.{theirs}.bias", False))
    return tuple(rows)


_BERT_TENSORS = _tensors(
    "encoder.layer.{}",
    {
        "attn/q": "attention.self.query",
        "attn/k": "attention.self.key",
        "attn/v": "attention.self.value",
        "attn/o": "attention.output.dense",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    },
    {"attn_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"},
)
_DISTILBERT_TENSORS = _tensors(
    "transformer.layer.{}",
    {
        "attn/q": "attention.q_lin",
        "attn/k": "attention.k_lin",
        "attn/v": "attention.v_lin",
        "attn/o": "attention.out_lin",
        "mlp/up": "ffn.lin1",
        "mlp/down": "ffn.lin2",
    },
    {"attn_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm"},
)
# The heads of pretraining, and the positions 0, 1, ... that older folders store.
_IGNORED = (
    *(r"cls\..*", r"lm_head\..*", r"vocab_transform\..*", r"vocab_layer_norm\..*"),
    *(r"vocab_projector\..*", r"embeddings\.position_ids.*"),
)


def _renamed(prefix: str) -> tuple[tuple[str, str], ...]:
    """A head above the trunk brings a prefix; folders that began in TensorFlow name norms so."""
    return (
        (rf"^{prefix}\.", ""),
        (r"LayerNorm\.gamma", "LayerNorm.weight"),
        (r"LayerNorm\.beta", "LayerNorm.bias"),
    )


#: By `model_type`.
FAMILIES: dict[str, Family] = {
    "bert": Family(
        options=_bert_options("BertModel", pad_token_id=0),
        tensors=_BERT_TENSORS,
        renamed=_renamed("bert"),
        ignored=_IGNORED,
    ),
    "roberta": Family(
        options=_bert_options("RobertaModel", pad_token_id=1),
        tensors=_BERT_TENSORS,
        renamed=_renamed("roberta"),
        ignored=_IGNORED,
    ),
    "distilbert": Family(
        options=_DISTILBERT_OPTIONS,
        tensors=_DISTILBERT_TENSORS,
        fields={"type_vocab_size": 0, "norm_eps": 1e-12},
        renamed=_renamed("distilbert"),
        ignored=_IGNORED,
    ),
}
