"""Conversion of adapters over a residual base to plain LoRA over the original base."""

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


def to_lora(
    method: Method, adapter: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """Converts an adapter of `pissa`, `olora`, `corda` or `lora_ga` to plain LoRA.

    The update s * (a @ b - a0 @ b0) of the original base, where a0 and b0 are the factors at the
    start of training, is a LoRA of twice the rank:

        a @ b - a0 @ b0 = [a, a0] @ [b; -b0]

    Use it to share an adapter, or to save one whose start cannot be computed again from a file.

    If 2 r is more than min(in, out), the factors get the rank min(in, out) by a QR decomposition:
    with [a, a0] = Q R they are Q and R @ [b; -b0], or, if the matrix has more inputs than outputs,
    likewise from [b; -b0]^T. Their product stays the same up to rounding.

    Args:
      method: The method. From a `chain`, give the one in it that is to be converted.
      adapter: The trained adapter. It may have arrays of other methods as well.
      start: The adapter at the start of training, as `split` returned it.

    Returns:
      `(method, adapter)`: a `lora` for the original params, and its adapter, for `save_adapter` or
      to load on the original base. Arrays of other methods stay in the adapter; `chain` their
      methods with the new one as before.

    Raises:
      ValueError: The method is another one, or the adapter or the start lacks its arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> method = jp.pissa(1, jp.sites(fn, params, jnp.ones((1, 4))).linear)
      >>> frozen, start = jp.split(method(jax.random.key(0), params))
      >>> plain, adapter = jp.adapters.to_lora(method, start, start)
      >>> plain.name, adapter["w/a"].shape
      ('lora', (4, 2))
    """
    options = options_of(method, RESIDUAL_METHODS, "to_lora")
    sites, scaling = options["sites"], options["scaling"]
    names = [f"{path}/{name}" for path in sites for name in "ab"]
    own, others = own_and_other_arrays(adapter, names, "to_lora")
    own_start, _ = own_and_other_arrays(start, names, "to_lora", "start")
    alphas = by_pattern(options["alpha"], sites, "alpha")
    converted: dict[str, jax.Array] = {}
    ranks, scaled_alphas = {}, {}
    for path in sites:
        a, b = (f"{path}/{name}" for name in "ab")
        converted[a], converted[b] = _bounded_rank(
            jnp.concatenate([own[a], own_start[a]], axis=-1),
            jnp.concatenate([own[b], -own_start[b]], axis=-2),
        )
        rank, alpha = converted[a].shape[-1], alphas[path]
        growth = rank / own[a].shape[-1]
        # With this alpha, the scale stays the same.
        scaled = alpha and alpha * (growth if scaling == "alpha/r" else growth**0.5)
        ranks[glob.escape(path)], scaled_alphas[glob.escape(path)] = rank, scaled
    plain = lora(ranks, sites, alpha=scaled_alphas, scaling=scaling, dtype=options["dtype"])
    return plain, {**others, **converted}


def _bounded_rank(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of a (*stack, n, r) @ b (*stack, r, m) with a rank of at most min(n, m)."""
    n, r, m = *a.shape[-2:], b.shape[-1]
    if r <= min(n, m):
        return a, b
    wide = jnp.promote_types(a.dtype, jnp.float32)
    with jax.default_matmul_precision("highest"):
        if n <= m:
            q, upper = jnp.linalg.qr(a.astype(wide))
            left, right = q, upper @ b.astype(wide)
        else:
            q, upper = jnp.linalg.qr(jnp.swapaxes(b.astype(wide), -1, -2))
            left, right = a.astype(wide) @ jnp.swapaxes(upper, -1, -2), jnp.swapaxes(q, -1, -2)
    return left.astype(a.dtype), right.astype(b.dtype)
