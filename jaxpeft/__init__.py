"""jaxpeft: parameter-efficient fine-tuning for any JAX function, unmodified."""

from jaxpeft.lift import Materialized, MaterializedWarning, NotAMatrixError, lift, merge
from jaxpeft.methods import lora
from jaxpeft.sites import Part, Site, Sites, sites
from jaxpeft.tree import Hole, Train, base, chain, combine, count, labels, mask, split
from jaxpeft.weight import View, Weight

__version__ = "0.1.0"

__all__ = [
    "Hole",
    "Materialized",
    "MaterializedWarning",
    "NotAMatrixError",
    "Part",
    "Site",
    "Sites",
    "Train",
    "View",
    "Weight",
    "base",
    "chain",
    "combine",
    "count",
    "labels",
    "lift",
    "lora",
    "mask",
    "merge",
    "sites",
    "split",
]
