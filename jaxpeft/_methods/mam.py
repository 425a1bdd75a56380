"""MAM adapters: prefix tuning and a scaled parallel adapter."""

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
    bottleneck_dim: int,
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
    """Mix-and-match adapter: prefix tuning in attention, a scaled parallel adapter beside the MLP.

        attention       softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]    P_k, P_v of `length` rows
        feed-forward    y = MLP(x) + scale * (act(x @ down + c) @ up + e)

    Args:
      length: Number of virtual positions of the prefix; 30 in the paper.
      bottleneck_dim: Bottleneck dimension of the parallel adapter; 512 in the paper.
      keys, values: The key and value projections of attention.
      inputs, outputs: The first and the last kernel of each feed-forward block.
      hidden: Hidden size of the network that computes the prefix. `None` trains its rows.
      rope: The rotary frequencies of the model, as for `prefix_tuning`.
      scale: Factor of the parallel adapter.
      activation: Activation of the parallel adapter.
      dropout: Dropout rate of the parallel adapter.
      dtype: Dtype of the trainable parameters.

    Returns:
      The `chain` of `prefix_tuning` and `parallel_adapter`, with their trainable parameters. A
      call takes the virtual positions, as `prefix_tuning` does.

    Raises:
      ValueError: As `prefix_tuning` and `parallel_adapter`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> def model(p, x):
      ...     scores = jax.nn.softmax((x @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2))
      ...     return jax.nn.relu(scores @ (x @ p["v"]) @ p["up"]) @ p["down"]
      >>> params = {name: jnp.ones((4, 4)) for name in ("q", "k", "v", "up", "down")}
      >>> x, positions = jnp.ones((1, 5, 4)), jnp.array([[0, 1, -1, -1, -1]])
      >>> k, v, up, down = map(jp.sites(model, params, x).match, ("k", "v", "up", "down"))
      >>> frozen, adapter = jp.split(jp.mam(2, 3, k, v, up, down)(jax.random.key(0), params))
      >>> tree = jp.combine(frozen, adapter, virtual_positions=positions)
      >>> jp.lift(model)(tree, x).shape, sum(a.size for a in adapter.values())
      ((1, 5, 4), 47)

    References:
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, 2021,
      section 4.6. https://arxiv.org/abs/2110.04366
    """
    prefix = prefix_tuning(length, keys, values, hidden=hidden, rope=rope, dtype=dtype)
    parallel = parallel_adapter(
        bottleneck_dim,
        inputs,
        outputs,
        scale=scale,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
    )
    options = dict(
        length=length,
        bottleneck_dim=bottleneck_dim,
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
    return Method("mam", options, chain(prefix, parallel).apply)
