"""Fine-tuning methods, one file per method or tight family."""

from jaxpeft.methods.bottleneck import bottleneck, parallel
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.lora import lora
from jaxpeft.methods.prefix import prefix, with_virtual, without_virtual
from jaxpeft.methods.prompt import check_ids, check_prompt, prompt, virtual_ids
from jaxpeft.methods.selection import bitfit, full, last_layers, linear_probe, norm_tuning, unfreeze

__all__ = [
    "bitfit",
    "bottleneck",
    "check_ids",
    "check_prompt",
    "full",
    "ia3",
    "last_layers",
    "linear_probe",
    "lora",
    "norm_tuning",
    "parallel",
    "prefix",
    "prompt",
    "unfreeze",
    "virtual_ids",
    "with_virtual",
    "without_virtual",
]
