"""LoRA whose factors start away from zero: their product is subtracted from the base."""

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

#: The methods that replace the base by a residual. `to_lora` converts their adapters.
RESIDUAL_METHODS = ("pissa", "olora", "corda", "lora_ga")

#: From a key, a site, its matrices (*stack, in, out), the rank and the scale to the factors
#: a0 (*stack, in, r) and b0 (*stack, r, out).
Start = Callable[[jax.Array, Site, jax.Array, int, float], tuple[jax.Array, jax.Array]]


def residual_start(start: Start, sites: Sites, options: Mapping[str, Any], caller: str) -> Callable:
    """LoRA whose factors start at a0 and b0, over the residual base `w - scale * a0 @ b0`.

    Training starts at the base model up to rounding. If the base is not a plain array but, for
    example, quantized, it stays as it is, and `-scale * a0 @ b0` is added to it as a second
    low-rank matrix, which is frozen.

    Args:
      start: See `Start`. It gets the matrices in float32 or wider, one stack at a time.
      sites: The matrices to adapt.
      options: Options of `lora`.
      caller: Name of the method that the user called, for error messages.

    Returns:
      A function from a key and a tree to a tree, for `Method.apply`.
    """
    check_whole(caller, sites)
    low = low_rank(caller, sites=sites, **options)  # type: ignore[arg-type]

    def make(key: jax.Array, site: Site, view: View) -> View:
        old: LowRank = view.weight
        check_floating(caller, site.path, view.dtype)
        if any(isinstance(x, Trainable) for x in jax.tree.leaves(old.w, is_leaf=is_trainable)):
            raise ValueError(
                f"`{caller}`: '{site.path}' is trained by another method already, so it has no "
                f"fixed base to decompose. Put that method after `{caller}` in the `chain`, or "
                "leave this weight out of the sites."
            )
        w = replicated(matrices_of(dataclasses.replace(view, weight=old.w)))
        with jax.default_matmul_precision("highest"):
            a, b = start(key, site, w, old.a.value.shape[-1], old.scale)
        a, b = (x.astype(old.a.value.dtype) for x in (a, b))
        residual = residual_base(old.w, site, w, a, b, old.scale)
        weight = dataclasses.replace(old, w=residual, a=Trainable(a), b=Trainable(b))
        return dataclasses.replace(view, weight=weight)

    return lambda key, tree: apply_to_sites(key, low(key, tree), sites, make, caller=caller)


def is_trainable(x: Any) -> bool:
    """Whether a node of a tree is a `Trainable`."""
    return isinstance(x, Trainable)


def matrices_of(view: View) -> jax.Array:
    """The dense matrices (*stack, in, out) of a frozen weight, in float32 or wider."""
    view = view.unfolded()
    w = dataclasses.replace(view, weight=view.canonical(), natural=False)
    matrices = w.over_stack(lambda x, _: dense(x), None)
    return matrices.astype(jnp.promote_types(computing(matrices.dtype), jnp.float32))


def residual_base(
    base: Any, site: Site, w: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> Any:
    """The base `w - scale * a @ b`, in the layout and the sharding of the base that it replaces.

    Args:
      base: What the method was put on: an array, or a weight, which gets a frozen low-rank matrix
        on top.
      site: The use of the array by the model.
      w: Dense matrices of the base (*stack, in, out).
      a, b: Factors (*stack, in, r) and (*stack, r, out) at their start.
      scale: s of the method.
    """
    if isinstance(base, Weight):
        # Copies, because the adapter's own arrays may be donated.
        a, b = (jnp.array(x, copy=True) for x in (a, b))
        return LowRank(base, a, b, key=None, scale=-scale, dropout=0.0, part=None)
    with jax.default_matmul_precision("highest"):
        residual = w - scale * (a.astype(w.dtype) @ b.astype(w.dtype))
    residual = site.array(residual).astype(base.dtype)
    sharding = compat.typed_sharding(jax.typeof(base))
    if sharding is None:
        return residual
    return jax.sharding.reshard(residual, on_mesh_of(base, sharding.spec))


def replicated(w: jax.Array) -> jax.Array:
    """The array replicated on every device, as decompositions need it.

    Only meshes with Explicit axes need to be told; elsewhere the compiler gathers it.
    """
    if compat.typed_sharding(jax.typeof(w)) is None:
        return w
    return jax.sharding.reshard(w, on_mesh_of(w, PartitionSpec()))


def on_mesh_of(x: jax.Array, spec: PartitionSpec) -> NamedSharding:
    """The sharding with this spec on the mesh of an array, which may be traced."""
    sharding: Any = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    return NamedSharding(sharding.mesh, spec)
