"""Statistics of a model on a few batches: second moments of inputs, and gradients of weights.

No hooks are needed. The moments of an input are computed in the backward pass, as the gradient
with respect to an array that the forward pass ignores.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft._lift import lift
from jaxpeft._marks import Placeholder, Trainable
from jaxpeft._method import takes_sites
from jaxpeft._sites import Site, Sites
from jaxpeft._tree import arrays_of, combine, flatten, split
from jaxpeft._view import View, is_view
from jaxpeft._weight import IN, PositionsError, Weight, axes, base_weight, static, weight
from jaxpeft.extend._apply import apply_to_sites


class Moments(NamedTuple):
    """Sums over the inputs x (in,) of a matrix, for each matrix of a stack.

    Attributes:
      second: Sum of x x^T, (*stack, in, in).
      first: Sum of x, (*stack, in).
      count: Number of inputs, or the sum of their weights, (*stack,).
    """

    second: jax.Array
    first: jax.Array
    count: Any  # jax.Array; Any, since tuples have a method `count`


@jax.custom_vjp
def _observed(x: jax.Array, moments: Moments, mask: jax.Array | None) -> jax.Array:
    """x; the gradient with respect to `moments` is the moments of x."""
    del moments, mask
    return x


def _observed_forward(x: jax.Array, moments: Moments, mask: jax.Array | None) -> tuple:
    return x, (x, moments, mask)


def _observed_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    x, moments, mask = residuals
    inputs = x.reshape(-1, x.shape[-1]).astype(moments.second.dtype)
    weights = jnp.ones(inputs.shape[:1], inputs.dtype)
    if mask is not None:
        weights = mask.reshape(-1).astype(inputs.dtype)
        # A masked input may be NaN, and 0 * NaN is NaN.
        inputs = jnp.where(weights[:, None] != 0, inputs, 0)
    weighted = inputs * weights[:, None]
    with jax.default_matmul_precision("highest"):
        second = weighted.T @ inputs
    of_mask = None if mask is None else jnp.zeros_like(mask)
    return gradient, Moments(second, jnp.sum(weighted, 0), jnp.sum(weights)), of_mask


_observed.defvjp(_observed_forward, _observed_backward)


@weight
class Observed(Weight):
    """The matrix `w`; the gradients of the other fields are the moments of its inputs."""

    w: Any = base_weight()
    second: Any = axes("in", "other")
    first: Any = axes("in")
    count: Any = axes()
    mask: Any = axes(shared=True, optional=True)
    path: str = static("")

    is_mergeable = False  # A use as an array would be missed.
    per_position = "mask"

    def forward(self, x):
        moments = Moments(self.second.array, self.first.array, self.count.array)
        mask = None if self.mask is None else self.mask.array
        if mask is not None and mask.shape != x.shape[:-1]:
            raise PositionsError(
                f"`input_moments(mask=...)` has a mask of shape {mask.shape}, but the inputs of "
                f"'{self.path}' have leading axes {x.shape[:-1]}: the model merges or transposes "
                "batch and time before this product. Leave `mask` out, and give batches without "
                "padding."
            )
        return _observed(x, moments, mask) @ self.w


@takes_sites
def input_moments(
    fn: Callable[[Any, Any], Any],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    mask: Callable[[Any], jax.Array] | None = None,
) -> dict[str, Moments]:
    """Second moments of the inputs of each selected matrix, summed over batches.

    For y = x @ w with inputs x_i and weights m_i (ones without a mask), the sums over i of
    m_i x_i x_i^T, m_i x_i and m_i.

    Each batch takes one forward and one backward pass in one compiled program. Layers of a scan
    and experts of a stack have moments of their own. An array (in, in) in float32 is held for
    each matrix: select no more matrices at a time than fit in memory.

    Args:
      fn: `fn(params, batch)`, whose outputs (any tree of floats) depend on all products.
      params: Parameters, which may contain structured weights without trainable arrays.
      sites: The matrices; the model uses each as a product.
      batches: An iterable of batches, all of one shape.
      steps: Number of batches to use. `None` uses all.
      mask: `mask(batch)` returns the weight of each position, (batch, time): 0 for padding.

    Returns:
      {path: Moments}, for `eva`, `corda`, `sparsity.obs_scores` and `sparsity.sparsegpt_update`.

    Raises:
      ValueError: There is no batch, or fewer than `steps`; inputs are not finite (names the
        weight and the batch); the model uses a weight as an embedding or a convolution; the
        outputs of `fn` do not depend on a product.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> moments = input_moments(f, params, jp.sites(f, params, x), [x])["w"]
      >>> moments.second.tolist(), moments.first.tolist(), float(moments.count)
      ([[10.0, 14.0], [14.0, 20.0]], [4.0, 6.0], 2.0)
    """

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        if "linear" not in site.kinds or site.kinds & {"embedding", "conv"}:
            raise ValueError(
                f"`input_moments`: the model uses '{site.path}' as "
                f"{', '.join(sorted(site.kinds))}, but only the inputs of plain products have "
                "moments. Select from `sites.linear`."
            )
        n, dtype = site.size(IN), jnp.promote_types(view.dtype, jnp.float32)
        second, first, count = (
            Trainable(jnp.zeros((*site.stack, *shape), dtype)) for shape in ((n, n), (n,), ())
        )
        of_call = None if mask is None else Placeholder("mask")
        weight = Observed(view.weight, second, first, count, of_call, site.path)
        return dataclasses.replace(view, weight=weight)

    tree = apply_to_sites(
        jax.random.key(0), params, sites, make, caller="input_moments", parts=True
    )
    frozen, zeros = split(tree)
    arrays, rebuilt = arrays_of(frozen)
    lifted = lift(fn)

    @jax.jit
    def sums(zeros: Any, arrays: Any, batch: Any) -> Any:
        frozen = rebuilt(arrays)
        call = {} if mask is None else {"mask": mask(batch)}

        def total(moments: Any) -> jax.Array:
            found = jax.tree.leaves(lifted(combine(frozen, moments, **call), batch))
            floats = [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.float32(0))

        return jax.grad(total)(zeros)

    found = zeros
    for number, batch in enumerate(first_batches(batches, steps, "input_moments")):
        new = sums(zeros, arrays, batch)
        check_finite_statistics(new, number, "the inputs of", "input_moments")
        found = jax.tree.map(jnp.add, found, new)
    by_path = {
        path: Moments(*(found[f"{path}/{name}"] for name in Moments._fields)) for path in sites
    }
    for path, moments in by_path.items():
        if not jnp.all(moments.count > 0):
            raise ValueError(
                f"`input_moments` found no input of '{path}': the outputs of `fn` do not depend on "
                "its product, or the mask is all zeros. Return an output that depends on it."
            )
    return by_path


@takes_sites
def mean_gradients(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
) -> dict[str, jax.Array]:
    """The gradients of a loss by the selected arrays, averaged over batches.

    The average is computed in float32 or wider, whatever the dtype of the arrays.

    Args:
      loss_fn: `loss_fn(params, batch)`, a scalar.
      params: Parameters; the selected ones must be plain arrays.
      sites: The arrays to differentiate by.
      batches: An iterable of batches, all of one shape.
      steps: Number of batches to use. `None` uses all.

    Returns:
      {path: array of the shape of the parameter}.

    Raises:
      ValueError: There is no batch, or fewer than `steps`; a gradient is not finite (names the
        weight and the batch); a selected weight is not a plain array, or not in the tree.

    Example:
      >>> import jax.numpy as jnp, jaxpeft as jp
      >>> loss, params = lambda p, x: jnp.sum(x @ p["w"]), {"w": jnp.ones((2, 3))}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> sites = jp.sites(loss, params, x)
      >>> mean_gradients(loss, params, sites, [x, 3 * x])["w"].tolist()
      [[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]
    """
    selected, with_selected = selected_arrays(params, sites, "mean_gradients")
    arrays, rebuilt = arrays_of(params)
    lifted = lift(loss_fn)

    @jax.jit
    def gradients(selected: Any, arrays: Any, batch: Any) -> Any:
        rest = rebuilt(arrays)
        of_selected = jax.grad(lambda selected: lifted(with_selected(selected, rest), batch))
        return to_float32(of_selected(selected))

    found, count = None, 0
    for number, batch in enumerate(first_batches(batches, steps, "mean_gradients")):
        new = gradients(selected, arrays, batch)
        check_finite_statistics(new, number, "the gradient of", "mean_gradients")
        found = new if found is None else jax.tree.map(jnp.add, found, new)
        count = number + 1
    return jax.tree.map(lambda x: x / count, found)


def to_float32(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays in float32 or wider: a long sum in bfloat16 stops growing."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    return {path: wide(x) for path, x in arrays.items()}


def selected_arrays(
    params: Any, sites: Sites, caller: str
) -> tuple[dict[str, jax.Array], Callable[[Mapping[str, Any], Any], Any]]:
    """The selected arrays, {path: array}, and a function that puts others in their place.

    Raises:
      ValueError: A selected weight is not a plain array, or not in the tree.
    """
    flat, _ = flatten(params, is_leaf=is_view)
    for path in sites:
        if path not in flat or is_view(flat[path]):
            raise ValueError(
                f"`{caller}`: '{path}' is not a plain array of this tree, so it has no entries and "
                "no gradient of its shape. Give the params from before a quantization or another "
                "method, or `merge(tree)`."
            )

    def with_selected(selected: Mapping[str, Any], tree: Any) -> Any:
        flat, treedef = flatten(tree, is_leaf=is_view)
        return jax.tree.unflatten(treedef, list({**flat, **selected}.values()))

    return {path: flat[path] for path in sites}, with_selected


def first_batches(batches: Iterable[Any], steps: int | None, caller: str) -> Iterator[Any]:
    """Yields the first `steps` batches, or all.

    Raises:
      ValueError: There are fewer batches, or none.
    """
    if steps is not None and steps < 1:
        raise ValueError(
            f"`{caller}(steps={steps})`: `steps` must be at least 1, or None for all batches."
        )
    count = 0
    for batch in batches:
        yield batch
        count += 1
        if count == steps:
            return
    if count == 0 or steps is not None:
        wanted = "at least one" if steps is None else steps
        raise ValueError(
            f"`{caller}`: the iterator was exhausted after {count} batches, of {wanted} needed. An "
            "iterator can be used only once: make a new one, give a list, or lower `steps`."
        )


def check_finite_statistics(
    found: dict[str, jax.Array], number: int, what: str, caller: str
) -> None:
    """Raises ValueError where a statistic of a batch is not finite; names its weight.

    Args:
      found: {path: array}.
      number: Index of the batch.
      what: The statistic, as "the gradient of".
      caller: The call as the user wrote it.
    """
    fine = jax.device_get({path: jnp.all(jnp.isfinite(x)) for path, x in found.items()})
    bad = [path for path, ok in fine.items() if not ok]
    if bad:
        names = dict.fromkeys(_site_of(path) for path in bad)
        raise ValueError(
            f"`{caller}`: {what} {', '.join(repr(name) for name in names)} in batch {number} are "
            "not finite. Leave that batch out, or fix the model; in a 16-bit dtype, the usual "
            "cause is overflow."
        )


def seems_finite(x: jax.Array) -> bool:
    """Whether x is finite everywhere; true for a traced array, whose values are not known."""
    if isinstance(x, jax.core.Tracer):
        return True
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(jnp.isfinite(x)))


def _site_of(path: str) -> str:
    """The path without the name of a moment."""
    head, _, last = path.rpartition("/")
    return head if last in Moments._fields else path


def check_moments(moments: Any, site: Site, caller: str) -> Moments:
    """The moments of a site's inputs.

    Raises:
      ValueError: There are none, or they have another shape.
    """
    found = moments.get(site.path)
    if found is None:
        raise ValueError(
            f"`{caller}`: there are no moments of the inputs of '{site.path}'; those given are of "
            f"{sorted(moments)}. Give those of `input_moments` with the same sites."
        )
    n = site.size(IN)
    if found.second.shape != (*site.stack, n, n):
        raise ValueError(
            f"`{caller}`: the moments of '{site.path}' have shape {found.second.shape}, but must "
            f"have {(*site.stack, n, n)}. Give moments of this model."
        )
    return found
