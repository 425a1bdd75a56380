"""Every format: how far its values are off, whatever the shape and the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._method_json import to_json
from jaxpeft._view import View, roles_of
from jaxpeft.quant import FORMATS, requantize
from jaxpeft.quant._quantize import quantizer

KEY = jax.random.key(0)

# The largest error of an entry, in units of the largest entry of its block.
STEP = {
    "nf4": 0.1520,  # half the widest gap, between -1 and -0.6962
    "fp4": 1 / 6,  # between 2/3 and 1
    "int4": 0.5 / 7,
    "int4+asym": 1 / 15 + 0.5 / 15,  # of max - min: at most twice the largest entry, see below
    "int8": 0.5 / 127,
    "fp8": 16 / 448,  # a step of 32 between 256 and 448
}
SHAPES = [(128, 6), (100, 5), (1, 1), (65, 2), (2, 3, 9, 4)]


def gaussian(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def by_block(w, block):
    """max |w| over each block of rows of a column, at every entry of it."""
    rows = w.shape[-2]
    pad = [(0, 0)] * (w.ndim - 2) + [(0, -rows % block), (0, 0)]
    cut = np.pad(np.abs(w), pad).reshape(*w.shape[:-2], -1, block, w.shape[-1])
    return np.repeat(cut.max(-2), block, axis=-2)[..., :rows, :]


# Both compiled: op by op, most of the time would go into compiling each.
def quantize(format, w, **options):
    return quantizer(format, **options)(w)


@jax.jit
def dequantize(quantized):
    """Of a weight or a view of one."""
    return quantized.materialize()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [64, 5, None], ids="block {}".format)
@pytest.mark.parametrize("format", list(STEP))
def test_no_entry_is_off_by_more_than_the_formats_step(format, block, shape):
    if block is None and format not in ("int8", "fp8"):
        block = 1
    w = gaussian(*shape)
    quantized = quantize(format, w, block=block)
    scale = by_block(np.asarray(w), block or shape[-2])
    step = STEP[format] * (2 if format == "int4+asym" else 1)
    error = np.abs(np.asarray(dequantize(quantized)) - np.asarray(w))
    assert dequantize(quantized).shape == w.shape
    assert (error <= step * scale * (1 + 1e-5)).all()
    assert error.max() > 0 or block == 1 or w.shape[-2] == 1  # rounding does happen


@pytest.mark.parametrize("shape", [(128, 70), (576, 576), (2, 200, 90)], ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_double_quantization_moves_a_scale_by_a_hundredth_at_most(format, shape):
    w = gaussian(*shape, seed=1)
    plain, double = quantize(format, w), quantize(format + "+dq", w)
    np.testing.assert_array_equal(plain.values, double.values)
    with np.errstate(invalid="ignore"):  # zeros stay zeros
        ratio = np.asarray(dequantize(double)) / np.asarray(dequantize(plain))
    # The map has a step of at most 1.5 % of the largest deviation from the mean scale.
    deviation = np.abs(plain.scales - plain.scales.mean(axis=(-2, -1), keepdims=True))
    bound = 0.0075 * deviation.max() / np.asarray(plain.scales).min()
    assert np.nanmax(np.abs(ratio - 1)) <= bound
    assert np.nanmax(np.abs(ratio - 1)) > 0


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("shape", [(3, 300, 77), (2, 1000, 129)], ids=str)
def test_quantized_scales_are_the_same_eagerly_compiled_and_layer_by_layer(shape, layout):
    w = gaussian(*shape, seed=2)
    quantize = lambda w: FORMATS["nf4+dq"](w, layout=layout)  # noqa: E731
    eager, compiled = quantize(w), jax.jit(quantize)(w)
    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *map(jax.jit(quantize), w))
    for other in compiled, layers:
        for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_zeros_stay_zeros_and_negligible_numbers_become_them(format):
    w = gaussian(130, 4).at[:64, 1].set(0).at[5].set(0).at[:, 3].set(1e-40)
    got = np.asarray(dequantize(quantize(format, w)))
    assert (got[:64, 1] == 0).all() and (got[5] == 0).all()
    assert np.abs(got[:, 3]).max() <= 1e-38
    assert (np.asarray(dequantize(quantize(format, jnp.zeros((70, 3))))) == 0).all()


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"int4+asym"}))
@pytest.mark.parametrize("value", [3.7, -0.02, 1e30, 2e-38])
def test_blocks_of_one_value_are_exact(format, value):
    w = jnp.full((128, 3), value)
    got = np.asarray(dequantize(quantize(format, w)))
    # The books reach 1 and -1, the integers their largest code: only a product is rounded.
    np.testing.assert_allclose(got, w, rtol=3e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_what_is_not_finite_is_refused_with_its_path_or_stays_visible(format, bad):
    params = {"w": gaussian(128, 4).at[70, 2].set(bad)}
    sites = jp.sites(lambda p, x: x @ p["w"], params, jnp.ones((1, 128)))
    method = jp.quantize(format, sites)
    with pytest.raises(ValueError, match=f"'w' has 1 entries of 512.*{'infinite or NaN'}"):
        method(KEY, params)
    # Under jit no value can be looked at; the block must not pass for numbers.
    block = jax.jit(lambda p: jp.merge(method(KEY, p)))(params)["w"][64:, 2]
    assert not np.isfinite(np.asarray(block)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_weight_keeps_the_dtype_that_the_program_sees(format, dtype):
    params = {"w": gaussian(64, 8, dtype=dtype)}
    f = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((2, 64), dtype)
    tree = jp.quantize(format, jp.sites(f, params, x))(KEY, params)
    assert jp.lift(f)(tree, x).dtype == dtype
    assert jp.merge(tree)["w"].dtype == dtype
    assert jp.merge(tree, dtype=jnp.float32)["w"].dtype == jnp.float32
    exact = np.asarray(dequantize(tree["w"].weight), np.float64)
    cast = np.asarray(jnp.asarray(exact).astype(dtype), np.float64)
    np.testing.assert_array_equal(np.asarray(jp.merge(tree)["w"], np.float64), cast)


def rows_of(quantized, ids):
    """A lookup through lift, of a table with these quantized values."""
    shape = dequantize(quantized).shape
    view = View(quantized, roles_of("in", "out")(shape), (), jnp.float32, "w", False)
    whole = View.of(jnp.zeros(shape), roles_of("in", "out")(shape), "w")
    view = View(quantized, whole.axes, whole.dims, whole.dtype, "w", natural=False)
    return jp.lift(lambda p, i: p[i], materialize="error")(view, ids)


@pytest.mark.parametrize("rows", [128, 100, 7])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_lookup_gives_the_rows_of_the_matrix(format, rows):
    quantized = quantize(format, gaussian(rows, 70))
    ids = jnp.asarray([[0, 1, rows - 1], [rows // 2, 3, 0]])
    want = np.asarray(dequantize(quantized))[ids]
    np.testing.assert_allclose(rows_of(quantized, ids), want, rtol=1e-6)


@pytest.mark.parametrize("format", ["nf4", "nf4+dq", "int4", "int4+asym", "int8", "fp8"])
def test_a_stack_is_coded_like_each_of_its_matrices(format):
    w = gaussian(3, 130, 70)
    stacked = quantize(format, w)
    for i in range(3):
        one = quantize(format, w[i])
        for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a[i], b)


CUT = [("nf4", 64), ("nf4+dq", 256), ("int4+asym", 64), ("int8", 1), ("fp8", 1)]


@pytest.mark.parametrize(("format", "unit"), CUT)
def test_a_view_is_cut_where_whole_blocks_end_and_nowhere_else(format, unit):
    w = gaussian(512, 128)
    view = View.of(w, roles_of("in", "out")(w.shape), "w")
    view = View(quantize(format, w), view.axes, view.dims, view.dtype, "w", natural=False)
    dense = np.asarray(dequantize(view))
    rows = view.cut(0, unit, 2 * unit)
    np.testing.assert_array_equal(dequantize(rows), dense[unit : 2 * unit])
    np.testing.assert_array_equal(dequantize(view.cut(1, 64, 128)), dense[:, 64:])
    assert view.divides(0, 512 // unit) and view.divides(1, 2)
    if unit > 1:
        assert view.cut(0, unit // 2, unit) is None
        assert not view.divides(0, 2 * 512 // unit)
    if format == "nf4+dq":  # a tile has 64 columns
        assert view.cut(1, 0, 32) is None and not view.divides(1, 4)


@pytest.mark.parametrize(("blocks", "width"), [(1, 256), (2, 128), (3, 85), (4, 64), (5, 64)])
def test_a_tile_of_scales_is_never_cut(blocks, width):
    w = gaussian(64 * blocks, 4 * width) * (1 + jnp.arange(4 * width) // 64)
    plain = View.of(w, roles_of("in", "out")(w.shape), "w")
    quantized = quantize("nf4+dq", w)
    view = View(quantized, plain.axes, plain.dims, plain.dtype, "w", natural=False)
    dense = np.asarray(dequantize(view))
    for start, stop in ((0, width), (width, 3 * width), (0, 4 * width)):
        cut = view.cut(1, start, stop)
        np.testing.assert_array_equal(dequantize(cut), dense[:, start:stop])
    for start in (width // 2, 64 if width > 64 else 32):
        assert view.cut(1, start, 2 * width) is None
    assert view.divides(1, 4) and not view.divides(1, 8)


def test_what_has_a_short_last_block_is_cut_by_columns_only():
    w = gaussian(100, 8)
    plain = View.of(w, roles_of("in", "out")(w.shape), "w")
    view = View(quantize("nf4", w), plain.axes, plain.dims, plain.dtype, "w", natural=False)
    assert view.cut(0, 0, 64) is None
    dense = np.asarray(dequantize(view))
    np.testing.assert_array_equal(dequantize(view.cut(1, 2, 5)), dense[:, 2:5])


BITS = {
    "nf4": 4.5, "nf4+dq": 4.126984, "fp4": 4.5, "fp4+dq": 4.126984, "int4": 4.5, "int4+asym": 4.625,
    "int8": 8.03125, "fp8": 8.03125,
}  # fmt: skip


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_bits_per_parameter_are_those_of_the_formula(format):
    quantized = quantize(format, gaussian(1024, 1024))
    assert 8 * sum(x.nbytes for x in jax.tree.leaves(quantized)) / 2**20 == pytest.approx(
        BITS[format], abs=2e-5
    )


def test_options_are_checked():
    w = gaussian(8, 8)
    for bad, message in ((0, "`block=0`"), (-1, "`block=-1`"), (2.5, r"`block=2\.5`")):
        for format in ("nf4", "int4", "int8"):
            with pytest.raises(ValueError, match=message):
                quantize(format, w, block=bad)
    with pytest.raises(ValueError, match="`nf4\\(layout='columns'\\)`: choose 'rows' or 'flat'"):
        quantize("nf4", w, layout="columns")


def test_what_quantize_selects_is_described_with_its_options():
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": gaussian(64, 8)}
    method = jp.quantize("nf4", jp.sites(f, params, jnp.ones((1, 64))), block=32)
    description = to_json(method)["options"]
    assert description["format"] == "nf4" and description["block"] == 32
    assert method(KEY, params)["w"].weight.block == 32


def test_hidden_weights_are_neither_embedding_nor_head():
    def model(p, ids):
        x = p["table"][ids]
        return jnp.tanh(x @ p["up"]) @ p["down"] @ p["head"]

    sizes = dict(table=(50, 8), up=(8, 12), down=(12, 8), head=(8, 50))
    params = {k: gaussian(*s) for k, s in sizes.items()}
    assert set(jp.sites(model, params, jnp.zeros((1, 2), int)).hidden) == {"up", "down"}


# --- Merging adapters into quantized values --------------------------------------------------


def folded(format, size):
    params = {"w": gaussian(128, 96)}
    f = lambda p, x: x @ p["w"]  # noqa: E731
    sites = jp.sites(f, params, jnp.ones((1, 128)))
    tree = jp.chain(jp.quantize(format, sites), jp.lora(4, sites))(KEY, params)
    frozen, adapter = jp.split(tree)
    adapter = {k: v + size * gaussian(*v.shape, seed=3) for k, v in adapter.items()}
    return jp.combine(frozen, adapter)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_requantized_keeps_the_format_and_says_its_error(format):
    tree = folded(format, 0.1)
    dense = np.asarray(jp.merge(tree, dtype=jnp.float64)["w"])
    done = jp.quant.requantize(tree)
    got = np.asarray(jp.merge(done.tree, dtype=jnp.float64)["w"])
    error = np.linalg.norm(got - dense) / np.linalg.norm(dense)
    assert done.error == {"w": pytest.approx(error, rel=1e-4)}
    assert 0 < error < {"8": 0.03}.get(format[-1], 0.14)
    before, after = tree["w"].weight.w, done.tree["w"].weight
    assert [x.shape for x in jax.tree.leaves(after)] == [x.shape for x in jax.tree.leaves(before)]


def test_requantized_to_another_format():
    done = jp.quant.requantize(folded("nf4", 0.1), "int8")
    assert done.error["w"] < 0.01
    assert done.tree["w"].weight.values.dtype == jnp.int8


def test_requantize_needs_quantized_values_that_are_finite():
    with pytest.raises(ValueError, match="`requantize`: the tree has no quantized weight"):
        jp.quant.requantize({"w": gaussian(3, 3)})
    with pytest.raises(ValueError, match="`requantize`: 'w' has 12288 entries of 12288"):
        jp.quant.requantize(folded("nf4", jnp.nan))


# --- LoRA that starts at what was lost -------------------------------------------------------


@pytest.mark.parametrize("init", ["loftq", "pissa"])
@pytest.mark.parametrize("format", ["nf4+dq", "int4", "int8"])
def test_loftq_is_nearer_to_the_weight_than_quantized_alone(format, init):
    w = gaussian(2, 96, 64, seed=5)
    f = lambda p, x: jax.lax.scan(lambda x, w: ((x @ w) @ w.T, None), x, p["w"])[0]  # noqa: E731
    sites = jp.sites(f, {"w": w}, jnp.ones((1, 96)))
    distance = lambda t: np.linalg.norm(jp.merge(t)["w"] - w, axis=(1, 2))  # noqa: E731
    plain = distance(jp.quantize(format, sites)(KEY, {"w": w}))
    none, one, five = (
        distance(jp.combine(*jp.split(tree)))
        for tree in (
            jp.loftq(8, sites, format=format, init=init, n_iter=n)(KEY, {"w": w}) for n in (0, 1, 5)
        )
    )
    assert (one < 0.9 * plain).all() and (five <= one).all()
    if init == "loftq":
        np.testing.assert_allclose(none, plain, rtol=1e-6)  # no factors yet
    # No rank-8 pair can do better than the singular values that this q leaves.
    assert (five > 0.3 * plain).all()


def test_one_iteration_of_loftq_is_the_svd_of_the_loss():
    w = gaussian(96, 64, seed=6)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    sites = jp.sites(f, {"w": w}, jnp.ones((1, 96)))
    frozen, adapter = jp.split(jp.loftq(4, sites, format="nf4", n_iter=1)(KEY, {"w": w}))
    tree = jp.combine(frozen, adapter)
    q = np.asarray(dequantize(quantize("nf4", w)), np.float64)
    u, s, v = np.linalg.svd(np.asarray(w, np.float64) - q, full_matrices=False)
    first = q + u[:, :4] * s[:4] @ v[:4]
    again = np.asarray(dequantize(quantize("nf4", jnp.asarray(w - (u[:, :4] * s[:4] @ v[:4])))))
    second = again + u[:, :4] * s[:4] @ v[:4]
    best = min((first, second), key=lambda x: np.linalg.norm(x - np.asarray(w)))
    np.testing.assert_allclose(jp.merge(tree)["w"], best, atol=1e-5)
    assert {k: v.shape for k, v in adapter.items()} == {"w/a": (96, 4), "w/b": (4, 64)}


def test_loftq_refuses_what_it_cannot_do():
    w = gaussian(8, 4)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    sites = jp.sites(f, {"w": w}, jnp.ones((1, 8)))
    for options, message in (
        (dict(rank=5), r"`loftq\(rank=5\)` needs 1 <= rank <= min.*'w'.*\(8, 4\) is 8 x 4"),
        (dict(rank=2, init="svd"), r"`loftq\(init='svd'\)`"),
        (dict(rank=2, n_iter=-1), r"`loftq\(n_iter=-1\)`"),
        (dict(rank=2, format="nf5"), "nf5"),
    ):
        with pytest.raises(ValueError, match=message):
            jp.loftq(sites=sites, **options)(KEY, {"w": w})
    for first in (jp.quantize("int8", sites), jp.lora(2, sites)):
        with pytest.raises(ValueError, match="'w' holds .* already"):
            jp.loftq(2, sites)(KEY, first(KEY, {"w": w}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: jp.quantize("nf4+dq", s, block_size=64), "block_size.*of 'nf4.dq' are .'block'"),
        (lambda s: jp.quantize("nf4+dq", s, double=False), "nf4.dq.*no option .'double'"),
        (lambda s: jp.quantize("int8", s, layout="flat"), "int8.*no option .'layout'"),
        (lambda s: jp.loftq(2, s, format="nf5"), r"`loftq\(format='nf5'\)`: the formats are"),
        (lambda s: jp.loftq(2, s, size=5), r"`loftq\(format='nf4\+dq'\)` has no option .'size'"),
        (lambda s: requantize({}, "int9"), r"`requantize\(tree, 'int9'\)`: the formats are"),
    ],
)
def test_an_option_that_a_format_does_not_have_is_refused_when_the_method_is_made(call, message):
    sites = jp.sites(lambda p, x: x @ p["w"], {"w": gaussian(8, 4)}, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match=message):
        call(sites.linear)
