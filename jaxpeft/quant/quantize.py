"""quantize: the method that stores frozen arrays in fewer bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import compat
from jaxpeft.method import Method
from jaxpeft.methods.placing import check_floating, place, takes_sites
from jaxpeft.quant.fp4 import fp4
from jaxpeft.quant.fp8 import fp8
from jaxpeft.quant.int4 import int4
from jaxpeft.quant.int8 import int8
from jaxpeft.quant.nf4 import nf4
from jaxpeft.rules.sharding import followed
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import View, Weight, innermost, with_innermost

#: Each format is a function from a matrix (*stack, in, out) to a weight.
FORMATS: dict[str, Callable[..., Weight]] = {
    "nf4": nf4,
    "nf4+dq": functools.partial(nf4, double=True),
    "fp4": fp4,
    "fp4+dq": functools.partial(fp4, double=True),
    "int4": int4,
    "int4/asym": functools.partial(int4, symmetric=False),
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


@takes_sites
def quantize(format: str, sites: Sites, **options: Any) -> Method:
    """Stores the selected matrices in fewer bits, under whatever other methods put on them.

    The array at the bottom of each selected weight is replaced, so the order in a `chain`
    does not matter: `chain(lora(...), quantize(...))` is `chain(quantize(...), lora(...))`.

    Args:
      format: "nf4", "nf4+dq", "fp4", "fp4+dq", "int4", "int4/asym", "int8", "fp8".
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
        if isinstance(inner, (Train, Weight)):
            what = "trained" if isinstance(inner, Train) else f"{type(inner).__name__} already"
            raise ValueError(
                f"`quantize('{format}')`: '{site.path}' is {what}. Leave it out of the sites."
            )
        who = f"quantize('{format}')"
        check_floating(who, site.path, view.dtype, instead="cast or split it first")
        check_finite(inner, site.path, who)
        return encoded(view, encode)

    return Method(
        "quantize",
        {"format": format, "sites": sites, **options},
        lambda key, tree: place(key, tree, sites, make, who="quantize"),
    )


def encoded(view: View, encode: Callable[[jax.Array], Weight]) -> View:
    """The view with the array at its bottom in codes, which lie on devices as the array does.

    Only a mesh with Explicit axes has to be told how; a side is whole on every device where
    its shards would cut a block.
    """

    def in_codes(view: View) -> View:
        weight = with_innermost(view.canonical(), encode)
        return dataclasses.replace(view, weight=weight, natural=False)

    sharding = compat.typed_sharding(jax.typeof(innermost(view.weight)))
    if sharding is None:
        return in_codes(view)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), view)
    shapes = jax.eval_shape(in_codes, plain)
    leaves, treedef = jax.tree.flatten(shapes)
    specs = followed(shapes.refined(), sharding) or [PartitionSpec()] * len(leaves)
    places = [NamedSharding(sharding.mesh, spec) for spec in specs]
    return jax.sharding.auto_axes(in_codes, out_sharding=jax.tree.unflatten(treedef, places))(view)


def check_finite(array: Any, path: str, who: str) -> None:
    """Refuses infinities and NaNs in an array that is there, rather than traced."""
    if isinstance(array, jax.core.Tracer) or isinstance(array, jax.ShapeDtypeStruct):
        return
    with jax.ensure_compile_time_eval():  # params that a traced function closes over are known
        bad = int(jnp.sum(~jnp.isfinite(array)))
    if bad:
        raise ValueError(
            f"`{who}`: '{path}' has {bad} entries of {array.size} that are infinite or NaN. "
            "They would take their block with them; mend the weight, or leave it out."
        )
