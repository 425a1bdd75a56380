"""LoRA that starts somewhere: the base gives up what the factors begin with."""

import dataclasses
import glob
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.method import Method
from jaxpeft.methods.lora import LowRank, lora
from jaxpeft.methods.placing import check_whole, place
from jaxpeft.sites import Site, Sites, by_pattern
from jaxpeft.tree import Train
from jaxpeft.weight import View, Weight, dense

#: From a key, a site, its matrices (*stack, in, out), the rank and the scale to two factors.
Start = Callable[[jax.Array, Site, jax.Array, int, float], tuple[jax.Array, jax.Array]]


def starting_at(start: Start, sites: Sites, options: Mapping[str, Any], who: str) -> Callable:
    """The method whose factors begin at `start`, and its base at `w - scale * a @ b`.

    Training starts at the base model but for rounding. Over a weight that is no plain array, such
    as codes, the base stays as it is and the start is taken away beside it, as a second low-rank
    matrix that is frozen.

    Args:
      start: See `Start`; matrices come in float32 or wider, one stack at a time.
      sites: The matrices to adapt.
      options: Of `lora`.
      who: For messages.
    """
    low = lora(sites=sites, **options)  # type: ignore[arg-type]
    check_whole(who, sites)

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: LowRank = view.weight
        if any(isinstance(x, Train) for x in jax.tree.leaves(old.w, is_leaf=_is_train)):
            raise ValueError(
                f"`{who}`: '{site.path}' is trained by another method already, so that there is "
                f"no base to start from. Put that method behind `{who}` in the `chain`, or leave "
                "the weight out."
            )
        w = _matrices(dataclasses.replace(view, weight=old.w))
        with jax.default_matmul_precision("highest"):
            a, b = start(key, site, w, old.a.value.shape[-1], old.scale)
        a, b = (x.astype(old.a.value.dtype) for x in (a, b))
        rest = _without(old.w, site, w, a, b, old.scale)
        weight = dataclasses.replace(old, w=rest, a=Train(a), b=Train(b))
        return dataclasses.replace(view, weight=weight)

    return lambda key, tree: place(key, low(key, tree), sites, make, who=who)


def _is_train(x: Any) -> bool:
    return isinstance(x, Train)


def _matrices(view: View) -> jax.Array:
    """The matrices (*stack, in, out) that a frozen weight stands for, in float32 or wider."""
    view = view.unfolded()
    w = dataclasses.replace(view, weight=view.canonical(), natural=False)
    matrices = w.over_stack(lambda x, _: dense(x), None)
    return matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))


def _without(base: Any, site: Site, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> Any:
    """What stands for `w - scale * a @ b`: an array as it lay, or a frozen weight on top."""
    if isinstance(base, Weight):
        a, b = (jnp.array(x, copy=True) for x in (a, b))  # the adapter's own may be donated
        return LowRank(base, a, b, key=None, scale=-scale, dropout=0.0, part=None)
    with jax.default_matmul_precision("highest"):
        rest = w - scale * (a.astype(w.dtype) @ b.astype(w.dtype))
    return site.array(rest).astype(base.dtype)


def as_lora(
    method: Method, adapter: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """The same change as plain LoRA of twice the rank, over the base as it was.

    a @ b - a0 @ b0 = [a, a0] @ [b; -b0], where a0 and b0 are what training started with. For
    adapters that are to be shared, or stored where the start cannot be made again.

    Args:
      method: From `pissa`, `olora`, `corda` or `lora_ga`.
      adapter: Trained.
      start: As `split` gave it.

    Returns:
      The method, for `save_adapter` with the original params, and its adapter.

    Raises:
      ValueError: The method does not start from a base of its own.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> method = jp.pissa(1, jp.sites(f, params, jnp.ones((1, 4))).linear)
      >>> frozen, start = jp.split(method(jax.random.key(0), params))
      >>> plain, adapter = jp.as_lora(method, start, start)
      >>> plain.name, adapter["w/a"].shape
      ('lora', (4, 2))
    """
    if method.name not in ("pissa", "olora", "corda", "lora_ga"):
        raise ValueError(
            f"`as_lora` takes adapters of pissa, olora, corda and lora_ga, whose base has given "
            f"something up; this one is of '{method.name}' and can be stored as it is."
        )
    sites, scaling = method.options["sites"], method.options["scaling"]
    alphas = by_pattern(method.options["alpha"], sites, "alpha")
    twice = {"alpha/r": 2.0, "alpha/sqrt(r)": 2**0.5}[scaling]  # keeps the scale
    joined: dict[str, jax.Array] = {}
    for path in sites:
        a, b = (f"{path}/{name}" for name in "ab")
        joined[a] = jnp.concatenate([adapter[a], start[a]], axis=-1)
        joined[b] = jnp.concatenate([adapter[b], -start[b]], axis=-2)
    given: Any = {glob.escape(p): None if x is None else twice * x for p, x in alphas.items()}
    plain = lora(
        {glob.escape(path): joined[f"{path}/a"].shape[-1] for path in sites},
        sites,
        alpha=given,
        scaling=scaling,
        dtype=method.options["dtype"],
    )
    return plain, joined
