"""EVA: low-rank factors along which the inputs vary most."""

import dataclasses
import glob
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank, lora, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT
from jaxpeft.calibration._statistics import Moments, check_moments
from jaxpeft.extend._apply import apply_to_sites


@register_method
def eva(
    rank: int,
    sites: Sites,
    moments: Mapping[str, Moments],
    *,
    rho: float = 2.0,
    alpha: float | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Explained variance adaptation: LoRA whose `a` spans the principal inputs of each matrix.

    The columns of `a` (in, r) are the leading eigenvectors of the sum of x x^T over the inputs x
    of a few batches, `b` (r, out) is zero, so that training starts at the base model. Each
    component goes to the matrix where it explains the largest share of the inputs' variance, at
    most rho * rank to one, until the ranks of all matrices together are those of `lora`. A matrix
    that gets none is left out.

    All L matrices of a stack have one rank, by their mean shares, and a component of it costs L.
    One that costs more than is left of the ranks is passed over for those that cost less: where
    stacks are of different lengths, as of layers and one head, there may remain fewer ranks than
    one more component of the longest would cost.

    Args:
      rank: On average, over all matrices.
      sites: The matrices to adapt.
      moments: From `input_moments`, of at least these sites.
      rho: 1 gives every matrix the same rank.
      alpha, scaling, dropout, dtype: As for `lora`, with the scale that `rank` has.

    Returns:
      A method that calls itself `lora`, with the ranks that it has found: an adapter is stored
      and loaded without the moments.

    Raises:
      ValueError: As `lora`, a rank out of range at the call already; rho below 1, no moments of a
        site, or those of another model.

    References:
      Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance
      Adaptation, 2024, section 3. https://arxiv.org/abs/2410.07170
    """
    if rho < 1:
        raise ValueError(f"`eva(rho={rho})`: at least 1 is needed, for a rank of {rank} each.")
    low_rank("eva", rank, sites, alpha=alpha, scaling=scaling, dropout=dropout)  # checks
    vectors, shares = {}, {}
    for path, site in sites.items():
        second = check_moments(moments, site, "eva").second
        n, m = site.size(IN), site.size(OUT)
        m = site.part.size(m) if site.part else m
        most = min(int(rho * rank), n, m)
        values, columns = jnp.linalg.eigh(second)
        vectors[path] = columns[..., ::-1][..., :most]
        values = jnp.maximum(values[..., ::-1], 0)  # those of zero may be rounded below it
        total = jnp.sum(values, -1, keepdims=True)
        # Inputs that are all zero have no variance to be explained.
        share = values / jnp.where(total > 0, total, 1)
        shares[path] = np.asarray(jnp.mean(share.reshape(-1, share.shape[-1]), 0))[:most]
    costs = {path: math.prod(site.stack) for path, site in sites.items()}
    ranks = _distributed(shares, costs, rank * sum(costs.values()))
    chosen = sites.match(lambda site: ranks[site.path] > 0)
    scale = alpha if alpha is None or scaling == "alpha/r" else alpha * rank**0.5
    low = lora(
        {glob.escape(path): ranks[path] for path in chosen},
        chosen,
        # The scale of all of them is that of the average rank.
        alpha=scale and {glob.escape(path): scale * ranks[path] / rank for path in chosen},
        dropout=dropout,
        dtype=dtype,
    )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        old: LowRank = view.weight
        a = vectors[site.path][..., : ranks[site.path]]
        return dataclasses.replace(
            view, weight=dataclasses.replace(old, a=Trainable(jnp.array(a, dtype)))
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), chosen, make, caller="eva", parts=True)

    return dataclasses.replace(low, apply=apply)


def _distributed(
    shares: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """How many of its leading components each path keeps, the largest shares first.

    Args:
      shares: {path: of its components, in descending order}.
      costs: {path: of one component}.
      budget: That all costs together do not exceed.
    """
    ordered = sorted((-share, path) for path, own in shares.items() for share in own)
    ranks = dict.fromkeys(shares, 0)
    for _, path in ordered:
        # Costs of one path are equal: where one component is too dear, so are those after it.
        if costs[path] <= budget:
            budget -= costs[path]
            ranks[path] += 1
    return ranks
