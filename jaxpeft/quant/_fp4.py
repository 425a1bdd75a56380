"""FP4: four-bit floats of a sign, two exponent bits and one fraction bit."""

import jax

from jaxpeft.quant._book import Book
from jaxpeft.quant._codebook import Layout, codebook
from jaxpeft.quant._flat import Flat
from jaxpeft.quant._rows import Codebook

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

FP4 = Book("fp4", tuple(sign * m / 12 for sign in (1, -1) for m in _MAGNITUDES))


def fp4(
    matrix: jax.Array,
    *,
    block: int = 64,
    double: bool = False,
    layout: Layout = "rows",
) -> Codebook | Flat:
    """Rounds a matrix (*stack, in, out) to floats of four bits.

    scale = max |w| over `block` rows of a column, codes = the nearest of the sixteen values
    +-(0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1) to w / scale, in the order of the codes that
    bitsandbytes writes. Bits per parameter and arguments are those of `nf4`.

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 4.
      https://arxiv.org/abs/2305.14314
    """
    return codebook(matrix, FP4, block=block, double=double, layout=layout)
