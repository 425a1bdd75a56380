"""Sparse deltas: single entries of a matrix are trained, stored as values and positions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._computed import Computed, matrix_of
from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import IN, OUT, Weight, axes, base_weight, dense, static, weight
from jaxpeft.extend._apply import apply_to_sites, check_entries, check_whole
from jaxpeft.sparsity._masks import packed, unpacked


@weight
class SparseDelta(Weight):
    """The matrix `w` with `values` added at `positions`, numbered row by row in (in, out).

    A position of in * out is none: matrices of a stack may have different numbers of entries.
    """

    w: Any = base_weight()
    values: Any = axes("entry")
    positions: Any = axes("entry")
    sides: tuple[int, int] = static((0, 0))

    def forward(self, x):
        """x @ (w + delta)."""
        return sum(x @ part for part in self._parts())

    def transposed(self, y):
        """y @ (w + delta).T."""
        return sum(y @ part.T for part in self._parts())

    def lookup(self, ids):
        """w[ids] + delta[ids]."""
        return self.with_delta(self.w[ids], ids, self._delta()[ids], self.values.site.rows)

    def materialize(self):
        return dense(self.w) + self._scattered(self.values, self.positions)

    def _scattered(self, values: jax.Array, positions: jax.Array) -> jax.Array:
        """The delta (*stack, in, out)."""
        if values.ndim > 1:
            return jax.vmap(self._scattered)(values, positions)
        flat = jnp.zeros(self.sides[0] * self.sides[1], values.dtype)
        return flat.at[positions].add(values, mode="drop").reshape(self.sides)

    def _parts(self) -> list[Any]:
        """What adds up to the matrix: itself, or two where a narrow base would swallow values."""
        wide = jnp.promote_types(self.values.dtype, self.values.site.dtype)
        return [self._sum()] if wide == self.values.site.dtype else [self.w, self._delta()]

    def _delta(self) -> Computed:
        return Computed(self._scattered, {"values": self.values, "positions": self.positions})

    def _sum(self) -> Computed:
        operands, matrix = matrix_of(self.w)

        def total(values: jax.Array, positions: jax.Array, **of_base: Any) -> jax.Array:
            return matrix(of_base) + self._scattered(values, positions)

        return Computed(total, {"values": self.values, "positions": self.positions, **operands})


@register_method
def sparse_delta(
    masks: Mapping[str, Any] | float, sites: Sites, *, dtype: Any = jnp.float32
) -> Method:
    """Trains chosen entries of each matrix: `w + delta`, delta zero but at these entries.

    Values start at zero, so that training starts at the base model. Which entries is up to a mask,
    of `keep` and any score, or random as in SHiRA's plainest form. An adapter file holds the values
    and, packed, the masks.

    Args:
      masks: {path: bools of the weight's shape}; or a share in (0, 1], and each matrix trains as
        many entries, drawn from the method's key.
      sites: The matrices.
      dtype: Of the values.

    Returns:
      A method with as many trained numbers as the masks have entries; a stack of matrices has
      those of the fullest, for each. The matrix is formed where it is used, and again in the
      backward pass, whose gradient is dense for one matrix at a time.

    Raises:
      ValueError: A share out of range, a mask that is missing, empty or of another shape; names
        the weight.

    References:
      Bhardwaj et al., Sparse High Rank Adapters, 2024, section 3. https://arxiv.org/abs/2406.13175
    """
    check_whole("sparse_delta", sites)
    if isinstance(masks, Mapping):
        found = {p: unpacked(masks.get(p), site, "sparse_delta") for p, site in sites.items()}
        given: Any = {path: packed(mask) for path, mask in found.items()}
    else:
        if not 0 < masks <= 1:
            raise ValueError(f"`sparse_delta({masks})`: a share of entries in (0, 1] is needed.")
        found, given = {}, float(masks)
    share = 0.0 if found else given

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_entries("sparse_delta", site, view)
        n, m = site.size(IN), site.size(OUT)
        if site.path in found:
            positions = _positions(np.asarray(site.matrices(found[site.path])), site)
        else:
            positions = _drawn(key, site, max(round(share * n * m), 1))
        values = Trainable(jnp.zeros(positions.shape, dtype))
        return dataclasses.replace(view, weight=SparseDelta(view.weight, values, positions, (n, m)))

    return Method(
        "sparse_delta",
        {"masks": given, "sites": sites, "dtype": dtype},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="sparse_delta"),
    )


def _positions(mask: np.ndarray, site: Site) -> jax.Array:
    """Where a mask (*stack, in, out) is true, (*stack, entries)."""
    flat = mask.reshape(-1, mask.shape[-2] * mask.shape[-1])
    counts = flat.sum(axis=1)
    if not counts.all():
        raise ValueError(
            f"`sparse`: the mask of '{site.path}' has no entry"
            + (f" in matrix {int(np.argmin(counts))} of its stack" if site.stack else "")
            + ". Leave the weight out of the sites, or keep more."
        )
    rows = np.full((len(flat), counts.max()), flat.shape[1], np.int32)
    for row, own in zip(rows, flat, strict=True):
        at = np.flatnonzero(own)
        row[: len(at)] = at
    return jnp.asarray(rows.reshape(*site.stack, -1))


def _drawn(key: jax.Array, site: Site, count: int) -> jax.Array:
    """`count` entries of each matrix, none twice."""
    size = site.size(IN) * site.size(OUT)
    keys = jax.random.split(key, site.stack) if site.stack else key
    draw = lambda key: jnp.sort(jax.random.choice(key, size, (count,), replace=False))  # noqa: E731
    for _ in site.stack:
        draw = jax.vmap(draw)
    return draw(keys).astype(jnp.int32)
