"""Sparse deltas: chosen entries of a matrix are trained, stored as values and positions."""

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
from jaxpeft.sparsity._masks import pack_mask, unpack_mask


@weight
class SparseDelta(Weight):
    """The matrix `w` with `values` added at `positions`, flat indices into (in, out).

    The matrices of a stack may have different numbers of entries; shorter ones are padded with
    the position in * out, which stands for no entry.
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
        """The terms of the matrix: their sum, or both where a narrower base would round values."""
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
    """Sparse delta: each matrix becomes w + delta, where only chosen entries of delta are trained.

    The other entries of delta are zero, and the chosen ones start at zero, so training starts at
    the base model. The entries are those of a mask, from any score, or random as in the simplest
    form of SHiRA. An adapter file holds the values, and the masks with one bit per entry.

    Args:
      masks: {path: bool array of the weight's shape}, from `sparsity.topk_mask`. Or a density in
        (0, 1]: this fraction of the entries of each matrix is drawn from the method's key.
      sites: The matrices.
      dtype: Dtype of the values.

    Returns:
      A method with one trainable parameter per chosen entry; in a stack, each matrix has as many
      as the one with the most. The matrix is formed where it is used, and again in the backward
      pass, where the gradient of one matrix at a time is dense.

    Raises:
      ValueError: A density out of range, or a mask that is missing, empty or of another shape;
        names the weight.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 5))}
      >>> sites = jp.sites(f, params, jnp.ones((1, 4)))
      >>> frozen, adapter = jp.split(jp.sparse_delta(0.2, sites)(jax.random.key(0), params))
      >>> {path: x.shape for path, x in adapter.items()}
      {'w/values': (4,)}

    References:
      Bhardwaj et al., Sparse High Rank Adapters, 2024, section 3. https://arxiv.org/abs/2406.13175
    """
    check_whole("sparse_delta", sites)
    if isinstance(masks, Mapping):
        found = {p: unpack_mask(masks.get(p), site, "sparse_delta") for p, site in sites.items()}
        given: Any = {path: pack_mask(mask) for path, mask in found.items()}
    else:
        if not 0 < masks <= 1:
            raise ValueError(
                f"`sparse_delta(masks={masks})`: a density must be in (0, 1], the fraction of "
                "entries to train. Or give masks by path."
            )
        found, given = {}, float(masks)
    density = 0.0 if found else given

    def make(key: jax.Array, site: Site, view: View) -> View:
        check_entries("sparse_delta", site, view)
        n, m = site.size(IN), site.size(OUT)
        if site.path in found:
            positions = _positions(np.asarray(site.matrices(found[site.path])), site)
        else:
            positions = _random_positions(key, site, max(round(density * n * m), 1))
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
            f"`sparse_delta`: the mask of '{site.path}' has no entry"
            + (f" in matrix {int(np.argmin(counts))} of its stack" if site.stack else "")
            + ". Leave the weight out of the sites, or use a mask of higher density."
        )
    rows = np.full((len(flat), counts.max()), flat.shape[1], np.int32)
    for row, own in zip(rows, flat, strict=True):
        at = np.flatnonzero(own)
        row[: len(at)] = at
    return jnp.asarray(rows.reshape(*site.stack, -1))


def _random_positions(key: jax.Array, site: Site, count: int) -> jax.Array:
    """`count` different random entries of each matrix, (*stack, count)."""
    size = site.size(IN) * site.size(OUT)
    keys = jax.random.split(key, site.stack) if site.stack else key
    draw = lambda key: jnp.sort(jax.random.choice(key, size, (count,), replace=False))  # noqa: E731
    for _ in site.stack:
        draw = jax.vmap(draw)
    return draw(keys).astype(jnp.int32)
