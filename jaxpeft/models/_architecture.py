"""What all reference models can do: run as a pure function, be initialized, loaded and saved."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpeft.io import _safetensors as safetensors
from jaxpeft.io._stacked import Formats, Stack
from jaxpeft.models import _config
from jaxpeft.models import _hf_folder as folders

__all__ = ["Architecture"]

Params = dict[str, Any]


class Config(Protocol):
    """The shape of a model, a frozen dataclass."""

    @property
    def model_type(self) -> str: ...

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self: ...

    def to_hf(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture(Generic[C]):
    """The functions of a reference model, made from its Flax NNX module and its families.

    Attributes:
      module: `module(config, *, rngs, param_dtype, **options)`, with a table `embed`.
      config: The class of its configuration.
      families: How folders describe and store it, by `model_type`.
      name: What it is, as errors say it: "decoder".
      inspect: `inspect(config, tensors)`, the configuration after a look at the tensors of the
        folder, for what `config.json` does not tell or tells wrongly.
    """

    module: Callable[..., nnx.Module]
    config: type[C]
    families: Mapping[str, _config.Family]
    name: str
    inspect: Callable[[C, Mapping[str, safetensors.Tensor]], C]

    def apply_fn(self, config: C, method: str = "__call__", **options: Any) -> Callable[..., Any]:
        """The model as a pure function, `apply_fn(config)(params, *args, **kwargs)`.

        Args:
          config: Shape of the model.
          method: The method of the module to call. `"hidden"`, for example, gives the hidden
            states that the head of a language model reads: a trunk for `jaxpeft.models.heads`.
          **options: Those of the module: `dtype`, `remat`, `unroll`, `attention_fn`, ...
        Returns:
          A function of the nested dict of arrays that `init` and `load` give, and of what the
          method takes. On a mesh with Explicit axes, wrap it in `jax.sharding.auto_axes`.
        Raises:
          ValueError: A `dtype` that is not of floating-point numbers, or an unknown `remat`.
        """
        graphdef = nnx.graphdef(self._abstract(config, **options))

        def forward(params: Params, *args: Any, **kwargs: Any) -> Any:
            return getattr(nnx.merge(graphdef, params), method)(*args, **kwargs)

        return forward

    def init(self, config: C, key: Array, dtype: Any = jnp.float32) -> Params:
        """Random parameters, Normal(0, 0.02 ** 2), with norms at one and biases at zero.

        Args:
          config: Shape of the model.
          key: A key of `jax.random`.
          dtype: Dtype of the parameters.
        Returns:
          A nested dict of arrays.
        Raises:
          ValueError: A `dtype` that is not of floating-point numbers.
        """
        return _init(self.module, config, key, dtype)

    def shapes(self, config: C, dtype: Any = jnp.float32) -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated, whatever their size.

        Args:
          config: Shape of the model.
          dtype: Dtype of the parameters.
        Raises:
          ValueError: A `dtype` that is not of floating-point numbers.
        """
        return nnx.to_pure_dict(nnx.state(self._abstract(config, param_dtype=dtype)))

    def plan(self, config: C) -> dict[str, Stack]:
        """Which tensors of a Hugging Face folder each array is made of, by path.

        Args:
          config: Shape of the model.
        Raises:
          ValueError: A `model_type` that this model has no table for.
        """
        table = self._family(config).tensors
        return folders.plan(self.shapes(config), table(config) if callable(table) else table)

    def load(
        self,
        folder: str | Path,
        dtype: Any = None,
        sharding: Any = None,
        quantize: Formats = None,
    ) -> tuple[C, Params]:
        """A model from a Hugging Face folder, read straight into stacked arrays.

        It takes the memory of the parameters, quantized where they are to be, and little more:
        room to quantize one tensor, and its scales in the whole stack.

        Linear weights that bitsandbytes has stored in four bits keep their quantized values and
        scales. Tensors that the model has no use for are an error, but for those that its family
        names, such as the heads of pretraining beside an encoder.

        Args:
          folder: With `config.json` and `model.safetensors`, or several files and their index.
          dtype: Dtype of the parameters; of quantized ones, what the program sees. `None` keeps
            that of the file.
          sharding: One `jax.sharding.Sharding` for all arrays, or a dict of them like the
            parameters. Each process then reads only its own shards. The fields of a quantized
            weight are cut as the array that it stands for. `None` is the default device.
          quantize: A format, for the linear weights of the layers: what
            `jp.quantize(format, sites.hidden)` makes of the loaded model, bit for bit. Either a
            name such as "nf4+dq", or a function from a matrix to a weight such as
            `functools.partial(jp.quant.nf4, block=128)`. A mapping chooses among all matrices, by
            pattern of path, as in `{"*mlp*": "nf4+dq", "*attn*": "int8"}`; the first match wins,
            and what none matches stays as it is.
        Returns:
          The configuration and the parameters, a nested dict of arrays and, where quantized,
          views; with these, run it as `jp.lift(apply_fn(config))`.
        Raises:
          FileNotFoundError: The folder, its `config.json` or a weights file is not there.
          ValueError: The files are damaged, hold other tensors than `config.json` asks for (all
            are named), or describe a model that this one does not compute. A format is unknown,
            or does not fit `sharding`; a weight is quantized already, or not finite; `dtype` is
            not of floating-point numbers.
        """
        hf, tensors = folders.open(folder)
        config = self.config.from_hf(hf)
        family = self._family(config)
        tensors = {_renamed(name, family): tensor for name, tensor in tensors.items()}
        config = self.inspect(config, tensors)
        params = folders.read(
            folder,
            tensors,
            self.plan(config),
            dtype=dtype,
            sharding=sharding,
            quantize=quantize,
            ignore=lambda name: any(re.fullmatch(pattern, name) for pattern in family.ignored),
        )
        return config, params

    def save(
        self,
        folder: str | Path,
        config: C,
        params: Params,
        *,
        shard_bytes: int = 5_000_000_000,
        tokenizer_from: str | Path | None = None,
    ) -> None:
        """Writes a Hugging Face folder that `load` and transformers read.

        Rates of dropout that `config` has no field for are left to the defaults of transformers.

        Args:
          folder: Where to. Other files in it stay, weights of an earlier save do not.
          config: Shape of the model.
          params: Plain arrays; what a method made of them must be merged first. Weights in NF4 or
            FP4 of layout "flat" are written as they are, for bitsandbytes.
          shard_bytes: Size at which a file ends and the next begins.
          tokenizer_from: The folder whose tokenizer, chat template and generation config are
            copied, in the place of those there: the one that the model was loaded from. Without
            them the folder cannot be trained on text again.
        Raises:
          FileNotFoundError: `tokenizer_from` holds no tokenizer.
          ValueError: The arrays are not those that `config` asks for, or are weights that no such
            folder holds (all are named). The family has no option for a field of `config`.
          OSError: The disk is full.
        """
        hf = config.to_hf() | {"torch_dtype": np.dtype(params["embed"]["embedding"].dtype).name}
        folders.write(
            folder,
            hf,
            params,
            self.plan(config),
            shard_bytes=shard_bytes,
            tokenizer_from=tokenizer_from,
        )

    def _family(self, config: C) -> _config.Family:
        return _config.find(self.families, config.model_type, self.name)

    def _abstract(self, config: C, **options: Any) -> nnx.Module:
        return nnx.eval_shape(lambda: self.module(config, rngs=nnx.Rngs(params=0), **options))


@functools.partial(jax.jit, static_argnames=("module", "config", "dtype"))
def _init(module: Callable[..., nnx.Module], config: Any, key: Array, dtype: Any) -> Params:
    model = module(config, rngs=nnx.Rngs(params=key), param_dtype=dtype)
    return nnx.to_pure_dict(nnx.state(model))


def _renamed(name: str, family: _config.Family) -> str:
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name
