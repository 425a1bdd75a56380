"""The kernel that decodes as it multiplies, in Pallas's interpreter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import quant
from jaxpeft.quant._kernels import nf4_matmul
from jaxpeft.quant._kernels.fused import fused

CASES = {  # tokens, in, out, dtype, options of the format
    "one small tile": (3, 64, 8, jnp.float32, {}),
    "no leading axis": (None, 64, 8, jnp.float32, {}),
    "scales in eight bits": (5, 128, 130, jnp.bfloat16, {"double": True}),
    # Tiles are of 512 tokens, 8 blocks and 512 columns.
    "whole tiles": (8, 256, 1024, jnp.float32, {"block": 16}),
    "tiles beyond all three axes": (520, 144, 600, jnp.float32, {"block": 16}),
    "the same in bfloat16": (520, 144, 600, jnp.bfloat16, {"block": 16}),
}


def random(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def interpreted(rows, columns, encode=quant.nf4, **options):
    return dataclasses.replace(encode(random(rows, columns), **options), kernel="interpret")


def kernels_in(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("pallas_call[")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_is_the_plain_product_forward_and_backward(case, transposed):
    tokens, rows, columns, dtype, options = CASES[case]
    w = interpreted(rows, columns, **options)
    matrix = w.decode().astype(dtype)
    matrix = matrix.T if transposed else matrix
    lead = () if tokens is None else (tokens,)
    x = random(*lead, matrix.shape[0], dtype=dtype)
    y = random(*lead, matrix.shape[1], dtype=dtype, seed=1)

    def kernel(x, y):
        f = functools.partial(nf4_matmul.product, weight=w, dtype=dtype, transposed=transposed)
        value, back = jax.vjp(f, x)
        return value, *back(y)

    def plain(a, b):
        return np.asarray(a, np.float64) @ np.asarray(b, np.float64)

    # Against sums in float64; in bfloat16 the result is rounded to eight bits.
    tolerance = 4e-6 if dtype == jnp.float32 else 2**-8
    for got, want in zip(
        jax.jit(kernel)(x, y), (plain(x, matrix), plain(y, matrix.T)), strict=True
    ):
        assert got.shape == want.shape and got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), want, rtol=tolerance, atol=4e-6 * np.abs(want).max()
        )
    assert kernels_in(kernel, x, y) == 2


def test_a_matrix_times_the_unit_vectors_is_the_decoded_matrix_bit_for_bit():
    w = interpreted(128, 24, quant.fp4, double=True)
    got = nf4_matmul.product(jnp.eye(128, dtype=jnp.float32), w, dtype=jnp.float32)
    np.testing.assert_array_equal(got, w.decode())


def test_the_result_has_the_dtype_that_the_program_prefers():
    w = interpreted(64, 8)
    x = random(3, 64, dtype=jnp.bfloat16)
    got = nf4_matmul.product(x, w, dtype=jnp.bfloat16, out_dtype=jnp.float32)
    want = jnp.matmul(x, w.decode().astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- In a program --------------------------------------------------------------------------


def layers(params, x):
    """Three layers in a scan, each up and down, and the table of the first product again."""

    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x @ params["in"], params["layers"])
    return x @ params["in"].T


def model(dtype=jnp.float32, width=64):
    params = {
        "in": random(64, width, dtype=dtype),
        "layers": {
            "up": random(3, width, 32, dtype=dtype, seed=1) / 8,
            "down": random(3, 32, width, dtype=dtype, seed=2) / 8,
        },
    }
    return params, random(2, 5, 64, dtype=dtype, seed=3)


@functools.cache
def quantized(block):
    """The frozen part, the adapter, away from zero, and the input."""
    params, x = model()
    sites = jp.sites(layers, params, x)
    method = jp.chain(jp.quantize("nf4+dq", sites.linear, block=block), jp.lora(2, sites.linear))
    make = jax.jit(lambda key, params: jp.split(method(key, params)))
    frozen, adapter = make(jax.random.key(0), params)
    return frozen, jax.tree.map(lambda a: a + 0.1, adapter), x


def loss(adapter, frozen, x):
    return jnp.sum(jnp.square(jp.lift(layers)(jp.combine(frozen, adapter), x)))


def test_a_lifted_model_computes_the_same_with_and_without_the_kernel():
    frozen, adapter, x = quantized(32)
    with_kernel = fused(frozen, "interpret")
    step = jax.jit(jax.value_and_grad(loss))
    value, grads = step(adapter, with_kernel, x)
    want, want_grads = step(adapter, frozen, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), grads, want_grads
    )
    # `in`, its transpose, `up` and `down`, and the same again on the way back but for the first,
    # whose input nobody differentiates with respect to.
    assert kernels_in(loss, adapter, with_kernel, x) == 4
    assert kernels_in(jax.grad(loss), adapter, with_kernel, x) == 7
    assert kernels_in(loss, adapter, frozen, x) == 0


def test_what_is_saved_for_the_backward_pass_is_no_dense_matrix():
    frozen, adapter, x = quantized(32)
    saved = jax.eval_shape(
        lambda a: jax.vjp(lambda a: loss(a, fused(frozen, "interpret"), x), a)[1], adapter
    )
    dense = {(3, 64, 32), (3, 32, 64), (64, 64)}
    assert not dense & {leaf.shape for leaf in jax.tree.leaves(saved)}


def test_where_there_is_no_tpu_the_kernel_for_tpus_is_the_plain_product_bit_for_bit():
    frozen, adapter, x = quantized(32)
    got = jax.jit(loss)(adapter, fused(frozen), x)
    np.testing.assert_array_equal(got, jax.jit(loss)(adapter, frozen, x))


def test_the_kernel_can_be_taken_out_again():
    frozen, _, _ = quantized(32)
    again = fused(fused(frozen), None)
    assert jax.tree.structure(again) == jax.tree.structure(frozen)
    assert jax.tree.structure(fused(frozen)) != jax.tree.structure(frozen)


def test_a_double_matrix_decodes_as_before():
    x, w = random(3, 64, dtype=jnp.float64), random(64, 8, dtype=jnp.float64)

    def product(w, x):
        return x @ w

    tree = jp.quantize("nf4", jp.sites(product, w, x).linear)(jax.random.key(0), w)
    got = jp.lift(product)(fused(tree, "interpret"), x)
    np.testing.assert_array_equal(got, jp.lift(product)(tree, x))
    assert kernels_in(jp.lift(product), fused(tree, "interpret"), x) == 0


def test_a_row_and_a_convolution_decode_as_before():
    def program(params, ids, image):
        rows = params["table"][ids]
        kernel = params["conv"]
        return rows, jax.lax.conv_general_dilated(image, kernel, (1,), "SAME")

    params = {"table": random(64, 8), "conv": random(8, 16, 1)}  # OIW
    args = jnp.arange(3), random(1, 16, 5)
    sites = jp.sites(program, params, *args)
    tree = jp.quantize("nf4", sites.every, block=16)(jax.random.key(0), params)
    marked = fused(tree, "interpret")
    got, want = jp.lift(program)(marked, *args), jp.lift(program)(tree, *args)
    assert kernels_in(jp.lift(program), marked, *args) == 0
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_scales_are_constants_to_the_kernel():
    w = interpreted(64, 8)
    x = random(3, 64)

    def total(scales):
        return jnp.sum(
            nf4_matmul.product(x, dataclasses.replace(w, scales=scales), dtype=jnp.float32)
        )

    np.testing.assert_array_equal(jax.grad(total)(w.scales), jnp.zeros_like(w.scales))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel='triton'.*'pallas', 'interpret'"):
        fused({}, "triton")


def test_a_tree_without_a_matrix_for_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"none in 4 bits"):
        fused({"w": random(4, 4)})
    frozen, _, _ = quantized(24)
    reasons = r"'in' has a last block of 16 rows instead of 24.*'layers/down' has a last block of 8"
    with pytest.raises(ValueError, match=reasons):
        fused(frozen)
    frozen, _, _ = quantized(8)
    with pytest.raises(ValueError, match=r"'in' has blocks of 8 rows, no multiple of 16"):
        fused(frozen)


def test_matrices_that_it_does_not_serve_stay_as_they_are_beside_others():
    frozen, adapter, x = quantized(64)  # `down` has 32 rows, its only block
    assert kernels_in(loss, adapter, fused(frozen, "interpret"), x) == 3
