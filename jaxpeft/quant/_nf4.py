"""NF4: four bits whose values are equally likely under a normal distribution."""

import jax

from jaxpeft.quant._book import Book
from jaxpeft.quant._codebook import Layout, codebook
from jaxpeft.quant._flat import Flat
from jaxpeft.quant._rows import Codebook

NF4 = Book(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)


def nf4(
    matrix: jax.Array,
    *,
    block: int = 64,
    double: bool = False,
    layout: Layout = "rows",
) -> Codebook | Flat:
    """Quantizes a matrix (*stack, in, out) to NormalFloat of four bits.

    scale = max |w| over `block` rows of a column, values = the nearest of sixteen values to
    w / scale, which are quantiles of the standard normal distribution, scaled to [-1, 1] and
    with an exact zero.

    Args:
      matrix: The weights.
      block: Rows under one scale. 4 + 32 / block bits per parameter.
      double: Whether scales are quantized too, to eight bits by the dynamic map after their
        mean is subtracted, in tiles of 256. 4 + 8 / block + 32 / (256 * block) bits.
      layout: "rows" has its blocks along the input side, so that columns, and runs of whole
        blocks, can be cut and sharded. "flat" is bitsandbytes' own, blocks over the row-major
        (out, in) array, straddling its rows where `in` is not a multiple of the block.

    References:
      Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3 and
      appendix E. https://arxiv.org/abs/2305.14314
    """
    return codebook(matrix, NF4, block=block, double=double, layout=layout)
