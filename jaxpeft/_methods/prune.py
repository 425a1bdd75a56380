"""Pruning: a mask holds entries of the base at zero."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft._computed import Computed, matrix_of
from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, axes, base_weight, dense, weight
from jaxpeft.extend._apply import apply_to_sites, check_entries, check_whole
from jaxpeft.sparsity._masks import pack_mask, unpack_mask


class Entrywise(Weight):
    """A matrix f(w) with an entrywise function f, formed where it is used.

    A subclass defines f in `entrywise`.
    """

    w: Any
    local_in = local_out = True

    def entrywise(self) -> tuple[dict[str, Any], Callable[..., jax.Array]]:
        """Arrays by name, and the function f(matrix, **arrays)."""
        raise NotImplementedError

    def forward(self, x):
        """x @ f(w)."""
        return x @ self._matrix()

    def transposed(self, y):
        """y @ f(w).T."""
        return y @ self._matrix().T

    def materialize(self):
        arrays, f = self.entrywise()
        return f(dense(self.w), **arrays)

    def _matrix(self):
        operands, matrix = matrix_of(self.w)
        arrays, f = self.entrywise()

        def formed(**given: Any) -> jax.Array:
            own = {name: given.pop(name) for name in arrays}
            return f(matrix(given), **own)

        return Computed(formed, {**arrays, **operands})


@weight
class Masked(Entrywise):
    """The matrix `w`, zero where the mask is false."""

    w: Any = base_weight()
    mask: Any = axes("in", "out")

    def entrywise(self):
        return {"mask": self.mask}, lambda matrix, mask: jnp.where(mask, matrix, 0)

    def lookup(self, ids):
        """w[ids] * mask[ids]."""
        rows = self.w[ids]
        return self.with_delta(rows, ids, jnp.where(self.mask[ids], 0, -rows), self.mask.site.rows)


@register_method
def prune(masks: Mapping[str, Any], sites: Sites) -> Method:
    """Pruning: sets the entries of each weight to zero where its mask is false, w * mask.

    A plain array becomes another plain array, at no cost in the model. Over the weight of another
    method the mask stays: after that method in the `chain`, it also prunes what the method adds,
    so that a merged tree keeps its zeros, `chain(prune(masks, sites), lora(8, sites),
    prune(masks, sites))`. The matrix is then formed where it is used, and again in the backward
    pass.

    Args:
      masks: {path: bool array of the weight's shape}, from `sparsity.topk_mask`; true where an
        entry is kept.
      sites: The weights.

    Returns:
      A method without trainable parameters.

    Raises:
      ValueError: A mask is missing, or has another shape or dtype; a weight is trained as a
        whole by another method, or has no dense equivalent under one; names the weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> sites = jp.sites(f, params, jnp.ones((1, 2)))
      >>> scores = jp.sparsity.magnitude_scores(params, sites)
      >>> masks = jp.sparsity.topk_mask(scores, sites, density=0.5)
      >>> jp.prune(masks, sites)(jax.random.key(0), params)["w"].tolist()
      [[0.0, -4.0], [3.0, 0.0]]

    References:
      Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015,
      section 3. https://arxiv.org/abs/1506.02626
    """
    check_whole("prune", sites)
    found = {p: unpack_mask(masks.get(p), site, "prune") for p, site in sites.items()}

    def make(key: jax.Array, site: Site, view: View) -> Any:
        del key
        mask, w = found[site.path], view.weight
        if isinstance(w, Trainable):
            raise ValueError(
                f"`prune`: '{site.path}' is already trained as a whole, and training would move "
                "its zeros. Train the kept entries with `sparse_delta`, or use "
                "`optim.fixed_mask` as the optimizer."
            )
        if isinstance(w, Weight):
            check_entries("prune", site, view)
            return dataclasses.replace(view, weight=Masked(w, site.matrices(mask)))
        return jnp.where(mask, w, jnp.zeros((), w.dtype))

    texts = {path: pack_mask(mask) for path, mask in found.items()}
    return Method(
        "prune",
        {"masks": texts, "sites": sites},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="prune"),
    )
