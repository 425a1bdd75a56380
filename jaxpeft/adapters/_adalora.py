"""AdaLoRA adapters: the orthogonality penalty, effective ranks, and removal of pruned ranks."""

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


def adalora_paths(adapter: Mapping[str, Any]) -> Iterator[str]:
    """The paths at which an adapter holds the arrays `a`, `values` and `b` of `adalora`."""
    for path in adapter:
        head, _, last = path.rpartition("/")
        if last == "values" and {f"{head}/a", f"{head}/b"} <= set(adapter):
            yield head


def orthogonality_penalty(adapter: Mapping[str, Any]) -> jax.Array:
    """The penalty of AdaLoRA that keeps its factors near orthonormal, for the loss.

    The sum over all matrices of |a^T a - I|^2 + |b b^T - I|^2, squared Frobenius norms. This is
    equation 4 of the paper, which multiplies it by 0.1 to 0.5.

    Args:
      adapter: Adapter {path: array} with arrays of `adalora`.

    Returns:
      A scalar, in float32 or wider.

    Raises:
      ValueError: The adapter has no arrays of `adalora`.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> adapter = {"w/a": jnp.eye(4, 2), "w/values": jnp.zeros(2), "w/b": 2 * jnp.eye(2, 3)}
      >>> float(jp.adapters.orthogonality_penalty(adapter))  # b b^T - I = 3 I
      18.0

    References:
      Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning,
      2023, section 3.1. https://arxiv.org/abs/2303.10512
    """
    paths = list(adalora_paths(adapter))
    if not paths:
        raise ValueError(
            "`orthogonality_penalty`: the adapter has no arrays of `adalora`; it has "
            f"{sorted(adapter)}. Give the adapter that `split` returns."
        )
    total = jnp.float32(0)
    for path in paths:
        a, b = adapter[f"{path}/a"], jnp.swapaxes(adapter[f"{path}/b"], -1, -2)
        for x in (a, b):
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            deviation = jnp.swapaxes(x, -1, -2) @ x - jnp.eye(x.shape[-1], dtype=x.dtype)
            total = total + jnp.sum(deviation * deviation)
    return total


def effective_ranks(adapter: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The ranks of an AdaLoRA adapter that are not pruned.

    Args:
      adapter: Adapter {path: array} with arrays of `adalora`.

    Returns:
      {path: number of values that are not zero, (*stack,)}.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> values = jnp.array([0.0, 0.5, 0.0])
      >>> adapter = {"w/a": jnp.ones((4, 3)), "w/values": values, "w/b": jnp.ones((3, 2))}
      >>> {path: int(rank) for path, rank in jp.adapters.effective_ranks(adapter).items()}
      {'w': 1}
    """
    found = {path: np.asarray(adapter[f"{path}/values"]) for path in adalora_paths(adapter)}
    return {path: np.count_nonzero(values, axis=-1) for path, values in found.items()}


def drop_pruned_ranks(
    method: Method, adapter: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """An AdaLoRA adapter with the same updates in smaller arrays, without its pruned ranks.

    Args:
      method: The method, from `adalora`. From a `chain`, give the `adalora` in it.
      adapter: The trained adapter. It may have arrays of other methods as well.

    Returns:
      `(method, adapter)`: an `adalora` with the ranks that are left, for the original params, and
      its adapter. All matrices of a stack keep as many ranks as the one with the most. Matrices
      whose ranks are all pruned are left out. Arrays of other methods stay in the adapter; `chain`
      their methods with the new one as before.

    Raises:
      ValueError: The method is not from `adalora`, the adapter lacks its arrays, or all values are
        zero.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> method = jp.adalora(3, jp.sites(fn, params, jnp.ones((1, 8))).linear)
      >>> frozen, adapter = jp.split(method(jax.random.key(0), params))
      >>> trained = {**adapter, "w/values": jnp.array([0.0, 0.5, 0.0])}
      >>> method, adapter = jp.adapters.drop_pruned_ranks(method, trained)
      >>> {path: array.shape for path, array in adapter.items()}
      {'w/a': (8, 1), 'w/values': (1,), 'w/b': (1, 4)}
    """
    options = options_of(method, ["adalora"], "drop_pruned_ranks")
    sites: Sites = options["sites"]
    names = [f"{path}/{name}" for path in sites for name in ("a", "values", "b")]
    own, others = own_and_other_arrays(adapter, names, "drop_pruned_ranks")
    ranks = {path: int(np.max(count)) for path, count in effective_ranks(own).items()}
    if not any(ranks.values()):
        raise ValueError(
            "`drop_pruned_ranks`: all values of this adapter are zero, as before the first step of "
            "training, so no rank would be left. Give a trained adapter."
        )
    kept = sites.match(lambda site: ranks[site.path] > 0)
    alphas = by_pattern(options["alpha"], sites, "alpha")
    smaller: dict[str, jax.Array] = {}
    scaled_alphas: dict[str, Any] = {}
    for path in kept:
        values, a, b = (own[f"{path}/{name}"] for name in ("values", "a", "b"))
        # Values that are not zero come first, in the order that they have.
        order = jnp.argsort(values == 0, axis=-1, stable=True)[..., : ranks[path]]
        smaller[f"{path}/a"] = jnp.take_along_axis(a, order[..., None, :], -1)
        smaller[f"{path}/values"] = jnp.take_along_axis(values, order, -1)
        smaller[f"{path}/b"] = jnp.take_along_axis(b, order[..., :, None], -2)
        alpha = alphas[path]
        # With this alpha, alpha / r stays the same.
        own_alpha = None if alpha is None else alpha * ranks[path] / a.shape[-1]
        scaled_alphas[glob.escape(path)] = own_alpha
    kept_options = {name: options[name] for name in ("dropout", "init_std", "dtype")}
    kept_ranks = {glob.escape(path): ranks[path] for path in kept}
    small_method = adalora(kept_ranks, kept, alpha=scaled_alphas, **kept_options)
    return small_method, {**others, **smaller}
