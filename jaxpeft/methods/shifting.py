"""LoRA that starts somewhere: the base gives up what the factors begin with."""

import dataclasses
import glob
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import compat
from jaxpeft.method import Method
from jaxpeft.methods.lora import LowRank, lora, low_rank
from jaxpeft.methods.placing import check_floating, check_whole, place
from jaxpeft.methods.trained import options_of, taken_apart
from jaxpeft.sites import Site, Sites, by_pattern
from jaxpeft.tree import Train
from jaxpeft.weight import View, Weight, computing, dense

#: The methods whose base has given something up: what `as_lora` takes.
SHIFTING = ("pissa", "olora", "corda", "lora_ga")

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
    check_whole(who, sites)
    low = low_rank(who, sites=sites, **options)  # type: ignore[arg-type]

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: LowRank = view.weight
        check_floating(who, site.path, view.dtype)
        if any(isinstance(x, Train) for x in jax.tree.leaves(old.w, is_leaf=_is_train)):
            raise ValueError(
                f"`{who}`: '{site.path}' is trained by another method already, so that there is "
                f"no base to start from. Put that method behind `{who}` in the `chain`, or leave "
                "the weight out."
            )
        w = _whole(_matrices(dataclasses.replace(view, weight=old.w)))
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
    return matrices.astype(jnp.promote_types(computing(matrices.dtype), jnp.float32))


def _without(base: Any, site: Site, w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> Any:
    """What stands for `w - scale * a @ b`: an array as it lay, or a frozen weight on top."""
    if isinstance(base, Weight):
        a, b = (jnp.array(x, copy=True) for x in (a, b))  # the adapter's own may be donated
        return LowRank(base, a, b, key=None, scale=-scale, dropout=0.0, part=None)
    with jax.default_matmul_precision("highest"):
        rest = w - scale * (a.astype(w.dtype) @ b.astype(w.dtype))
    rest = site.array(rest).astype(base.dtype)
    lies = compat.typed_sharding(jax.typeof(base))
    return rest if lies is None else jax.sharding.reshard(rest, _on(base, lies.spec))


def _whole(w: jax.Array) -> jax.Array:
    """Whole on every device, as decompositions need it; only Explicit axes have to be told."""
    lies = compat.typed_sharding(jax.typeof(w))
    return w if lies is None else jax.sharding.reshard(w, _on(w, PartitionSpec()))


def _on(x: jax.Array, spec: PartitionSpec) -> NamedSharding:
    """This layout on the mesh of an array that is there, or of one that is traced."""
    lies: Any = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    return NamedSharding(lies.mesh, spec)


# Plain LoRA of it --------------------------------------------------------------------------------


def as_lora(
    method: Method, adapter: Mapping[str, Any], start: Mapping[str, Any]
) -> tuple[Method, dict[str, jax.Array]]:
    """The same change as plain LoRA of twice the rank, over the base as it was.

    a @ b - a0 @ b0 = [a, a0] @ [b; -b0], where a0 and b0 are what training started with. For
    adapters that are to be shared, or stored where the start cannot be made again.

    A matrix has no rank above min(in, out). Where twice the rank is more, the product is kept, to
    rounding, in factors of that rank: with [a, a0] = Q R they are Q and R @ [b; -b0], where the
    matrix has more inputs than outputs likewise by a decomposition of [b; -b0]^T.

    Args:
      method: From `pissa`, `olora`, `corda` or `lora_ga`; of a chain, that method of it.
      adapter: Trained, maybe with arrays of other methods.
      start: As `split` gave it.

    Returns:
      The method, for `save_adapter` with the original params, and its adapter. Arrays of other
      methods are in it as they were: `chain` those methods with this one as before.

    Raises:
      ValueError: The method does not start from a base of its own, or the adapter or the start
        lacks arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxpeft as jp
      >>> f, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> method = jp.pissa(1, jp.sites(f, params, jnp.ones((1, 4))).linear)
      >>> frozen, start = jp.split(method(jax.random.key(0), params))
      >>> plain, adapter = jp.as_lora(method, start, start)
      >>> plain.name, adapter["w/a"].shape
      ('lora', (4, 2))
    """
    options = options_of(method, SHIFTING, "as_lora")
    sites, scaling = options["sites"], options["scaling"]
    names = [f"{path}/{name}" for path in sites for name in "ab"]
    own, others = taken_apart(adapter, names, "as_lora")
    first, _ = taken_apart(start, names, "as_lora", "start")
    alphas = by_pattern(options["alpha"], sites, "alpha")
    joined: dict[str, jax.Array] = {}
    ranks, strengths = {}, {}
    for path in sites:
        a, b = (f"{path}/{name}" for name in "ab")
        joined[a], joined[b] = _of_full_rank(
            jnp.concatenate([own[a], first[a]], axis=-1),
            jnp.concatenate([own[b], -first[b]], axis=-2),
        )
        rank, alpha = joined[a].shape[-1], alphas[path]
        more = rank / own[a].shape[-1]
        # The scale stays what it was.
        kept = alpha and alpha * (more if scaling == "alpha/r" else more**0.5)
        ranks[glob.escape(path)], strengths[glob.escape(path)] = rank, kept
    plain = lora(ranks, sites, alpha=strengths, scaling=scaling, dtype=options["dtype"])
    return plain, {**others, **joined}


def _of_full_rank(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of a @ b, (*stack, n, r) and (*stack, r, m), with min(n, m) columns if r is more."""
    n, r, m = *a.shape[-2:], b.shape[-1]
    if r <= min(n, m):
        return a, b
    wide = jnp.promote_types(a.dtype, jnp.float32)
    with jax.default_matmul_precision("highest"):
        if n <= m:
            q, rest = jnp.linalg.qr(a.astype(wide))
            left, right = q, rest @ b.astype(wide)
        else:
            q, rest = jnp.linalg.qr(jnp.swapaxes(b.astype(wide), -1, -2))
            left, right = a.astype(wide) @ jnp.swapaxes(rest, -1, -2), jnp.swapaxes(q, -1, -2)
    return left.astype(a.dtype), right.astype(b.dtype)
