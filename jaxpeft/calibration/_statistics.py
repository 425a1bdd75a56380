"""What a model does on a few batches: second moments of inputs, and gradients of weights.

Nothing is hooked into the model. An input's moments come out of the backward pass, as the
gradient of an array that changes nothing.
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
    """Sums over the inputs x (in,) of one matrix, or of each matrix of a stack.

    Attributes:
      second: Of x x^T, (*stack, in, in).
      first: Of x, (*stack, in).
      rows: How many there were, (*stack,).
    """

    second: jax.Array
    first: jax.Array
    rows: jax.Array


@jax.custom_vjp
def _observed(x: jax.Array, moments: Moments, counted: jax.Array | None) -> jax.Array:
    """x, whatever the moments are; their gradients are what they are called."""
    del moments, counted
    return x


def _observed_forward(x: jax.Array, moments: Moments, counted: jax.Array | None) -> tuple:
    return x, (x, moments, counted)


def _observed_backward(kept: tuple, slope: jax.Array) -> tuple:
    x, moments, counted = kept
    rows = x.reshape(-1, x.shape[-1]).astype(moments.second.dtype)
    share = jnp.ones(rows.shape[:1], rows.dtype)
    if counted is not None:
        share = counted.reshape(-1).astype(rows.dtype)
        # An input that does not count may be anything, NaN too.
        rows = jnp.where(share[:, None] != 0, rows, 0)
    weighed = rows * share[:, None]
    with jax.default_matmul_precision("highest"):
        second = weighed.T @ rows
    nothing = None if counted is None else jnp.zeros_like(counted)
    return slope, Moments(second, jnp.sum(weighed, 0), jnp.sum(share)), nothing


_observed.defvjp(_observed_forward, _observed_backward)


@weight
class Observed(Weight):
    """The matrix `w`; a backward pass leaves the moments of its inputs as gradients."""

    w: Any = base_weight()
    second: Any = axes("in", "other")
    first: Any = axes("in")
    rows: Any = axes()
    counted: Any = axes(shared=True, optional=True)
    path: str = static("")

    is_mergeable = False  # a use as an array would be missed
    per_position = "counted"

    def forward(self, x):
        moments = Moments(self.second.array, self.first.array, self.rows.array)
        counted = None if self.counted is None else self.counted.array
        if counted is not None and counted.shape != x.shape[:-1]:
            raise PositionsError(
                f"`input_moments` is told which inputs count as {counted.shape}, but those of "
                f"'{self.path}' have leading axes {x.shape[:-1]}: the model merges or moves them "
                "before this product. Leave `counted` out, or give batches without padding."
            )
        return _observed(x, moments, counted) @ self.w


@takes_sites
def input_moments(
    fn: Callable[[Any, Any], Any],
    params: Any,
    sites: Sites,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    counted: Callable[[Any], jax.Array] | None = None,
) -> dict[str, Moments]:
    """Second moments of the inputs of each selected matrix, summed over batches.

    One forward and one backward pass for each batch, in one compiled program; layers of a scan
    and experts of a stack have moments of their own. Arrays of (in, in) for every matrix are
    held, in float32: select as many at a time as there is room for.

    Args:
      fn: `fn(params, batch)`, whose outputs (any tree of floats) depend on all products.
      params: Parameters, in part structured weights already, none of them trained.
      sites: The matrices; each is used as a product.
      batches: Any iterable of batches, all of one shape.
      steps: How many are taken; `None` takes all.
      counted: `counted(batch)`, numbers (batch, time) by which each position counts: 0 for
        padding.

    Returns:
      {path: Moments}, for `eva` and `corda`.

    Raises:
      ValueError: There is no batch, or fewer than `steps`; inputs are not finite (names the
        weight and the batch); a weight has no inputs of its own (an embedding, a convolution).
    """

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        if "linear" not in site.kinds or site.kinds & {"embedding", "conv"}:
            raise ValueError(
                f"`input_moments`: '{site.path}' is used as {', '.join(sorted(site.kinds))}; only "
                "the inputs of plain products are seen. Select from `sites.linear`."
            )
        n, dtype = site.size(IN), jnp.promote_types(view.dtype, jnp.float32)
        second, first, rows = (
            Trainable(jnp.zeros((*site.stack, *shape), dtype)) for shape in ((n, n), (n,), ())
        )
        told = None if counted is None else Placeholder("counted")
        weight = Observed(view.weight, second, first, rows, told, site.path)
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
        call = {} if counted is None else {"counted": counted(batch)}

        def total(moments: Any) -> jax.Array:
            found = jax.tree.leaves(lifted(combine(frozen, moments, **call), batch))
            floats = [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.float32(0))

        return jax.grad(total)(zeros)

    found = zeros
    for number, batch in enumerate(taken(batches, steps, "input_moments")):
        new = sums(zeros, arrays, batch)
        check_finite_statistics(new, number, "the inputs of", "input_moments")
        found = jax.tree.map(jnp.add, found, new)
    by_path = {
        path: Moments(*(found[f"{path}/{name}"] for name in Moments._fields)) for path in sites
    }
    for path, moments in by_path.items():
        if not jnp.all(moments.rows > 0):
            raise ValueError(
                f"`input_moments` has seen no input of '{path}': the outputs of `fn` do not "
                "depend on its product, or nothing counts. Return what comes after it too."
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
    """The gradients of the selected arrays, averaged over batches: {path: array}.

    The average is taken in float32 at least, whatever the arrays are.

    Args:
      loss_fn: `loss_fn(params, batch)`, a number.
      params: Parameters; the selected ones are plain arrays.
      sites: What is differentiated.
      batches: Any iterable of batches, all of one shape.
      steps: How many are taken; `None` takes all.

    Raises:
      ValueError: There is no batch, or fewer than `steps`; a gradient is not finite (names the
        weight and the batch); a selected weight is no plain array, or not in the tree.
    """
    chosen, with_chosen = chosen_arrays(params, sites, "mean_gradients")
    arrays, rebuilt = arrays_of(params)
    lifted = lift(loss_fn)

    @jax.jit
    def gradients(chosen: Any, arrays: Any, batch: Any) -> Any:
        rest = rebuilt(arrays)
        return widened(jax.grad(lambda chosen: lifted(with_chosen(chosen, rest), batch))(chosen))

    found, count = None, 0
    for number, batch in enumerate(taken(batches, steps, "mean_gradients")):
        new = gradients(chosen, arrays, batch)
        check_finite_statistics(new, number, "the gradient of", "mean_gradients")
        found = new if found is None else jax.tree.map(jnp.add, found, new)
        count = number + 1
    return jax.tree.map(lambda x: x / count, found)


def widened(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """In float32 at least: a long sum in bfloat16 stops growing."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    return {path: wide(x) for path, x in arrays.items()}


def chosen_arrays(
    params: Any, sites: Sites, caller: str
) -> tuple[dict[str, jax.Array], Callable[[Mapping[str, Any], Any], Any]]:
    """The selected arrays, {path: array}, and a function that puts others into a tree.

    Raises:
      ValueError: A selected weight is no plain array, or not in the tree.
    """
    flat, _ = flatten(params, is_leaf=is_view)
    for path in sites:
        if path not in flat or is_view(flat[path]):
            raise ValueError(
                f"`{caller}`: '{path}' is no plain array of this tree, so it has no entries and no "
                "gradient of its shape. Give the params before quantization or another method."
            )

    def with_chosen(chosen: Mapping[str, Any], tree: Any) -> Any:
        flat, treedef = flatten(tree, is_leaf=is_view)
        return jax.tree.unflatten(treedef, list({**flat, **chosen}.values()))

    return {path: flat[path] for path in sites}, with_chosen


def taken(batches: Iterable[Any], steps: int | None, caller: str) -> Iterator[Any]:
    """The first `steps` batches, or all.

    Raises:
      ValueError: There are fewer, or none.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"`{caller}(steps={steps})`: at least one batch is needed.")
    count = 0
    for batch in batches:
        yield batch
        count += 1
        if count == steps:
            return
    if count == 0 or steps is not None:
        wanted = "at least one" if steps is None else steps
        raise ValueError(
            f"`{caller}`: the batches ran dry after {count} of {wanted}. An iterator that was used "
            "before is empty now; make it anew, or ask for fewer steps."
        )


def check_finite_statistics(
    found: dict[str, jax.Array], number: int, what: str, caller: str
) -> None:
    """Raises ValueError where an array of a batch is not finite; names its weight.

    Args:
      found: {path: array}.
      number: Of the batch.
      what: Before the names in the message.
      caller: Likewise.
    """
    fine = jax.device_get({path: jnp.all(jnp.isfinite(x)) for path, x in found.items()})
    bad = [path for path, ok in fine.items() if not ok]
    if bad:
        names = dict.fromkeys(_site_of(path) for path in bad)
        raise ValueError(
            f"`{caller}`: {what} {', '.join(repr(name) for name in names)} in batch {number} are not "
            "finite. Leave that batch out, or mend the model; in a narrow dtype, overflow is "
            "the usual cause."
        )


def seems_finite(x: jax.Array) -> bool:
    """Whether all numbers of x are finite; those that are traced pass, since they are not known."""
    if isinstance(x, jax.core.Tracer):
        return True
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(jnp.isfinite(x)))


def _site_of(path: str) -> str:
    """Without the name of a moment."""
    head, _, last = path.rpartition("/")
    return head if last in Moments._fields else path


def check_moments(moments: Any, site: Site, caller: str) -> Moments:
    """The moments for a site.

    Raises:
      ValueError: There are none for it, or of another shape.
    """
    found = moments.get(site.path)
    if found is None:
        raise ValueError(
            f"`{caller}` has no moments of the inputs of '{site.path}'; it has {sorted(moments)}. "
            "Give those of `input_moments` with the same sites."
        )
    n = site.size(IN)
    if found.second.shape != (*site.stack, n, n):
        raise ValueError(
            f"`{caller}`: the moments of '{site.path}' have shape {found.second.shape}, should be "
            f"{(*site.stack, n, n)}. Were they taken on another model?"
        )
    return found
