"""What each primitive does with a structured weight, one file per kind of primitive."""

from jaxpeft.rules import contractions, control, gathers, scaling, sharding, views
from jaxpeft.rules.registry import COMPUTING, RULES

__all__ = [
    "COMPUTING",
    "RULES",
    "contractions",
    "control",
    "gathers",
    "scaling",
    "sharding",
    "views",
]
