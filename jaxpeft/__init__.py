"""jaxpeft: parameter-efficient fine-tuning for any JAX function, unmodified."""

from jaxpeft.lift import Materialized, MaterializedWarning, NotAMatrixError, lift, merge
from jaxpeft.memory import Memory, memory
from jaxpeft.method import Method, chain
from jaxpeft.methods import (
    bitfit,
    bottleneck,
    check_ids,
    check_prompt,
    full,
    ia3,
    last_layers,
    linear_probe,
    lora,
    norm_tuning,
    parallel,
    prefix,
    prompt,
    unfreeze,
    virtual_ids,
    with_virtual,
    without_virtual,
)
from jaxpeft.quant import loftq, quantize, requantize
from jaxpeft.sites import Part, Site, Sites, sites
from jaxpeft.tree import Hole, Train, base, combine, count, labels, mask, split
from jaxpeft.weight import View, Weight

__version__ = "0.1.0"

__all__ = [
    "Hole",
    "Materialized",
    "MaterializedWarning",
    "Memory",
    "Method",
    "NotAMatrixError",
    "Part",
    "Site",
    "Sites",
    "Train",
    "View",
    "Weight",
    "base",
    "bitfit",
    "bottleneck",
    "chain",
    "check_ids",
    "check_prompt",
    "combine",
    "count",
    "full",
    "ia3",
    "labels",
    "last_layers",
    "lift",
    "linear_probe",
    "loftq",
    "lora",
    "mask",
    "memory",
    "merge",
    "norm_tuning",
    "parallel",
    "prefix",
    "prompt",
    "quantize",
    "requantize",
    "sites",
    "split",
    "unfreeze",
    "virtual_ids",
    "with_virtual",
    "without_virtual",
]
