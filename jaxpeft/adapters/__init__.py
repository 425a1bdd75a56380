"""What can be done with a trained adapter: convert it, simplify it, and read its ranks."""

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
