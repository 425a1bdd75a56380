"""One task of a mixture of LoRA experts, as plain LoRA."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method
from jaxpeft._methods.lora import lora
from jaxpeft._methods.task_mixtures import mixture_weights, skill_weights, spread
from jaxpeft._sites import Sites
from jaxpeft.adapters._options import options_of, own_and_other_arrays


def select_task(
    method: Method, adapter: Mapping[str, Any], task: int
) -> tuple[Method, dict[str, jax.Array]]:
    """What a mixture is for one task, as plain LoRA.

    Args:
      method: From `moelora` or `poly`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.
      task: Its number.

    Returns:
      The method, for the original params, and its adapter; they merge, and are stored, like any
      other. Arrays of other methods are in it as they were: `chain` those methods with this one
      as before.

    Raises:
      ValueError: It is another method, has no such task, or the adapter lacks arrays.
    """
    options = options_of(method, ["moelora", "poly"], "select_task")
    if not 0 <= task < options["tasks"]:
        raise ValueError(
            f"`select_task(task={task})`: there are {options['tasks']} tasks, from 0 on."
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
            shares = mixture_weights(own[f"{first}/tasks"], own[f"{first}/gate"])
            b = spread(shares, options["rank"])[task][:, None] * b
        else:
            share = skill_weights(own[f"{path}/logits"])[..., task, :]
            a = a.reshape(*a.shape[:-1], options["skills"], -1)
            a = jnp.einsum("...nkr,...k->...nr", a, share)
            b = b.reshape(*b.shape[:-2], options["skills"], -1, b.shape[-1])
            b = jnp.einsum("...krm,...k->...rm", b, share)
        plain[f"{path}/a"], plain[f"{path}/b"] = a, b
    low = lora(options["rank"], sites, alpha=options["alpha"], dtype=options["dtype"])
    return low, {**others, **plain}
