"""Stacks of trained LoRA adapters, as experts of `xlora`, and weighted sums of them."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft._method import Method
from jaxpeft._methods.lora import lora
from jaxpeft._sites import Site, Sites
from jaxpeft._weight import IN, OUT
from jaxpeft.extend._apply import check_whole


class AdapterStack(NamedTuple):
    """Several LoRA adapters as experts, with their factors side by side at each matrix.

    Attributes:
      arrays: {"<path>/experts/a": (*stack, in, sum of ranks), "<path>/experts/b": (*stack, sum of
        ranks, out)}, for `combine`.
      sites: All matrices that at least one expert adapts.
      ranks: {path: rank of each expert}, 0 for an expert that does not adapt the matrix.
    """

    arrays: dict[str, jax.Array]
    sites: Sites
    ranks: dict[str, list[int]]


def stack_adapters(adapters: Sequence[tuple[Method, Mapping[str, Any]]]) -> AdapterStack:
    """Stacks LoRA adapters of one base as the experts of `xlora`, in this order.

    At each matrix the factors are concatenated, [a_1, a_2, ...] and [s_1 b_1; s_2 b_2; ...], with
    each adapter's scale s_i multiplied into its `b`. Ranks, scales and matrices may differ.

    Args:
      adapters: `(method, adapter)` of each: a method from `lora`, and its trained arrays, as
        `load_adapter` returns them. From a `chain`, give the `lora` in it.

    Returns:
      An `AdapterStack`.

    Raises:
      ValueError: There are fewer than two adapters, a method is not from `lora` or adapts a slice
        of the outputs, arrays are missing, unknown or of another shape than the method's, or the
        adapters are of different bases. The message names the adapter by its number, and the path.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> sites, key = jp.sites(fn, params, jnp.ones((1, 8))), jax.random.key(0)
      >>> methods = [jp.lora(rank, sites) for rank in (1, 2)]
      >>> trained = [(method, jp.split(method(key, params))[1]) for method in methods]
      >>> experts = jp.mixtures.stack_adapters(trained)
      >>> experts.ranks, experts.arrays["w/experts/a"].shape
      ({'w': [1, 2]}, (8, 3))
    """
    if len(adapters) < 2:
        raise ValueError(
            f"`stack_adapters` got {len(adapters)} adapters. Give at least two; a single expert "
            "needs no routing."
        )
    experts = [_expert(i, method, adapter) for i, (method, adapter) in enumerate(adapters)]
    known: dict[str, tuple[int, Site]] = {}
    for i, (method, _) in enumerate(adapters):
        for path, site in method.options["sites"].items():
            first, other = known.setdefault(path, (i, site))
            if _layout(site) != _layout(other):
                raise ValueError(
                    f"`stack_adapters`: '{path}' is {_layout(other)} (shape, stack, in, out, "
                    f"roles) in adapter {first}, but {_layout(site)} in adapter {i}. They were "
                    "trained on different bases. Give adapters of the same base."
                )
    sites = functools.reduce(operator.or_, (method.options["sites"] for method, _ in adapters))
    arrays, ranks = {}, {}
    for path in sites:
        factors = [expert[path] for expert in experts if path in expert]
        arrays[f"{path}/experts/a"] = jnp.concatenate([a for a, _ in factors], axis=-1)
        arrays[f"{path}/experts/b"] = jnp.concatenate([b for _, b in factors], axis=-2)
        ranks[path] = [e[path][0].shape[-1] if path in e else 0 for e in experts]
    return AdapterStack(arrays, sites, ranks)


def _layout(site: Site) -> tuple:
    """(shape, stack, in, out, roles of its axes) of a parameter, equal for the same base."""
    roles = tuple(dict.fromkeys(axis.role for axis in site.axes))
    return site.shape, site.stack, site.size(IN), site.size(OUT), roles


def _expert(i: int, method: Any, adapter: Mapping[str, Any]) -> dict[str, tuple]:
    """{path: (a, s * b)} of adapter i.

    Raises:
      ValueError: The method is not from `lora`, or the arrays are not those of the method.
    """
    if getattr(method, "name", None) != "lora":
        raise ValueError(
            f"`stack_adapters` takes adapters of `lora`, but adapter {i} is of "
            f"'{getattr(method, 'name', method)}'. From a `chain`, give the `lora` in it."
        )
    sites: Sites = method.options["sites"]
    check_whole("stack_adapters", sites)
    params = {path: jax.ShapeDtypeStruct(site.shape, jnp.float32) for path, site in sites.items()}
    tree = jax.eval_shape(method.apply, jax.random.key(0), params)
    weights = {path: view.weight for path, view in tree.items()}
    expected = {f"{path}/{name}": getattr(w, name) for path, w in weights.items() for name in "ab"}
    for name in sorted({*expected, *adapter}):
        want = tuple(expected[name].shape) if name in expected else None
        have = tuple(adapter[name].shape) if name in adapter else None
        if have != want:
            raise ValueError(
                f"`stack_adapters`: '{name}' of adapter {i} has shape {have}, but its method has "
                f"{want}. Give each adapter with its own method."
            )
    factors = {}
    for path, w in weights.items():
        a, b = (jnp.asarray(adapter[f"{path}/{name}"]) for name in "ab")
        factors[path] = (a, w.scale * b)
    return factors


def merge_weighted(
    stack: AdapterStack, weights: Sequence[float]
) -> tuple[Method, dict[str, jax.Array]]:
    """The weighted sum of the experts of a stack, as plain LoRA.

    At each matrix, the update is sum_i weights[i] * s_i * a_i @ b_i.

    Args:
      stack: The experts, from `stack_adapters`.
      weights: One number for each expert. An expert with weight zero is left out.

    Returns:
      `(method, adapter)`: a `lora` for the original params, and its adapter. Its rank at a matrix
      is the sum of the ranks of the experts that are not left out.

    Raises:
      ValueError: The number of weights is not the number of experts, all weights are zero, or a sum
        of ranks is more than min(in, out), the largest rank of `lora`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}
      >>> method, key = jp.lora(2, jp.sites(fn, params, jnp.ones((1, 8)))), jax.random.key(0)
      >>> trained = [(method, jp.split(method(key, params))[1]) for _ in range(2)]
      >>> stack = jp.mixtures.stack_adapters(trained)
      >>> merged, adapter = jp.mixtures.merge_weighted(stack, [0.25, 0.75])
      >>> merged.name, adapter["w/a"].shape
      ('lora', (8, 4))
    """
    count = len(next(iter(stack.ranks.values())))
    by_expert = np.asarray(weights, float)
    if by_expert.shape != (count,) or not by_expert.any():
        raise ValueError(
            f"`merge_weighted(weights={by_expert.tolist()})`: give one number for each of {count} "
            "experts, not all of them zero."
        )
    plain, ranks = {}, {}
    for path, site in stack.sites.items():
        columns = np.repeat(by_expert, stack.ranks[path])
        kept = np.flatnonzero(columns)
        if len(kept) > min(site.size(IN), site.size(OUT)):
            raise ValueError(
                f"`merge_weighted`: the ranks of the experts sum to {len(kept)} at '{path}', which "
                f"is {site.size(IN)} x {site.size(OUT)}. Set more of the weights to zero."
            )
        if len(kept):
            a, b = (stack.arrays[f"{path}/experts/{name}"] for name in "ab")
            ranks[path] = len(kept)
            plain[f"{path}/a"] = a[..., kept]
            plain[f"{path}/b"] = b[..., kept, :] * jnp.asarray(columns[kept, None], b.dtype)
    sites = stack.sites.match(lambda site: site.path in ranks)
    return lora(ranks, sites, dtype=next(iter(plain.values())).dtype), plain
