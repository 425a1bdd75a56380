"""LongLoRA: what is trained when a model learns to read longer texts."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxpeft._method import Method, chain, register_method
from jaxpeft._methods.lora import lora
from jaxpeft._methods.selection import unfreeze
from jaxpeft._sites import Sites


@register_method
def longlora(
    rank: int | Mapping[str, int],
    sites: Sites,
    embedding: Sites,
    norms: Sites,
    *,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """LoRA on the projections, and the embedding and the norms as a whole.

    LoRA alone does not close the gap to full fine-tuning at long contexts; embeddings and norms,
    few numbers beside the rest, do (section 3.3). The other half of the method is how it is
    trained: `jaxpeft.models._shifted.shifted_sparse` as the model's `attention_fn`, and a
    configuration with interpolated positions.

    Args:
      rank, alpha, dropout, dtype: As for `lora`.
      sites: The projections of attention, in the paper.
      embedding: The table, `sites.embedding`; a head that is tied to it is trained with it.
      norms: `sites.norm`.

    Returns:
      `chain` of the two, with r * (in + out) trained numbers per matrix and all of the others.

    Raises:
      ValueError: As `lora`; or nothing is selected for one of the three.

    References:
      Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, 2023,
      section 3. https://arxiv.org/abs/2309.12307
    """
    for name, chosen in (("embedding", embedding), ("norms", norms)):
        if not chosen:
            raise ValueError(
                f"`longlora({name}=...)` selects no parameter. Without, it is `lora`; give "
                f"`sites.{name.removesuffix('s')}`."
            )
    low = lora(rank, sites, alpha=alpha, dropout=dropout, dtype=dtype)
    options = dict(
        rank=rank,
        sites=sites,
        embedding=embedding,
        norms=norms,
        alpha=alpha,
        dropout=dropout,
        dtype=dtype,
    )
    return Method("longlora", options, chain(low, unfreeze(embedding | norms)).apply)
