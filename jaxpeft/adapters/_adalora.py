"""Ranks of an AdaLoRA adapter: their number, their penalty, and an adapter without pruned ones."""

import glob
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._method import Method
from jaxpeft._methods.adalora import adalora
from jaxpeft._sites import Sites, by_pattern
from jaxpeft.adapters._options import options_of, own_and_other_arrays


def triplets(adapter: Mapping[str, Any]) -> Iterator[str]:
    """The paths at which an adapter holds `a`, `values` and `b`."""
    for path in adapter:
        head, _, last = path.rpartition("/")
        if last == "values" and {f"{head}/a", f"{head}/b"} <= set(adapter):
            yield head


def orthogonality_penalty(adapter: Mapping[str, Any]) -> jax.Array:
    """How far singular vectors are from orthonormal, for the loss.

    The sum over all matrices of |a^T a - 1|^2 + |b b^T - 1|^2, squared Frobenius norms (equation
    4 of the paper, whose weight for it is 0.1 to 0.5).

    Args:
      adapter: `{path: array}`, of `adalora`.

    Raises:
      ValueError: The adapter holds nothing of `adalora`.
    """
    heads = list(triplets(adapter))
    if not heads:
        raise ValueError(
            f"`orthogonality`: nothing of `adalora` is among {sorted(adapter)}. Give the adapter."
        )
    total = jnp.float32(0)
    for path in heads:
        a, b = adapter[f"{path}/a"], jnp.swapaxes(adapter[f"{path}/b"], -1, -2)
        for x in (a, b):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            off = jnp.swapaxes(x, -1, -2) @ x - jnp.eye(x.shape[-1], dtype=x.dtype)
            total = total + jnp.sum(off * off)
    return total


def effective_ranks(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """How many values of each matrix are not zero: {path: counts (*stack,)}."""
    found = {path: np.asarray(adapter[f"{path}/values"]) for path in triplets(adapter)}
    return {path: np.count_nonzero(values, axis=-1) for path, values in found.items()}


def drop_pruned_ranks(
    method: Method, adapter: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """The same deltas without the values that are zero: smaller arrays.

    Args:
      method: From `adalora`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.

    Returns:
      The method of the ranks that are left, for the original params, and its adapter. All
      matrices of a stack keep as many as the one that has the most. Matrices without any are
      left out. Arrays of other methods are in it as they were: `chain` those methods with this
      one as before.

    Raises:
      ValueError: It is another method, the adapter lacks arrays, or all values are zero.
    """
    options = options_of(method, ["adalora"], "drop_pruned_ranks")
    sites: Sites = options["sites"]
    names = [f"{path}/{name}" for path in sites for name in ("a", "values", "b")]
    own, others = own_and_other_arrays(adapter, names, "drop_pruned_ranks")
    left = {path: int(np.max(count)) for path, count in effective_ranks(own).items()}
    kept = sites.match(lambda site: left[site.path] > 0) if any(left.values()) else None
    if kept is None:
        raise ValueError(
            "`shrunk`: all values of this adapter are zero, as before the first step. There is "
            "nothing to keep."
        )
    alphas = by_pattern(options["alpha"], sites, "alpha")
    smaller: dict[str, jax.Array] = {}
    strengths: dict[str, Any] = {}
    for path in kept:
        values, a, b = (own[f"{path}/{name}"] for name in ("values", "a", "b"))
        # Those that are not zero come first, in their order.
        order = jnp.argsort(values == 0, axis=-1, stable=True)[..., : left[path]]
        smaller[f"{path}/a"] = jnp.take_along_axis(a, order[..., None, :], -1)
        smaller[f"{path}/values"] = jnp.take_along_axis(values, order, -1)
        smaller[f"{path}/b"] = jnp.take_along_axis(b, order[..., :, None], -2)
        alpha = alphas[path]
        # alpha / r stays what it was.
        strengths[glob.escape(path)] = None if alpha is None else alpha * left[path] / a.shape[-1]
    more = {name: options[name] for name in ("dropout", "std", "dtype")}
    ranked = {glob.escape(path): left[path] for path in kept}
    return adalora(ranked, kept, alpha=strengths, **more), {**others, **smaller}
