"""Adapters of methods that shift the base, as plain LoRA over the original base."""

import glob
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._method import Method
from jaxpeft._methods.lora import lora
from jaxpeft._methods.residual_init import RESIDUAL_METHODS
from jaxpeft._sites import by_pattern
from jaxpeft.adapters._options import options_of, own_and_other_arrays

# Plain LoRA of it --------------------------------------------------------------------------------


def to_lora(
    method: Method, adapter: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """The same change as plain LoRA of twice the rank, over the base as it was.

    a @ b - a0 @ b0 = [a, a0] @ [b; -b0], where a0 and b0 are what training started with. For
    adapters that are to be shared, or stored where the start cannot be made again.

    A matrix has no rank above min(in, out). Where twice the rank is more, the product is kept, to
    rounding, in factors of that rank: with [a, a0] = Q R they are Q and R @ [b; -b0], where the
    matrix has more inputs than outputs likewise by a decomposition of [b; -b0]^T.

    Args:
      method: From `pissa`, `olora`, `corda` or `lora_ga`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.
      start: As `split` gave it.

    Returns:
      The method, for `save_adapter` with the original params, and its adapter. Arrays of other
      methods are in it as they were: `chain` those methods with this one as before.

    Raises:
      ValueError: The method does not start from a base of its own, or the adapter or the start
        lacks arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> method = jp.pissa(1, jp.sites(f, params, jnp.ones((1, 4))).linear)
      >>> frozen, start = jp.split(method(jax.random.key(0), params))
      >>> plain, adapter = jp.adapters.to_lora(method, start, start)
      >>> plain.name, adapter["w/a"].shape
      ('lora', (4, 2))
    """
    options = options_of(method, RESIDUAL_METHODS, "to_lora")
    sites, scaling = options["sites"], options["scaling"]
    names = [f"{path}/{name}" for path in sites for name in "ab"]
    own, others = own_and_other_arrays(adapter, names, "to_lora")
    first, _ = own_and_other_arrays(start, names, "to_lora", "start")
    alphas = by_pattern(options["alpha"], sites, "alpha")
    joined: dict[str, jax.Array] = {}
    ranks, strengths = {}, {}
    for path in sites:
        a, b = (f"{path}/{name}" for name in "ab")
        joined[a], joined[b] = _of_full_rank(
            jnp.concatenate([own[a], first[a]], axis=-1),
            jnp.concatenate([own[b], -first[b]], axis=-2),
        )
        rank, alpha = joined[a].shape[-1], alphas[path]
        more = rank / own[a].shape[-1]
        # The scale stays what it was.
        kept = alpha and alpha * (more if scaling == "alpha/r" else more**0.5)
        ranks[glob.escape(path)], strengths[glob.escape(path)] = rank, kept
    plain = lora(ranks, sites, alpha=strengths, scaling=scaling, dtype=options["dtype"])
    return plain, {**others, **joined}


def _of_full_rank(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of a @ b, (*stack, n, r) and (*stack, r, m), with min(n, m) columns if r is more."""
    n, r, m = *a.shape[-2:], b.shape[-1]
    if r <= min(n, m):
        return a, b
    wide = jnp.promote_types(a.dtype, jnp.float32)
    with jax.default_matmul_precision("highest"):
        if n <= m:
            q, rest = jnp.linalg.qr(a.astype(wide))
            left, right = q, rest @ b.astype(wide)
        else:
            q, rest = jnp.linalg.qr(jnp.swapaxes(b.astype(wide), -1, -2))
            left, right = a.astype(wide) @ jnp.swapaxes(rest, -1, -2), jnp.swapaxes(q, -1, -2)
    return left.astype(a.dtype), right.astype(b.dtype)
