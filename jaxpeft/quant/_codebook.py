"""A matrix in a codebook, in one of two layouts."""

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
    """The codes of a book nearest to a matrix (*stack, in, out).

    Raises:
      ValueError: The layout is unknown, or the block is no positive number.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`{book.name}(layout={layout!r})`: choose 'rows' or 'flat'.")
    return LAYOUTS[layout](matrix, book, block=block, double=double)
