"""Prompt encoders: networks of a few virtual tokens, as in PyTorch, so that weights carry over."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ENCODERS = ("lstm", "mlp")


def init_encoder(
    key: jax.Array, kind: str, *, embed: int, hidden: int, width: int, layers: int, dtype: Any
) -> dict[str, Any]:
    """Arrays by name: uniform within 1 / sqrt(fan-in), for an LSTM 1 / sqrt(hidden)."""
    keys = iter(jax.random.split(key, 8 * layers + 6))

    def uniform(shape: Sequence[int], bound: int) -> jax.Array:
        return jax.random.uniform(next(keys), shape, dtype, -1, 1) / bound**0.5

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
        f"lstm{i}": {way: cell(2 * hidden if i else embed) for way in ("forward", "backward")}
        for i in range(layers)
    }
    return lstm | {"mlp0": linear(2 * hidden, 2 * hidden), "mlp1": linear(2 * hidden, width)}


def encode(
    kind: str, network: dict[str, Any], rows: jax.Array, lengths: Sequence[int]
) -> jax.Array:
    """rows (sum of lengths, embed) to (sum of lengths, width); an LSTM reads each task alone."""
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
        ways = network[name]
        forward = _lstm(ways["forward"], x, reverse=False)
        x = jnp.concatenate([forward, _lstm(ways["backward"], x, reverse=True)], axis=-1)
    return x


def _lstm(cell: dict[str, jax.Array], x: jax.Array, *, reverse: bool) -> jax.Array:
    """x (time, n) to the hidden states (time, hidden).

    i, f, g, o = x @ input + h @ hidden + both biases;
    c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c).
    """
    given = x @ cell["input"] + cell["input_bias"] + cell["hidden_bias"]

    def step(state: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[Any, jax.Array]:
        h, c = state
        i, f, g, o = jnp.split(gates + h @ cell["hidden"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(cell["hidden"].shape[0], given.dtype)
    return jax.lax.scan(step, (zero, zero), given, reverse=reverse)[1]
