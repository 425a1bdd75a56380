"""Kernels for one kind of hardware, chosen by hand: `fused`."""

from jaxpeft.quant._kernels.fused import fused

__all__ = ["fused"]
