"""MOELoRA: a mixture of LoRA experts, gated by the task of each example."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import low_rank
from jaxpeft._methods.task_routing import PerCallTasks, check_counts, routing_weights_of
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class TaskGatedExperts(Weight):
    """x @ w + scale * ((x @ a) * p) @ b, with routing weights p = softmax(tasks @ gate)[task].

    `a` holds the experts' first factors side by side, in blocks of equally many columns; all
    columns of expert i are multiplied by p[i].
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    tasks: Any = axes("task", "embedding", shared=True)
    gate: Any = axes("embedding", "expert", shared=True)
    task: Any = axes(shared=True)  # () or (batch,)
    scale: float = static(1.0)
    path: str = static("")

    is_mergeable = False
    local_in = local_out = True

    def forward(self, x):
        rank = self.a.array.shape[-1]
        by_column = repeat_by_column(expert_weights(self.tasks.array, self.gate.array), rank)
        own = routing_weights_of(by_column, self.task, x, self.path)
        low = x @ self.a
        # A convolution in groups has the columns once for each group.
        grouped = low.reshape(*low.shape[:-1], -1, rank)
        low = (grouped * own[..., None, :]).reshape(low.shape)
        return x @ self.w + self.scale * (low @ self.b)


def expert_weights(tasks: jax.Array, gate: jax.Array) -> jax.Array:
    """The routing weight (tasks, experts) of each expert for each task."""
    return jax.nn.softmax(tasks @ gate, axis=-1)


def repeat_by_column(weights: jax.Array, rank: int) -> jax.Array:
    """Routing weights (tasks, experts) repeated for each column of an expert (tasks, rank)."""
    return jnp.repeat(weights, rank // weights.shape[-1], axis=-1)


@register_method
def moelora(
    rank: int,
    sites: Sites,
    *,
    experts: int,
    tasks: int,
    task_embedding_dim: int = 64,
    alpha: float | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Mixture of LoRA experts for several tasks, with a gate that depends on the task alone.

    Each selected matrix `w` (in, out) gives, for an input of task t,

        y = x @ w + s * sum_i p[t, i] * x @ a_i @ b_i,    p[t] = softmax(e[t] @ g),    s = alpha / r

    with trainable experts `a_i` (in, r / experts) and `b_i` (r / experts, out) at each matrix, and
    a trainable table of task embeddings `e` (tasks, task_embedding_dim) and a gate `g`
    (task_embedding_dim, experts) that all matrices share. `a_i` starts at random, `b_i` at zero,
    so that training starts at the base model.

    The task ids are given per call: `combine(frozen, adapter, task=ids)`, with one integer for the
    whole call, or `ids` (batch,) with one per example. The outputs for an id that is out of range,
    such as -1, are NaN. `mixtures.select_task` converts one task to plain LoRA, which merges.

    Args:
      rank: r, the sum of the ranks of all experts.
      sites: The matrices to adapt, with all of their outputs, each of them used in a product.
      experts: Number of experts, which divides the rank.
      tasks: Number of tasks.
      task_embedding_dim: Size of the task embeddings; 64 in the paper.
      alpha: Strength of the update. `None` means s = 1.
      dtype: Dtype of the trainable arrays.

    Returns:
      A `Method` with r * (in + out) trainable parameters per matrix, and
      task_embedding_dim * (tasks + experts) once.

    Raises:
      ValueError: As for `lora`. Also if `experts`, `tasks` or `task_embedding_dim` is below 1, if
        `experts` does not divide the rank, or if a slice of the outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> x = jnp.ones((2, 8))
      >>> sites = jp.sites(fn, params, x)
      >>> method = jp.moelora(4, sites.linear, experts=2, tasks=3, task_embedding_dim=5)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 4), 'w/b': (4, 4), 'w/tasks': (3, 5), 'w/gate': (5, 2)}
      >>> tree = jp.combine(frozen, adapter, task=[0, 2])  # one task id per example
      >>> jp.lift(fn)(tree, x).shape
      (2, 4)

    References:
      Liu et al., When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
      Applications, 2023, section 4. https://arxiv.org/abs/2310.18339
    """
    check_counts("moelora", tasks, experts, "experts")
    low = low_rank("moelora", rank, sites, alpha=alpha, dtype=dtype)
    if rank % experts:
        divisors = [n for n in range(1, rank + 1) if rank % n == 0]
        raise ValueError(
            f"`moelora(rank={rank}, experts={experts})`: the number of experts should divide the "
            f"rank, since each expert has rank / experts columns. Choose one of {divisors}."
        )
    if task_embedding_dim < 1:
        raise ValueError(
            f"`moelora(task_embedding_dim={task_embedding_dim})`: give at least 1; without a task "
            "embedding, the gate cannot tell tasks apart."
        )
    check_whole("moelora", sites)
    # The first matrix holds the arrays that all matrices share.
    names = {name: f"{next(iter(sites))}/{name}" for name in ("tasks", "gate")} if sites else {}

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        keys = jax.random.split(key)
        shapes = {"tasks": (tasks, task_embedding_dim), "gate": (task_embedding_dim, experts)}
        shared: dict[str, Any] = {name: Placeholder(path) for name, path in names.items()}
        if site.path == next(iter(sites)):
            for k, (name, shape) in zip(keys, shapes.items(), strict=True):
                start = jax.random.normal(k, shape, dtype) / math.sqrt(task_embedding_dim)
                shared[name] = Trainable(start, name=names[name])
        experts_at_site = TaskGatedExperts(
            old.w,
            old.a,
            old.b,
            shared["tasks"],
            shared["gate"],
            PerCallTasks("task"),
            old.scale,
            site.path,
        )
        return dataclasses.replace(view, weight=experts_at_site)

    options = dict(
        rank=rank,
        sites=sites,
        experts=experts,
        tasks=tasks,
        task_embedding_dim=task_embedding_dim,
        alpha=alpha,
        dtype=dtype,
    )
    return Method(
        "moelora",
        options,
        lambda key, tree: apply_to_sites(key, low(key, tree), sites, make, caller="moelora"),
    )
