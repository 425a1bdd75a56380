"""A matrix quantized with a codebook, in one of two layouts."""

from collections.abc import Callable
from typing import Literal

import jax

from jaxpeft.quant._book import Book
from jaxpeft.quant._flat import Flat, flat
from jaxpeft.quant._rows import Codebook, rows

Layout = Literal["rows", "flat"]

LAYOUTS: dict[str, Callable[..., Codebook | Flat]] = {"rows": rows, "flat": flat}


def codebook(
    matrix: jax.Array, book: Book, *, block: int, double: bool, layout: Layout
) -> Codebook | Flat:
    """The matrix (*stack, in, out), each entry the nearest value of a codebook.

    Raises:
      ValueError: The layout is unknown, or the block is not a positive integer.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`{book.name}(layout={layout!r})`: choose 'rows' or 'flat'.")
    return LAYOUTS[layout](matrix, book, block=block, double=double)
