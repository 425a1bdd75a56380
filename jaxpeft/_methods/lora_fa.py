"""LoRA-FA: LoRA with the first factor frozen at its random start."""

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
    """LoRA with frozen `a`.

    Each selected matrix `w` (in, out) becomes

        w + s * a @ b

    as for `lora`, but only `b` (r, out) is trained. The backward pass needs x @ a (..., r) and
    not the input x (..., in) of a product, which saves activation memory. `a` (in, r) is computed
    from the method's key and is not stored in an adapter folder.

    Args:
      rank, alpha, scaling, dropout, init, dtype: As for `lora`.
      sites: The matrices to adapt. Embeddings are refused, because their `a` starts at zero.

    Returns:
      A `Method` with r * out trainable parameters per matrix.

    Raises:
      ValueError: As for `lora`. Also if an embedding is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites = jp.sites(fn, params, jnp.ones((1, 8)))
      >>> frozen, adapter = jp.split(jp.lora_fa(2, sites.linear)(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/b': (2, 4)}

    References:
      Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
      Fine-tuning, 2023, section 3. https://arxiv.org/abs/2308.03303
    """
    more = dict(alpha=alpha, scaling=scaling, dropout=dropout, init=init, dtype=dtype)
    low = low_rank("lora_fa", rank, sites, **more)  # type: ignore[arg-type]
    if lookups := [path for path, site in sites.items() if "embedding" in site.kinds]:
        raise ValueError(
            f"`lora_fa`: '{lookups[0]}' is an embedding, whose `a` starts at zero and would stay "
            "there, because it is frozen. Leave it out of the sites, or use `lora`."
        )

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key, site
        old: LowRank = view.weight
        return dataclasses.replace(view, weight=dataclasses.replace(old, a=old.a.value))

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, low(key, tree), sites, make, caller="lora_fa", parts=True)

    return dataclasses.replace(low, apply=apply)
