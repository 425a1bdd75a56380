"""Functions of a trained adapter: conversion to plain LoRA, pruned ranks, reparameterizations."""

from jaxpeft.adapters._adalora import drop_pruned_ranks, effective_ranks, orthogonality_penalty
from jaxpeft.adapters._reparameterization import drop_reparameterization
from jaxpeft.adapters._to_lora import to_lora

__all__ = [
    "drop_pruned_ranks",
    "drop_reparameterization",
    "effective_ranks",
    "orthogonality_penalty",
    "to_lora",
]
