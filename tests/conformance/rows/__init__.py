"""The rows of the conformance table: models as people write them, none of them knowing jaxpeft."""

from conformance.rows import (  # noqa: F401  (each registers its rows)
    linen,
    loops,
    nnx,
    plain,
    sharded,
)
from conformance.rows.row import ROWS, Case, Row

__all__ = ["ROWS", "Case", "Row"]
