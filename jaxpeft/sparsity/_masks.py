"""Masks: which entries of a weight are kept or trained, chosen by their scores.

scores          {path: array of the weight's shape}, the larger the more important
masks           {path: bool array of the weight's shape}, from `topk_mask`
prune           sets the entries outside a mask to zero
sparse_delta    trains the entries of a mask
"""

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._method import takes_sites
from jaxpeft._sites import Site, Sites
from jaxpeft._weight import IN, OUT

#: The groups of entries that are kept or pruned together: single entries, whole inputs or outputs
#: of a matrix (rows and columns of (in, out); an output of a convolution is a filter), blocks
#: (rows, columns), such as (None, head_dim) for heads, with None for a whole side, or whole
#: matrices of a stack (layers).
Structure = Literal["entry", "input", "output", "matrix"] | tuple[int | None, int | None]


@takes_sites
def topk_mask(
    scores: Mapping[str, jax.Array],
    sites: Sites,
    density: float,
    *,
    structure: Structure = "entry",
    scope: Literal["all", "matrix"] = "all",
    allow_empty: bool = False,
) -> dict[str, jax.Array]:
    """Masks of the entries with the largest scores, as many as fit into a density.

    The score of a group is the mean over its entries. With scope "all", the groups of all
    matrices are ranked together, and the best are kept while their entries fit into `density`
    times all entries. Of equal scores, the first are kept.

    Args:
      scores: {path: array of the weight's shape}, such as `magnitude_scores`.
      sites: The weights.
      density: Fraction of the entries to keep, in (0, 1]: 1 - sparsity.
      structure: What is kept or pruned together: "entry", "input", "output", "matrix", or the
        shape of a block (rows, columns), with None for a whole side.
      scope: "all" ranks the groups of all matrices together; "matrix" keeps the same density in
        each matrix.
      allow_empty: Whether a matrix may be left without entries.

    Returns:
      {path: bool array of the weight's shape}.

    Raises:
      ValueError: No site, a density out of range, an unknown structure, blocks that do not divide
        a matrix, scores that are missing, of another shape or not finite, or a matrix that would
        be left empty; names it.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> sites = jp.sites(f, params, jnp.ones((1, 2)))
      >>> scores = jp.sparsity.magnitude_scores(params, sites)
      >>> topk_mask(scores, sites, 0.5)["w"].tolist()
      [[False, True], [True, False]]
      >>> topk_mask(scores, sites, 0.5, structure="output")["w"].tolist()
      [[False, True], [False, True]]
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"`topk_mask(density={density})`: `density` must be in (0, 1], the fraction of entries "
            "to keep."
        )
    if scope not in ("all", "matrix"):
        raise ValueError(f"`topk_mask(scope='{scope}')`: `scope` must be 'all' or 'matrix'.")
    if not sites:
        raise ValueError(f"`topk_mask` selects no parameter. {sites.choices()}")
    grouped = {
        path: np.asarray(group_means(_checked(scores, site), site, structure), np.float64)
        for path, site in sites.items()
    }
    sizes = {path: math.prod(block_of(structure, site)) for path, site in sites.items()}
    kept = _topk(grouped, sizes, density, scope)
    masks = {}
    for path, site in sites.items():
        own = kept[path]
        empty = np.flatnonzero(~own.reshape(len(own), -1).any(axis=1))
        if len(empty) and not allow_empty:
            which = f"matrix {empty[0]} of '{path}'" if len(own) > 1 else f"'{path}'"
            raise ValueError(
                f"`topk_mask(density={density})` keeps no entry of {which}. Raise the density, "
                "rank the entries of each matrix on their own (scope='matrix'), or allow it "
                "(allow_empty=True)."
            )
        masks[path] = expand_groups(jnp.asarray(own), site, structure)
    return masks


def group_means(array: jax.Array, site: Site, structure: Structure) -> jax.Array:
    """The mean over each group of a weight's entries, (stack, groups of rows, of columns).

    All stack axes are merged into one.
    """
    rows, columns = block_of(structure, site)
    whole = site.matrices(array)
    n, m = whole.shape[-2:]
    blocks = whole.reshape(-1, n // rows, rows, m // columns, columns)
    return jnp.mean(blocks, axis=(2, 4))


def expand_groups(groups: jax.Array, site: Site, structure: Structure) -> jax.Array:
    """An array of the weight's shape with the value of each group at all of its entries.

    Args:
      groups: (stack, groups of rows, groups of columns), as from `group_means`.
      site: The weight.
      structure: See `Structure`.
    """
    rows, columns = block_of(structure, site)
    whole = jnp.repeat(jnp.repeat(groups, rows, axis=1), columns, axis=2)
    return site.array(whole.reshape(*site.stack, site.size(IN), site.size(OUT)))


def _checked(scores: Mapping[str, jax.Array], site: Site) -> jax.Array:
    found = scores.get(site.path)
    if found is None or found.shape != site.shape:
        shape = None if found is None else found.shape
        raise ValueError(
            f"The scores of '{site.path}' have shape {shape}, but must have {site.shape}. Give the "
            "scores of the same sites."
        )
    if not jnp.all(jnp.isfinite(found)):
        raise ValueError(
            f"The scores of '{site.path}' are not all finite and cannot be ranked: an overflow in "
            "the values they are computed from. Leave that batch or weight out."
        )
    return found


def block_of(structure: Structure, site: Site) -> tuple[int, int]:
    """Number of rows and columns of a group.

    Raises:
      ValueError: An unknown structure, or blocks that do not divide the matrix.
    """
    n, m = site.size(IN), site.size(OUT)
    named = {"entry": (1, 1), "input": (1, m), "output": (n, 1), "matrix": (n, m)}
    if isinstance(structure, str):
        if structure not in named:
            raise ValueError(
                f"structure='{structure}' is unknown; it must be one of {', '.join(named)}, or the "
                "shape of a block (rows, columns)."
            )
        return named[structure]
    if len(structure) != 2:
        raise ValueError(
            f"structure={structure!r} has {len(structure)} numbers, but must have two, (rows, "
            "columns) of a block, with None for a whole side."
        )
    rows, columns = (
        side if size is None else size for size, side in zip(structure, (n, m), strict=True)
    )
    if rows < 1 or columns < 1 or n % rows or m % columns:
        raise ValueError(
            f"structure={structure!r}: blocks of {rows} x {columns} do not divide '{site.path}', "
            f"which is {n} x {m}. Choose divisors of both sides."
        )
    return rows, columns


def _topk(
    grouped: Mapping[str, np.ndarray], sizes: Mapping[str, int], density: float, scope: str
) -> dict[str, np.ndarray]:
    """Which groups are kept: the best ones, while their entries fit into the density."""
    if scope == "matrix":
        found = {}
        for path, own in grouped.items():
            flat = own.reshape(len(own), -1)
            count = math.floor(density * flat.shape[1] + 1e-9)
            rank = np.argsort(np.argsort(-flat, axis=1, kind="stable"), axis=1)
            found[path] = (rank < count).reshape(own.shape)
        return found
    flat = np.concatenate([own.ravel() for own in grouped.values()])
    size = np.concatenate([np.full(own.size, sizes[path]) for path, own in grouped.items()])
    order = np.argsort(-flat, kind="stable")
    kept = np.zeros(flat.size, bool)
    kept[order] = np.cumsum(size[order]) <= density * size.sum() * (1 + 1e-9)
    parts = np.split(kept, np.cumsum([own.size for own in grouped.values()])[:-1])
    pairs = zip(grouped.items(), parts, strict=True)
    return {path: part.reshape(own.shape) for (path, own), part in pairs}


def mask_density(masks: Mapping[str, Any]) -> dict[str, float]:
    """The fraction of true entries of each mask, and of all masks together under "".

    Args:
      masks: {path: bool array}.

    Returns:
      {"": density of all masks, path: density of one}.

    Example:
      >>> mask_density({"a": np.array([True, False]), "b": np.ones(6, bool)})
      {'': 0.875, 'a': 0.5, 'b': 1.0}
    """
    counts = {path: (int(np.count_nonzero(m)), math.prod(m.shape)) for path, m in masks.items()}
    densities = {path: kept / size for path, (kept, size) in counts.items()}
    kept, size = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {"": kept / size, **densities}


# In files ----------------------------------------------------------------------------------------


def pack_mask(mask: Any) -> str:
    """A mask as text, one bit per entry and compressed, as the options of a method hold it."""
    bits = np.packbits(np.asarray(mask, bool).ravel()).tobytes()
    return base64.b64encode(zlib.compress(bits, 9)).decode()


def unpack_mask(mask: Any, site: Site, caller: str) -> jax.Array:
    """The mask of a site, from an array or from the text of `pack_mask`.

    Raises:
      ValueError: It is missing, or has another shape or dtype.
    """
    if isinstance(mask, str):
        bits = np.frombuffer(zlib.decompress(base64.b64decode(mask)), np.uint8)
        count = math.prod(site.shape)
        return jnp.asarray(np.unpackbits(bits, count=count).astype(bool).reshape(site.shape))
    shape = None if mask is None else tuple(mask.shape)
    if shape != site.shape:
        raise ValueError(
            f"`{caller}`: the mask of '{site.path}' has shape {shape}, but must have {site.shape}. "
            "Give masks of the same sites."
        )
    if mask.dtype != bool:
        raise ValueError(
            f"`{caller}`: the mask of '{site.path}' has dtype {mask.dtype}, but must be bool. "
            "`sparsity.topk_mask` makes masks of scores."
        )
    return jnp.asarray(mask)
