"""The BERT family of encoders: BERT, MiniLM, RoBERTa, DistilBERT.

Axes: B rows, T tokens, S keys (= T), D width, F inner width of the MLP, N heads, H size of a head
(N * H = D), V vocabulary, P positions, Y token types, L layers.

Layers are stacked (every array under `layers` has a leading axis L) and run in one scan. Kernels
are (in, out). The parameters of a model are one nested dict:

    embed/embedding (V, D)            layers/attn/{q,k,v,o}/{kernel,bias} (L, D, D), (L, D)
    positions/embedding (P, D)        layers/attn_norm/{scale,bias} (L, D)
    types/embedding (Y, D)            layers/mlp/up/{kernel,bias} (L, D, F), (L, F)
    embed_norm/{scale,bias} (D,)      layers/mlp/down/{kernel,bias} (L, F, D), (L, D)
    pooler/{kernel,bias} (D, D), (D,) layers/mlp_norm/{scale,bias} (L, D)

DistilBERT has no `types`, and `pooler` is there where the folder has it.

    config, params = encoder.load("all-MiniLM-L6-v2")
    hidden = jax.jit(encoder.pure(config))(params, tokens, mask=mask)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option
from jaxpeft.io._stacked import Formats, Stack
from jaxpeft.models import _hf_folder as folders
from jaxpeft.models._layers import (
    Embed,
    LayerNorm,
    Linear,
    check_remat,
    checkpointed,
)

__all__ = ["Config", "Encoder", "attention", "init", "load", "plan", "pure", "save", "shapes"]

Params = dict[str, Any]


# Configuration -----------------------------------------------------------------------------------


def _hf(name: str, default: Any = dataclasses.MISSING) -> Any:
    """A field whose value config.json holds under `name`, in DistilBERT's under another."""
    return dataclasses.field(default=default, metadata={"hf": name})


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of an encoder; `from_hf` and `to_hf` translate `config.json`."""

    vocab: int = _hf("vocab_size")
    width: int = _hf("hidden_size")
    mlp_width: int = _hf("intermediate_size")
    layers: int = _hf("num_hidden_layers")
    heads: int = _hf("num_attention_heads")
    family: str = _hf("model_type", "bert")  # or "roberta", "distilbert"
    # Rows of the table of positions. In RoBERTa the first pad + 1 of them are no positions.
    context: int = _hf("max_position_embeddings", 512)
    types: int = _hf("type_vocab_size", 2)  # Rows of the table of token types, 0 for none.
    eps: float = _hf("layer_norm_eps", 1e-12)
    act: str = _hf("hidden_act", "gelu")  # or "gelu_new", "relu", "silu"
    pad: int | None = _hf("pad_token_id", 0)
    # Stands in no config.json: `load` sees in the folder whether there is one.
    pooler: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"`width` must be a multiple of `heads`, got width={self.width}, "
                f"heads={self.heads}."
            )
        if self.family == "roberta" and self.pad is None:
            raise ValueError(
                "RoBERTa counts positions from pad + 1, got pad=None. Give the id of its padding "
                "token, usually 1 (pad_token_id in config.json)."
            )

    @property
    def head_dim(self) -> int:
        """Size of a head, H."""
        return self.width // self.heads

    @property
    def longest(self) -> int:
        """Most tokens of a row."""
        return self.context - self._first

    @property
    def _first(self) -> int:
        """The row of the first position."""
        return 0 if self.family != "roberta" or self.pad is None else self.pad + 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Config:
        """The configuration that a parsed `config.json` describes.

        Rates of dropout are passed over: this encoder has none.

        Raises:
          ValueError: A family, or an option of one, that this encoder does not compute.
        """
        family = hf.get("model_type")
        if family not in _NAMES:
            raise _refusal("model_type", family, f"one of {', '.join(_NAMES)}")
        hf, names = _DEFAULTS[family] | dict(hf), _NAMES[family]
        if missing := [name for name in names.values() if name not in hf]:
            raise ValueError(f"config.json lacks {', '.join(missing)}. Copy the model's own one.")
        for name, allowed in (_FIXED | {names["act"]: tuple(_ACTIVATIONS)}).items():
            if hf.get(name, allowed[0]) not in allowed:
                raise _refusal(name, hf[name], " or ".join(map(repr, allowed)))
        fields = {ours: hf[theirs] for ours, theirs in names.items()}
        return cls(**_LACKING[family] | fields)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`, such that `from_hf` gives this configuration again.

        Raises:
          ValueError: The family has no option for one of the fields.
        """
        if self.family not in _NAMES:
            raise _refusal("model_type", self.family, f"one of {', '.join(_NAMES)}")
        names = _NAMES[self.family]
        hf = {theirs: getattr(self, ours) for ours, theirs in names.items()}
        hf["architectures"] = [_ARCHITECTURES[self.family]]
        again = dataclasses.replace(Config.from_hf(hf), pooler=self.pooler)
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(again, field.name)
            if mine != theirs:
                raise ValueError(
                    f"config.json of a {self.family} cannot say {field.name}={mine!r}, it would be "
                    f"read as {theirs!r}. Choose another `family`, or keep the field as it says."
                )
        return hf


_BERT = {f.name: f.metadata["hf"] for f in dataclasses.fields(Config) if f.metadata}
_DISTIL = {"width": "dim", "mlp_width": "hidden_dim", "layers": "n_layers", "heads": "n_heads"}
_DISTIL |= {"act": "activation"}
#: What DistilBERT has no choice about.
_LACKING: dict[str, dict[str, Any]] = {"bert": {}, "roberta": {}}
_LACKING["distilbert"] = {"types": 0, "eps": 1e-12}
#: By family: what config.json calls each field.
_NAMES = {"bert": _BERT, "roberta": _BERT}
_NAMES["distilbert"] = {
    ours: _DISTIL.get(ours, theirs)
    for ours, theirs in _BERT.items()
    if ours not in _LACKING["distilbert"]
}
_ARCHITECTURES = {"bert": "BertModel", "roberta": "RobertaModel", "distilbert": "DistilBertModel"}
# What config.json may leave out, with the value that it then has in transformers.
_COMMON = {"max_position_embeddings": 512, "pad_token_id": 0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": _COMMON | {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    "distilbert": _COMMON | {"activation": "gelu"},
}
_DEFAULTS["roberta"] = _DEFAULTS["bert"] | {"pad_token_id": 1}
# Options of which this encoder computes one value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,  # by tanh
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _refusal(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {name}={value!r}, which this encoder does not compute; it must be "
        f"{allowed}. Use a model without it."
    )


# Attention ---------------------------------------------------------------------------------------


def attention(q: Array, k: Array, v: Array, *, mask: Array | None) -> Array:
    """Softmax attention to all keys of the mask, the softmax in float32 or wider.

    Any function of this signature can take its place.

    Args:
      q: (B, T, N, H).
      k: (B, S, N, H).
      v: (B, S, N, H).
      mask: (B, S), true for keys that are seen; `None` for all of them.
    Returns:
      (B, T, N, H); zeros in rows where nothing is seen.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    if mask is None:
        weights = jax.nn.softmax(scores)
    else:
        seen = mask[:, None, None]  # (B, 1, 1, S)
        # A finite minimum, and a second `where`: the softmax of a row that sees nothing must have
        # neither NaNs nor weight.
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min))
        weights = jnp.where(seen, weights, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


# Modules -----------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Multi-head attention in both directions."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.head_dim, self.attention_fn = c.head_dim, attention_fn
        self.q = Linear(c.width, c.width, True, rngs=rngs, **dtypes)
        self.k = Linear(c.width, c.width, True, rngs=rngs, **dtypes)
        self.v = Linear(c.width, c.width, True, rngs=rngs, **dtypes)
        self.o = Linear(c.width, c.width, True, rngs=rngs, **dtypes)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        rows, length, width = x.shape
        q = self.q(x).reshape(rows, length, -1, self.head_dim)
        k = self.k(x).reshape(rows, length, -1, self.head_dim)
        v = self.v(x).reshape(rows, length, -1, self.head_dim)
        return self.o(self.attention_fn(q, k, v, mask=mask).reshape(rows, length, width))


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        self.act = _ACTIVATIONS[c.act]
        self.up = Linear(c.width, c.mlp_width, True, rngs=rngs, **dtypes)
        self.down = Linear(c.mlp_width, c.width, True, rngs=rngs, **dtypes)

    def __call__(self, x: Array) -> Array:
        return self.down(self.act(self.up(x)))


class Layer(nnx.Module):
    """Attention, then MLP, each added to its input, and the sum normed."""

    def __init__(
        self, c: Config, attention_fn: Callable[..., Array], *, rngs: nnx.Rngs, **dtypes: Any
    ):
        self.attn = Attention(c, attention_fn, rngs=rngs, **dtypes)
        self.attn_norm = LayerNorm(c.width, c.eps, param_dtype=dtypes["param_dtype"])
        self.mlp = MLP(c, rngs=rngs, **dtypes)
        self.mlp_norm = LayerNorm(c.width, c.eps, param_dtype=dtypes["param_dtype"])

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = self.attn_norm(x + self.attn(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class Encoder(nnx.Module):
    """An encoder of the BERT family. It has no dropout, whatever rates config.json gives.

    Args:
      config: Its shape.
      rngs: For the initial weights, Normal(0, 0.02).
      param_dtype: Of the weights.
      dtype: Of the products. `None` means that of the weights. Norms and the softmax are computed
        in float32 or wider whatever it is.
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
        remat: Any = None,
        unroll: int = 1,
        attention_fn: Callable[..., Array] = attention,
    ):
        check_remat(remat)
        check_dtype_option("param_dtype", param_dtype)
        check_dtype_option("dtype", dtype)
        self.config, self.remat, self.unroll = config, remat, unroll
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed = Embed(config.vocab, config.width, rngs=rngs, **dtypes)
        self.positions = Embed(config.context, config.width, rngs=rngs, **dtypes)
        if config.types:
            self.types = Embed(config.types, config.width, rngs=rngs, **dtypes)
        self.embed_norm = LayerNorm(config.width, config.eps, param_dtype=param_dtype)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = nnx.vmap(
            lambda key: Layer(config, attention_fn, rngs=nnx.Rngs(params=key), **dtypes)
        )(keys)
        if config.pooler:
            self.pooler = Linear(config.width, config.width, True, rngs=rngs, **dtypes)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        types: Array | None = None,
        positions: Array | None = None,
    ) -> Array:
        """Hidden states after the last layer.

        Args:
          tokens: Ids (B, T).
          mask: (B, T), true for tokens, false for padding, on whichever side. `None` for tokens
            everywhere.
          types: (B, T) token types, for models that have them. `None` for type 0.
          positions: (B, T) or (1, T), rows of the table of positions. `None` does as transformers
            does: BERT and DistilBERT count all places from 0, padding too; RoBERTa counts tokens
            from pad + 1 and gives padding the row of `pad` (tokens are those of the mask, without
            one those other than `pad`).
        Returns:
          (B, T, D), finite also at padding, where they mean nothing.
        Raises:
          ValueError: There are more tokens than positions, or types for a model without them.
        """
        if positions is None:
            positions = self._count(tokens, mask)
        x = self.embed(tokens)
        if self.config.types:
            x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise ValueError(f"A {self.config.family} has no token types, got {types.shape} types.")
        x = self.embed_norm(x + self.positions(positions))
        mask = None if mask is None else jnp.asarray(mask, bool)
        graphdef, stack = nnx.split(self.layers)

        def step(x: Array, weights: Any) -> Any:
            return nnx.merge(graphdef, weights)(x, mask), None

        step = checkpointed(step, self.remat)
        return jax.lax.scan(step, x, stack, unroll=self.unroll)[0]

    def pooled(self, tokens: Array, *, virtual: int = 0, **where: Any) -> Array:
        """tanh(pooler(x)) (B, D) of the first token's hidden state x.

        Args:
          tokens: Ids (B, T).
          virtual: How many positions at the front belong to no token (of a prompt or a prefix).
          **where: `mask`, `types`, `positions` of `__call__`.
        Raises:
          ValueError: The model has no pooler.
        """
        if not self.config.pooler:
            raise ValueError(
                f"This {self.config.family} has no pooler (pooler=False). Pool its hidden states."
            )
        return jnp.tanh(self.pooler(self(tokens, **where)[:, virtual]))

    def _count(self, tokens: Array, mask: Array | None) -> Array:
        """Each token's row of the table of positions, (B, T) or (1, T)."""
        length = tokens.shape[1]
        if length > self.config.longest:
            raise ValueError(
                f"{length} tokens do not fit in the {self.config.longest} positions of this "
                f"{self.config.family}. Cut them, or give fewer virtual tokens."
            )
        pad = self.config.pad
        if self.config.family != "roberta" or pad is None:
            return jnp.arange(length, dtype=jnp.int32)[None]
        counted = jnp.asarray(tokens != pad if mask is None else mask, bool).astype(jnp.int32)
        return jnp.cumsum(counted, axis=1, dtype=jnp.int32) * counted + pad


# Parameters and files ----------------------------------------------------------------------------


def pure(config: Config, call: str = "__call__", **options: Any) -> Callable[..., Array]:
    """The model as a function `forward(params, tokens, **where) -> hidden states`.

    Args:
      config: Shape of the model.
      call: The method to run, where it is not the whole: "pooled".
      **options: Those of `Encoder`.
    Returns:
      A function of the nested dict of arrays that `init` and `load` give, and of what the method
      takes. On a mesh with Explicit axes, wrap it in `jax.sharding.auto_axes`.
    """
    graphdef = nnx.graphdef(_abstract(config, **options))

    def forward(params: Params, tokens: Array, **where: Any) -> Array:
        return getattr(nnx.merge(graphdef, params), call)(tokens, **where)

    return forward


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init(config: Config, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters, Normal(0, 0.02) with norms at one and biases at zero."""
    model = Encoder(config, rngs=nnx.Rngs(params=key), param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(model))


def shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated, whatever the size."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, param_dtype=dtype)))


_EMBEDDINGS: folders.Table = (
    (r"embed/embedding", r"embeddings.word_embeddings.weight", False),
    (r"positions/embedding", r"embeddings.position_embeddings.weight", False),
    (r"types/embedding", r"embeddings.token_type_embeddings.weight", False),
    (r"embed_norm/scale", r"embeddings.LayerNorm.weight", False),
    (r"embed_norm/bias", r"embeddings.LayerNorm.bias", False),
)


def _layer_table(prefix: str, linear: Mapping[str, str], norms: Mapping[str, str]) -> folders.Table:
    """The rows of what a layer and the pooler hold, by their names in a file."""
    rows: list[tuple[str, str, bool]] = []
    for ours, theirs in linear.items():
        rows.append((rf"layers/{ours}/kernel", f"{prefix}.{theirs}.weight", True))
        rows.append((rf"layers/{ours}/bias", f"{prefix}.{theirs}.bias", False))
    for ours, theirs in norms.items():
        rows.append((rf"layers/{ours}/scale", f"{prefix}.{theirs}.weight", False))
        rows.append((rf"layers/{ours}/bias", f"{prefix}.{theirs}.bias", False))
    rows.append((r"pooler/kernel", "pooler.dense.weight", True))
    rows.append((r"pooler/bias", "pooler.dense.bias", False))
    return _EMBEDDINGS + tuple(rows)


_BERT_TABLE = _layer_table(
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
_DISTIL_TABLE = _layer_table(
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
_TABLES = {"bert": _BERT_TABLE, "roberta": _BERT_TABLE, "distilbert": _DISTIL_TABLE}


def load(
    folder: str | Path, dtype: Any = None, sharding: Any = None, quantize: Formats = None
) -> tuple[Config, Params]:
    """A model from a Hugging Face folder, read straight into stacked arrays.

    The heads that masked language modelling and next-sentence prediction have left in a folder
    are passed over; any other head is an error.

    Args:
      folder: With `config.json` and `model.safetensors`, or several files and their index.
      dtype: Of the parameters; of quantized ones, what the program sees. `None` keeps that of
        the file.
      sharding: One `jax.sharding.Sharding` for all arrays, or a dict of them like the
        parameters. `None` is the default device.
      quantize: A format, for the linear weights of the layers, or a mapping of formats by
        pattern of path, as in `jaxpeft.models.decoder.load`.
    Returns:
      The configuration and the parameters, a nested dict of arrays and, where quantized, views;
      with these, run it as `jp.lift(pure(config))`.
    Raises:
      FileNotFoundError: The folder, its `config.json` or a weights file is not there.
      ValueError: The files are damaged, hold other tensors than `config.json` asks for (all are
        named), or describe a model that this encoder does not compute. A format is unknown, or
        does not fit `sharding`; a weight is quantized already, or not finite; `dtype` is not one
        of real floating-point numbers.
    """
    hf, tensors = folders.open(folder)
    config = Config.from_hf(hf)
    tensors = {_plain(name, config.family): tensor for name, tensor in tensors.items()}
    config = dataclasses.replace(config, pooler="pooler.dense.weight" in tensors)
    params = folders.read(
        folder,
        tensors,
        plan(config),
        dtype=dtype,
        sharding=sharding,
        quantize=quantize,
        ignore=lambda name: name.startswith(_IGNORABLE),
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

    Its config.json leaves the rates of dropout to the defaults of transformers.

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
    return folders.plan(shapes(config), _TABLES[config.family])


# Heads of pretraining, and the positions 0, 1, ... that older folders store.
_IGNORABLE = (
    "cls.",
    "lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "embeddings.position_ids",
)


def _plain(name: str, family: str) -> str:
    """A tensor's name without the prefix that a head above the trunk brings with it."""
    name = name.removeprefix(f"{family}.")
    # Folders that began in TensorFlow.
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _abstract(config: Config, **options: Any) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(params=0), **options))
