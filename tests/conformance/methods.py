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


def _lora(sites, dtype):
    return jp.lora(2, sites.matrices, alpha=3.0, dtype=dtype)


def _lora_on_int8(sites, dtype):
    return jp.chain(
        jp.quantize("int8", sites.linear),
        jp.lora(2, sites.linear, alpha=3.0, scaling="alpha/sqrt(r)", dtype=dtype),
    )


_LINEAR = ("linear",)

METHODS = [
    Method("lora", _lora),
    Method("ia3", lambda sites, dtype: jp.ia3(sites.linear, dtype=dtype), roles=_LINEAR),
    Method("lora on int8", _lora_on_int8, roles=_LINEAR, factored=False),
]
