"""What a row is, the sizes all rows share, and random parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Sizes are chosen so that no activation has as many elements as a weight: that is how a
# materialized weight is told from an activation. test_rows.py holds them to it.
B, T = 2, 5  # batch, time
D, F = 13, 17  # model width, hidden width
N, H = 3, 7  # heads, head width: N * H is unlike D
V = 29  # vocabulary
E, C = 4, 6  # experts, tokens of one expert
L = 3  # layers of a stack


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: `fn(params, *args)`.

    Attributes:
      also: More functions of the same parameters, with their arguments.
      mesh: The mesh that the model runs on, if any.
    """

    fn: Callable
    params: Any
    args: tuple
    also: tuple[tuple[Callable, tuple], ...] = ()
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One style of model, and what is true of it.

    Paths are those of `jax.tree_util.keystr(..., simple=True, separator="/")`.
    """

    name: str
    build: Callable[[], Case]
    linear: tuple[str, ...] = ()  # contracted with an activation
    embedding: tuple[str, ...] = ()  # read by rows, or multiplied by a one-hot row
    conv: tuple[str, ...] = ()
    # Weights that cannot stay factored here, by the three exceptions; empty everywhere else.
    materializes: tuple[str, ...] = ()
    reverse: bool = True  # False: JAX itself has no reverse mode for the program
    tolerance: float = 1e-10  # looser only where the program itself casts down
    vmap: bool = True  # False: the dense program cannot be vmapped
    bf16: bool = True  # False: the dense program does not run in bf16
    # A custom rule makes the dense gradient of these weights in the hand-written step too.
    rule: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()  # weights that the model takes no gradient through
    # Rows that stand for their kind in the everyday suite.
    everyday: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.linear + self.embedding + self.conv))


ROWS: list[Row] = []


def row(name: str, **facts) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Registers the function below it as the model of a row."""

    def register(build):
        ROWS.append(Row(name, build, **facts))
        return build

    return register


def paths(tree) -> dict[str, Any]:
    """The leaves of a tree by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves}


def matrices(row: Row, case: Case) -> list[str]:
    """The paths of the row's matrices as the tree spells them (NNX adds `/value`)."""
    have = paths(case.params)
    return [n if n in have else n + "/value" for n in row.matrices]


def all_rows() -> list:
    """Every row as a test's parameter; those outside the everyday suite carry the mark."""
    return [pytest.param(r, id=r.name, marks=marks(r.everyday)) for r in ROWS]


def marks(everyday: bool) -> list:
    return [] if everyday else [pytest.mark.conformance]


def random(*shape, seed: int = 0, scale: float = 0.4, dtype=jnp.float64):
    """Normal numbers, the same ones for the same seed and shape."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * scale, dtype)


def params(**shapes):
    """Random arrays by name; a name that ends in `scale` is around 1."""
    return {
        name: random(*shape, seed=i + 1) + (1.0 if name.endswith("scale") else 0.0)
        for i, (name, shape) in enumerate(shapes.items())
    }


def randomized(tree):
    """The tree with every real array replaced by random float64, norm scales around 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    out = []
    for i, (path, x) in enumerate(leaves):
        if jnp.issubdtype(x.dtype, jnp.floating):
            around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
            x = random(*x.shape, seed=i + 1) + around
        out.append(x)
    return structure.unflatten(out)


def activations(*shape, seed: int = 100):
    return random(*shape, seed=seed, scale=1.0)


def tokens(*shape, low: int = 0, high: int = V, seed: int = 200):
    return jnp.asarray(np.random.default_rng([seed, *shape]).integers(low, high, shape), jnp.int32)


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def attend(q, k, v):
    """Causal attention of (B, T, N, H) queries, keys and values."""
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
