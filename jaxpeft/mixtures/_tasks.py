"""One task of a mixture of LoRA experts, as plain LoRA."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method
from jaxpeft._methods.lora import lora
from jaxpeft._methods.moelora import expert_weights, repeat_by_column
from jaxpeft._methods.poly import skill_weights
from jaxpeft._sites import Sites
from jaxpeft.adapters._options import options_of, own_and_other_arrays


def select_task(
    method: Method, adapter: Mapping[str, Any], task: int
) -> tuple[Method, dict[str, jax.Array]]:
    """Converts one task of a mixture of experts to plain LoRA, which merges.

    Args:
      method: The method, from `moelora` or `poly`. From a `chain`, give that method in it.
      adapter: The trained adapter. It may have arrays of other methods as well.
      task: Id of the task, from 0 on.

    Returns:
      `(method, adapter)`: a `lora` for the original params, and its adapter. Arrays of other
      methods stay in the adapter; `chain` their methods with the new one as before.

    Raises:
      ValueError: The method is another one, the task id is out of range, or the adapter lacks
        arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> method = jp.poly(2, jp.sites(fn, params, jnp.ones((1, 8))).linear, skills=4, tasks=3)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> plain, low_rank = jp.mixtures.select_task(method, adapter, 1)
      >>> plain.name, low_rank["w/a"].shape
      ('lora', (8, 2))
    """
    options = options_of(method, ["moelora", "poly"], "select_task")
    if not 0 <= task < options["tasks"]:
        raise ValueError(
            f"`select_task(task={task})`: there are {options['tasks']} tasks. Give an id from 0 to "
            f"{options['tasks'] - 1}."
        )
    sites: Sites = options["sites"]
    plain: dict[str, jax.Array] = {}
    first = next(iter(sites))
    names = [f"{path}/{name}" for path in sites for name in "ab"]
    if method.name == "moelora":
        names += [f"{first}/tasks", f"{first}/gate"]
    else:
        names += [f"{path}/logits" for path in sites]
    own, others = own_and_other_arrays(adapter, names, "select_task")
    for path in sites:
        a, b = (own[f"{path}/{name}"] for name in "ab")
        if method.name == "moelora":
            weights = expert_weights(own[f"{first}/tasks"], own[f"{first}/gate"])
            b = repeat_by_column(weights, options["rank"])[task][:, None] * b
        else:
            weights = skill_weights(own[f"{path}/logits"])[..., task, :]
            a = a.reshape(*a.shape[:-1], options["skills"], -1)
            a = jnp.einsum("...nkr,...k->...nr", a, weights)
            b = b.reshape(*b.shape[:-2], options["skills"], -1, b.shape[-1])
            b = jnp.einsum("...krm,...k->...rm", b, weights)
        plain[f"{path}/a"], plain[f"{path}/b"] = a, b
    low = lora(options["rank"], sites, alpha=options["alpha"], dtype=options["dtype"])
    return low, {**others, **plain}
