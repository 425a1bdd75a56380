"""Every format under every method: over quantized values it acts as over their dequantization.

Both sides are lifted; that a method over plain arrays is right is what test_laws.py shows. With
the method left out, the quantized model is the plain model with dequantized weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp

from .methods import METHODS
from .rows import ROWS
from .rows.row import marks
from .subject import differentiated, in_mesh, lifted_call, score, scores, subject, worst

pytestmark = [
    pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning"),
    # Sides of a few rows, in blocks: no device could have a part of its own.
    pytest.mark.filterwarnings("ignore:`quantize`. the quantized values of"),
]

# Blocks so small that the table's tiny weights have several, some cut short.
FORMATS = {
    "nf4": dict(format="nf4", block=2),
    "nf4+dq": dict(format="nf4+dq", block=4),
    "nf4, flat": dict(format="nf4+dq", block=8, layout="flat"),
    "fp4": dict(format="fp4", block=3),
    "int4": dict(format="int4", block=2),
    "int4+asym": dict(format="int4+asym", block=5),
    "int8": dict(format="int8"),
    "int8, blocks": dict(format="int8", block=2),
    "fp8": dict(format="fp8"),
    "fp8, blocks": dict(format="fp8", block=4),
}

# Everyday: each format on one row, and the rows where decoding has something of its own to do.
PLAIN = "x @ w"
SPECIAL = {
    "experts by ragged_dot",
    "convolution, NHWC",
    "table[ids]",
    "lax.scan of remat with a policy",
    "shard_map, column- then row-parallel",
    "a mesh with Explicit axes",
}


def pairs(methods):
    """LoRA on every row in every format; the others on every row in one, on theirs in all."""
    listed = []
    for method in methods:
        for row in filter(method.takes, ROWS):
            for name in FORMATS:
                lora = method is METHODS[0]
                if not (lora or row.name in method.rows or name == "nf4+dq"):
                    continue
                first = row.name == PLAIN or row.name in SPECIAL and name == "nf4+dq"
                label = f"{name}: {method.name}: {row.name}"
                listed.append(
                    pytest.param(row, method, name, id=label, marks=marks(lora and first))
                )
    return listed


def quantized(s, format):
    """(quantize, dequantized): the row's parameters with its matrices in a format."""
    chosen = s.sites.matrices
    quantize = jp.quantize(sites=chosen, **FORMATS[format])
    tree = quantize(jax.random.key(0), s.case.params)
    return quantize, jp.merge(tree), tree


def same(s, sides):
    """Whether both sides have the same outputs and gradients, to rounding."""
    for fn, args in s.programs:
        results = []
        for side in sides:
            f, variables = scores(side, fn, args, lifted_call(side), keep=True)
            with in_mesh(s.case.mesh):
                results.append(jax.jit(differentiated(side, f, keep=True))(variables))
        (value, slope), (wanted_value, wanted_slope) = results
        assert worst(value, wanted_value) <= s.row.tolerance
        assert worst(slope, wanted_slope) <= s.row.tolerance * 10


@pytest.mark.parametrize(
    ("row", "method", "format"), pairs([m for m in METHODS if m.name != "lora on nf4"])
)
def test_a_method_over_quantized_values_is_the_method_over_the_dequantized_ones(
    row, method, format
):
    s = subject(row, method)
    quantize, dequantized, _ = quantized(s, format)
    make = method.make(s.sites, jnp.float64)
    sides = []
    key = jax.random.key(1)  # what a method draws and freezes is the same on both sides
    for tree in (quantize(key, s.case.params), dequantized):
        frozen, _ = jp.split(make(key, tree))
        sides.append(dataclasses.replace(s, frozen=frozen))
    same(s, sides)


@pytest.mark.parametrize(("row", "method", "format"), pairs(METHODS[:1]))
def test_a_quantized_model_is_the_model_with_dequantized_weights(row, method, format):
    s = subject(row, method)
    _, dequantized, tree = quantized(s, format)
    for fn, args in s.programs:
        with in_mesh(s.case.mesh):
            got = jax.jit(lambda t, fn=fn, args=args: score(jp.lift(fn)(t, *args)))(tree)
            want = jax.jit(lambda p, fn=fn, args=args: score(fn(p, *args)))(dequantized)
        assert worst(got, want) <= row.tolerance * 10
