"""LoRA that starts somewhere: the base gives up what the factors begin with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import _compat as compat
from jaxpeft._marks import Trainable
from jaxpeft._methods.lora import LowRank, low_rank
from jaxpeft._operand import computing
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, dense
from jaxpeft.extend._apply import apply_to_sites, check_floating, check_whole

#: The methods whose base has given something up: what `to_lora` takes.
RESIDUAL_METHODS = ("pissa", "olora", "corda", "lora_ga")

#: From a key, a site, its matrices (*stack, in, out), the rank and the scale to two factors.
Start = Callable[[jax.Array, Site, jax.Array, int, float], tuple[jax.Array, jax.Array]]


def residual_start(start: Start, sites: Sites, options: Mapping[str, Any], caller: str) -> Callable:
    """The method whose factors begin at `start`, and its base at `w - scale * a @ b`.

    Training starts at the base model but for rounding. Over a weight that is no plain array, such
    as codes, the base stays as it is and the start is taken away beside it, as a second low-rank
    matrix that is frozen.

    Args:
      start: See `Start`; matrices come in float32 or wider, one stack at a time.
      sites: The matrices to adapt.
      options: Of `lora`.
      caller: For messages.
    """
    check_whole(caller, sites)
    low = low_rank(caller, sites=sites, **options)  # type: ignore[arg-type]

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: LowRank = view.weight
        check_floating(caller, site.path, view.dtype)
        if any(isinstance(x, Trainable) for x in jax.tree.leaves(old.w, is_leaf=is_trainable)):
            raise ValueError(
                f"`{caller}`: '{site.path}' is trained by another method already, so that there is "
                f"no base to start from. Put that method behind `{caller}` in the `chain`, or leave "
                "the weight out."
            )
        w = gathered(matrices_of(dataclasses.replace(view, weight=old.w)))
        with jax.default_matmul_precision("highest"):
            a, b = start(key, site, w, old.a.value.shape[-1], old.scale)
        a, b = (x.astype(old.a.value.dtype) for x in (a, b))
        rest = without_start(old.w, site, w, a, b, old.scale)
        weight = dataclasses.replace(old, w=rest, a=Trainable(a), b=Trainable(b))
        return dataclasses.replace(view, weight=weight)

    return lambda key, tree: apply_to_sites(key, low(key, tree), sites, make, caller=caller)


def is_trainable(x: Any) -> bool:
    """Whether a node of a tree is a `Trainable` mark."""
    return isinstance(x, Trainable)


def matrices_of(view: View) -> jax.Array:
    """The matrices (*stack, in, out) that a frozen weight stands for, in float32 or wider."""
    view = view.unfolded()
    w = dataclasses.replace(view, weight=view.canonical(), natural=False)
    matrices = w.over_stack(lambda x, _: dense(x), None)
    return matrices.astype(jnp.promote_types(computing(matrices.dtype), jnp.float32))


def without_start(
    base: Any, site: Site, w: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> Any:
    """What stands for `w - scale * a @ b`: an array as it lay, or a frozen weight on top."""
    if isinstance(base, Weight):
        a, b = (jnp.array(x, copy=True) for x in (a, b))  # the adapter's own may be donated
        return LowRank(base, a, b, key=None, scale=-scale, dropout=0.0, part=None)
    with jax.default_matmul_precision("highest"):
        rest = w - scale * (a.astype(w.dtype) @ b.astype(w.dtype))
    rest = site.array(rest).astype(base.dtype)
    lies = compat.typed_sharding(jax.typeof(base))
    return rest if lies is None else jax.sharding.reshard(rest, on_spec(base, lies.spec))


def gathered(w: jax.Array) -> jax.Array:
    """Whole on every device, as decompositions need it; only Explicit axes have to be told."""
    lies = compat.typed_sharding(jax.typeof(w))
    return w if lies is None else jax.sharding.reshard(w, on_spec(w, PartitionSpec()))


def on_spec(x: jax.Array, spec: PartitionSpec) -> NamedSharding:
    """This layout on the mesh of an array that is there, or of one that is traced."""
    lies: Any = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    return NamedSharding(lies.mesh, spec)
