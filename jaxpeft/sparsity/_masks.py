"""Masks: which entries of a weight are kept or trained, by their scores.

scores   {path: numbers of the weight's shape}, the larger the more important (scores.py)
masks    {path: bools of the weight's shape}, from `keep`
prune    the entries that are not kept become zero
sparse   the entries of a mask are trained, and nothing else (sparse.py)
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

#: What is kept or given up together: single entries, whole inputs or outputs of a matrix (rows
#: and columns of (in, out); an output of a convolution is a filter), blocks (rows, columns), as a
#: head's (in, head_dim), with None for all of a side, or whole matrices of a stack (layers).
Structure = Literal["entry", "input", "output", "matrix"] | tuple[int | None, int | None]


@takes_sites
def topk_mask(
    scores: Mapping[str, jax.Array],
    sites: Sites,
    density: float,
    *,
    structure: Structure = "entry",
    scope: Literal["all", "matrix"] = "all",
    empty: bool = False,
) -> dict[str, jax.Array]:
    """Masks of the entries with the largest scores.

    A group's score is the mean over its entries; groups of all matrices compete, weighed by their
    size, or those of each matrix alone. Of equal scores, the first are kept.

    Args:
      scores: {path: numbers of the weight's shape}.
      sites: The weights.
      density: Share of entries that is kept, in (0, 1]: 1 - sparsity.
      structure: See `Structure`.
      scope: "all" compares all matrices with each other; "matrix" keeps the same share of each.
      empty: Whether a matrix may be left without entries.

    Returns:
      {path: bools of the weight's shape}.

    Raises:
      ValueError: No site, a density out of range, an unknown structure, blocks that do not divide
        a matrix, scores that are missing, of another shape or not finite, or a matrix that would
        be left empty; names it.
    """
    if not 0 < density <= 1:
        raise ValueError(f"`topk_mask(density={density})`: a share in (0, 1] is needed.")
    if scope not in ("all", "matrix"):
        raise ValueError(f"`topk_mask(scope='{scope}')`: choose 'all' or 'matrix'.")
    if not sites:
        raise ValueError(f"`keep` selects no parameter. {sites.what_there_is()}")
    grouped = {
        path: np.asarray(group_means(_checked(scores, site), site, structure), np.float64)
        for path, site in sites.items()
    }
    sizes = {path: math.prod(block_of(structure, site)) for path, site in sites.items()}
    chosen = _largest(grouped, sizes, density, scope)
    masks = {}
    for path, site in sites.items():
        own = chosen[path]
        bare = np.flatnonzero(~own.reshape(len(own), -1).any(axis=1))
        if len(bare) and not empty:
            which = f"matrix {bare[0]} of '{path}'" if len(own) > 1 else f"'{path}'"
            raise ValueError(
                f"`topk_mask(density={density})` leaves no entry of {which}. Keep more, compare "
                "entries with those of the same matrix (scope='matrix'), or allow it (empty=True)."
            )
        masks[path] = spread(jnp.asarray(own), site, structure)
    return masks


def group_means(array: jax.Array, site: Site, structure: Structure) -> jax.Array:
    """The mean over each group of a weight's entries, (stack, groups of rows, of columns).

    All axes of the stack are one here.
    """
    rows, columns = block_of(structure, site)
    whole = site.matrices(array)
    n, m = whole.shape[-2:]
    blocks = whole.reshape(-1, n // rows, rows, m // columns, columns)
    return jnp.mean(blocks, axis=(2, 4))


def spread(groups: jax.Array, site: Site, structure: Structure) -> jax.Array:
    """What stands at each group, at each of its entries: an array of the weight's shape."""
    rows, columns = block_of(structure, site)
    whole = jnp.repeat(jnp.repeat(groups, rows, axis=1), columns, axis=2)
    return site.array(whole.reshape(*site.stack, site.size(IN), site.size(OUT)))


def _checked(scores: Mapping[str, jax.Array], site: Site) -> jax.Array:
    found = scores.get(site.path)
    if found is None or found.shape != site.shape:
        shape = None if found is None else found.shape
        raise ValueError(
            f"The scores of '{site.path}' have shape {shape}, should be {site.shape}. Give those "
            "of the same sites."
        )
    if not jnp.all(jnp.isfinite(found)):
        raise ValueError(
            f"The scores of '{site.path}' are not all finite, so they have no order. What they "
            "were computed from overflows; leave that batch or weight out."
        )
    return found


def block_of(structure: Structure, site: Site) -> tuple[int, int]:
    """Rows and columns of a group.

    Raises:
      ValueError: There is no such structure, or the matrix does not divide into it.
    """
    n, m = site.size(IN), site.size(OUT)
    named = {"entry": (1, 1), "input": (1, m), "output": (n, 1), "matrix": (n, m)}
    if isinstance(structure, str):
        if structure not in named:
            raise ValueError(
                f"There is no structure '{structure}'; there are {', '.join(named)}, and blocks "
                "(rows, columns)."
            )
        return named[structure]
    if len(structure) != 2:
        raise ValueError(
            f"structure={structure!r} has {len(structure)} numbers, should have two, (rows, "
            "columns) of a block, with None for all of a side."
        )
    rows, columns = (
        side if size is None else size for size, side in zip(structure, (n, m), strict=True)
    )
    if rows < 1 or columns < 1 or n % rows or m % columns:
        raise ValueError(
            f"Blocks of {rows} x {columns} do not divide '{site.path}', which is {n} x {m}."
        )
    return rows, columns


def _largest(
    grouped: Mapping[str, np.ndarray], sizes: Mapping[str, int], density: float, scope: str
) -> dict[str, np.ndarray]:
    """Which groups are kept: the best ones, as long as their entries fit into the share."""
    if scope == "matrix":
        found = {}
        for path, own in grouped.items():
            flat = own.reshape(len(own), -1)
            count = math.floor(density * flat.shape[1] + 1e-9)
            place = np.argsort(np.argsort(-flat, axis=1, kind="stable"), axis=1)
            found[path] = (place < count).reshape(own.shape)
        return found
    flat = np.concatenate([own.ravel() for own in grouped.values()])
    size = np.concatenate([np.full(own.size, sizes[path]) for path, own in grouped.items()])
    order = np.argsort(-flat, kind="stable")
    chosen = np.zeros(flat.size, bool)
    chosen[order] = np.cumsum(size[order]) <= density * size.sum() * (1 + 1e-9)
    parts = np.split(chosen, np.cumsum([own.size for own in grouped.values()])[:-1])
    pairs = zip(grouped.items(), parts, strict=True)
    return {path: part.reshape(own.shape) for (path, own), part in pairs}


def mask_density(masks: Mapping[str, Any]) -> dict[str, float]:
    """Share of entries that each mask has, and under "" that of all."""
    counts = {path: (int(np.count_nonzero(m)), math.prod(m.shape)) for path, m in masks.items()}
    share = {path: some / of for path, (some, of) in counts.items()}
    some, of = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {"": some / of, **share}


# In files ----------------------------------------------------------------------------------------


def packed(mask: Any) -> str:
    """A mask as text, one bit an entry and compressed, as an adapter's description holds it."""
    bits = np.packbits(np.asarray(mask, bool).ravel()).tobytes()
    return base64.b64encode(zlib.compress(bits, 9)).decode()


def unpacked(mask: Any, site: Site, caller: str) -> jax.Array:
    """The mask of a site, from an array or the text of `packed`.

    Raises:
      ValueError: There is none, or it has another shape or dtype.
    """
    if isinstance(mask, str):
        bits = np.frombuffer(zlib.decompress(base64.b64decode(mask)), np.uint8)
        count = math.prod(site.shape)
        return jnp.asarray(np.unpackbits(bits, count=count).astype(bool).reshape(site.shape))
    shape = None if mask is None else tuple(mask.shape)
    if shape != site.shape:
        raise ValueError(
            f"`{caller}`: the mask of '{site.path}' has shape {shape}, should be {site.shape}. Give "
            "masks of the same sites."
        )
    if mask.dtype != bool:
        raise ValueError(
            f"`{caller}`: the mask of '{site.path}' has dtype {mask.dtype}, should be bool. Masks "
            "are made of scores by `keep`."
        )
    return jnp.asarray(mask)
