"""EVA: low-rank factors that start at the principal components of the inputs."""

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
    """Explained variance adaptation: LoRA along the principal components of the inputs.

    Each selected matrix `w` (in, out) becomes

        w + s * a @ b

    as for `lora`, where the columns of `a` (in, r) start at the leading eigenvectors of the sum of
    x x^T over the inputs x of a few batches, and `b` (r, out) at zero, so that training starts at
    the base model. The total of the ranks is that of `lora`, but they are redistributed: the
    components, over all matrices, that explain the largest fractions of their inputs' variance
    are chosen, at most rho * rank of one matrix. A matrix without a chosen component is not
    adapted.

    All L matrices of a stack have the same rank, from their mean fractions, so one component of
    a stack costs L of the total. A component that costs more than is left of the total is skipped
    in favor of cheaper ones. If stacks differ in length, such as layers and one head, the ranks
    may therefore sum to slightly less than the total.

    Args:
      rank: The mean rank of all matrices.
      sites: The matrices to adapt. `Sites.output_slice` selects a slice of their outputs.
      moments: Second moments of the inputs {path: Moments}, from `calibration.input_moments` with
        at least these sites.
      rho: Bound of one matrix's rank, as a multiple of `rank`. With 1, all ranks are equal.
      alpha, scaling, dropout, dtype: As for `lora`; every matrix gets the scale that `rank` gives.

    Returns:
      A `Method` with the name `lora` and the ranks that were found, r * (in + out) trainable
      parameters per matrix. Its adapter is stored and loaded without the moments.

    Raises:
      ValueError: As for `lora`, but a rank out of range is refused at the call already. Also if
        `rho` is below 1, or if the moments of a site are missing or are those of another model.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (16, 8))
      >>> sites = jp.sites(fn, params, x).linear
      >>> method = jp.eva(2, sites, jp.calibration.input_moments(fn, params, sites, [x]))
      >>> method.name, method.options["rank"]
      ('lora', {'w': 2})

    References:
      Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance
      Adaptation, 2024, section 3. https://arxiv.org/abs/2410.07170
    """
    if rho < 1:
        raise ValueError(f"`eva(rho={rho})`: give at least 1; with 1, each matrix has rank {rank}.")
    # This call checks the options; its method is not used.
    low_rank("eva", rank, sites, alpha=alpha, scaling=scaling, dropout=dropout)
    components, explained = {}, {}
    for path, site in sites.items():
        second = check_moments(moments, site, "eva").second
        n, m = site.size(IN), site.size(OUT)
        m = site.part.size(m) if site.part else m
        max_rank = min(int(rho * rank), n, m)
        variances, vectors = jnp.linalg.eigh(second)
        components[path] = vectors[..., ::-1][..., :max_rank]
        variances = jnp.maximum(variances[..., ::-1], 0)  # rounding may make zeros negative
        total = jnp.sum(variances, -1, keepdims=True)
        # Inputs that are all zero have no variance to be explained.
        fraction = variances / jnp.where(total > 0, total, 1)
        mean = jnp.mean(fraction.reshape(-1, fraction.shape[-1]), 0)
        explained[path] = np.asarray(mean)[:max_rank]
    costs = {path: math.prod(site.stack) for path, site in sites.items()}
    ranks = _distribute_ranks(explained, costs, rank * sum(costs.values()))
    chosen = sites.match(lambda site: ranks[site.path] > 0)
    # alpha / r of each matrix is to be the scale that the mean rank gives.
    mean_alpha = alpha if alpha is None or scaling == "alpha/r" else alpha * rank**0.5
    alphas = None
    if mean_alpha is not None:
        alphas = {glob.escape(path): mean_alpha * ranks[path] / rank for path in chosen}
    low = lora(
        {glob.escape(path): ranks[path] for path in chosen},
        chosen,
        alpha=alphas,
        dropout=dropout,
        dtype=dtype,
    )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        old: LowRank = view.weight
        a = components[site.path][..., : ranks[site.path]]
        return dataclasses.replace(
            view, weight=dataclasses.replace(old, a=Trainable(jnp.array(a, dtype)))
        )

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), chosen, make, caller="eva", parts=True)

    return dataclasses.replace(low, apply=apply)


def _distribute_ranks(
    explained: Mapping[str, np.ndarray], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """The rank of each path: how many of its leading components are chosen.

    Components are chosen in descending order of the fraction of variance that they explain.

    Args:
      explained: {path: fractions of its components, in descending order}.
      costs: {path: cost of one component}.
      budget: Upper bound of the sum of all costs.
    """
    ordered = sorted((-fraction, path) for path, own in explained.items() for fraction in own)
    ranks = dict.fromkeys(explained, 0)
    for _, path in ordered:
        # Components of one path cost the same. If one is too expensive, so are those after it,
        # and the chosen ones are always the leading ones.
        if costs[path] <= budget:
            budget -= costs[path]
            ranks[path] += 1
    return ranks
