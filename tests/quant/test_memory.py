"""No dense copy of a quantized weight outlives its layer, whatever the format and the loop."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft.quant import FORMATS

WIDTH, TOKENS, RANK = 128, 4, 2
DENSE = WIDTH * WIDTH
KEY = jax.random.key(0)


def layer(w, x):
    return jnp.tanh(x @ w)


def model(layers, scanned, remat):
    """A stack of matrices (layers, WIDTH, WIDTH), scanned over or one array for each layer."""
    body = jax.checkpoint(layer) if remat else layer
    if scanned:
        params = {"w": jax.random.normal(KEY, (layers, WIDTH, WIDTH)) / 12}
        return params, lambda p, x: jax.lax.scan(lambda x, w: (body(w, x), None), x, p["w"])[0]
    params = {f"w{i}": jax.random.normal(KEY, (WIDTH, WIDTH)) / 12 for i in range(layers)}
    return params, lambda p, x: functools.reduce(lambda x, n: body(p[n], x), sorted(p), x)


def setting(format, layers, scanned, remat):
    """A loss of the adapter, and its arguments."""
    params, f = model(layers, scanned, remat)
    x = jnp.ones((TOKENS, WIDTH)) / 12
    sites = jp.sites(f, params, x)
    method = jp.chain(jp.quantize(format, sites), jp.lora(RANK, sites))
    frozen, adapter = jp.split(method(KEY, params))
    lifted = jp.lift(f, materialize="error")
    return lambda a, frozen, x: jnp.sum(lifted(jp.combine(frozen, a), x) ** 2), adapter, frozen, x


def kept(f, *args):
    """Arrays that are saved for the backward pass, by shape and dtype."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))


def dense(arrays):
    """Those as large as a weight or several, and no codes."""
    wide = [x for x in arrays if x.dtype.itemsize > 1]
    return [x for x in wide if x.size >= DENSE and x.size % DENSE == 0]


LOOPS = list(itertools.product((False, True), (False, True)))
NAMES = [
    "{}, {}".format("scanned" if s else "unrolled", "remat" if r else "plain") for s, r in LOOPS
]


@pytest.mark.parametrize(("scanned", "remat"), LOOPS, ids=NAMES)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_nothing_dense_is_saved_for_the_backward_pass(format, scanned, remat):
    loss, adapter, frozen, x = setting(format, 3, scanned, remat)
    saved = kept(lambda a, x: loss(a, frozen, x), adapter, x)
    assert saved and not dense(saved), dense(saved)


def test_a_product_that_just_decodes_would_save_the_dense_weight():
    """That the test above can fail."""
    w = FORMATS["nf4"](jax.random.normal(KEY, (WIDTH, WIDTH)))
    saved = kept(lambda x: jnp.sum(jnp.tanh(x @ w.decode()) ** 2), jnp.ones((TOKENS, WIDTH)))
    assert dense(saved)


@pytest.mark.parametrize(("scanned", "remat"), LOOPS, ids=NAMES)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_temporaries_do_not_grow_with_depth_by_dense_weights(format, scanned, remat):
    sizes = []
    for layers in (2, 6):
        loss, *args = setting(format, layers, scanned, remat)
        compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    # Four layers more: their activations and the adapter's gradients, not one weight of theirs.
    more = 4 * 8 * (8 * TOKENS * WIDTH + 4 * RANK * WIDTH)
    assert sizes[1] - sizes[0] <= more < 4 * 4 * DENSE


@pytest.mark.parametrize("format", ["nf4+dq", "int8"])
def test_a_gather_and_a_convolution_save_no_dense_weight_either(format):
    def f(p, ids, image):
        x = p["table"][ids]
        y = jax.lax.conv_general_dilated(
            image, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.tanh(x)) + jnp.sum(jnp.tanh(y))

    params = {
        "table": jax.random.normal(KEY, (WIDTH, WIDTH)),
        "kernel": jax.random.normal(KEY, (4, 4, 32, 32)),
    }
    args = jnp.zeros((1, 3), int), jnp.ones((1, 5, 5, 32))
    sites = jp.sites(f, params, *args)
    tree = jp.chain(jp.quantize(format, sites.matrices), jp.lora(2, sites.matrices))(KEY, params)
    frozen, adapter = jp.split(tree)
    lifted = jp.lift(f, materialize="error")
    saved = kept(lambda a, i: lifted(jp.combine(frozen, a), args[0], i), adapter, args[1])
    assert saved and not dense(saved), dense(saved)


@pytest.mark.parametrize("format", ["nf4", "int4+asym", "int8", "fp8"])
def test_who_trains_the_scales_gets_their_gradient(format):
    params, f = model(2, scanned=True, remat=False)
    x = jnp.ones((TOKENS, WIDTH)) / 12
    view = jp.quantize(format, jp.sites(f, params, x))(KEY, params)["w"]
    name = "scale" if hasattr(view.weight, "scale") else "scales"

    def with_scales(scales):
        weight = dataclasses.replace(view.weight, **{name: scales})
        return {"w": dataclasses.replace(view, weight=weight)}

    scales = getattr(view.weight, name)
    got = jax.grad(lambda s: jnp.sum(jp.lift(f)(with_scales(s), x) ** 2))(scales)
    want = jax.grad(lambda s: jnp.sum(f(jp.merge(with_scales(s)), x) ** 2))(scales)
    assert jnp.max(jnp.abs(want)) > 0
    assert jnp.allclose(got, want, rtol=1e-4, atol=1e-5 * jnp.max(jnp.abs(want)))
