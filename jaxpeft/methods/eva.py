"""EVA: low-rank factors along which the inputs vary most."""

import dataclasses
import glob
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.method import Method
from jaxpeft.methods.calibration import Moments, check_moments
from jaxpeft.methods.lora import LowRank, lora
from jaxpeft.methods.placing import place
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import IN, OUT, View


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
    of a few batches, `b` (r, out) is zero, so that training starts at the base model. The ranks
    of all matrices together are those of `lora`; each component goes to the matrix where it
    explains the largest share of the inputs' variance, at most rho * rank to one. A matrix that
    gets none is left out. All matrices of a stack have one rank, by their mean shares.

    Args:
      rank: On average.
      sites: The matrices to adapt.
      moments: From `input_moments`, of at least these sites.
      rho: 1 gives every matrix the same rank.
      alpha, scaling, dropout, dtype: As for `lora`, with the scale that `rank` has.

    Returns:
      A method that calls itself `lora`, with the ranks that it has found: an adapter is stored
      and loaded without the moments.

    Raises:
      ValueError: As `lora`; rho below 1, no moments of a site, or those of another model.

    References:
      Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance
      Adaptation, 2024, section 3. https://arxiv.org/abs/2410.07170
    """
    if rho < 1:
        raise ValueError(f"`eva(rho={rho})`: at least 1 is needed, for a rank of {rank} each.")
    lora(rank, sites, alpha=alpha, scaling=scaling, dropout=dropout, dtype=dtype)  # checks
    vectors, shares = {}, {}
    for path, site in sites.items():
        second = check_moments(moments, site, "eva").second
        most = min(int(rho * rank), site.size(IN), site.size(OUT))
        values, columns = jnp.linalg.eigh(second)
        vectors[path] = columns[..., ::-1][..., :most]
        share = values[..., ::-1] / jnp.sum(values, -1, keepdims=True)
        shares[path] = np.asarray(jnp.mean(share.reshape(-1, share.shape[-1]), 0))[:most]
    ranks = _distributed(shares, rank * len(sites))
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
            view, weight=dataclasses.replace(old, a=Train(jnp.array(a, dtype)))
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        return place(key, low(key, tree), chosen, make, who="eva")

    return dataclasses.replace(low, apply=apply)


def _distributed(shares: Mapping[str, np.ndarray], budget: int) -> dict[str, int]:
    """How many of its leading components each path keeps, the largest shares first."""
    ordered = sorted(
        ((-share, path) for path, own in shares.items() for share in own),
    )
    ranks = dict.fromkeys(shares, 0)
    for _, path in ordered[:budget]:
        ranks[path] += 1
    return ranks
