"""Sparsity: scores of entries and groups, masks, structured pruning, and weights that compensate.

The methods themselves (`prune`, `sparse_delta`, `gates`) are at the top level, and the optimizer
transformations that prune during training in `jaxpeft.optim`.
"""

from jaxpeft.sparsity._gates import expected_density, gate_masks
from jaxpeft.sparsity._groups import (
    PrunableGroups,
    group_scores,
    prunable_groups,
    prune_structured,
    topk_groups,
)
from jaxpeft.sparsity._masks import mask_density, topk_mask
from jaxpeft.sparsity._scores import magnitude_scores, obs_scores, saliency_scores
from jaxpeft.sparsity._sparsegpt import sparsegpt_update

__all__ = [
    "PrunableGroups",
    "expected_density",
    "gate_masks",
    "group_scores",
    "magnitude_scores",
    "mask_density",
    "obs_scores",
    "prunable_groups",
    "prune_structured",
    "saliency_scores",
    "sparsegpt_update",
    "topk_groups",
    "topk_mask",
]
