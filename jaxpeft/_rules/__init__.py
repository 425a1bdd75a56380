"""What each primitive does with a structured weight, one file per kind of primitive."""

from jaxpeft._rules import (
    composite_products,
    composites,
    contractions,
    control,
    gathers,
    scaling,
    sharding,
    views,
)
from jaxpeft._rules.registry import COMPOSITES, COMPUTING, RULES

__all__ = [
    "COMPOSITES",
    "COMPUTING",
    "RULES",
    "composite_products",
    "composites",
    "contractions",
    "control",
    "gathers",
    "scaling",
    "sharding",
    "views",
]
