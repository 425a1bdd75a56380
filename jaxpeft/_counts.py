"""Parameter counts and bytes of a tree that was split."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# --- Counting -------------------------------------------------------------------------------


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ParamCounts:
    """How many numbers and bytes a tree holds.

    Attributes:
      trainable: Trained numbers.
      frozen: Numbers of the frozen arrays (codes and scales of quantized weights count as
        the numbers they are).
      total: Numbers of the dense model that the tree stands for, plus what methods added.
      trainable_bytes, frozen_bytes: Bytes of these arrays.
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
    """Numbers and bytes of both parts of a tree; shapes alone will do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, a = jnp.ones((4, 4), "float32"), jnp.ones((4, 1), "float32")
      >>> str(count_params({"w": w}, {"a": a}))
      'trainable 4 of 20 (20.0000 %), 16 bytes; frozen 64 bytes'
    """
    arrays = [x for x in jax.tree.leaves(frozen) if hasattr(x, "shape")]
    trained = list(adapter.values())
    return ParamCounts(
        sum(math.prod(x.shape) for x in trained),
        sum(math.prod(x.shape) for x in arrays),
        sum(map(_bytes, trained)),
        sum(map(_bytes, arrays)),
    )
