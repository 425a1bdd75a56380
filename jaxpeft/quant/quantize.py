"""quantize: the method that stores frozen arrays in fewer bits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.method import Method
from jaxpeft.methods.placing import place
from jaxpeft.quant.int8 import int8
from jaxpeft.sites import Site, Sites
from jaxpeft.tree import Train
from jaxpeft.weight import View, Weight, innermost, with_innermost

#: Each format is a function from a matrix (*stack, in, out) to a weight.
FORMATS: dict[str, Callable[[Any], Weight]] = {"int8": int8}


def quantize(format: str, sites: Sites) -> Method:
    """Stores the selected matrices in fewer bits, under whatever other methods put on them.

    The array at the bottom of each selected weight is replaced, so the order in a `chain`
    does not matter: `chain(lora(...), quantize(...))` is `chain(quantize(...), lora(...))`.

    Args:
      format: "int8" (symmetric, a scale per output channel).
      sites: The matrices.

    Raises:
      ValueError: The format is unknown, or a selected array is trained or quantized already.
    """
    if format not in FORMATS:
        raise ValueError(f"`quantize('{format}')`: the formats are {sorted(FORMATS)}.")
    encode = FORMATS[format]

    def make(key: jax.Array, site: Site, view: View) -> View:
        del key
        inner = innermost(view.weight)
        if isinstance(inner, (Train, Weight)):
            what = "trained" if isinstance(inner, Train) else f"{type(inner).__name__} already"
            raise ValueError(
                f"`quantize('{format}')`: '{site.path}' is {what}. Leave it out of the sites."
            )
        return dataclasses.replace(
            view, weight=with_innermost(view.canonical(), encode), natural=False
        )

    return Method(
        "quantize",
        {"format": format, "sites": sites},
        lambda key, tree: place(key, tree, sites, make, who="quantize"),
    )
