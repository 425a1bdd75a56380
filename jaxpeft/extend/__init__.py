"""What the methods of this library are written with, for those who write their own."""

from jaxpeft._method import takes_sites
from jaxpeft._operand import CallSite, Operand
from jaxpeft._view import Axis
from jaxpeft._weight import (
    IN,
    OUT,
    STACK,
    PositionsError,
    Unsupported,
    arrays,
    axes,
    base_weight,
    dense,
    static,
    weight,
)
from jaxpeft.extend._apply import (
    apply_to_sites,
    bias_of,
    check_any,
    check_entries,
    check_floating,
    check_rank,
    check_whole,
)
from jaxpeft.extend._dropout import check_rate, dropout_key, dropped

__all__ = [
    "Axis",
    "CallSite",
    "IN",
    "OUT",
    "Operand",
    "PositionsError",
    "STACK",
    "Unsupported",
    "apply_to_sites",
    "arrays",
    "axes",
    "base_weight",
    "bias_of",
    "check_any",
    "check_entries",
    "check_floating",
    "check_rank",
    "check_rate",
    "check_whole",
    "dense",
    "dropout_key",
    "dropped",
    "static",
    "takes_sites",
    "weight",
]
