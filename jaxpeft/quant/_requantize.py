"""requantize: merges adapters into a quantized base that stays quantized."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpeft._lift import merge
from jaxpeft._methods.oft import as_sharded
from jaxpeft._view import View, map_views
from jaxpeft._weight import innermost
from jaxpeft.quant._quantize import check_finite_weight, check_format, quantized_view, quantizer
from jaxpeft.quant._quantized import Quantized


class Requantized(NamedTuple):
    """What `requantize` returns."""

    tree: Any
    error: dict[str, float]  # by path: |w' - w| / |w| over all entries, w' dequantized


def requantize(tree: Any, format: str | None = None, **options: Any) -> Requantized:
    """Merges adapters into the quantized weights below them, and quantizes the result.

    Each weight is merged in float32 (or wider) at the highest matmul precision and quantized.
    Where nothing was quantized before (plain arrays, adapters on them), this does what `merge`
    does. Rounding loses up to half a step of the format per entry, which may be more than the
    adapter has added: check `error`, and compare the losses.

    Args:
      tree: A tree with structured weights over quantized arrays.
      format: A format as in `quantize`; `None` keeps the format of each weight.
      options: Options of the format.

    Returns:
      The tree, and the relative error of each weight.

    Raises:
      NotMergeableError: A weight has no dense equivalent; names its path.
      ValueError: Nothing in the tree is quantized, a merged weight is not finite, or the format
        is unknown.
    """
    if format is not None:
        check_format(f"requantize(tree, '{format}')", format, options)
    quantize = None if format is None else quantizer(format, **options)
    error: dict[str, float] = {}

    def one(view: View) -> Any:
        base = innermost(view.weight)
        if not isinstance(base, Quantized):
            return merge(view)
        whole = merge(view, dtype=jnp.promote_types(view.dtype, jnp.float32))
        check_finite_weight(whole, view.path, "requantize")
        plain = View.of(whole, view.axes, view.path)
        matrix, fresh = plain.canonical(), quantized_view(plain, quantize or base.requantize).weight
        # Weights of zeros have no relative error.
        size = jnp.maximum(jnp.linalg.norm(matrix.ravel()), jnp.finfo(matrix.dtype).tiny)
        lost = as_sharded(jnp.subtract, matrix, fresh.materialize())
        error[view.path] = float(jnp.linalg.norm(lost.ravel()) / size)
        return dataclasses.replace(view, weight=fresh, natural=False)

    done = map_views(one, tree)
    if not error:
        raise ValueError(
            "`requantize`: the tree has no quantized weight. `merge` is for all others."
        )
    return Requantized(done, error)
