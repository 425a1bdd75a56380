"""A language model small enough to be checked by hand, with LoRA written out."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.train import cross_entropy

VOCABULARY, WIDTH, RANK = 11, 6, 2


def model(dtype=jnp.float64, seed=0):
    """`(frozen, adapter)`, the adapter away from its init so that all gradients are there."""
    random = np.random.default_rng(seed)
    frozen = {
        "embed": random.normal(size=(VOCABULARY, WIDTH)),
        "w": random.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5,
        "head": random.normal(size=(WIDTH, VOCABULARY)),
    }
    adapter = {
        "w/a": random.normal(size=(WIDTH, RANK)) / WIDTH**0.5,
        "w/b": random.normal(size=(RANK, WIDTH)) / 2,
    }
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    return cast(frozen), cast(adapter)


def forward(frozen, adapter, tokens):
    """(B, T) -> (B, T, vocabulary)."""
    x = jax.nn.one_hot(tokens, len(frozen["embed"]), dtype=frozen["embed"].dtype) @ frozen["embed"]
    hidden = jnp.tanh(x @ frozen["w"] + x @ adapter["w/a"] @ adapter["w/b"])
    return hidden @ frozen["head"]


def loss_fn(frozen, adapter, batch, key):
    del key
    logits = forward(frozen, adapter, batch["tokens"])
    return cross_entropy(logits, batch["targets"], batch["weights"])


def noisy_loss_fn(frozen, adapter, batch, key):
    """With dropout, so that keys matter."""
    x = frozen["embed"][batch["tokens"]]
    kept = x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape) * 2
    hidden = jnp.tanh(x @ frozen["w"] + kept @ adapter["w/a"] @ adapter["w/b"])
    return cross_entropy(hidden @ frozen["head"], batch["targets"], batch["weights"])


def batch(rows=24, length=20, seed=0, dtype=jnp.float64):
    random = np.random.default_rng(seed)
    return {
        "tokens": random.integers(VOCABULARY, size=(rows, length)),
        "targets": random.integers(VOCABULARY, size=(rows, length)),
        "weights": random.integers(2, size=(rows, length)).astype(dtype),
    }
