"""Quantized arrays as weights with their own dequantization, one file per format.

Start at coded.py. `quantize` puts a format under whatever else stands on a weight, `requantize`
folds that into the codes, `loftq` starts LoRA at what the rounding has lost.
"""

from jaxpeft.quant.fp4 import fp4
from jaxpeft.quant.fp8 import fp8
from jaxpeft.quant.int4 import int4
from jaxpeft.quant.int8 import int8
from jaxpeft.quant.loftq import loftq
from jaxpeft.quant.nf4 import nf4
from jaxpeft.quant.quantize import FORMATS, quantize
from jaxpeft.quant.requantize import Requantized, requantize

__all__ = [
    "FORMATS",
    "Requantized",
    "fp4",
    "fp8",
    "int4",
    "int8",
    "loftq",
    "nf4",
    "quantize",
    "requantize",
]
