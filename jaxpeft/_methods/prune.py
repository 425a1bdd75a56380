"""Pruning: entries of the base are held at zero by a mask."""

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
from jaxpeft.sparsity._masks import packed, unpacked

# Pruning -----------------------------------------------------------------------------------------


class Entrywise(Weight):
    """A matrix with its entries changed one by one, and formed where it is used.

    A subclass says in `changes` what becomes of the formed matrix.
    """

    w: Any
    local_in = local_out = True

    def changes(self) -> tuple[dict[str, Any], Callable[..., jax.Array]]:
        """Arrays by name, and `change(matrix, **arrays)`."""
        raise NotImplementedError

    def forward(self, x):
        """x @ change(w)."""
        return x @ self._matrix()

    def transposed(self, y):
        """y @ change(w).T."""
        return y @ self._matrix().T

    def materialize(self):
        arrays, change = self.changes()
        return change(dense(self.w), **arrays)

    def _matrix(self):
        operands, matrix = matrix_of(self.w)
        arrays, change = self.changes()

        def edited(**given: Any) -> jax.Array:
            own = {name: given.pop(name) for name in arrays}
            return change(matrix(given), **own)

        return Computed(edited, {**arrays, **operands})


@weight
class Masked(Entrywise):
    """The matrix `w`, zero where the mask is false."""

    w: Any = base_weight()
    mask: Any = axes("in", "out")

    def changes(self):
        return {"mask": self.mask}, lambda matrix, mask: jnp.where(mask, matrix, 0)

    def lookup(self, ids):
        """w[ids] * mask[ids]."""
        rows = self.w[ids]
        return self.with_delta(rows, ids, jnp.where(self.mask[ids], 0, -rows), self.mask.site.rows)


@register_method
def prune(masks: Mapping[str, Any], sites: Sites) -> Method:
    """Sets the entries to zero that the masks do not keep.

    A plain array becomes one with zeros, at no cost later. Over another method's weight the mask
    stays: put behind one in the `chain`, it prunes what that adds too, so that a merged tree keeps
    its zeros: `chain(prune(masks, sites), lora(8, sites), prune(masks, sites))`. The matrix is
    then formed where it is used, and again in the backward pass.

    Args:
      masks: {path: bools of the weight's shape}, from `keep`.
      sites: The weights.

    Returns:
      A method that trains nothing.

    Raises:
      ValueError: A mask is missing, of another shape or no bools; a weight is trained as a whole
        by another method, or made no matrix by one; names it.
    """
    check_whole("prune", sites)
    found = {p: unpacked(masks.get(p), site, "prune") for p, site in sites.items()}

    def make(key: jax.Array, site: Site, view: View) -> Any:
        del key
        mask, w = found[site.path], view.weight
        if isinstance(w, Trainable):
            raise ValueError(
                f"`prune`: '{site.path}' is trained as a whole already, and would be moved away "
                "from zero. Train its entries with `sparse`, or under `optim.fixed_mask`."
            )
        if isinstance(w, Weight):
            check_entries("prune", site, view)
            return dataclasses.replace(view, weight=Masked(w, site.matrices(mask)))
        return jnp.where(mask, w, jnp.zeros((), w.dtype))  # an array again, as it was

    texts = {path: packed(mask) for path, mask in found.items()}
    return Method(
        "prune",
        {"masks": texts, "sites": sites},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="prune"),
    )
