"""Optax transformations for fine-tuning.

lora_plus                           a learning rate of its own for LoRA's `b`
rank_allocator                      AdaLoRA's rank allocation
adamw8bit, scale_by_adam8bit        Adam with 8-bit moments
paged, to_host                      optimizer states in host memory
scheduled_pruning, rigl, fixed_mask sparse training
"""

from jaxpeft.optim._adam8bit import adamw8bit, scale_by_adam8bit
from jaxpeft.optim._lora_plus import lora_plus
from jaxpeft.optim._masking import fixed_mask
from jaxpeft.optim._paging import paged, to_host
from jaxpeft.optim._rank_allocator import rank_allocator
from jaxpeft.optim._rigl import rigl
from jaxpeft.optim._scheduled_pruning import scheduled_pruning

__all__ = [
    "adamw8bit",
    "fixed_mask",
    "lora_plus",
    "paged",
    "rank_allocator",
    "rigl",
    "scale_by_adam8bit",
    "scheduled_pruning",
    "to_host",
]
