"""Layers that the reference models share: linear maps, tables, norms, and pieces of attention.

Kernels are (in, out). `dtype=None` computes in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option

__all__ = [
    "Embed",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "cast",
]
__all__ += ["check_free_slots", "check_options", "checkpointed", "masked_softmax", "normal"]
__all__ += ["stacked", "vocab_logits", "write_to_cache"]


class Linear(nnx.Module):
    """x @ kernel + bias, with a kernel (in, out), computed in `dtype`."""

    def __init__(self, n: int, m: int, bias: bool, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(normal(rngs.params(), (n, m), param_dtype))
        self.bias = nnx.Param(jnp.zeros((m,), param_dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ cast(self.kernel, self.dtype)
        return y if self.bias is None else y + cast(self.bias, self.dtype)


class RMSNorm(nnx.Module):
    """scale * x / sqrt(mean(x ** 2) + eps) over the last axis, in float32 or wider."""

    def __init__(self, n: int, eps: float, *, param_dtype: Any):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((n,), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """scale * (x - mean) / sqrt(var + eps) + bias over the last axis, in float32 or wider."""

    def __init__(self, n: int, eps: float, *, param_dtype: Any):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((n,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((n,), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embed(nnx.Module):
    """The rows of a table by id. An id beyond the table gives NaN, not another token's row."""

    def __init__(self, vocab: int, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(normal(rngs.params(), (vocab, width), param_dtype))

    def __call__(self, ids: Array) -> Array:
        return cast(jnp.take(self.embedding[...], ids, axis=0), self.dtype)


def normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal(0, 0.02 ** 2), drawn in float32 whatever the dtype."""
    check_dtype_option("dtype", dtype)
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def cast(weight: Any, dtype: Any) -> Array:
    """The array of a parameter in `dtype`, or in its own."""
    return weight[...] if dtype is None else weight[...].astype(dtype)


def check_options(*, remat: Any, **dtypes: Any) -> None:
    """Checks the options that the modules of all models take.

    Args:
      remat: As `checkpointed` takes it.
      **dtypes: By name, each a floating-point dtype or `None`.
    Raises:
      ValueError: One of them is something else.
    """
    if not (remat in (None, "full") or callable(remat)):
        raise ValueError(f"`remat` must be None, 'full' or a checkpoint policy, got {remat!r}.")
    for name, dtype in dtypes.items():
        check_dtype_option(name, dtype)


def checkpointed(step: Callable[..., Any], remat: Any) -> Callable[..., Any]:
    """The step of a scan over layers, rematerialized in the backward pass.

    Args:
      step: The step.
      remat: `None` stores all that the backward pass needs, "full" only the input of each layer; a
        policy of `jax.checkpoint_policies` says what is stored.
    """
    if remat is None:
        return step
    return jax.checkpoint(step, policy=None if remat == "full" else remat, prevent_cse=False)


# Pieces of attention, heads and caches -----------------------------------------------------------


def masked_softmax(scores: Array, mask: Array | None) -> Array:
    """Softmax over the last axis, the keys, of those that the mask shows.

    Args:
      scores: Real numbers (..., S).
      mask: A bool that broadcasts to the scores, or `None` for all keys.
    Returns:
      Weights of the shape of the scores; zeros where a query attends to nothing.
    """
    if mask is None:
        return jax.nn.softmax(scores)
    # A finite minimum, and a second `where`: the softmax of a row without keys must have neither
    # NaNs nor weight.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(mask, weights, 0)


def vocab_logits(x: Array, embed: Embed, head: Linear | None, logits_dtype: Any) -> Array:
    """Logits (B, T, V) of hidden states (B, T, D).

    Args:
      x: Hidden states.
      embed: The table of the tokens.
      head: The head, or `None` for the transposed table.
      logits_dtype: Dtype of the sums and of the logits. `None` means that of the products.
    """
    if head is None:
        table = cast(embed.embedding, embed.dtype)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=logits_dtype)
    kernel = cast(head.kernel, embed.dtype)
    return jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=logits_dtype)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module that holds `count` layers, each array with a leading axis, for a scan over them.

    Args:
      make: The layer for its own `rngs`.
      count: How many layers, L.
      rngs: Those of the model.
    """
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def write_to_cache(cache: Array, new: Array, layer: Array, used: Array) -> Array:
    """The cached keys or values of all layers, (L, B, S, K, H), with those of one layer entered.

    A step writes T slots of the stack and not the whole cache.

    Args:
      cache: Cache of all layers.
      new: Keys and values of this layer, (B, T, K, H).
      layer: Its index.
      used: How many slots were used before.
    """
    at = (layer, jnp.int32(0), used, jnp.int32(0), jnp.int32(0))
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), at)


def check_free_slots(tokens: Array, cache: Any, what: str) -> None:
    """Raises a ValueError where tokens (B, T) do not fit in a cache, if it is not traced.

    Args:
      tokens: Their ids.
      cache: With keys `k` (L, B, S, ...) and the number of slots `used`; `None` has room for all.
      what: What the tokens are, for the message: "tokens" or "targets".
    """
    if cache is None:
        return
    free = cache.k.shape[2]
    if not isinstance(cache.used, jax.core.Tracer):
        free -= int(cache.used)
    if tokens.shape[1] > free:
        raise ValueError(
            f"{tokens.shape[1]} {what} do not fit in the {free} free slots of the cache. Make "
            "a longer one: init_cache(config, batch_size, length)."
        )
