"""The rows of the conformance table: models as people write them, none of them knowing jaxpeft."""

from . import (  # noqa: F401  (they register rows)
    joined,
    linen,
    loops,
    nnx,
    plain,
    sharded,
    transformer,
)
from .row import ROWS, Case, Row

__all__ = ["ROWS", "Case", "Row"]
