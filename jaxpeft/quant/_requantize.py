"""requantize: adapters folded into a quantized base that stays quantized."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpeft._lift import merge
from jaxpeft._methods.oft import as_sharded
from jaxpeft._view import View, map_views
from jaxpeft._weight import innermost
from jaxpeft.quant._quantize import check_finite_weight, encoded, encoder
from jaxpeft.quant._quantized import Quantized


class Requantized(NamedTuple):
    """What `requantize` returns."""

    tree: Any
    error: dict[str, float]  # by path: |w' - w| / |w| over all entries, w' what the codes say


def requantize(tree: Any, format: str | None = None, **options: Any) -> Requantized:
    """Merges what stands on quantized weights into them, and rounds anew.

    Each weight is merged in float32 (or wider) at the highest matmul precision and rounded to
    codes; what was no code before (plain arrays, adapters on them) is merged or left as `merge`
    does. Rounding loses up to half a step of the format per entry, which may be more than the
    adapter has added: look at `error`, and compare the losses.

    Args:
      tree: With structured weights over quantized arrays.
      format: As in `quantize`, with its options; `None` keeps the format of each weight.
      options: Of the format.

    Returns:
      The tree, and the relative error of each weight.

    Raises:
      NotAMatrixError: A weight is no matrix; names its path.
      ValueError: Nothing in the tree is quantized, a merged weight is not finite, or the format
        is unknown.
    """
    encode = None if format is None else encoder(format, **options)
    error: dict[str, float] = {}

    def one(view: View) -> Any:
        coded = innermost(view.weight)
        if not isinstance(coded, Quantized):
            return merge(view)
        whole = merge(view, dtype=jnp.promote_types(view.dtype, jnp.float32))
        check_finite_weight(whole, view.path, "requantize")
        plain = View.of(whole, view.axes, view.path)
        matrix, fresh = plain.canonical(), encoded(plain, encode or coded.again).weight
        # Blocks of zeros have no error to speak of.
        size = jnp.maximum(jnp.linalg.norm(matrix.ravel()), jnp.finfo(matrix.dtype).tiny)
        lost = as_sharded(jnp.subtract, matrix, fresh.materialize())
        error[view.path] = float(jnp.linalg.norm(lost.ravel()) / size)
        return dataclasses.replace(view, weight=fresh, natural=False)

    done = map_views(one, tree)
    if not error:
        raise ValueError("`requantize`: the tree has no quantized weight. `merge` folds the rest.")
    return Requantized(done, error)
