"""Which weights of a tree multiply by a kernel of their own."""

import dataclasses
from typing import TypeVar

from jaxpeft._view import View, map_views
from jaxpeft._weight import innermost, with_innermost
from jaxpeft.quant._kernels.nf4_matmul import KERNELS, why_not
from jaxpeft.quant._rows import Codebook

Tree = TypeVar("Tree")


def fused(tree: Tree, kernel: str | None = "pallas") -> Tree:
    """The tree with products by 4-bit matrices in one kernel that decodes as it multiplies.

    Unproven: right in Pallas's interpreter, and compiled for TPUs v5e and v5p without one; whether
    it wins over what XLA makes of decoding and product is to be measured on a TPU. Nothing uses it
    unless asked to. A whole decoded matrix never exists, neither in the forward nor in the backward
    pass; sums are in float32.

        frozen, adapter = jp.split(method(key, params))
        frozen = fused(frozen)

    It is for NF4 and FP4 in rows, on one chip or inside `jax.shard_map` (XLA cannot cut a kernel
    over a mesh by itself). Matrices whose rows are no multiple of the block, or whose block is no
    multiple of 16, lookups, convolutions, ragged products, and float64 decode as before, as does
    everything where the program is not compiled for a TPU. The scales are constants to the kernel,
    with no gradient, and there is no forward-mode derivative.

    Args:
      tree: What `quantize` returned, or either part of what `split` made of that.
      kernel: "pallas" for TPUs; "interpret" runs the same kernel in Pallas's interpreter, anywhere
        and slowly; `None` takes the kernels out again.

    Raises:
      ValueError: There is no such kernel, or no matrix in the tree that it could serve.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"`fused(kernel={kernel!r})`: choose one of {KERNELS}, or None.")
    refused: dict[str, str] = {}
    chosen = 0

    def one(view: View) -> View:
        nonlocal chosen
        inner = innermost(view.weight)
        if not isinstance(inner, Codebook):
            return view
        if kernel is not None and (reason := why_not(inner)):
            refused[view.path] = reason
            return view
        chosen += 1
        marked = with_innermost(view.weight, lambda w: dataclasses.replace(w, kernel=kernel))
        return dataclasses.replace(view, weight=marked)

    out = map_views(one, tree)
    if kernel is not None and not chosen:
        found = "; ".join(f"'{path}' {reason}" for path, reason in refused.items())
        raise ValueError(
            f"`fused`: the tree has no matrix that the kernel serves ({found or 'none in 4 bits'})."
            " It is for nf4 and fp4 in the layout 'rows'."
        )
    return out
