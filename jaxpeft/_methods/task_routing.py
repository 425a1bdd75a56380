"""What mixtures of LoRA experts share: values of a call, and routing weights by task."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable, exportable_node
from jaxpeft._marks import Placeholder


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PerCall(Placeholder):
    """A placeholder for an array of each call, which may be given as a number or a list."""

    def fill(self, value: Any) -> Any:
        # A list would be a tree of numbers to `jax.jit`, and not the array that the weight needs.
        return jnp.asarray(value) if isinstance(value, (int, float, list, tuple)) else value


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PerCallTasks(PerCall):
    """A placeholder for the task id of a call, or for one task id per example.

    Raises:
      ValueError: The ids are not integers.
    """

    def fill(self, value: Any) -> Any:
        task = super().fill(value)
        if hasattr(task, "dtype") and not jnp.issubdtype(task.dtype, jnp.integer):
            raise ValueError(
                f"`combine({self.name}=...)` got {task.dtype} of shape {task.shape}, but task ids "
                "are integers from 0 on. Give one integer, or an array or a list with one integer "
                "per example."
            )
        return task


def routing_weights_of(weights: jax.Array, task: Any, x: jax.Array, path: str) -> jax.Array:
    """The routing weights of the task of each input.

    Args:
      weights: Routing weights of all tasks (tasks, n).
      task: Operand with the task id of the call (), or of each example (batch,).
      x: The inputs (batch, ..., in) of the product.
      path: Path of the weight, for error messages.

    Returns:
      (n,) for one task of the call, (batch, 1, ..., n) for a task per example. They are NaN if the
      task id is out of range, including negative ids.

    Raises:
      ValueError: There is a task for each example, but x does not lead with the examples.
    """
    own = jnp.take(weights, task.array, axis=0, mode="fill", fill_value=jnp.nan)
    # `take` counts negative ids from the end, and fills with NaN only beyond that.
    own = jnp.where((task.array >= 0)[..., None], own, jnp.nan)
    if task.array.ndim == 0:
        return own
    if task.array.ndim > 1 or x.ndim < 2 or x.shape[0] != task.array.shape[0]:
        raise ValueError(
            f"The mixture at '{path}' got task ids of shape {task.array.shape} (batch,), but its "
            f"input has shape {x.shape}: the model merges or moves the batch axis before this "
            "product. Give one task for the whole call, or lift the model over one example and use "
            "`jax.vmap`."
        )
    return own.reshape(own.shape[0], *(1,) * (x.ndim - 2), own.shape[-1])


def check_counts(caller: str, tasks: int, experts: int, name: str) -> None:
    """Raises ValueError unless there are at least one task and one expert, or skill."""
    if tasks < 1 or experts < 1:
        raise ValueError(
            f"`{caller}(tasks={tasks}, {name}={experts})`: `tasks` and `{name}` must both be at "
            "least 1."
        )
