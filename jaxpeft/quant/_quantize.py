"""quantize: the method that stores frozen arrays in fewer bits."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import _compat as compat
from jaxpeft._marks import Trainable
from jaxpeft._method import Method, register_method
from jaxpeft._rules.sharding import followed, parts_of
from jaxpeft._sites import Site, Sites
from jaxpeft._view import View
from jaxpeft._weight import Weight, innermost, with_innermost
from jaxpeft.extend._apply import apply_to_sites, check_floating
from jaxpeft.quant._fp4 import fp4
from jaxpeft.quant._fp8 import fp8
from jaxpeft.quant._int4 import int4
from jaxpeft.quant._int8 import int8
from jaxpeft.quant._nf4 import nf4

#: Each format is a function from a matrix (*stack, in, out) to a weight.
FORMATS: dict[str, Callable[..., Weight]] = {
    "nf4": nf4,
    "nf4+dq": functools.partial(nf4, double=True),
    "fp4": fp4,
    "fp4+dq": functools.partial(fp4, double=True),
    "int4": int4,
    "int4+asym": functools.partial(int4, symmetric=False),
    "int8": int8,
    "fp8": fp8,
}


@functools.cache  # One function per format, which is then compiled once per shape.
def encoder(format: str, **options: Any) -> Callable[[jax.Array], Weight]:
    """The function of a format's name from a matrix to a weight, compiled.

    Raises:
      ValueError: There is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"`quantize('{format}')`: the formats are {sorted(FORMATS)}.")
    return jax.jit(functools.partial(FORMATS[format], **options))


@register_method
def quantize(format: str, sites: Sites, **options: Any) -> Method:
    """Stores the selected matrices in fewer bits, under whatever other methods put on them.

    The array at the bottom of each selected weight is replaced, so the order in a `chain`
    does not matter: `chain(lora(...), quantize(...))` is `chain(quantize(...), lora(...))`.

    Args:
      format: "nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+asym", "int8", "fp8".
      sites: The matrices; usually `sites.hidden`, which leaves embeddings and the head.
      options: Of the format, such as `block=128`.

    Raises:
      ValueError: The format is unknown, a selected array is trained or quantized already, is not
        of floating-point numbers, or has entries that are no finite numbers (unless it is traced,
        when they cannot be seen: their whole block then decodes to NaN).
    """
    encode = encoder(format, **options)

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        inner = innermost(view.weight)
        if isinstance(inner, (Trainable, Weight)):
            what = "trained" if isinstance(inner, Trainable) else f"{type(inner).__name__} already"
            raise ValueError(
                f"`quantize('{format}')`: '{site.path}' is {what}. Leave it out of the sites."
            )
        caller = f"quantize('{format}')"
        check_floating(caller, site.path, view.dtype, instead="cast or split it first")
        check_finite_weight(inner, site.path, caller)
        return encoded(view, encode)

    return Method(
        "quantize",
        {"format": format, "sites": sites, **options},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="quantize"),
    )


def encoded(view: View, encode: Callable[[jax.Array], Weight]) -> View:
    """The view with the array at its bottom in codes, which lie on devices as the array does.

    On a mesh with Explicit axes they do so in traced programs, too; with Automatic ones the
    compiler chooses there.

    Warns:
      UserWarning: The codes are in fewer parts than the array was; names it, and what to do.
    """

    def in_codes(view: View) -> View:
        weight = with_innermost(view.canonical(), encode)
        return dataclasses.replace(view, weight=weight, natural=False)

    array = innermost(view.weight)
    typed = compat.typed_sharding(jax.typeof(array))
    sharding = typed if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not parts_of(sharding.mesh, sharding.spec) > 1:
        return in_codes(view)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), view)
    shapes = jax.eval_shape(in_codes, plain)
    leaves, treedef = jax.tree.flatten(shapes)
    specs = followed(shapes, sharding)
    _warn_of_whole(view, sharding, leaves, specs)
    places = [NamedSharding(sharding.mesh, spec) for spec in specs]
    wanted = jax.tree.unflatten(treedef, places)
    if typed is None:
        return jax.device_put(in_codes(view), wanted)
    return jax.sharding.auto_axes(in_codes, out_sharding=wanted)(view)


def _warn_of_whole(
    view: View, sharding: NamedSharding, leaves: list[Any], specs: list[PartitionSpec]
) -> None:
    """Warns where the largest field lies in fewer parts than the array that it stands for."""
    at = max(range(len(leaves)), key=lambda i: leaves[i].size * leaves[i].dtype.itemsize)
    have, want = (parts_of(sharding.mesh, spec) for spec in (specs[at], sharding.spec))
    if have < want:
        codes = f"{leaves[at].dtype} of shape {leaves[at].shape}"
        warnings.warn(
            f"`quantize`: the codes of '{view.path}', {codes}, lie in {have} parts on the devices, "
            f"while the array of shape {view.shape} lies in {want} by {sharding.spec}: their sides "
            "do not divide as its own do. Divide another side, or leave the weight out.",
            stacklevel=2,
        )


def check_finite_weight(array: Any, path: str, caller: str) -> None:
    """Refuses infinities and NaNs in an array that is there, rather than traced."""
    if isinstance(array, jax.core.Tracer) or isinstance(array, jax.ShapeDtypeStruct):
        return
    with jax.ensure_compile_time_eval():  # params that a traced function closes over are known
        bad = int(jnp.sum(~jnp.isfinite(array)))
    if bad:
        raise ValueError(
            f"`{caller}`: '{path}' has {bad} entries of {array.size} that are infinite or NaN. "
            "They would take their block with them; mend the weight, or leave it out."
        )
