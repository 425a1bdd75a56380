"""Layers that the reference models share: products, tables and norms, and how they are cast.

Kernels are (in, out); `None` for a `dtype` computes in that of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpeft._schema import check_dtype_option

__all__ = ["Embed", "LayerNorm", "Linear", "RMSNorm", "cast"]
__all__ += ["check_remat", "checkpointed", "normal"]


class Linear(nnx.Module):
    """x @ kernel + bias, kernel (in, out), computed in `dtype` (`None`: as it comes)."""

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
    """Rows of a table by id; an id beyond the table gives NaN, not another token's row."""

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


def check_remat(how: Any) -> None:
    """Raises ValueError where `how` is none of what `checkpointed` takes."""
    if not (how in (None, "full") or callable(how)):
        raise ValueError(f"`remat` must be None, 'full' or a checkpoint policy, got {how!r}.")


def checkpointed(step: Callable[..., Any], how: Any) -> Callable[..., Any]:
    """The step of a scan over layers, of which the backward pass computes again what `how` says:
    `None` nothing, "full" all from its input, or a policy of `jax.checkpoint_policies`."""
    if how is None:
        return step
    return jax.checkpoint(step, policy=None if how == "full" else how, prevent_cse=False)
