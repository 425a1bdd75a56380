"""Dtypes: operands are promoted as the program does, and what it rounds stays rounded."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.quant import nf4

BF16, F16, F32, F64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
NWC = ("NWC", "WIO", "NWC")

pytestmark = pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")


def random(*shape, seed=0, dtype=F64):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def adapted(fn, params, *args, method=None, seed=5):
    """(frozen, adapter at its start, adapter moved) of LoRA on every matrix, in float64."""
    sites = jp.sites(fn, params, *args).matrices
    made = (method or (lambda s: jp.lora(2, s, alpha=3.0, dtype=F64)))(sites)
    frozen, start = jp.split(made(jax.random.key(0), params))
    moved = {k: v + 0.3 * random(*v.shape, seed=seed).astype(v.dtype) for k, v in start.items()}
    return frozen, start, moved


def far(a, b):
    """|a - b| / |b| over all leaves, which have the same dtypes."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert all(x.dtype == y.dtype for x, y in pairs)
    flat = [
        np.concatenate([np.asarray(x, np.complex128).ravel() for x in side])
        for side in zip(*pairs, strict=True)
    ]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


def follows_the_law(fn, params, *args, method=None, tolerance=1e-10):
    """Whether lifted is merged, at the start and elsewhere; where the weight was materialized."""
    frozen, start, moved = adapted(fn, params, *args, method=method)
    events = []
    lifted = jp.lift(fn, materialize=events.append)
    trees = [jp.combine(frozen, adapter) for adapter in (start, moved)]
    assert far(jp.merge(trees[0]), params) < 1e-10 and far(jp.merge(trees[1]), params) > 0.01
    for tree in trees:
        assert far(lifted(tree, *args), fn(jp.merge(tree), *args)) <= tolerance
    return {event.primitive for event in events}


# ---- a weight that the program rounds

W, X = {"w": random(8, 6)}, random(3, 8)
IDS = jnp.array([1, 3, 3])


def through(*dtypes):
    """A product with the weight cast to these dtypes in turn, and back."""

    def fn(p, x):
        w = p["w"]
        for dtype in dtypes:
            w = w.astype(dtype)
        return x @ w.astype(x.dtype)

    return fn


ROUNDED = {
    "bfloat16": (through(BF16), W, X),
    "float16": (through(F16), W, X),
    "float32 of float64": (through(F32), W, X),
    "float8_e4m3fn": (through(E4M3), W, X),
    "float8_e5m2": (through(E5M2), W, X),
    "a chain": (through(F32, BF16, F32), W, X),
    "reduced precision": (lambda p, x: x @ jax.lax.reduce_precision(p["w"], 8, 7), W, X),
    "promoted by the product": (lambda p, x: x @ p["w"].astype(BF16), W, X),
    "scaled floats of 8 bits": (
        lambda p, x: x @ ((p["w"] / 0.03).astype(E4M3).astype(x.dtype) * 0.03),
        W,
        X,
    ),
    "rounded by a product with a number": (
        lambda p, x: x @ (p["w"].astype(BF16) * BF16(0.3)).astype(x.dtype),
        W,
        X,
    ),
    "transposed": (lambda p, x: x @ p["w"].T.astype(BF16).astype(x.dtype), {"w": random(6, 8)}, X),
    "a table": (lambda p, x: p["w"].astype(BF16).astype(F64)[IDS], W, X),
    "a tied head": (
        lambda p, x: (p["w"].astype(BF16)[IDS], x @ p["w"].T.astype(BF16).astype(x.dtype)),
        {"w": random(6, 8)},
        X,
    ),
    "layers of a scan": (
        lambda p, x: jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w.astype(h.dtype)), None), x, p["w"].astype(BF16)
        )[0],
        {"w": random(2, 8, 8)},
        X,
    ),
    "a convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"].astype(E5M2).astype(x.dtype), (1,), "SAME", dimension_numbers=NWC
        ),
        {"w": random(3, 4, 5)},
        random(2, 6, 4),
    ),
    "experts": (
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"].astype(F16).astype(x.dtype)),
        {"w": random(2, 8, 5)},
        random(2, 3, 8),
    ),
    "checkpointed": (
        lambda p, x: jax.checkpoint(lambda w: x @ w.astype(x.dtype))(p["w"].astype(BF16)),
        W,
        X,
    ),
    "integers": (
        lambda p, x: jax.lax.dot_general(
            (10 * x).astype(jnp.int8),
            10 * p["w"],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        ),
        W,
        X,
    ),
    "a product of floats of 8 bits": (
        lambda p, x: (x.astype(E4M3) @ p["w"].astype(E4M3)).astype(F32),
        W,
        X,
    ),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_a_wider_product_sees_rounded_is_rounded(name):
    fn, params, x = ROUNDED[name]
    assert follows_the_law(fn, params, x)  # materialized, and said


FACTORED = {
    "a product in bfloat16": (lambda p, x: x.astype(BF16) @ p["w"].astype(BF16), W, 2**-6),
    "a wider result": (
        lambda p, x: jnp.dot(x.astype(BF16), p["w"].astype(BF16), preferred_element_type=F32),
        W,
        2**-6,
    ),
    "a narrower result": (
        lambda p, x: jax.lax.dot_general(
            x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=BF16
        ),
        W,
        1e-10,
    ),
    "rows of a rounded table": (lambda p, x: p["w"].astype(BF16)[IDS].astype(F64), W, 1e-10),
    "rows of a scaled table": (lambda p, x: (p["w"].astype(E4M3))[IDS].astype(F64), W, 1e-10),
    "a quotient in bfloat16": (
        lambda p, x: (p["w"].astype(BF16) / BF16(3))[IDS].astype(F64),
        W,
        1e-10,
    ),
    "as many bits as before": (
        lambda p, x: x @ jax.lax.reduce_precision(p["w"], 11, 52),
        W,
        1e-10,
    ),
    "stored in bfloat16": (
        lambda p, x: x.astype(F32) @ p["w"].astype(BF16).astype(F32),
        {"w": random(8, 6, dtype=BF16)},
        2**-6,
    ),
    "stored in bfloat16, promoted": (
        lambda p, x: x.astype(F32) @ p["w"],
        {"w": random(8, 6, dtype=BF16)},
        2**-6,
    ),
    "stored in 8 bits": (
        lambda p, x: x @ p["w"].astype(F64),
        {"w": random(8, 6).astype(E4M3)},
        2**-3,
    ),
}


@pytest.mark.parametrize("name", FACTORED)
def test_what_loses_nothing_or_stays_narrow_stays_factored(name):
    fn, params, tolerance = FACTORED[name]
    assert not follows_the_law(fn, params, X, tolerance=tolerance)


def test_a_rounded_weight_says_which_cast_needs_its_entries():
    def fn(p, x):
        return x @ p["rounded/once"].astype(BF16).astype(x.dtype)

    frozen, _, moved = adapted(fn, {"rounded/once": W["w"]}, X)
    with pytest.raises(ValueError, match=r"'rounded/once' at convert_element_type \(.*test_dtypes"):
        jp.lift(fn, materialize="error")(jp.combine(frozen, moved), X)


def test_what_has_no_dense_equivalent_is_refused_where_it_is_rounded():
    def fn(p, x):
        return x @ p["w"].astype(BF16).astype(x.dtype)

    frozen, start, _ = adapted(fn, W, X, method=lambda s: jp.bottleneck_adapter(2, s))
    with pytest.raises(TypeError, match=r"Bottleneck at 'w' .*`convert_element_type`.*test_dtypes"):
        jp.lift(fn)(jp.combine(frozen, start), X)


def test_quantized_values_stay_the_same_where_the_program_rounds_them():
    def fn(p, x):
        return x @ p["w"].astype(BF16).astype(x.dtype)

    tree = jp.quantize("int8", jp.sites(fn, W, X).linear)(jax.random.key(0), W)
    assert far(jp.lift(fn)(tree, X), fn(jp.merge(tree), X)) <= 1e-10


# ---- operands that a weight multiplies


def multi_hot(x):
    return x > 0.5


NARROW = {
    "multi-hot": multi_hot,
    "int32": lambda x: (3 * x).astype(jnp.int32),
    "uint8": lambda x: jnp.abs(3 * x).astype(jnp.uint8),
    "bfloat16": lambda x: x.astype(BF16),
    "float16": lambda x: x.astype(F16),
}
METHODS = {
    "lora": lambda s: jp.lora(2, s, dtype=F64),
    "oft": lambda s: jp.oft(2, s, dtype=F64),
    "ia3 of inputs": lambda s: jp.ia3(s - s, s, dtype=F64),
    "gates of inputs": lambda s: jp.gates(s, kind="hard concrete", structure="input", dtype=F64),
    "hra": lambda s: jp.hra(2, s, dtype=F64),
}
BASES = {
    "plain": None,
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "nf4": ("nf4", {"block": 4}),
    "int8, blocks": ("int8", {"block": 4}),
}
GROUPS = jnp.array([2, 0, 1], jnp.int32)
PRODUCTS = {
    "x @ w": (lambda p, x: x @ p["w"], (8, 6)),
    "x @ w.T": (lambda p, x: x @ p["w"].T, (6, 8)),
    "the weight first": (lambda p, x: jnp.einsum("df,td->ft", p["w"], x), (8, 6)),
    "a stack": (lambda p, x: jnp.einsum("td,edf->etf", x, p["w"]), (2, 8, 6)),
    "ragged": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], GROUPS, preferred_element_type=F64),
        (3, 8, 6),
    ),
}
TELLING = [
    ("multi-hot", "lora", "int8", "x @ w"),
    ("multi-hot", "oft", "plain", "x @ w"),
    ("int32", "ia3 of inputs", "fp8", "x @ w.T"),
    ("uint8", "gates of inputs", "plain", "the weight first"),
    ("bfloat16", "hra", "int8", "a stack"),
    ("float16", "lora", "int8, blocks", "ragged"),
    ("multi-hot", "ia3 of inputs", "nf4", "ragged"),
    ("bfloat16", "lora", "fp8", "x @ w.T"),
]


def crossed():
    """The telling ones every day, the product of all of them in `make conformance`."""
    every = ((i, m, b, p) for i in NARROW for m in METHODS for b in BASES for p in PRODUCTS)
    return [
        pytest.param(*c, id=": ".join(c), marks=() if c in TELLING else pytest.mark.conformance)
        for c in every
    ]


@pytest.mark.parametrize(("inputs", "method", "base", "product"), crossed())
def test_inputs_are_promoted_as_by_the_programs_own_product(inputs, method, base, product):
    fn, shape = PRODUCTS[product]
    params, x = {"w": random(*shape, seed=2)}, NARROW[inputs](random(3, 8, seed=3))

    def make(sites):
        own = METHODS[method](sites)
        if BASES[base] is None:
            return own
        name, options = BASES[base]
        return jp.chain(jp.quantize(name, sites, **options), own)

    frozen, _, moved = adapted(fn, params, random(3, 8, seed=3), method=make)
    tree = jp.combine(frozen, moved)
    events = []
    got = jp.lift(fn, materialize=events.append)(tree, x)
    assert far(got, fn(jp.merge(tree), x)) <= 1e-10
    assert not events


def test_a_wider_result_of_a_product_with_quantized_values_is_not_rounded():
    def fn(p, x):
        return jnp.dot(x, p["w"], preferred_element_type=F32)

    params, x = {"w": random(8, 6, dtype=BF16)}, X.astype(BF16)
    tree = jp.quantize("int8", jp.sites(fn, params, x).linear)(jax.random.key(0), params)
    exact = np.asarray(x, np.float64) @ np.asarray(jp.merge(tree, dtype=F64)["w"])
    got = np.asarray(jp.lift(fn)(tree, x), np.float64)
    # Sums of int8 values are exact in float32; rounded to bfloat16 they would be off by 2**-9.
    assert np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact)


def test_the_base_product_of_mixed_precision_stays_narrow():
    def fn(p, x):
        return x.astype(BF16) @ p["w"].astype(BF16)

    frozen, start, _ = adapted(fn, W, X)
    jaxpr = jax.make_jaxpr(lambda a: jp.lift(fn)(jp.combine(frozen, a), X))(start)
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [{v.aval.dtype for v in e.invars} for e in products if e.invars[1].aval.size == 48] == [
        {jnp.dtype(BF16)}
    ]


# ---- complex numbers

COMPLEX = {
    "a spectrum": (lambda p, x: jnp.fft.rfft(x) @ p["w"], {"w": random(5, 6)}),
    "a spectrum, transposed": (lambda p, x: jnp.fft.fft(x) @ p["w"].T, {"w": random(6, 8)}),
    "the weight first": (
        lambda p, x: jnp.einsum("df,bd->fb", p["w"], jnp.fft.rfft(x)),
        {"w": random(5, 6)},
    ),
    "a stack": (
        lambda p, x: jnp.einsum("bd,edf->ebf", jnp.fft.rfft(x), p["w"]),
        {"w": random(2, 5, 6)},
    ),
    "a filter": (
        lambda p, x: jax.lax.conv_general_dilated(
            jnp.fft.fft(x)[..., None],
            p["w"].astype(jnp.complex128),
            (1,),
            "SAME",
            dimension_numbers=NWC,
        ),
        {"w": random(3, 1, 5)},
    ),
    "a complex weight": (
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) @ p["w"]),
        {"w": random(5, 5) + 1j * random(5, 5, seed=1)},
    ),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_no_imaginary_part_is_dropped(name):
    fn, params = COMPLEX[name]
    assert not follows_the_law(fn, params, X)


@pytest.mark.parametrize("method", ["oft", "ia3 of inputs", "hra"])
def test_no_method_drops_imaginary_parts(method):
    fn, _ = COMPLEX["a spectrum"]
    assert not follows_the_law(fn, {"w": random(5, 6)}, X, method=_of_five(method))
    assert not follows_the_law(fn, COMPLEX["a complex weight"][1], X, method=_of_five(method))


def _of_five(method):
    return (lambda s: jp.oft(5, s, dtype=F64)) if method == "oft" else METHODS[method]


@pytest.mark.parametrize("format", ["int8", "fp8", "nf4", "int4"])
def test_quantized_values_meet_complex_inputs(format):
    fn, params = COMPLEX["a spectrum"]
    tree = jp.quantize(format, jp.sites(fn, params, X).linear)(jax.random.key(0), params)
    assert far(jp.lift(fn)(tree, X), fn(jp.merge(tree), X)) <= 1e-10


REFUSING = {
    "quantize('int8')": lambda s: jp.quantize("int8", s),
    "quantize('nf4')": lambda s: jp.quantize("nf4", s),
    "loftq": lambda s: jp.loftq(2, s),
    "dora": lambda s: jp.dora(2, s),
    "pissa": lambda s: jp.pissa(2, s),
    "olora": lambda s: jp.olora(2, s),
}


@pytest.mark.parametrize("name", REFUSING)
def test_complex_weights_are_refused_by_name(name):
    fn, params = COMPLEX["a complex weight"]
    sites = jp.sites(fn, params, X).linear
    with pytest.raises(ValueError, match=re.escape(f"`{name}`: 'w' is complex128, but")):
        REFUSING[name](sites)(jax.random.key(0), params)


def test_a_format_refuses_complex_numbers():
    with pytest.raises(ValueError, match=r"complex64 and shape \(8, 6\) cannot be quantized"):
        nf4(W["w"].astype(jnp.complex64))


def test_complex_factors_on_a_real_base_are_refused():
    def fn(p, x):
        return x @ p["w"]

    def complex_lora(sites):
        return jp.lora(2, sites, init="gaussian", dtype=jnp.complex128)

    frozen, start, _ = adapted(fn, W, X, method=complex_lora)
    tree = jp.combine(frozen, start)
    message = "'w' gives complex128 where the program has float64, .* imaginary parts"
    with pytest.raises(ValueError, match=message):
        jp.lift(fn)(tree, X)
    with pytest.raises(ValueError, match=message):
        jp.merge(tree)


def test_a_sum_with_integers_is_merged_into_a_dtype_that_holds_it():
    def fn(p, x):
        return x @ p["w"].astype(x.dtype)

    params = {"w": (10 * W["w"]).astype(jnp.int8)}
    frozen, _, moved = adapted(fn, params, X)
    tree = jp.combine(frozen, moved)
    message = "'w' gives float64 where the program has int8, .*fractions"
    with pytest.raises(ValueError, match=message):
        jp.merge(tree)
    assert far(jp.lift(fn)(tree, X), fn(jp.merge(tree, dtype=F64), X)) <= 1e-10


def test_nothing_is_warned_of_where_nothing_is_rounded():
    def fn(p, x):
        return multi_hot(x) @ p["w"]

    frozen, start, _ = adapted(fn, W, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.lift(fn)(jp.combine(frozen, start), X)
