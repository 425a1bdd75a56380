"""LoRA-FA: low-rank factors of which the first stays as it was drawn."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft.extend._apply import apply_to_sites


@register_method
def lora_fa(
    rank: int | Mapping[str, int],
    sites: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
    dropout: float = 0.0,
    init: Literal["kaiming", "gaussian"] = "kaiming",
    dtype: Any = jnp.float32,
) -> Method:
    """LoRA with frozen `a`: each matrix `w` becomes `w + s * a @ b`, and only `b` is trained.

    Half of the trained numbers, and of a product's input only x @ a (..., r) is kept for the
    backward pass. `a` follows from the method's key and is in no adapter file.

    Args:
      rank, alpha, scaling, dropout, init, dtype: As for `lora`.
      sites: The matrices to adapt; no embeddings, whose `a` starts at zero.

    Returns:
      A method with r * out trained numbers per matrix.

    Raises:
      ValueError: As `lora`; or an embedding is selected.

    References:
      Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
      Fine-tuning, 2023, section 3. https://arxiv.org/abs/2308.03303
    """
    more = dict(alpha=alpha, scaling=scaling, dropout=dropout, init=init, dtype=dtype)
    low = low_rank("lora_fa", rank, sites, **more)  # type: ignore[arg-type]
    if lookups := [path for path, site in sites.items() if "embedding" in site.kinds]:
        raise ValueError(
            f"`lora_fa`: '{lookups[0]}' is an embedding, whose `a` starts at zero and, frozen, "
            "would stay there. Leave it out of the sites, or use `lora`."
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key, site
        old: LowRank = view.weight
        return dataclasses.replace(view, weight=dataclasses.replace(old, a=old.a.value))

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="lora_fa", parts=True)

    return dataclasses.replace(low, apply=apply)
