"""What each primitive does with a structured weight, one file per kind of primitive."""

from jaxpeft.rules import composites, contractions, control, gathers, scaling, sharding, views
from jaxpeft.rules.registry import COMPOSITES, COMPUTING, RULES

__all__ = [
    "COMPOSITES",
    "COMPUTING",
    "RULES",
    "composites",
    "contractions",
    "control",
    "gathers",
    "scaling",
    "sharding",
    "views",
]
