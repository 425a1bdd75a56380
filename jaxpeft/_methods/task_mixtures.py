"""Mixtures: several low-rank experts at each weight, weighed by the task of an example."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._export import exportable, exportable_node
from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import low_rank
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PerCall(Placeholder):
    """A place for an array of the call, which may be given as a number or a list too."""

    def fill(self, value: Any) -> Any:
        # Left as it is, a list would be a tree of numbers to `jit`, and no array to the weight.
        return jnp.asarray(value) if isinstance(value, (int, float, list, tuple)) else value


@exportable_node
@exportable
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PerCallTasks(PerCall):
    """A place for the number of a task, or for one of each example.

    Raises:
      ValueError: They are no integers.
    """

    def fill(self, value: Any) -> Any:
        task = super().fill(value)
        if hasattr(task, "dtype") and not jnp.issubdtype(task.dtype, jnp.integer):
            raise ValueError(
                f"`combine({self.name}=...)` got {task.dtype} of shape {task.shape}, but tasks are "
                "numbered from 0 on. Give an integer, or an array or a list of integers, one for "
                "each example."
            )
        return task


def routing_weights_of(shares: jax.Array, task: Any, x: jax.Array, path: str) -> jax.Array:
    """Rows of `shares` (tasks, n) for the inputs x (batch, ..., in): (batch, 1, ..., n).

    One task for all gives (n,). A task that there is not gives NaN, a negative one too.

    Raises:
      ValueError: There is one task for each example, and x does not lead with the examples.
    """
    own = jnp.take(shares, task.array, axis=0, mode="fill", fill_value=jnp.nan)
    # `take` counts negative ones from the end, and fills in only beyond that.
    own = jnp.where((task.array >= 0)[..., None], own, jnp.nan)
    if task.array.ndim == 0:
        return own
    if task.array.ndim > 1 or x.ndim < 2 or x.shape[0] != task.array.shape[0]:
        raise ValueError(
            f"The mixture at '{path}' is told of tasks {task.array.shape} (batch,), but its input "
            f"has shape {x.shape}: the model merges or moves the batch before this product. Give "
            "one task for the whole call, or lift the model over one example and use `jax.vmap`."
        )
    return own.reshape(own.shape[0], *(1,) * (x.ndim - 2), own.shape[-1])


@weight
class Mixture(Weight):
    """x @ w + scale * ((x @ a) * share) @ b: columns of `a` belong to experts, in equal parts.

    share = softmax(tasks @ gate)[task].
    """

    w: Any = base_weight()
    a: Any = axes("in", "rank")
    b: Any = axes("rank", "out")
    tasks: Any = axes("task", "width", shared=True)
    gate: Any = axes("width", "expert", shared=True)
    task: Any = axes(shared=True)  # () or (batch,)
    scale: float = static(1.0)
    path: str = static("")

    is_mergeable = False
    local_in = local_out = True

    def forward(self, x):
        rank = self.a.array.shape[-1]
        shares = spread(mixture_weights(self.tasks.array, self.gate.array), rank)
        own = routing_weights_of(shares, self.task, x, self.path)
        low = x @ self.a
        grouped = low.reshape(*low.shape[:-1], -1, rank)  # a convolution in groups has it for each
        low = (grouped * own[..., None, :]).reshape(low.shape)
        return x @ self.w + self.scale * (low @ self.b)


def mixture_weights(tasks: jax.Array, gate: jax.Array) -> jax.Array:
    """The share (tasks, experts) of each expert in each task."""
    return jax.nn.softmax(tasks @ gate, axis=-1)


def spread(shares: jax.Array, rank: int) -> jax.Array:
    """(tasks, rank) of (tasks, experts): an expert has as many columns as the others."""
    return jnp.repeat(shares, rank // shares.shape[-1], axis=-1)


@weight
class Skills(Weight):
    """x @ w + scale * (x @ a_t) @ b_t, with a_t and b_t weighed means of every skill's.

    `a` holds the skills' (in, rank) side by side, `b` their (rank, out) one below the other.
    """

    w: Any = base_weight()
    a: Any = axes("in", "skills")
    b: Any = axes("skills", "out")
    logits: Any = axes("task", "skill")
    task: Any = axes(shared=True)
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    path: str = static("")

    is_mergeable = False
    local_in = local_out = True

    def forward(self, x):
        logits = self.logits.array
        if self.key is not None:
            key = jax.random.fold_in(self.key.array, self.key.site.salt)
            logits = logits + jax.random.logistic(key, logits.shape, logits.dtype)
        share = routing_weights_of(skill_weights(logits), self.task, x, self.path)
        share = share[..., None, :]  # the same in each group of a convolution
        low = x @ self.a
        skills, columns = share.shape[-1], self.a.array.shape[-1]
        grouped = low.reshape(*low.shape[:-1], -1, skills, columns // skills)
        # Not `sum(grouped * share)`: XLA 0.10 on CPU puts that sum and the products around it in
        # one kernel, which gives wrong numbers in float32 (tests/conformance/test_float32.py).
        mean = jnp.einsum("...kr,...k->...r", grouped, share)  # x @ a_t
        own = mean[..., None, :] * share[..., None]
        return x @ self.w + self.scale * (own.reshape(low.shape) @ self.b)


def skill_weights(logits: jax.Array) -> jax.Array:
    """The share of each skill: sigmoids, divided by their sum."""
    open_ = jax.nn.sigmoid(logits)
    return open_ / jnp.sum(open_, axis=-1, keepdims=True)


@register_method
def moelora(
    rank: int,
    sites: Sites,
    *,
    experts: int,
    tasks: int,
    width: int = 64,
    alpha: float | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """A mixture of LoRA experts for several tasks, gated by the task alone.

    Each selected matrix gives y = x @ w + s * sum_i share[t, i] * x @ a_i @ b_i, with experts of
    rank r / experts and s = alpha / r. The shares of task t are softmax(e_t @ g), with one table
    of task embeddings `e` (tasks, width) and one gate `g` (width, experts) for all weights.
    `a` starts random, `b` at zero, so that training starts at the base model. The call names the
    tasks: `combine(frozen, adapter, task=ids)`, ids (batch,), or one for all. The outputs of an
    id that is no task, such as -1, are NaN. `select_task` makes plain LoRA of it.

    Args:
      rank: Of all experts together.
      sites: The matrices, each used as a product.
      experts, tasks: How many; the experts divide the rank.
      width: Of the task embeddings, 64 in the paper.
      alpha: `None` means s = 1.
      dtype: Of what is trained.

    Returns:
      A method with r * (in + out) trained numbers per matrix, and width * (tasks + experts).

    Raises:
      ValueError: As `lora`; no task or no expert, a rank that experts do not divide, or a width
        below 1.

    References:
      Liu et al., When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
      Applications, 2023, section 4. https://arxiv.org/abs/2310.18339
    """
    _check_counts("moelora", tasks, experts, "experts")
    low = low_rank("moelora", rank, sites, alpha=alpha, dtype=dtype)
    if rank % experts:
        fit = [n for n in range(1, rank + 1) if rank % n == 0]
        raise ValueError(
            f"`moelora(rank={rank}, experts={experts})`: each expert has rank / experts columns. "
            f"Of this rank, {fit} experts can be made."
        )
    if width < 1:
        raise ValueError(
            f"`moelora(width={width})`: embeddings without numbers cannot tell tasks apart, and no "
            "share would ever change. Give at least 1."
        )
    check_whole("moelora", sites)
    names = {name: f"{next(iter(sites))}/{name}" for name in ("tasks", "gate")} if sites else {}

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        keys = jax.random.split(key)
        shapes = {"tasks": (tasks, width), "gate": (width, experts)}
        shared: dict[str, Any] = {name: Placeholder(path) for name, path in names.items()}
        if site.path == next(iter(sites)):
            for k, (name, shape) in zip(keys, shapes.items(), strict=True):
                drawn = jax.random.normal(k, shape, dtype) / math.sqrt(width)
                shared[name] = Trainable(drawn, name=names[name])
        mixture = Mixture(
            old.w,
            old.a,
            old.b,
            shared["tasks"],
            shared["gate"],
            PerCallTasks("task"),
            old.scale,
            site.path,
        )
        return dataclasses.replace(view, weight=mixture)

    options = dict(
        rank=rank, sites=sites, experts=experts, tasks=tasks, width=width, alpha=alpha, dtype=dtype
    )
    return Method(
        "moelora",
        options,
        lambda key, tree: apply_to_sites(key, low(key, tree), sites, make, caller="moelora"),
    )


@register_method
def poly(
    rank: int,
    sites: Sites,
    *,
    skills: int,
    tasks: int,
    alpha: float | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Polytropon: tasks that share an inventory of LoRA skills, each of which it picks some.

    Each selected matrix gives y = x @ w + s * (x @ a_t) @ b_t, a_t = sum_k share[t, k] a_k and
    b_t likewise, s = alpha / r. The shares of task t are sigmoids of trained logits, divided by
    their sum. The logits start within 1e-3 of zero, every `a` random, every `b` at zero, so that
    training starts at the base model. The call names the tasks, `combine(frozen, adapter,
    task=ids)`, ids (batch,) or one for all; in training also `skills=key`: the sigmoids are then
    drawn from relaxed Bernoulli distributions. The outputs of an id that is no task, such as -1,
    are NaN. `select_task` makes plain LoRA of it.

    Args:
      rank: Of each skill.
      sites: The matrices, each used as a product.
      skills, tasks: How many.
      alpha: `None` means s = 1; PEFT and the paper's code have 1 (s = 1 / r).
      dtype: Of what is trained.

    Returns:
      A method with skills * r * (in + out) + tasks * skills trained numbers per matrix.

    Raises:
      ValueError: As `lora`; no task or no skill.

    References:
      Ponti et al., Combining Parameter-efficient Modules for Task-level Generalisation, 2022,
      section 2. https://arxiv.org/abs/2202.13914
    """
    _check_counts("poly", tasks, skills, "skills")
    check_whole("poly", sites)
    low = low_rank("poly", rank, sites, alpha=alpha, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        n, m = site.size(IN), site.size(OUT)
        first, second = jax.random.split(key)
        a = jax.random.uniform(first, (*site.stack, n, skills * rank), dtype, -1, 1) / math.sqrt(n)
        b = jnp.zeros((*site.stack, skills * rank, m), dtype)
        logits = jax.random.uniform(second, (*site.stack, tasks, skills), dtype, -1e-3, 1e-3)
        drawn = Placeholder(
            "skills", optional=True, fold=zlib.crc32(site.path.encode()), stack=view.sizes("stack")
        )
        weight = Skills(
            old.w,
            Trainable(a.astype(dtype)),
            Trainable(b),
            Trainable(logits),
            PerCallTasks("task"),
            drawn,
            old.scale,
            site.path,
        )
        return dataclasses.replace(view, weight=weight)

    options = dict(rank=rank, sites=sites, skills=skills, tasks=tasks, alpha=alpha, dtype=dtype)
    return Method(
        "poly",
        options,
        lambda key, tree: apply_to_sites(key, low(key, tree), sites, make, caller="poly"),
    )


def _check_counts(caller: str, tasks: int, experts: int, name: str) -> None:
    if tasks < 1 or experts < 1:
        raise ValueError(
            f"`{caller}(tasks={tasks}, {name}={experts})`: tasks without {name} have nothing to "
            f"weigh, and {name} without tasks nobody who weighs them. Both are at least 1."
        )
