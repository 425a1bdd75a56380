"""Optax transformations for fine-tuning: learning rates, rank allocation, memory, sparsity."""

from jaxpeft.optim._adam8bit import adamw8bit, scale_by_adam8bit
from jaxpeft.optim._lora_plus import lora_plus
from jaxpeft.optim._paging import paged, to_host
from jaxpeft.optim._pruning import fixed_mask, rigl, scheduled_pruning
from jaxpeft.optim._rank_allocator import rank_allocator

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
