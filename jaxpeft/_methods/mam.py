"""MAM adapters: a prefix and a scaled parallel adapter."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxpeft._method import Method, chain, register_method
from jaxpeft._methods.bottleneck_adapter import parallel_adapter
from jaxpeft._methods.prefix_tuning import prefix_tuning
from jaxpeft._sites import Sites


@register_method
def mam(
    length: int,
    width: int,
    keys: Sites,
    values: Sites,
    inputs: Sites,
    outputs: Sites,
    *,
    hidden: int | None = None,
    rope: Sequence[float] | None = None,
    scale: float = 4.0,
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Mix-and-match adapter: a prefix at attention, a scaled parallel adapter at the feed-forward.

    Args:
      length: Virtual positions of the prefix; the paper takes 30.
      width: Of the parallel adapter; the paper takes 512.
      keys, values: The projections of attention.
      inputs, outputs: The first and the last kernel of each feed-forward block.
      hidden: Inner width of the network that makes the prefix; `None` trains its rows.
      rope: As for `prefix`.
      scale: Of the parallel adapter.
      activation, dropout: Of the parallel adapter.
      dtype: Of what is trained.

    Returns:
      `chain` of the two, with their trained numbers.

    References:
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021,
      section 4.6. https://arxiv.org/abs/2110.04366
    """
    at_attention = prefix_tuning(length, keys, values, hidden=hidden, rope=rope, dtype=dtype)
    beside = parallel_adapter(
        width, inputs, outputs, scale=scale, activation=activation, dropout=dropout, dtype=dtype
    )
    options = dict(
        length=length,
        width=width,
        keys=keys,
        values=values,
        inputs=inputs,
        outputs=outputs,
        hidden=hidden,
        rope=None if rope is None else [float(f) for f in rope],
        scale=scale,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )
    return Method("mam", options, chain(at_attention, beside).apply)
