"""Fine-tuning methods, one file per method or tight family."""

from jaxpeft.methods.lora import LowRank, lora

__all__ = ["LowRank", "lora"]
