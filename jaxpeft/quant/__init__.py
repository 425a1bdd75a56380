"""Quantized arrays as weights with their own dequantization, one file per format."""

from jaxpeft.quant.int8 import Int8, int8
from jaxpeft.quant.quantize import quantize

__all__ = ["Int8", "int8", "quantize"]
