"""Mixtures of LoRA adapters: stacks of experts, weighted merges, and single tasks as plain LoRA."""

from jaxpeft.mixtures._stack import AdapterStack, merge_weighted, stack_adapters
from jaxpeft.mixtures._tasks import select_task

__all__ = ["AdapterStack", "merge_weighted", "select_task", "stack_adapters"]
