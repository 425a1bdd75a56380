"""Parameter counts and bytes of a tree that was split."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._view import View, is_view
from jaxpeft._weight import Weight, with_innermost


@dataclasses.dataclass(frozen=True)
class ParamCounts:
    """How many parameters a tree has, and the bytes of the arrays that hold them.

    Attributes:
      trainable: Trainable parameters.
      frozen: Frozen parameters. A quantized weight has as many as the array that it stands for,
        whatever its format stores: packed values and scales are not counted.
      total: Parameters of the dense model that the tree stands for, plus what methods added.
      trainable_bytes, frozen_bytes: Bytes of the arrays as they are stored, so those of packed
        values and scales for a quantized weight.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return (
            f"trainable {self.trainable:,} of {self.total:,} ({share:.4f} %), "
            f"{self.trainable_bytes:,} bytes; frozen {self.frozen_bytes:,} bytes"
        )


def count_params(frozen: Any, adapter: Mapping[str, Any]) -> ParamCounts:
    """Counts the parameters and bytes of both parts of a tree; shapes are enough.

    Args:
      frozen, adapter: From `split`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, a = jnp.ones((4, 4), "float32"), jnp.ones((4, 1), "float32")
      >>> str(count_params({"w": w}, {"a": a}))
      'trainable 4 of 20 (20.0000 %), 16 bytes; frozen 64 bytes'
    """
    arrays = [x for x in jax.tree.leaves(frozen) if hasattr(x, "shape")]
    nodes = jax.tree.leaves(frozen, is_leaf=is_view)
    trained = list(adapter.values())
    return ParamCounts(
        sum(math.prod(x.shape) for x in trained),
        sum(map(_parameters, nodes)),
        sum(map(_bytes, trained)),
        sum(map(_bytes, arrays)),
    )


def _parameters(node: Any) -> int:
    """Parameters of a frozen array, or of all that stands in the place of one."""
    if not isinstance(node, View):
        return math.prod(node.shape) if hasattr(node, "shape") else 0
    whole = jax.ShapeDtypeStruct([axis.size for axis in node.axes], node.dtype)
    # A weight that acts on nothing is quantized: its fields stand for the whole array.
    weight = with_innermost(node.weight, lambda x: whole if isinstance(x, Weight) else x)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(weight) if hasattr(x, "shape"))


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
