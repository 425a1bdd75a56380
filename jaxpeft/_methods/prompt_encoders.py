"""Prompt encoders of P-tuning, with the layout of PyTorch so that its weights can be converted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ENCODERS = ("lstm", "mlp")


def init_encoder(
    key: jax.Array, kind: str, *, embed: int, hidden: int, width: int, layers: int, dtype: Any
) -> dict[str, Any]:
    """Arrays by name, from a uniform distribution.

    The bounds are +-1 / sqrt(fan-in) for a linear layer and +-1 / sqrt(hidden) for an LSTM.

    Args:
      key: PRNG key.
      kind: One of `ENCODERS`.
      embed, hidden, width: Sizes of the inputs, of the hidden layers and of the outputs.
      layers: Number of layers of the LSTM.
      dtype: Dtype of the arrays.
    """
    keys = iter(jax.random.split(key, 8 * layers + 6))

    def uniform(shape: Sequence[int], fan_in: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, dtype, -1, 1) / fan_in**0.5

    def linear(n: int, m: int) -> dict[str, jax.Array]:
        return {"kernel": uniform((n, m), n), "bias": uniform((m,), n)}

    if kind == "mlp":
        sizes = [embed, hidden, hidden, width]
        return {f"mlp{i}": linear(*sizes[i : i + 2]) for i in range(3)}

    def cell(n: int) -> dict[str, jax.Array]:
        shapes = {"input": (n, 4 * hidden), "hidden": (hidden, 4 * hidden)}
        biases = dict.fromkeys(("input_bias", "hidden_bias"), (4 * hidden,))
        return {name: uniform(shape, hidden) for name, shape in (shapes | biases).items()}

    lstm = {
        f"lstm{i}": {side: cell(2 * hidden if i else embed) for side in ("forward", "backward")}
        for i in range(layers)
    }
    return lstm | {"mlp0": linear(2 * hidden, 2 * hidden), "mlp1": linear(2 * hidden, width)}


def encode(
    kind: str, network: dict[str, Any], rows: jax.Array, lengths: Sequence[int]
) -> jax.Array:
    """The rows of the virtual tokens, (sum of lengths, width).

    Args:
      kind: One of `ENCODERS`.
      network: From `init_encoder`.
      rows: Embeddings (sum of lengths, embed).
      lengths: Number of virtual tokens of each task; an LSTM encodes each task on its own.
    """
    if kind == "lstm":
        tasks = jnp.split(rows, [sum(lengths[:i]) for i in range(1, len(lengths))])
        rows = jnp.concatenate([_bidirectional(network, task) for task in tasks])
    names = _numbered(network, "mlp")
    for name in names:
        rows = rows @ network[name]["kernel"] + network[name]["bias"]
        rows = rows if name == names[-1] else jax.nn.relu(rows)
    return rows


def _numbered(network: dict[str, Any], kind: str) -> list[str]:
    return [f"{kind}{i}" for i in range(sum(name.startswith(kind) for name in network))]


def _bidirectional(network: dict[str, Any], x: jax.Array) -> jax.Array:
    for name in _numbered(network, "lstm"):
        cells = network[name]
        forward = _lstm(cells["forward"], x, reverse=False)
        backward = _lstm(cells["backward"], x, reverse=True)
        x = jnp.concatenate([forward, backward], axis=-1)
    return x


def _lstm(cell: dict[str, jax.Array], x: jax.Array, *, reverse: bool) -> jax.Array:
    """The hidden states (time, hidden) of inputs x (time, n).

    i, f, g, o = x @ input + h @ hidden + both biases;
    c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c).
    """
    inputs = x @ cell["input"] + cell["input_bias"] + cell["hidden_bias"]

    def step(state: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[Any, jax.Array]:
        h, c = state
        i, f, g, o = jnp.split(gates + h @ cell["hidden"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(cell["hidden"].shape[0], inputs.dtype)
    return jax.lax.scan(step, (zero, zero), inputs, reverse=reverse)[1]
