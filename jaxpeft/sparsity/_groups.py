"""Structured pruning: groups that span several arrays are removed, and the arrays get smaller.

A hidden unit of a feed-forward block is a column of `up`, an entry of its bias and a row of
`down`; a head is some columns of q, k and v and as many rows of o; a filter is an output of one
kernel and an input channel of the next; a layer is a slice of every array in its stack.

    prunable_groups     the blocks of the arrays that make up each group
    group_scores        how important each group is, from the scores of its entries
    topk_groups         which groups have the largest scores
    prune_structured    the parameters without the other groups
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._marks import Concatenated, Trainable
from jaxpeft._method import takes_sites
from jaxpeft._sites import Site, Sites
from jaxpeft._tree import flatten
from jaxpeft._view import is_view
from jaxpeft._weight import IN, OUT, STACK
from jaxpeft.extend._apply import check_whole

_SIDES = {OUT: "output", IN: "input", STACK: "stack"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One array, with a block for each group.

    Attributes:
      path, shape: Path and shape of the array.
      sizes: Sizes of its axes as the model uses them, finer than `shape` where the model reshapes
        an axis into several.
      axis: The index in `sizes` of the axis (outer, groups, block), most significant first.
      outer: 1, except for a bias whose kernel has output axes before that of the groups.
      stack: The indices in `sizes` of the stack axes, each entry of which has its own groups.
    """

    path: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    axis: int
    outer: int
    stack: tuple[int, ...]

    def split(self, count: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """Sizes with an axis for the groups, the index of this axis, and those of the stack."""
        block = self.sizes[self.axis] // (self.outer * count)
        sizes = (*self.sizes[: self.axis], self.outer, count, block, *self.sizes[self.axis + 1 :])
        return sizes, self.axis + 1, tuple(i if i < self.axis else i + 2 for i in self.stack)

    def scores(self, array: jax.Array, count: int) -> jax.Array:
        """The sum over each block, (*stack, count)."""
        sizes, group, stack = self.split(count)
        others = tuple(i for i in range(len(sizes)) if i != group and i not in stack)
        summed = jnp.sum(array.reshape(sizes), others)
        return jnp.moveaxis(summed, sum(i < group for i in stack), -1)

    def kept(self, array: jax.Array, index: np.ndarray, count: int) -> tuple[Any, "Member"]:
        """The array with the groups at `index` (*stack, kept) only, and its `Member`."""
        sizes, group, stack = self.split(count)
        index = np.moveaxis(index, -1, sum(i < group for i in stack))
        others = [i for i in range(len(sizes)) if i != group and i not in stack]
        index = np.expand_dims(index, others)
        part = jnp.take_along_axis(array.reshape(sizes), jnp.asarray(index), axis=group)
        kept = part.shape[group]
        # The last axis of `shape` that starts no later than the axis of the groups.
        start = math.prod(self.sizes[: self.axis])
        dim = max(i for i in range(len(self.shape)) if math.prod(self.shape[:i]) <= start)
        shape = _with(self.shape, dim, self.shape[dim] // count * kept)
        smaller = _with(self.sizes, self.axis, self.sizes[self.axis] // count * kept)
        return part.reshape(shape), dataclasses.replace(self, shape=shape, sizes=smaller)


def _with(sizes: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
    return (*sizes[:at], size, *sizes[at + 1 :])


@dataclasses.dataclass(frozen=True)
class PrunableGroups:
    """Groups of entries that can be pruned together, from `prunable_groups`.

    Attributes:
      count: Number of groups in each slice of the stack.
      stack: Sizes of the stack axes that the members share.
      members: The arrays, each with a block for each group.
    """

    count: int
    stack: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an array with one entry per group: (*stack, count)."""
        return (*self.stack, self.count)


@takes_sites
def prunable_groups(
    count: int,
    *,
    outputs: Sites | None = None,
    inputs: Sites | None = None,
    stacks: Sites | None = None,
) -> PrunableGroups:
    """`count` groups, such as heads or hidden units: one block of an axis of each selected array.

    The axis of an array is the one of length `count` on the named side, or else the one whose
    length `count` divides, cut into contiguous blocks: in a kernel (in, heads * head_dim) a head
    is head_dim columns. With as many groups as key-value heads, the query heads that share a
    key-value head are one group.

    A kernel that concatenates parts with all groups in each, such as [gate | up], is not
    supported: store its parts as arrays of their own.

    Args:
      count: Number of groups in each layer of a stack.
      outputs: The weights that compute the groups: kernels, each with the bias that the model
        adds to its product, and vectors, such as the scale of a norm between two convolutions.
      inputs: The weights that read the groups.
      stacks: Weights whose slices along a stack axis are the groups: layers, or experts, which
        are also outputs of their router. Each entry of the stack axes before it has its own
        groups.

    Returns:
      `PrunableGroups`, for `group_scores`, `topk_groups` and `prune_structured`.

    Raises:
      ValueError: Nothing is selected; an array has no axis that `count` divides, or more than
        one; a bias does not have one entry per output of its kernel; or the stacks of the arrays
        differ; names them.

    Example:
      >>> from jaxpeft import sites
      >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> p = {"up": jnp.ones((2, 6)), "down": jnp.ones((6, 3))}
      >>> s = sites(f, p, jnp.ones((1, 2)))
      >>> hidden = prunable_groups(6, outputs=s.match("up"), inputs=s.match("down"))
      >>> jax.tree.map(jnp.shape, prune_structured(p, hidden, jnp.arange(6) < 4))
      {'down': (4, 3), 'up': (2, 4)}
    """
    if count < 1:
        raise ValueError(
            f"`prunable_groups({count})`: `count` must be at least 1, the number of groups."
        )
    members: list[Member] = []
    for role, selected in ((OUT, outputs), (IN, inputs), (STACK, stacks)):
        check_whole("prunable_groups", selected or Sites({}))
        biases: dict[str, Member] = {}
        for site in (selected or {}).values():
            member = _member(site, role, count)
            members.append(member)
            bias = selected.every[site.bias] if selected and role == OUT and site.bias else None
            if bias is not None and bias.size(OUT) > 1:
                biases[bias.path] = _bias(bias, site, member, count)
        if biases:
            members = [m for m in members if m.path not in biases] + list(biases.values())
    if not members:
        raise ValueError(
            f"`prunable_groups({count})` selects no parameter. Give the `outputs` that compute the "
            "groups and the `inputs` that read them, or `stacks`."
        )
    found = [tuple(m.sizes[i] for i in m.stack) for m in members]
    for member, stack in zip(members, found, strict=True):
        if stack != found[0]:
            raise ValueError(
                f"`prunable_groups({count})`: '{members[0].path}' has a stack {found[0]}, but "
                f"'{member.path}' of shape {member.shape} has a stack {stack}. A group needs a "
                "block in each of its arrays: select arrays of one stack."
            )
    return PrunableGroups(count, found[0], tuple(members))


def _member(site: Site, role: str, count: int) -> Member:
    """The array of a site, with its only axis of this role that `count` divides.

    Raises:
      ValueError: There is no such axis, or more than one.
    """
    side = [(i, axis.size) for i, axis in enumerate(site.axes) if axis.role == role]
    exact = [i for i, size in side if size == count]
    fit = exact if len(exact) == 1 else [i for i, size in side if size % count == 0]
    if len(fit) != 1:
        sizes = [size for _, size in side]
        candidates = [site.axes[i].size for i in fit]
        what = (
            f"`prunable_groups({count})`: the {_SIDES[role]} axes of '{site.path}' {site.shape} "
            "have lengths"
        )
        if not fit:
            raise ValueError(
                f"{what} {sizes}, none of which divides into {count} equal blocks. Give the number "
                "of groups that this array has, or leave it out."
            )
        raise ValueError(
            f"{what} {candidates} that divide into {count} equal blocks, so the axis of the groups "
            "is ambiguous. Give the other axes another role with "
            f"`sites.override('{site.path}', ...)`."
        )
    stack = [i for i, axis in enumerate(site.axes) if axis.role == STACK]
    if role == STACK:
        stack = [i for i in stack if i < fit[0]]
    sizes = [axis.size for axis in site.axes]
    return Member(site.path, site.shape, tuple(sizes), fit[0], 1, tuple(stack))


def _bias(bias: Site, site: Site, kernel: Member, count: int) -> Member:
    """The bias of a kernel, with blocks for the same outputs as those of the kernel.

    Raises:
      ValueError: It does not have one entry per output, or its axes divide the outputs otherwise.
    """
    before = math.prod(a.size for a in site.axes[: kernel.axis] if a.role == OUT)
    start = 1
    for i, axis in enumerate(bias.axes):
        if axis.role != OUT or bias.size(OUT) != site.size(OUT):
            continue
        outer, uneven = divmod(before, start)
        if outer and not uneven and axis.size % (outer * count) == 0:
            stack = (i for i, a in enumerate(bias.axes) if a.role == STACK)
            sizes = tuple(a.size for a in bias.axes)
            return Member(bias.path, bias.shape, sizes, i, outer, tuple(stack))
        start *= axis.size
    raise ValueError(
        f"`prunable_groups({count})`: the model adds '{bias.path}' of shape {bias.shape} to the "
        f"product of '{site.path}' of shape {site.shape}, but the {count} groups of that do not "
        f"divide the bias: it has {bias.size(OUT)} entries for {site.size(OUT)} outputs. Give the "
        "bias the output axes of its kernel, in the model or with `sites.override`."
    )


def group_scores(scores: Mapping[str, jax.Array], groups: PrunableGroups) -> jax.Array:
    """The score of each group: the sum of the scores of its entries in all of its arrays.

    Args:
      scores: {path: array of the parameter's shape}, the larger the more important, such as
        `magnitude_scores`. Arrays without scores, such as biases, do not contribute.
      groups: From `prunable_groups`.

    Returns:
      (*stack, count), in float32 or wider.

    Raises:
      ValueError: None of the arrays has scores, or scores have another shape or are not finite.

    Example:
      >>> from jaxpeft import sites
      >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> p = {"up": jnp.ones((2, 3)), "down": jnp.arange(3.0)[:, None]}
      >>> s = sites(f, p, jnp.ones((1, 2)))
      >>> hidden = prunable_groups(3, outputs=s.match("up"), inputs=s.match("down"))
      >>> group_scores(p, hidden).tolist()
      [2.0, 3.0, 4.0]

    References:
      Li et al., Pruning Filters for Efficient ConvNets, 2017, section 3.1, for sums of magnitudes.
      https://arxiv.org/abs/1608.08710
    """
    total = None
    for member in groups.members:
        found = scores.get(member.path)
        if found is None:
            continue
        if found.shape != member.shape:
            raise ValueError(
                f"`group_scores`: the scores of '{member.path}' have shape {found.shape}, but must "
                f"have {member.shape}. Give the scores of the model whose groups these are."
            )
        wide = jnp.asarray(found, jnp.promote_types(found.dtype, jnp.float32))
        own = member.scores(wide, groups.count)
        total = own if total is None else total + own
    if total is None:
        raise ValueError(
            f"`group_scores`: none of {[m.path for m in groups.members]} has scores; there are "
            f"scores of {list(scores)[:20]}. Give the scores of the weights of these groups."
        )
    _check_finite(total)
    return total


def _check_finite(scores: jax.Array) -> None:
    if not jnp.all(jnp.isfinite(scores)):
        raise ValueError(
            "The scores of the groups are not all finite and cannot be ranked: an overflow in the "
            "values they are computed from. Leave that batch or weight out."
        )


def topk_groups(
    scores: Mapping[str, jax.Array] | jax.Array, groups: PrunableGroups, density: float
) -> jax.Array:
    """A mask of the groups with the largest scores, the same number in each slice of a stack.

    A stacked array has one shape, so groups of different layers are not ranked against each
    other. Of equal scores, the first are kept.

    Args:
      scores: Scores of entries, as for `group_scores`, or of groups (*stack, count).
      groups: From `prunable_groups`.
      density: Fraction of the groups to keep, in (0, 1]; their number is rounded down.

    Returns:
      bool (*stack, count).

    Raises:
      ValueError: A density out of range, or one that keeps no group; as `group_scores`.

    Example:
      >>> from jaxpeft import sites
      >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> p = {"up": jnp.ones((2, 4)), "down": jnp.ones((4, 3))}
      >>> s = sites(f, p, jnp.ones((1, 2)))
      >>> hidden = prunable_groups(4, outputs=s.match("up"), inputs=s.match("down"))
      >>> topk_groups(jnp.array([3.0, 1.0, 4.0, 1.0]), hidden, 0.5).tolist()
      [True, False, True, False]
    """
    if not 0 < density <= 1:
        raise ValueError(
            f"`topk_groups(density={density})`: `density` must be in (0, 1], the fraction of "
            "groups to keep."
        )
    own = group_scores(scores, groups) if isinstance(scores, Mapping) else jnp.asarray(scores)
    if own.shape != groups.shape:
        raise ValueError(
            f"`topk_groups`: the scores have shape {own.shape}, but must have {groups.shape}, one "
            "for each group. Use `group_scores`."
        )
    _check_finite(own)
    kept = math.floor(density * groups.count + 1e-9)
    if not kept:
        raise ValueError(
            f"`topk_groups(density={density})` keeps none of {groups.count} groups. The density "
            f"must be at least {1 / groups.count:.3g}."
        )
    rank = jnp.argsort(jnp.argsort(-own, axis=-1, stable=True), axis=-1)
    return rank < kept


def prune_structured(params: Any, groups: PrunableGroups, mask: Any) -> Any:
    """The parameters with smaller arrays: the groups outside the mask are removed.

    Where a group of zeros contributes nothing (hidden units under relu, gelu or silu, heads,
    residual layers), the smaller model computes the same as the model with zeros in these
    groups. Sizes in the configuration of a model must be changed to the new ones. The sites of
    the smaller model must be found again.

    Args:
      params: Parameters; the arrays of the groups must be plain.
      groups: From `prunable_groups`.
      mask: bool (*stack, count), from `topk_groups`: true where a group is kept, the same number
        in each slice of a stack.

    Returns:
      The tree with the kept groups in their order. Other leaves are the same objects.

    Raises:
      ValueError: The mask has another shape or dtype, keeps no group, or not the same number in
        each slice; the tree lacks an array, or has it in another shape or as a structured
        weight.

    Example:
      >>> from jaxpeft import sites
      >>> f = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> p = {"up": jnp.ones((2, 6)), "down": jnp.ones((6, 3))}
      >>> s = sites(f, p, jnp.ones((1, 2)))
      >>> hidden = prunable_groups(6, outputs=s.match("up"), inputs=s.match("down"))
      >>> smaller = prune_structured(p, hidden, topk_groups(p, hidden, 0.5))
      >>> jax.tree.map(jnp.shape, smaller)
      {'down': (3, 3), 'up': (2, 3)}
    """
    index = _index(np.asarray(mask), groups)
    flat, treedef = flatten(
        params, is_leaf=lambda x: is_view(x) or isinstance(x, (Trainable, Concatenated))
    )
    for member in groups.members:
        if member.path not in flat:
            raise ValueError(
                f"`prune_structured`: this tree does not have '{member.path}'. It has "
                f"{list(flat)[:20]}. Give the parameters of the model whose groups these are."
            )
        leaf = flat[member.path]
        if is_view(leaf) or isinstance(leaf, (Trainable, Concatenated)):
            raise ValueError(
                f"`prune_structured`: '{member.path}' is a structured weight, but must be a plain "
                "array. Merge first: `merge(tree)`."
            )
        if tuple(leaf.shape) != member.shape:
            raise ValueError(
                f"`prune_structured`: '{member.path}' has shape {tuple(leaf.shape)}, but had "
                f"{member.shape} when the groups were found. Find sites and groups again after "
                "each `prune_structured`."
            )
    smaller: dict[str, Member] = {}
    for member in groups.members:
        path = member.path
        if path in smaller:  # Already pruned along another axis.
            done = smaller[path]
            member = dataclasses.replace(member, shape=done.shape, sizes=done.sizes)
        flat[path], smaller[path] = member.kept(flat[path], index, groups.count)
    return jax.tree.unflatten(treedef, list(flat.values()))


def _index(mask: np.ndarray, groups: PrunableGroups) -> np.ndarray:
    """The indices of the kept groups, (*stack, kept)."""
    if mask.shape != groups.shape or mask.dtype != bool:
        raise ValueError(
            f"`prune_structured`: the mask has shape {mask.shape} and dtype {mask.dtype}, but must "
            f"be bool {groups.shape}, one entry for each group."
        )
    counts = np.unique(np.count_nonzero(mask, axis=-1))
    if len(counts) > 1:
        raise ValueError(
            f"`prune_structured`: the mask keeps {' or '.join(map(str, counts))} groups, by slice "
            f"of the stack {groups.stack}. A stacked array has one shape: keep the same number in "
            "each slice."
        )
    if counts[0] == 0:
        raise ValueError(
            f"`prune_structured`: the mask keeps none of {groups.count} groups. Keep at least one."
        )
    order = np.argsort(~mask, axis=-1, kind="stable")
    return order[..., : counts[0]].astype(np.int32)
