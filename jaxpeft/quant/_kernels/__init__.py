"""Experimental kernels for one kind of hardware, which `fused` turns on."""

from jaxpeft.quant._kernels.fused import fused

__all__ = ["fused"]
