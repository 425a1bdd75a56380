"""The methods that the table is run over: a new one is one line in METHODS."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jaxpeft as jp


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, and what is true of it.

    Attributes:
      name: For the test's name.
      make: From the model's sites and the adapter's dtype to the method.
      roles: The kinds of weight it takes: "linear", "embedding", "conv".
      factored: Whether it never forms an array of a weight's size. False only where the
        method's own formula does (a norm over the columns of the sum, codes to decode).
      by_hand: For a method whose weight is no matrix: a function of (row, case, tree) that
        computes the outputs with the method written into the model. `None`: merge says it.
      rows: The rows of the everyday suite, by role; the others run in the full product.
    """

    name: str
    make: Callable[[Any, Any], Any]
    roles: tuple[str, ...] = ("linear", "embedding", "conv")
    factored: bool = True
    by_hand: Callable[..., Any] | None = None
    rows: tuple[str, ...] = ("x @ w", "tied head", "lax.scan over layers", "experts by ragged_dot")


METHODS = [
    Method("lora", lambda sites, dtype: jp.lora(2, sites.matrices, alpha=3.0, dtype=dtype)),
]
