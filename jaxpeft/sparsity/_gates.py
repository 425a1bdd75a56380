"""Learned gates after and during training: their masks, and the density for a penalty."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method, takes_sites
from jaxpeft._sites import Sites
from jaxpeft._weight import IN, OUT
from jaxpeft.sparsity._masks import block_of, expand_groups

#: Temperature and bounds of the stretched hard concrete distribution, as in the paper (section 4).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def gate_values(
    kind: str, logits: jax.Array, key: Any = None, inverse_temperature: Any = None
) -> jax.Array:
    """The gates of logits in float32 or wider: sampled with a key, deterministic without.

    Args:
      kind: "hard concrete" or "sigmoid".
      logits: Logits of any shape.
      key: PRNG key of the samples, for "hard concrete".
      inverse_temperature: Factor of the logits, for "sigmoid".
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "hard concrete":
        if key is not None:
            noise = jax.random.logistic(key, logits.shape, logits.dtype)  # log u - log(1 - u)
            logits = (logits + noise) / BETA
        return jnp.clip(jax.nn.sigmoid(logits) * (ZETA - GAMMA) + GAMMA, 0, 1)
    if inverse_temperature is None:
        return (logits > 0).astype(logits.dtype)
    return jax.nn.sigmoid(jnp.asarray(inverse_temperature, logits.dtype) * logits)


def logits_name(path: str, structure: Any) -> str:
    """The logits' name in the adapter, since one weight may have gates of two structures."""
    if not isinstance(structure, str):
        structure = "x".join("all" if size is None else str(size) for size in structure)
    return f"{path}/gates/{structure}"


@takes_sites
def gate_masks(
    method: Method, adapter: Mapping[str, Any], sites: Sites | None = None
) -> dict[str, jax.Array]:
    """Masks of the entries whose gate is open at inference: z > 0 without sampling.

    Args:
      method: The method that `gates` returned; for a chain, that one of its methods.
      adapter: The trained adapter, which may contain arrays of other methods.
      sites: A selection of the method's sites. `None` means all.

    Returns:
      {path: bool array of the weight's shape}, for `prune`.

    Raises:
      ValueError: The method is not from `gates`, the adapter lacks logits, or a site has no
        gates; names it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}
      >>> method = jp.gates(jp.sites(f, params, jnp.ones((1, 2))), structure="output")
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> adapter["w/gates/output"] = jnp.array([3.0, -9.0, 3.0])
      >>> gate_masks(method, adapter)["w"].tolist()
      [[True, False, True], [True, False, True]]
    """
    options = _options(method, "gate_masks")
    chosen: Sites = options["sites"]
    if sites is not None:
        if missing := [path for path in sites if path not in chosen]:
            raise ValueError(
                f"`gate_masks`: {missing} have no gates of this method, which has gates at "
                f"{list(chosen)}. Select from these."
            )
        chosen = chosen & sites
    masks = {}
    for path, site in chosen.items():
        rows, columns = block_of(options["structure"], site)
        is_open = gate_values(options["kind"], _logits(method, adapter, path)) > 0
        groups = is_open.reshape(-1, site.size(IN) // rows, site.size(OUT) // columns)
        masks[path] = expand_groups(groups, site, options["structure"])
    return masks


def expected_density(
    method: Method, adapter: Mapping[str, Any], inverse_temperature: Any = None
) -> jax.Array:
    """The expected fraction of entries whose gate is open, as a penalty for the loss.

    Groups are weighted by their number of entries n_g, sum_g n_g p_g / sum_g n_g, with

        p = sigmoid(logit - 2/3 log(0.1 / 1.1))     "hard concrete": the probability that z > 0
        p = sigmoid(inverse_temperature * logit)    "sigmoid"

    Args:
      method: The method that `gates` returned; for a chain, that one of its methods.
      adapter: The adapter, which may contain arrays of other methods.
      inverse_temperature: For "sigmoid", the same as for `combine`. `None` gives the density at
        inference, the fraction of logits above 0, which has no gradient.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: The method is not from `gates`, the adapter lacks logits, or an inverse
        temperature is given for hard concrete gates.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}
      >>> method = jp.gates(jp.sites(f, params, jnp.ones((1, 2))), kind="sigmoid")
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> round(float(expected_density(method, adapter, inverse_temperature=1.0)), 2)
      0.95

    References:
      Louizos et al., Learning Sparse Neural Networks through L0 Regularization, 2018, equation
      12. https://arxiv.org/abs/1712.01312
    """
    options = _options(method, "expected_density")
    kind, sites = options["kind"], options["sites"]
    if inverse_temperature is not None and kind == "hard concrete":
        raise ValueError(
            f"`expected_density(inverse_temperature={inverse_temperature})`: gates of kind 'hard "
            "concrete' have a fixed temperature, 2/3. Leave the argument out."
        )
    total = sum(math.prod(site.shape) for site in sites.values())
    density = jnp.zeros((), jnp.float32)
    for path, site in sites.items():
        logits = _logits(method, adapter, path)
        if kind == "hard concrete":
            logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            p = jax.nn.sigmoid(logits - BETA * math.log(-GAMMA / ZETA))
        else:
            p = gate_values(kind, logits, inverse_temperature=inverse_temperature)
        # The groups of one weight have equal sizes.
        density = density + math.prod(site.shape) / total * jnp.mean(p)
    return density


def _options(method: Any, caller: str) -> Mapping[str, Any]:
    name = method.name if isinstance(method, Method) else repr(method)
    if name != "gates":
        raise ValueError(
            f"`{caller}` takes a method that `gates` returned, but this one is '{name}'. For a "
            "chain, give its method `gates` and the whole adapter."
        )
    return method.options


def _logits(method: Method, adapter: Mapping[str, Any], path: str) -> jax.Array:
    name = logits_name(path, method.options["structure"])
    if name not in adapter:
        raise ValueError(
            f"The adapter has no '{name}', the logits of the gates at '{path}'; it has "
            f"{sorted(adapter)}. Give the adapter of this method, with the same `structure`."
        )
    return jnp.asarray(adapter[name])
