"""jaxpeft: parameter-efficient fine-tuning for any JAX function, unmodified.

`sites` finds what a function does with its parameters. A method, such as `lora`, puts structured
weights in the place of some of them. `split` takes the result apart into what is frozen and what is
trained, `combine` puts it together again, `lift` makes the function accept it, and `merge` turns it
into plain arrays.

The top level has these verbs, the types of the core, and every function that returns a `Method`.
Helpers are in the namespace of their subject, such as `jaxpeft.sparsity`, which is loaded when it
is first used; `jaxpeft.extend` has what methods are written with. A name with an underscore in its
path is private.

Example:
  >>> import jax, jax.numpy as jnp, jaxpeft as jp
  >>> def model(params, x):
  ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
  >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 4))}
  >>> x = jnp.ones((16, 8))
  >>> sites = jp.sites(model, params, x)
  >>> frozen, adapter = jp.split(jp.lora(2, sites.linear)(jax.random.key(0), params))
  >>> def loss(adapter):
  ...     return jnp.mean(jp.lift(model)(jp.combine(frozen, adapter), x) ** 2)
  >>> list(jax.grad(loss)(adapter))
  ['down/a', 'down/b', 'up/a', 'up/b']
  >>> list(jp.merge(jp.combine(frozen, adapter)))
  ['down', 'up']
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxpeft._counts import ParamCounts, count_params
from jaxpeft._find_sites import sites
from jaxpeft._lift import Materialized, MaterializedWarning, NotMergeableError, lift, merge
from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._masks_and_labels import param_labels, trainable_mask, trainable_only
from jaxpeft._memory import MemoryEstimate, estimate_memory
from jaxpeft._method import Method, chain
from jaxpeft._methods.adalora import adalora
from jaxpeft._methods.boft import boft
from jaxpeft._methods.bottleneck_adapter import bottleneck_adapter, parallel_adapter
from jaxpeft._methods.corda import corda
from jaxpeft._methods.dora import dora
from jaxpeft._methods.eva import eva
from jaxpeft._methods.gates import gates
from jaxpeft._methods.hira import hira
from jaxpeft._methods.hra import hra
from jaxpeft._methods.ia3 import ia3
from jaxpeft._methods.loha import loha
from jaxpeft._methods.lokr import lokr
from jaxpeft._methods.longlora import longlora
from jaxpeft._methods.lora import lora
from jaxpeft._methods.lora_fa import lora_fa
from jaxpeft._methods.lora_ga import lora_ga
from jaxpeft._methods.mam import mam
from jaxpeft._methods.miss import miss
from jaxpeft._methods.moelora import moelora
from jaxpeft._methods.oft import oft
from jaxpeft._methods.p_tuning import p_tuning
from jaxpeft._methods.pissa import olora, pissa
from jaxpeft._methods.poly import poly
from jaxpeft._methods.prefix_tuning import prefix_tuning
from jaxpeft._methods.prompt_tuning import prompt_tuning
from jaxpeft._methods.prune import prune
from jaxpeft._methods.road import road
from jaxpeft._methods.selection import (
    bitfit,
    full_finetuning,
    last_layers,
    linear_probe,
    norm_tuning,
    unfreeze,
)
from jaxpeft._methods.sparse_delta import sparse_delta
from jaxpeft._methods.trainable_tokens import trainable_tokens
from jaxpeft._methods.unipelt import unipelt
from jaxpeft._methods.vera import vera
from jaxpeft._methods.xlora import xlora
from jaxpeft._site import OutputSlice, Site
from jaxpeft._sites import Sites
from jaxpeft._tree import base_params, combine, split
from jaxpeft._version import __version__ as __version__
from jaxpeft._view import View
from jaxpeft._weight import Weight
from jaxpeft.quant._loftq import loftq
from jaxpeft.quant._quantize import quantize

if TYPE_CHECKING:  # for tools that read types; at run time, `__getattr__` loads them
    from jaxpeft import (  # noqa: F401
        adapters,
        bridge,
        calibration,
        data,
        extend,
        io,
        mixtures,
        models,
        optim,
        prompts,
        quant,
        serve,
        sparsity,
        train,
    )


_NAMESPACES = (
    "adapters",
    "bridge",
    "calibration",
    "data",
    "extend",
    "io",
    "mixtures",
    "models",
    "optim",
    "prompts",
    "quant",
    "serve",
    "sparsity",
    "train",
)

__all__ = [
    "Materialized",
    "MaterializedWarning",
    "MemoryEstimate",
    "Method",
    "NotMergeableError",
    "OutputSlice",
    "ParamCounts",
    "Placeholder",
    "Site",
    "Sites",
    "Trainable",
    "View",
    "Weight",
    "adalora",
    "base_params",
    "bitfit",
    "boft",
    "bottleneck_adapter",
    "chain",
    "combine",
    "corda",
    "count_params",
    "dora",
    "estimate_memory",
    "eva",
    "full_finetuning",
    "gates",
    "hira",
    "hra",
    "ia3",
    "last_layers",
    "lift",
    "linear_probe",
    "loftq",
    "loha",
    "lokr",
    "longlora",
    "lora",
    "lora_fa",
    "lora_ga",
    "mam",
    "merge",
    "miss",
    "moelora",
    "norm_tuning",
    "oft",
    "olora",
    "p_tuning",
    "parallel_adapter",
    "param_labels",
    "pissa",
    "poly",
    "prefix_tuning",
    "prompt_tuning",
    "prune",
    "quantize",
    "road",
    "sites",
    "sparse_delta",
    "split",
    "trainable_mask",
    "trainable_only",
    "trainable_tokens",
    "unfreeze",
    "unipelt",
    "vera",
    "xlora",
]


def __getattr__(name: str) -> Any:
    """A namespace, imported when it is first used (PEP 562)."""
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_NAMESPACES, "__version__"])
