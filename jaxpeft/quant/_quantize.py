"""quantize: the method that stores frozen arrays in fewer bits, and the formats by name."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
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
def quantizer(format: str, **options: Any) -> Callable[[jax.Array], Weight]:
    """The compiled function of a format, from a matrix to a weight.

    Raises:
      ValueError: There is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"`quantize('{format}')`: the formats are {sorted(FORMATS)}.")
    return jax.jit(functools.partial(FORMATS[format], **options))


def check_format(caller: str, format: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown format, or for an option that the format does not have.

    Args:
      caller: The call as the user wrote it, such as "quantize('nf4')".
      format: The name of the format.
      options: The options given.
    """
    if format not in FORMATS:
        raise ValueError(f"`{caller}`: the formats are {sorted(FORMATS)}.")
    function = FORMATS[format]
    fixed = {"matrix", *getattr(function, "keywords", {})}
    known = [name for name in inspect.signature(function).parameters if name not in fixed]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"`{caller}` has no option {unknown}. The options of '{format}' are {known}."
        )


@register_method
def quantize(format: str, sites: Sites, **options: Any) -> Method:
    """Quantizes the selected matrices, whatever other methods have put on top of them.

    The array at the bottom of each selected weight is replaced, so the order in a `chain`
    does not matter: `chain(lora(...), quantize(...))` is `chain(quantize(...), lora(...))`.

    Args:
      format: "nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4+asym", "int8", "fp8".
      sites: The matrices; usually `sites.hidden`, which leaves out embeddings and the head.
      options: Options of the format, such as `block=128`.

    Raises:
      ValueError: The format or an option of it is unknown, or a selected array is trained or
        quantized already, has no floating-point dtype, or has infinite or NaN entries. (Those of
        a traced array are not known: their whole block dequantizes to NaN.)
    """
    check_format(f"quantize('{format}')", format, options)
    quantize = quantizer(format, **options)

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
        return quantized_view(view, quantize)

    return Method(
        "quantize",
        {"format": format, "sites": sites, **options},
        lambda key, tree: apply_to_sites(key, tree, sites, make, caller="quantize"),
    )


def quantized_view(view: View, quantize: Callable[[jax.Array], Weight]) -> View:
    """The view with the array at its bottom quantized, and sharded as the array is.

    On a mesh with Explicit axes this holds in traced programs, too; with Automatic axes the
    compiler chooses the sharding there.

    Warns:
      UserWarning: The quantized values are in fewer shards than the array was; names the array,
        and what to do.
    """

    def quantized(view: View) -> View:
        weight = with_innermost(view.canonical(), quantize)
        return dataclasses.replace(view, weight=weight, natural=False)

    array = innermost(view.weight)
    typed = compat.typed_sharding(jax.typeof(array))
    sharding = typed if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not parts_of(sharding.mesh, sharding.spec) > 1:
        return quantized(view)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), view)
    shapes = jax.eval_shape(quantized, plain)
    leaves, treedef = jax.tree.flatten(shapes)
    specs = followed(shapes, sharding)
    _warn_of_whole(view, sharding, leaves, specs)
    places = [NamedSharding(sharding.mesh, spec) for spec in specs]
    wanted = jax.tree.unflatten(treedef, places)
    if typed is None:
        return jax.device_put(quantized(view), wanted)
    return jax.sharding.auto_axes(quantized, out_sharding=wanted)(view)


def _warn_of_whole(
    view: View, sharding: NamedSharding, leaves: list[Any], specs: list[PartitionSpec]
) -> None:
    """Warns where the largest field is in fewer shards than the array that it replaces."""
    at = max(range(len(leaves)), key=lambda i: leaves[i].size * leaves[i].dtype.itemsize)
    have, want = (parts_of(sharding.mesh, spec) for spec in (specs[at], sharding.spec))
    if have < want:
        field = f"{leaves[at].dtype} of shape {leaves[at].shape}"
        warnings.warn(
            f"`quantize`: the quantized values of '{view.path}', {field}, are in {have} shards, "
            f"while the array of shape {view.shape} is in {want} by {sharding.spec}: their sides "
            "are not divisible as its own are. Shard another side, or leave the weight out.",
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
            "They would make their whole block NaN; fix the weight, or leave it out."
        )
