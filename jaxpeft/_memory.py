"""The memory of a training step, estimated from shapes alone."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxpeft import _compat as compat
from jaxpeft._argument_order import check_loss_order, check_order
from jaxpeft._tree import arrays_of


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """What a training step holds in memory, in bytes. Printing it shows a table in MiB.

    Attributes:
      weights: The frozen tree and the adapter.
      gradients: One array for each array of the adapter.
      optimizer: The state of the optax transformation.
      activations: What the forward pass keeps for the backward pass, other than its arguments.
        Temporaries of the compiler are not included; `compiled.memory_analysis()` has them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        rows = {**dataclasses.asdict(self), "total": self.total}
        return "\n".join(f"{name:<12}{size / 2**20:12,.2f} MiB" for name, size in rows.items())


def estimate_memory(
    loss: Callable, frozen: Any, adapter: Mapping[str, Any], *args: Any, tx: Any = None
) -> MemoryEstimate:
    """Estimates what a training step on a loss holds in memory, from shapes alone.

    Args:
      loss: `loss(frozen, adapter, *args)`, a scalar, which is differentiated with respect
        to the adapter.
      frozen, adapter: From `split`. Arrays or `jax.ShapeDtypeStruct`s.
      args: The other arguments of the loss, such as a batch. Arrays or `jax.ShapeDtypeStruct`s.
      tx: An optax transformation, or `None` for no optimizer state.

    Returns:
      The bytes of weights, gradients, optimizer state and saved activations. Nothing is computed.

    Raises:
      ValueError: The frozen tree and the adapter are swapped, here or in `loss`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, x = jnp.ones((64, 64), "float32"), jnp.ones((8, 64), "float32")
      >>> print(estimate_memory(lambda w, a, x: jnp.sum(jnp.tanh(x @ w) @ a["v"]), w, {"v": w}, x))
      weights             0.03 MiB
      gradients           0.02 MiB
      optimizer           0.00 MiB
      activations         0.00 MiB
      total               0.05 MiB
    """
    check_order("estimate_memory(loss, frozen, adapter, ...)", adapter)
    check_loss_order(loss)
    adapter = dict(adapter)
    arrays, rebuilt = arrays_of(frozen)
    state = jax.eval_shape(tx.init, adapter) if tx is not None else ()
    return MemoryEstimate(
        _bytes((frozen, adapter)),
        _bytes(adapter),
        _bytes(state),
        _saved(lambda xs, adapter, args: loss(rebuilt(xs), adapter, *args), arrays, adapter, args),
    )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "shape")
    )


def _saved(loss: Callable, frozen: Any, adapter: Any, args: Any) -> int:
    """Bytes of the residuals of the forward pass that are not arguments of it."""

    def residuals(frozen: Any, adapter: Any, args: Any) -> list:
        _, pullback = jax.vjp(lambda adapter: loss(frozen, adapter, args), adapter)
        return jax.tree.leaves(pullback)

    jaxpr, _ = compat.open_jaxpr(jax.make_jaxpr(residuals)(frozen, adapter, args))
    known = set(jaxpr.invars) | set(jaxpr.constvars)
    kept = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)} - known
    return _bytes([v.aval for v in kept])
