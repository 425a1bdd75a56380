"""Quantized arrays as weights with their own dequantization, one file per format.

`jaxpeft.quantize` puts a format under whatever else stands on a weight, `requantize` folds that
into the quantized values, `jaxpeft.loftq` starts LoRA at what rounding has lost.
"""

from jaxpeft.quant._fp4 import fp4
from jaxpeft.quant._fp8 import fp8
from jaxpeft.quant._int4 import int4
from jaxpeft.quant._int8 import int8
from jaxpeft.quant._nf4 import nf4
from jaxpeft.quant._quantize import FORMATS
from jaxpeft.quant._requantize import Requantized, requantize

__all__ = ["FORMATS", "Requantized", "fp4", "fp8", "int4", "int8", "nf4", "requantize"]
