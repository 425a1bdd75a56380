"""Trained LoRA adapters side by side, and weighted sums of them."""

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

# The bank ----------------------------------------------------------------------------------------


class AdapterStack(NamedTuple):
    """Several LoRA adapters side by side.

    Attributes:
      arrays: {"<path>/experts/a": (*stack, in, sum of ranks), "<path>/experts/b": (*stack, sum of
        ranks, out)}, for `combine`.
      sites: All weights that any of them adapts.
      ranks: {path: rank of each expert there}, 0 where it does not adapt the weight.
    """

    arrays: dict[str, jax.Array]
    sites: Sites
    ranks: dict[str, list[int]]


def stack_adapters(adapters: Sequence[tuple[Method, Mapping[str, Any]]]) -> AdapterStack:
    """LoRA adapters of one base as the experts of `xlora`, in this order.

    At each weight the factors lie side by side, with each adapter's strength s in its `b`:
    [a_1, a_2] and [s_1 b_1; s_2 b_2]. Ranks, strengths and weights may differ.

    Args:
      adapters: The method, from `lora`, and the trained arrays of each; as `load_adapter` gives
        them, or of a `chain`, the `lora` in it.

    Raises:
      ValueError: Fewer than two, a method that is not `lora` or acts on a part of the columns,
        arrays that are missing, too many or of another shape than the method makes, or weights
        of different bases; names the adapter by its number and the path.
    """
    if len(adapters) < 2:
        raise ValueError(
            f"`bank` got {len(adapters)} adapters. It takes two or more: a single one has the "
            "whole share always."
        )
    experts = [_expert(i, method, adapter) for i, (method, adapter) in enumerate(adapters)]
    known: dict[str, tuple[int, Site]] = {}
    for i, (method, _) in enumerate(adapters):
        for path, site in method.options["sites"].items():
            first, other = known.setdefault(path, (i, site))
            if _layout(site) != _layout(other):
                raise ValueError(
                    f"`bank`: '{path}' is {_layout(other)} (shape, stack, in, out, roles) in "
                    f"adapter {first}, but {_layout(site)} in adapter {i}. They were trained on "
                    "different bases, and have no common one to be weighed on."
                )
    sites = functools.reduce(operator.or_, (method.options["sites"] for method, _ in adapters))
    arrays, ranks = {}, {}
    for path in sites:
        acting = [expert[path] for expert in experts if path in expert]
        arrays[f"{path}/experts/a"] = jnp.concatenate([a for a, _ in acting], axis=-1)
        arrays[f"{path}/experts/b"] = jnp.concatenate([b for _, b in acting], axis=-2)
        ranks[path] = [e[path][0].shape[-1] if path in e else 0 for e in experts]
    return AdapterStack(arrays, sites, ranks)


def _layout(site: Site) -> tuple:
    roles = tuple(dict.fromkeys(axis.role for axis in site.axes))
    return site.shape, site.stack, site.size(IN), site.size(OUT), roles


def _expert(i: int, method: Any, adapter: Mapping[str, Any]) -> dict[str, tuple]:
    """{path: (a, s * b)} of adapter i.

    Raises:
      ValueError: It is none of `lora`, or the arrays are not its own.
    """
    if getattr(method, "name", None) != "lora":
        raise ValueError(
            f"`bank` takes adapters of `lora`; adapter {i} is of "
            f"'{getattr(method, 'name', method)}'. Of a chain, give the `lora` in it."
        )
    sites: Sites = method.options["sites"]
    check_whole("stack_adapters", sites)
    like = {path: jax.ShapeDtypeStruct(site.shape, jnp.float32) for path, site in sites.items()}
    made = jax.eval_shape(method.apply, jax.random.key(0), like)
    lows = {path: view.weight for path, view in made.items()}
    wanted = {f"{path}/{name}": getattr(low, name) for path, low in lows.items() for name in "ab"}
    for name in sorted({*wanted, *adapter}):
        want = tuple(wanted[name].shape) if name in wanted else None
        have = tuple(adapter[name].shape) if name in adapter else None
        if have != want:
            raise ValueError(
                f"`bank`: '{name}' of adapter {i} has shape {have}, but its method makes {want}. "
                "Give each adapter with the method that made it."
            )
    found = {}
    for path, low in lows.items():
        a, b = (jnp.asarray(adapter[f"{path}/{name}"]) for name in "ab")
        found[path] = (a, low.scale * b)
    return found


def merge_weighted(
    bank: AdapterStack, shares: Sequence[float]
) -> tuple[Method, dict[str, jax.Array]]:
    """What the experts of a bank are with fixed shares, as plain LoRA, which merges.

    Args:
      bank: From `bank`.
      shares: A number for each expert, for all weights. Those with zero take no columns.

    Returns:
      The method, for the original params, and its adapter.

    Raises:
      ValueError: Another number of shares than of experts, all of them zero, or more columns at a
        weight than its smaller side, which is the largest rank that `lora` takes.
    """
    count = len(next(iter(bank.ranks.values())))
    share = np.asarray(shares, float)
    if share.shape != (count,) or not share.any():
        raise ValueError(
            f"`merge_weighted(shares={share.tolist()})`: give one number for each of {count} experts, "
            "not all of them zero."
        )
    plain, ranks = {}, {}
    for path, site in bank.sites.items():
        columns = np.repeat(share, bank.ranks[path])
        kept = np.flatnonzero(columns)
        if len(kept) > min(site.size(IN), site.size(OUT)):
            raise ValueError(
                f"`merge_weighted`: the experts have {len(kept)} columns at '{path}', which is "
                f"{site.size(IN)} x {site.size(OUT)}. Give fewer of them a share."
            )
        if len(kept):
            a, b = (bank.arrays[f"{path}/experts/{name}"] for name in "ab")
            ranks[path] = len(kept)
            plain[f"{path}/a"] = a[..., kept]
            plain[f"{path}/b"] = b[..., kept, :] * jnp.asarray(columns[kept, None], b.dtype)
    sites = bank.sites.match(lambda site: site.path in ranks)
    return lora(ranks, sites, dtype=next(iter(plain.values())).dtype), plain
