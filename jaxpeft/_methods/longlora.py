"""LongLoRA: LoRA with trainable embeddings and norms, for longer contexts."""

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
    """LoRA on the projections, with trainable embeddings and norms.

    Each matrix `w` (in, out) of `sites` becomes

        w + s * a @ b

    as for `lora`, and the arrays of `embedding` and `norms` are trained themselves. LoRA alone
    does not close the gap to full fine-tuning at long contexts; with embeddings and norms, which
    have few parameters, it does (section 3.3). The other half of LongLoRA is how the model is
    trained: with `jaxpeft.models.shifted_sparse` as its `attention_fn`, and with interpolated
    positions in its configuration.

    Args:
      rank, alpha, dropout, dtype: As for `lora`.
      sites: The matrices to adapt; in the paper, the projections of attention.
      embedding: The embedding, such as `sites.embedding`. A head that is tied to it is trained
        with it.
      norms: Scales and biases of the normalizations, such as `sites.norm`.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix, and all parameters of the
      embedding and the norms.

    Raises:
      ValueError: As for `lora`. Also if one of the three selections is empty.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn = lambda p, ids: jax.nn.standardize(p["table"][ids]) * p["scale"] @ p["w"]
      >>> params = {"table": jnp.ones((6, 4)), "scale": jnp.ones(4), "w": jnp.ones((4, 4))}
      >>> sites = jp.sites(fn, params, jnp.zeros((1, 3), int))
      >>> method = jp.longlora(2, sites.linear, sites.embedding, sites.match("scale"))
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'scale': (4,), 'table': (6, 4), 'w/a': (4, 2), 'w/b': (2, 4)}

    References:
      Chen et al., LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, 2023,
      section 3. https://arxiv.org/abs/2309.12307
    """
    for name, chosen in (("embedding", embedding), ("norms", norms)):
        if not chosen:
            raise ValueError(
                f"`longlora({name}=...)` selects no parameter. Give, for example, "
                f"`sites.{name.removesuffix('s')}`, or use `lora` to train the projections only."
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
