"""Quantized arrays as weights with their own dequantization, one file per format."""

from jaxpeft.quant.fp4 import fp4
from jaxpeft.quant.fp8 import fp8
from jaxpeft.quant.int4 import int4
from jaxpeft.quant.int8 import int8
from jaxpeft.quant.nf4 import nf4
from jaxpeft.quant.quantize import FORMATS, quantize

__all__ = ["FORMATS", "fp4", "fp8", "int4", "int8", "nf4", "quantize"]
