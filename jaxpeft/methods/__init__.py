"""Fine-tuning methods, one file per method or tight family."""

from jaxpeft.methods.bottleneck import bottleneck, parallel
from jaxpeft.methods.dora import dora
from jaxpeft.methods.folding import fold
from jaxpeft.methods.hira import hira
from jaxpeft.methods.hybrids import mam, unipelt
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.lora import lora
from jaxpeft.methods.prefix import prefix, with_prefixes, with_virtual, without_virtual
from jaxpeft.methods.prompt import (
    check_ids,
    check_prompt,
    p_tuning,
    prompt,
    template,
    virtual_ids,
)
from jaxpeft.methods.selection import bitfit, full, last_layers, linear_probe, norm_tuning, unfreeze
from jaxpeft.methods.tokens import trainable_tokens

__all__ = [
    "bitfit",
    "bottleneck",
    "check_ids",
    "check_prompt",
    "dora",
    "fold",
    "full",
    "hira",
    "ia3",
    "last_layers",
    "linear_probe",
    "lora",
    "mam",
    "norm_tuning",
    "p_tuning",
    "parallel",
    "prefix",
    "prompt",
    "template",
    "trainable_tokens",
    "unfreeze",
    "unipelt",
    "virtual_ids",
    "with_prefixes",
    "with_virtual",
    "without_virtual",
]
