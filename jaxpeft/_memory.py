"""What a training step holds in memory, from shapes alone."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxpeft import _compat as compat
from jaxpeft._tree import arrays_of


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step by purpose.

    Attributes:
      weights: The frozen tree and the adapter.
      gradients: One array for each trained one.
      optimizer: The state of the optax transformation.
      activations: What the forward pass keeps for the backward pass beside its arguments.
        Temporaries of the compiler are not in it: `compiled.memory_analysis()` has these.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        rows = {**dataclasses.asdict(self), "total": self.total}
        return "\n".join(f"{name:<12}{size / 2**20:12,.2f} MiB" for name, size in rows.items())


def estimate_memory(
    loss: Callable, adapter: Mapping[str, Any], frozen: Any, *args: Any, tx: Any = None
) -> MemoryEstimate:
    """Bytes that a step of `loss(adapter, frozen, *args)` holds.

    Args:
      loss: A function whose first result is differentiated in the adapter; a scalar.
      adapter, frozen: From `split`; shapes will do.
      args: What else the loss takes; shapes will do.
      tx: An optax transformation, or `None`.

    Returns:
      Weights, gradients, optimizer state and saved activations in bytes. Nothing is computed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, x = jnp.ones((64, 64), "float32"), jnp.ones((8, 64), "float32")
      >>> print(estimate_memory(lambda a, w, x: jnp.sum(jnp.tanh(x @ w) @ a["v"]), {"v": w}, w, x))
      weights             0.03 MiB
      gradients           0.02 MiB
      optimizer           0.00 MiB
      activations         0.00 MiB
      total               0.05 MiB
    """
    adapter = dict(adapter)
    arrays, rebuilt = arrays_of(frozen)
    state = jax.eval_shape(tx.init, adapter) if tx is not None else ()
    return MemoryEstimate(
        _bytes((adapter, frozen)),
        _bytes(adapter),
        _bytes(state),
        _saved(lambda adapter, xs, args: loss(adapter, rebuilt(xs), *args), adapter, arrays, args),
    )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "shape")
    )


def _saved(loss: Callable, adapter: Any, frozen: Any, args: Any) -> int:
    """Bytes of the residuals of the forward pass that are none of its arguments."""

    def residuals(adapter: Any, frozen: Any, args: Any) -> list:
        _, pullback = jax.vjp(lambda adapter: loss(adapter, frozen, args), adapter)
        return jax.tree.leaves(pullback)

    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(residuals)(adapter, frozen, args))
    known = set(jaxpr.invars) | set(jaxpr.constvars)
    kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)} - known
    return _bytes([v.aval for v in kept])
