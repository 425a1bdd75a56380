"""sites: what a program does with each parameter, and how parameters are selected."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from .methods import toy


@pytest.fixture(scope="module")
def sites():
    return jp.sites(toy.model, toy.params(), toy.ids())


def test_roles_kinds_and_biases_of_a_scanned_decoder(sites):
    assert set(sites.linear) == {f"layers/{n}/kernel" for n in ("q", "k", "v", "o", "up", "down")}
    assert set(sites.embedding) == {"embed", "positions"}
    assert set(sites.norm) == {"layers/norm1/scale", "layers/norm2/scale"}
    assert {s.bias for s in sites.linear.values()} == set(sites.bias)
    assert [a.role for a in sites["layers/up/kernel"].axes] == ["stack", "in", "out"]
    assert "linear" in sites["embed"].kinds and "embed" not in sites.linear


def test_shapes_are_enough_and_nothing_is_computed():
    big = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((8, 1 << 20), jnp.bfloat16)
    assert jp.sites(lambda p, x: x @ p["w"], big, x)["w"].size("in") == 1 << 20


def test_flags_and_strings_reach_the_model():
    def fn(p, x, *, train, mode):
        assert train is True and mode == "wide"
        return x @ p["w"]

    found = jp.sites(fn, {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)), train=True, mode="wide")
    assert list(found.linear) == ["w"]


def test_patterns_are_globs_regular_expressions_and_predicates(sites):
    assert list(sites.match("layers/[qk]/kernel")) == ["layers/k/kernel", "layers/q/kernel"]
    assert list(sites.match(re.compile(r"/q/ker"))) == ["layers/q/kernel"]
    assert list(sites.match(lambda s: s.shape == (50, 16))) == ["embed"]
    assert list(sites.linear.match("*/[qkv]/*", exclude="*/k/*")) == [
        "layers/q/kernel",
        "layers/v/kernel",
    ]
    assert list(sites.match("embed") | sites.match("positions")) == ["embed", "positions"]
    assert list(sites.embedding - sites.match("embed")) == ["positions"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.match("*/qq/kernel"), r"'\*/qq/kernel' matches none.*There are: layers/q/k"),
        (lambda s: s.match("*", exclude="*/w/*"), r"'\*/w/\*' matches none"),
        (lambda s: s.match("embed", exclude=["embed"]), r"nothing of \['embed'\] is left"),
        (lambda s: s["embd"], r"No parameter is called 'embd'. There are: embed,"),
        (lambda s: s.match("*/q/kernel").output_slice(0, 3), r"length 16.*multiple of 3"),
        (lambda s: s.match("*/q/kernel").output_slice(2, 2), r"Block 2 of 2"),
        (lambda s: s.override("embed", "in"), r"shape \(50, 16\).*2 axes.*\('in',\)"),
        (lambda s: s.override("embed", "in", "up"), r"not \('in', 'up'\)"),
    ],
)
def test_refusals_list_choices_nearest_first(sites, call, message):
    with pytest.raises((ValueError, KeyError), match=message):
        call(sites)


def test_a_slice_given_in_numpy_integers_is_stored_as_any_other(sites):
    part = sites.match("*/q/kernel").output_slice(np.int64(1), np.int32(2))
    assert json.dumps(part.to_json()) == json.dumps(
        sites.match("*/q/kernel").output_slice(1, 2).to_json()
    )


def test_what_no_program_reveals_can_be_overridden():
    """A vmapped ensemble that shares its input looks like heads."""
    p, x = {"w": jnp.ones((5, 4, 3))}, jnp.ones((2, 4))
    sites = jp.sites(lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), p, x)
    assert [a.role for a in sites["w"].axes] == ["out", "in", "out"]
    corrected = sites.override("w", "stack", "in", "out")
    tree = jp.lora(2, corrected.linear)(jax.random.key(0), p)
    assert tree["w"].weight.a.shape == (5, 4, 2)


def test_the_table_prints_every_parameter_with_its_roles(sites):
    table = str(sites)
    assert re.search(r"layers/q/bias +\(3, 16\) +stack, out +.*bias of layers/q/kernel", table)
    assert len(table.splitlines()) == len(sites) + 1


def test_a_materialization_is_announced():
    p, x = {"w": jnp.ones((4, 3)), "v": jnp.ones((4, 3))}, jnp.ones((2, 4))
    sites = jp.sites(lambda p, x: x @ p["w"] + x @ jnp.tanh(p["v"]) + x @ p["v"], p, x)
    assert not sites["w"].materialized
    assert [e.primitive for e in sites["v"].materialized] == ["tanh"]
    assert "materialized tanh" in str(sites)


def test_two_leaves_with_one_path_are_refused():
    p = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="Two leaves of the tree have the path 'a/b'"):
        jp.sites(lambda p: p["a/b"], p)


def test_a_bias_behind_a_residual_belongs_to_the_product():
    p = {n: jnp.ones((4, 4)) for n in "uw"} | {"b": jnp.ones(4)}

    def fn(p, x):
        x = x + x @ p["u"]
        return (x + x @ p["w"]) + p["b"]

    sites = jp.sites(fn, p, jnp.ones((2, 4)))
    assert sites["w"].bias == "b" and sites["u"].bias is None
