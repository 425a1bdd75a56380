"""What learned gates say: their masks, and the density that a loss can penalize."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, takes_sites
from jaxpeft._sites import Sites
from jaxpeft._weight import IN, OUT
from jaxpeft.sparsity._masks import block_of, spread

#: Temperature and ends of the hard concrete distribution, those of the paper (section 4).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def gate_values(kind: str, logits: jax.Array, key: Any = None, sharpness: Any = None) -> jax.Array:
    """The gates of logits, drawn with a key or deterministic; at least float32."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "hard concrete":
        if key is not None:
            noise = jax.random.logistic(key, logits.shape, logits.dtype)  # log u - log(1 - u)
            logits = (logits + noise) / BETA
        return jnp.clip(jax.nn.sigmoid(logits) * (ZETA - GAMMA) + GAMMA, 0, 1)
    if sharpness is None:
        return (logits > 0).astype(logits.dtype)
    return jax.nn.sigmoid(jnp.asarray(sharpness, logits.dtype) * logits)


def logits_name(path: str, structure: Any) -> str:
    """What the adapter calls the logits: gates of two structures may stand on one weight."""
    if not isinstance(structure, str):
        structure = "x".join("all" if size is None else str(size) for size in structure)
    return f"{path}/gates/{structure}"


@takes_sites
def gate_masks(
    method: Method, adapter: Mapping[str, Any], sites: Sites | None = None
) -> dict[str, jax.Array]:
    """Masks of the entries whose gates are open without a key or a sharpness: z > 0.

    Args:
      method: From `gates`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.
      sites: Those wanted, of the method's; `None` for all.

    Returns:
      {path: bools of the weight's shape}, ready for `prune`.

    Raises:
      ValueError: It is another method, the adapter lacks logits, or a site has no gates; names it.
    """
    options = _options(method, "gate_masks")
    chosen: Sites = options["sites"]
    if sites is not None:
        if missing := [path for path in sites if path not in chosen]:
            raise ValueError(
                f"`gate_masks`: {missing} have no gates of this method, which has them at "
                f"{list(chosen)}."
            )
        chosen = chosen & sites
    masks = {}
    for path, site in chosen.items():
        rows, columns = block_of(options["structure"], site)
        is_open = gate_values(options["kind"], _logits(method, adapter, path)) > 0
        groups = is_open.reshape(-1, site.size(IN) // rows, site.size(OUT) // columns)
        masks[path] = spread(groups, site, options["structure"])
    return masks


def expected_density(
    method: Method, adapter: Mapping[str, Any], sharpness: Any = None
) -> jax.Array:
    """The expected share of entries whose gates are open, for the loss.

    Each group counts with its entries: sum_g entries_g p_g / sum_g entries_g, with

        p = sigmoid(logit - 2/3 log(0.1 / 1.1))    "hard concrete": the probability that z > 0
        p = sigmoid(sharpness * logit)             "sigmoid"; whether logit > 0 without a sharpness

    Args:
      method: From `gates`; of a chain, that method of it.
      adapter: Maybe with arrays of other methods.
      sharpness: That of the call, for "sigmoid"; `None` gives the share at inference, which has
        no gradient.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: It is another method, the adapter lacks logits, or hard concrete gates are given
        a sharpness.
    """
    options = _options(method, "expected_density")
    kind, sites = options["kind"], options["sites"]
    if sharpness is not None and kind == "hard concrete":
        raise ValueError(
            f"`expected_density(sharpness={sharpness})`: gates of kind 'hard concrete' have no sharpness. "
            "Leave it out; their openness is that of the calls with a key."
        )
    total = sum(math.prod(site.shape) for site in sites.values())
    share = jnp.zeros((), jnp.float32)
    for path, site in sites.items():
        logits = _logits(method, adapter, path)
        if kind == "hard concrete":
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            p = jax.nn.sigmoid(logits - BETA * math.log(-GAMMA / ZETA))
        else:
            p = gate_values(kind, logits, sharpness=sharpness)
        share = share + math.prod(site.shape) / total * jnp.mean(p)  # groups of a weight are equal
    return share


def _options(method: Any, caller: str) -> Mapping[str, Any]:
    name = method.name if isinstance(method, Method) else repr(method)
    if name != "gates":
        raise ValueError(
            f"`{caller}` takes the method that `gates` made; this one is '{name}'. Of a chain, give "
            "the gates alone, with the whole adapter."
        )
    return method.options


def _logits(method: Method, adapter: Mapping[str, Any], path: str) -> jax.Array:
    name = logits_name(path, method.options["structure"])
    if name not in adapter:
        raise ValueError(
            f"The adapter has no '{name}', the logits of the gates at '{path}'. It has "
            f"{sorted(adapter)}. Was it trained with another structure?"
        )
    return jnp.asarray(adapter[name])
