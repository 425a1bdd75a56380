"""Methods as values: they are functions for `jit`, and options that have a JSON form."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._method import Method, from_json, to_json
from tests.conformance.methods import METHODS
from tests.methods.test_saved import at, others


def f(p, x):
    return jax.nn.relu(x @ p["up"] + p["b"]) @ p["down"]


KEY = jax.random.key(0)
P = {
    "up": jax.random.normal(KEY, (8, 12)),
    "b": jnp.ones(12),
    "down": jax.random.normal(KEY, (12, 6)),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)))
S = jp.sites(f, P, X)
M = S.linear


def moments():
    return jp.calibration.input_moments(f, P, M, [X])


def gradients():
    return jp.calibration.mean_gradients(lambda p, x: jnp.sum(f(p, x) ** 2), P, M, [X])


# Under jit ----------------------------------------------------------------------------------------

#: Those that the table of the laws has not.
MORE = {
    "chain": lambda: jp.chain(jp.quantize("nf4+dq", M, block=2), jp.lora({"*": 2}, M)),
    "eva": lambda: jp.eva(2, M, moments()),
    "corda": lambda: jp.corda(2, M, moments()),
    "lora_ga": lambda: jp.lora_ga(2, M, gradients()),
    "loftq": lambda: jp.loftq(2, M, format="int8"),
    "longlora": lambda: jp.longlora(2, M, S.match("up"), S.match("b")),
    "prune": lambda: jp.chain(
        jp.prune(jp.sparsity.topk_mask(jp.sparsity.magnitude_scores(P, M), M, 0.5), M),
        jp.lora(2, M),
    ),
    "bitfit": lambda: jp.bitfit(S),
    "full": lambda: jp.full_finetuning(S),
    "linear_probe": lambda: jp.linear_probe(S, "down"),
    "unfreeze": lambda: jp.unfreeze(S.match("up")),
}


def same_trees(method, params):
    """What jit of the method gives: the same structure, names and, to rounding, numbers."""
    here, there = method(KEY, params), jax.jit(method)(KEY, params)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MORE)
def test_a_method_can_be_given_to_jit(name):
    same_trees(MORE[name](), P)


@others(METHODS)
def test_a_method_of_the_table_can_be_given_to_jit(method):
    s = at(method)
    same_trees(method.make(s.sites, jnp.float64), s.case.params)


def closed_over(method, params):
    """The method inside a traced function that params are constants of: nothing is compiled."""
    shapes = jax.eval_shape(lambda key: method(key, params), KEY)
    assert jax.tree.structure(shapes) == jax.tree.structure(method(KEY, params))


@pytest.mark.parametrize("name", MORE)
def test_a_method_may_close_over_its_params_under_jit(name):
    closed_over(MORE[name](), P)


@pytest.mark.conformance
@others(METHODS)
def test_a_method_of_the_table_may_close_over_its_params_under_jit(method):
    s = at(method)
    closed_over(method.make(s.sites, jnp.float64), s.case.params)


@pytest.mark.parametrize("method", [jp.quantize("nf4", M, block=2), jp.loftq(2, M, format="int8")])
def test_a_quantized_base_that_is_closed_over_is_what_it_is_outside(method):
    here, there = method(KEY, P), jax.jit(lambda key: method(key, P))(KEY)
    for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), atol=1e-6)


def test_an_infinity_that_is_closed_over_is_seen():
    p = {**P, "up": P["up"].at[1, 2].set(jnp.inf)}
    with pytest.raises(ValueError, match="'up' has 1 entries of 96 that are infinite or NaN"):
        jax.jit(lambda key: jp.quantize("int8", M)(key, p))(KEY)
    with pytest.raises(ValueError, match="'up' has 1 entries of 96 that are infinite or NaN"):
        jax.make_jaxpr(lambda key: jp.loftq(2, M)(key, p))(KEY)


def test_methods_are_equal_only_to_themselves():
    """Options hold arrays, of which no equality is one truth value."""
    one, other = jp.corda(2, M, moments()), jp.corda(2, M, moments())
    assert one == one and one != other and len({one, other}) == 2


# As JSON ------------------------------------------------------------------------------------------


def option(value):
    """An option as it comes back from JSON."""
    written = to_json(Method("f", {"x": value}, lambda key, tree: tree))
    return from_json(written, {"f": lambda x: x})


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float32,
        jnp.bfloat16,
        np.int8,
        np.dtype("float16"),
        jnp.dtype("bfloat16"),
        ml_dtypes.int4,
        jnp.float8_e4m3fn,
        bool,
    ],
)
def test_dtypes_and_their_classes_are_dtypes(dtype):
    again = option(dtype)
    assert isinstance(again, np.dtype) and again == jnp.dtype(dtype)


@pytest.mark.parametrize(
    "value, plain",
    [
        (np.int64(2), 2),
        (np.uint8(2), 2),
        (np.float32(3.0), 3.0),
        (jnp.float32(3.0), 3.0),
        (jnp.bfloat16(1.5), 1.5),
        (ml_dtypes.bfloat16(1.5), 1.5),
        (jnp.int32(4), 4),
        (np.array(3), 3),
        (np.bool_(True), True),
        (jnp.array(False), False),
        ({"up": np.int64(2), "*": [jnp.float32(0.5)]}, {"up": 2, "*": [0.5]}),
    ],
)
def test_numbers_become_those_of_python(value, plain):
    again = option(value)
    assert again == plain and repr(again) == repr(plain)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jp.corda(2, M, moments()), "`corda(moments=...)` holds an array, float64 of"),
        (lambda: jp.lora_ga(2, M, gradients()), "`lora_ga(gradients=...)` holds an array"),
        (
            lambda: jp.chain(jp.quantize("int8", M), jp.corda(2, M, moments())),
            "`corda(moments=...)` holds an array, float64 of shape (12, 12), and the description "
            "of a method has no place for arrays. What starts from data (`corda`, `lora_ga`) is "
            "stored as plain LoRA over the same params: save the method and the adapter that "
            "`to_lora` returns.",
        ),
        (
            lambda: jp.lora(2, M, alpha=np.ones(1)),
            "`lora(alpha=...)` holds an array, float64 of shape (1,)",
        ),
        (lambda: jp.lora(2, M, alpha=1j), "`lora(alpha=1j)` cannot be written"),
        (lambda: jp.lora(2, M, alpha=np.complex64(1j)), "`lora(alpha=...)` holds an array, compl"),
        (lambda: jp.lora(2, M, alpha=KEY), "`lora(alpha=...)` holds an array, key<fry>"),
        (lambda: jp.lora(2, M, dtype=list), "`lora(dtype=<class 'list'>)` cannot be written"),
        (lambda: jp.lora(2, M, dtype=np.generic), "`lora(dtype=<class 'numpy.generic'>)` cannot"),
        (
            lambda: jp.lora({re.compile("up|down"): 2}, M),
            "`lora(rank={re.compile('up|down'): 2})` cannot be written",
        ),
    ],
)
def test_what_has_no_json_form_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        to_json(make())


def test_a_traced_number_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("`lora(alpha=...)` is a traced float32 of shape ()")
    ):
        jax.jit(lambda alpha: to_json(jp.lora(2, M, alpha=alpha)) and alpha)(np.float32(1))
