"""Poly (Polytropon): LoRA skills shared by tasks through a learned task-skill routing matrix."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._methods.lora import low_rank
from jaxpeft._methods.task_routing import PerCallTasks, check_counts, routing_weights_of
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_whole


@weight
class SkillMixture(Weight):
    """x @ w + scale * (x @ a_t) @ b_t, where a_t and b_t are weighted means over all skills.

    `a` holds the skills' first factors (in, rank) side by side, `b` their second ones (rank, out)
    one below the other. `key` is the key of a call that samples the routing weights.
    """

    w: Any = base_weight()
    a: Any = axes("in", "skills")
    b: Any = axes("skills", "out")
    logits: Any = axes("task", "skill")
    task: Any = axes(shared=True)  # () or (batch,)
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
        weights = routing_weights_of(skill_weights(logits), self.task, x, self.path)
        weights = weights[..., None, :]  # the same in each group of a convolution
        low = x @ self.a
        skills, columns = weights.shape[-1], self.a.array.shape[-1]
        by_skill = low.reshape(*low.shape[:-1], -1, skills, columns // skills)
        # Not `sum(by_skill * weights)`: XLA 0.10 on CPU fuses that sum with the products around it
        # into a kernel that gives wrong results in float32 (tests/conformance/test_float32.py).
        mean = jnp.einsum("...kr,...k->...r", by_skill, weights)  # x @ a_t
        weighted = mean[..., None, :] * weights[..., None]
        return x @ self.w + self.scale * (weighted.reshape(low.shape) @ self.b)


def skill_weights(logits: jax.Array) -> jax.Array:
    """The routing weight (..., skills) of each skill: sigmoids, divided by their sum."""
    allocation = jax.nn.sigmoid(logits)
    return allocation / jnp.sum(allocation, axis=-1, keepdims=True)


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
    """Polytropon: LoRA skills shared by tasks through a learned task-skill routing matrix.

    Each selected matrix `w` (in, out) gives, for an input of task t,

        y = x @ w + s * (x @ a_t) @ b_t,    s = alpha / r
        a_t = sum_k p[t, k] a_k,    b_t = sum_k p[t, k] b_k
        p[t] = sigmoid(z[t]) / sum(sigmoid(z[t]))

    with trainable skills `a_k` (in, r) and `b_k` (r, out) and trainable routing logits `z` (tasks,
    skills) at each matrix. `a_k` starts at random, `b_k` at zero and `z` within 1e-3 of zero, so
    that training starts at the base model.

    The task ids are given per call: `combine(frozen, adapter, task=ids)`, with one integer for the
    whole call, or `ids` (batch,) with one per example. The outputs for an id that is out of range,
    such as -1, are NaN. In training, `combine(..., skill_sampling=key)` samples relaxed Bernoulli
    variables in the place of the sigmoids, as in the paper. `mixtures.select_task` converts one
    task to plain LoRA, which merges.

    Args:
      rank: r, the rank of each skill.
      sites: The matrices to adapt, with all of their outputs, each of them used in a product.
      skills: Number of skills.
      tasks: Number of tasks.
      alpha: Strength of the update. `None` means s = 1. Hugging Face PEFT and the paper's code
        have s = 1 / r, which is `alpha=1`.
      dtype: Dtype of the trainable arrays.

    Returns:
      A `Method` with skills * r * (in + out) + tasks * skills trainable parameters per matrix.

    Raises:
      ValueError: As for `lora`. Also if `skills` or `tasks` is below 1, or if a slice of the
        outputs is selected.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> x = jnp.ones((2, 8))
      >>> sites = jp.sites(fn, params, x)
      >>> method = jp.poly(2, sites.linear, skills=4, tasks=3)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 8), 'w/b': (8, 4), 'w/logits': (3, 4)}
      >>> tree = jp.combine(frozen, adapter, task=[0, 2])  # one task id per example
      >>> jp.lift(fn)(tree, x).shape
      (2, 4)

    References:
      Ponti et al., Combining Parameter-efficient Modules for Task-level Generalisation, 2022,
      section 2. https://arxiv.org/abs/2202.13914
    """
    check_counts("poly", tasks, skills, "skills")
    check_whole("poly", sites)
    low = low_rank("poly", rank, sites, alpha=alpha, dtype=dtype)

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: Any = view.weight
        n, m = site.size(IN), site.size(OUT)
        a_key, logits_key = jax.random.split(key)
        a = jax.random.uniform(a_key, (*site.stack, n, skills * rank), dtype, -1, 1) / math.sqrt(n)
        b = jnp.zeros((*site.stack, skills * rank, m), dtype)
        logits = jax.random.uniform(logits_key, (*site.stack, tasks, skills), dtype, -1e-3, 1e-3)
        sampling = Placeholder(
            "skill_sampling",
            optional=True,
            fold=zlib.crc32(site.path.encode()),
            stack=view.sizes("stack"),
        )
        weight = SkillMixture(
            old.w,
            Trainable(a.astype(dtype)),
            Trainable(b),
            Trainable(logits),
            PerCallTasks("task"),
            sampling,
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
