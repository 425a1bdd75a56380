"""Units: what several arrays share along one axis, and pruning that makes the arrays smaller.

A hidden unit of a feed-forward block is a column of `up`, a number of its bias and a row of
`down`; a head is some columns of q, k and v and as many rows of o; a filter is an output of one
kernel and an input channel of the next; a layer is a slice of everything in its stack.

units         which axis of which array is cut into how many units
unit_scores   how important each unit is, from scores of entries (scores.py)
keep_units    the most important ones
cut           the tree without the others
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
    """One array that has a block for each unit.

    Attributes:
      path, shape: Of the array.
      sizes: Of the axes that the program gives it, finer than `shape` where it cuts an axis.
      axis: Which of these is (outer, units, block), most significant first.
      outer: 1 unless it is a bias whose kernel has axes before that of the units.
      stack: Which of these have units of their own for each of their entries.
    """

    path: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    axis: int
    outer: int
    stack: tuple[int, ...]

    def split(self, count: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """Sizes with the units on an axis of their own, this axis, and those of the stack."""
        block = self.sizes[self.axis] // (self.outer * count)
        sizes = (*self.sizes[: self.axis], self.outer, count, block, *self.sizes[self.axis + 1 :])
        return sizes, self.axis + 1, tuple(i if i < self.axis else i + 2 for i in self.stack)

    def scores(self, array: jax.Array, count: int) -> jax.Array:
        """Sums over the blocks, (*stack, count)."""
        sizes, unit, stack = self.split(count)
        others = tuple(i for i in range(len(sizes)) if i != unit and i not in stack)
        summed = jnp.sum(array.reshape(sizes), others)
        return jnp.moveaxis(summed, sum(i < unit for i in stack), -1)

    def taken(self, array: jax.Array, index: np.ndarray, count: int) -> tuple[Any, "Member"]:
        """The blocks of the units at `index` (*stack, kept), and the member of that array."""
        sizes, unit, stack = self.split(count)
        index = np.moveaxis(index, -1, sum(i < unit for i in stack))
        others = [i for i in range(len(sizes)) if i != unit and i not in stack]
        index = np.expand_dims(index, others)
        part = jnp.take_along_axis(array.reshape(sizes), jnp.asarray(index), axis=unit)
        kept = part.shape[unit]
        # The last axis of the array that starts no later than this one.
        start = math.prod(self.sizes[: self.axis])
        dim = max(i for i in range(len(self.shape)) if math.prod(self.shape[:i]) <= start)
        shape = _with(self.shape, dim, self.shape[dim] // count * kept)
        smaller = _with(self.sizes, self.axis, self.sizes[self.axis] // count * kept)
        return part.reshape(shape), dataclasses.replace(self, shape=shape, sizes=smaller)


def _with(sizes: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
    return (*sizes[:at], size, *sizes[at + 1 :])


@dataclasses.dataclass(frozen=True)
class PrunableGroups:
    """What `units` has found.

    Attributes:
      count: How many units there are, in each slice of the stack.
      stack: Lengths of the stack axes that the members share.
      members: The arrays that have a block for each unit.
    """

    count: int
    stack: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what has one entry for each unit: (*stack, count)."""
        return (*self.stack, self.count)


@takes_sites
def prunable_groups(
    count: int,
    *,
    outputs: Sites | None = None,
    inputs: Sites | None = None,
    stacks: Sites | None = None,
) -> PrunableGroups:
    """`count` units, each a block of one axis of every selected array.

    Of the axes of an array on the named side, that of length `count` is cut, else the one that
    `count` divides, into runs of neighbours: of a kernel (in, heads * head_dim) a head is
    head_dim columns. With as many units as key-value heads, the query heads of a group go
    together.

    A kernel in which each of several parts holds all units, as [gate | up], is not cut so: store
    its parts as arrays of their own.

    Args:
      count: How many units there are, in each layer of a stack.
      outputs: What makes the units: kernels, each with the bias that the model adds to its
        product, and vectors, such as the scale of a norm between two convolutions.
      inputs: What reads them.
      stacks: Weights whose slices along a stack axis are the units: layers, or experts, which
        are also outputs of their router. Stack axes before it have units of their own.

    Returns:
      Units for `group_scores`, `topk_groups` and `cut`.

    Raises:
      ValueError: Nothing is selected, an array has no axis for so many units or more than one,
        a bias has not one number for each output of its kernel, or the stacks of the arrays
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
        raise ValueError(f"`prunable_groups({count})`: at least one unit is needed.")
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
            f"`prunable_groups({count})` selects no parameter. Give `outputs` that make the units and "
            "`inputs` that read them, or `stacks`."
        )
    found = [tuple(m.sizes[i] for i in m.stack) for m in members]
    for member, stack in zip(members, found, strict=True):
        if stack != found[0]:
            raise ValueError(
                f"`prunable_groups({count})`: '{members[0].path}' has units in each slice of a stack "
                f"{found[0]}, '{member.path}' of shape {member.shape} in a stack {stack}. A unit "
                "needs a block in all of its arrays: select those of one stack."
            )
    return PrunableGroups(count, found[0], tuple(members))


def _member(site: Site, role: str, count: int) -> Member:
    """The array of a site, cut along its only axis of this role that has so many units.

    Raises:
      ValueError: There is none, or more than one.
    """
    side = [(i, axis.size) for i, axis in enumerate(site.axes) if axis.role == role]
    exact = [i for i, size in side if size == count]
    fit = exact if len(exact) == 1 else [i for i, size in side if size % count == 0]
    if len(fit) != 1:
        sizes = [size for _, size in side]
        candidates = [site.axes[i].size for i in fit]
        what = f"`prunable_groups({count})`: the {_SIDES[role]} axes of '{site.path}' {site.shape} have"
        if not fit:
            raise ValueError(
                f"{what} lengths {sizes}, none of which divides into {count} equal blocks."
            )
        raise ValueError(
            f"{what} lengths {candidates} that divide into {count} equal blocks, and it is not "
            "known which of them holds the units. Give the others another role with "
            f"`sites.override('{site.path}', ...)`."
        )
    stack = [i for i, axis in enumerate(site.axes) if axis.role == STACK]
    if role == STACK:
        stack = [i for i in stack if i < fit[0]]
    sizes = [axis.size for axis in site.axes]
    return Member(site.path, site.shape, tuple(sizes), fit[0], 1, tuple(stack))


def _bias(bias: Site, site: Site, kernel: Member, count: int) -> Member:
    """The bias of a kernel, cut where the outputs of the kernel are.

    Raises:
      ValueError: It has not one number for each output, or its axes are cut elsewhere.
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
        f"`prunable_groups({count})`: the model adds '{bias.path}' of shape {bias.shape} to the product of "
        f"'{site.path}' of shape {site.shape}, and cutting that into {count} units does not say "
        f"how to cut the bias: it has {bias.size(OUT)} numbers for {site.size(OUT)} outputs. "
        "Give both axes of one kind, in the model or with `sites.override`."
    )


def group_scores(scores: Mapping[str, jax.Array], units: PrunableGroups) -> jax.Array:
    """How important each unit is: the sum of the scores of its entries in all of its arrays.

    Args:
      scores: {path: numbers of the array's shape}, the larger the more important. Arrays without
        scores, such as biases, are left out.
      units: From `units`.

    Returns:
      (*stack, count), in float32 at least.

    Raises:
      ValueError: None of the arrays has scores, or they are of another shape or not finite.

    References:
      Li et al., Pruning Filters for Efficient ConvNets, 2017, section 3.1, for sums of magnitudes.
      https://arxiv.org/abs/1608.08710
    """
    total = None
    for member in units.members:
        found = scores.get(member.path)
        if found is None:
            continue
        if found.shape != member.shape:
            raise ValueError(
                f"`group_scores`: the scores of '{member.path}' have shape {found.shape}, should "
                f"be {member.shape}. Give those of the model on which the units were found."
            )
        wide = jnp.asarray(found, jnp.promote_types(found.dtype, jnp.float32))
        own = member.scores(wide, units.count)
        total = own if total is None else total + own
    if total is None:
        raise ValueError(
            f"`group_scores`: none of {[m.path for m in units.members]} has scores; there are "
            f"those of {list(scores)[:20]}."
        )
    _check_finite(total)
    return total


def _check_finite(scores: jax.Array) -> None:
    if not jnp.all(jnp.isfinite(scores)):
        raise ValueError(
            "The scores of the units are not all finite, so they have no order. What they were "
            "computed from overflows; leave that batch or weight out."
        )


def topk_groups(
    scores: Mapping[str, jax.Array] | jax.Array, units: PrunableGroups, density: float
) -> jax.Array:
    """The units with the largest scores, as many in each slice of a stack.

    A stacked array has one shape, so that layers do not compete. Of equal scores, the first are
    kept.

    Args:
      scores: Of entries, as for `group_scores`, or of units (*stack, count).
      units: From `units`.
      density: Share of units that is kept, in (0, 1], rounded down.

    Returns:
      Bools (*stack, count).

    Raises:
      ValueError: A density out of range, or one that keeps no unit; as `group_scores`.
    """
    if not 0 < density <= 1:
        raise ValueError(f"`topk_groups(density={density})`: a share in (0, 1] is needed.")
    own = group_scores(scores, units) if isinstance(scores, Mapping) else jnp.asarray(scores)
    if own.shape != units.shape:
        raise ValueError(
            f"`topk_groups`: the scores have shape {own.shape}, should be {units.shape}, one for "
            "each unit."
        )
    _check_finite(own)
    kept = math.floor(density * units.count + 1e-9)
    if not kept:
        raise ValueError(
            f"`topk_groups(density={density})` keeps none of {units.count} units. Keep at least "
            f"{1 / units.count:.3g}."
        )
    place = jnp.argsort(jnp.argsort(-own, axis=-1, stable=True), axis=-1)
    return place < kept


def prune_structured(params: Any, units: PrunableGroups, kept: Any) -> Any:
    """The same tree with smaller arrays: without the units that are not kept.

    A model that reads its sizes from its arrays then computes what it would with zeros in their
    place, wherever zeros mean absence: under relu, gelu, silu, heads, residual layers. Others
    are told their new sizes, such as `config.mlp_width`. Find sites anew afterwards.

    Args:
      params: Parameters; the arrays of the units are plain.
      units: From `units`.
      kept: Bools (*stack, count), from `topk_groups`; as many in each slice of a stack.

    Returns:
      The tree, with the units that are kept in their order. Other leaves are the same objects.

    Raises:
      ValueError: `kept` has another shape, is no mask, keeps nothing or not as many units in each
        slice; the tree lacks an array, or has it in another shape or as a structured weight.
    """
    index = _index(np.asarray(kept), units)
    flat, treedef = flatten(
        params, is_leaf=lambda x: is_view(x) or isinstance(x, (Trainable, Concatenated))
    )
    for member in units.members:
        if member.path not in flat:
            raise ValueError(
                f"`cut`: this tree does not have '{member.path}'. It has {list(flat)[:20]}. Were "
                "the units found on another model?"
            )
        leaf = flat[member.path]
        if is_view(leaf) or isinstance(leaf, (Trainable, Concatenated)):
            raise ValueError(
                f"`cut`: '{member.path}' is a structured weight, and only plain arrays can be "
                "made smaller. Merge first: `merge(tree)`."
            )
        if tuple(leaf.shape) != member.shape:
            raise ValueError(
                f"`cut`: '{member.path}' has shape {tuple(leaf.shape)}, but had {member.shape} "
                "when the units were found. Find sites and units anew after each cut."
            )
    smaller: dict[str, Member] = {}
    for member in units.members:
        path = member.path
        if path in smaller:  # cut along another axis already
            done = smaller[path]
            member = dataclasses.replace(member, shape=done.shape, sizes=done.sizes)
        flat[path], smaller[path] = member.taken(flat[path], index, units.count)
    return jax.tree.unflatten(treedef, list(flat.values()))


def _index(kept: np.ndarray, units: PrunableGroups) -> np.ndarray:
    """Which units are kept, (*stack, as many)."""
    if kept.shape != units.shape or kept.dtype != bool:
        raise ValueError(
            f"`cut`: `kept` has shape {kept.shape} and dtype {kept.dtype}, should be bools "
            f"{units.shape}, one for each unit."
        )
    counts = np.unique(np.count_nonzero(kept, axis=-1))
    if len(counts) > 1:
        raise ValueError(
            f"`cut`: `kept` keeps {' or '.join(map(str, counts))} units, by slice of the stack "
            f"{units.stack}. A stacked array has one shape: keep as many in each."
        )
    if counts[0] == 0:
        raise ValueError(f"`cut`: `kept` keeps none of {units.count} units. Keep at least one.")
    order = np.argsort(~kept, axis=-1, kind="stable")
    return order[..., : counts[0]].astype(np.int32)
