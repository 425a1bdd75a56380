"""Kernels that a model computes before it uses them: how they are found, and what lift makes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint

import jaxpeft as jp

pytestmark = pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.5)


KEY = jax.random.key(1)
X = random(2, 3, 6)
KERNELS = {"q": random(6, 8), "k": random(6, 4), "v": random(6, 4, seed=1)}


def adapted(fn, params, *args, select=lambda sites: sites.matrices):
    """(sites, the tree under LoRA, moved away from its start)."""
    sites = jp.sites(fn, params, *args)
    method = jp.lora(2, select(sites), dtype=jnp.float64)
    frozen, adapter = jp.split(method(KEY, params))
    adapter = {k: v + 0.3 * random(*v.shape, seed=7) for k, v in adapter.items()}
    return sites, jp.combine(frozen, adapter)


def check(fn, params, *args, found):
    """Lifted is merged, and the matrices found are those; returns what was formed."""
    sites, tree = adapted(fn, params, *args)
    assert set(sites.matrices) == set(found)
    formed = []
    lifted = jax.jit(jp.lift(fn, materialize=formed.append))(tree, *args)
    merged = jax.jit(fn)(jp.merge(tree), *args)
    moved = max(jnp.abs(a - b).max() for a, b in both(merged, fn(params, *args)))
    assert moved > 1e-3
    assert all(jnp.abs(a - b).max() < 1e-12 for a, b in both(lifted, merged))
    assert set(formed) == {e for s in sites.values() for e in s.materialized}
    return [(e.path, e.primitive) for e in formed]


def both(a, b):
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


#: name: (the parameters that are used, the model)
FACTORED = {
    "the weight first": ("qk", lambda p, x: jnp.einsum("df,btd->ftb", joined(p), x)),
    "cut into heads": (
        "qkv",
        lambda p, x: jnp.einsum("btd,dnh->btnh", x, joined(p).reshape(6, 4, 4)),
    ),
    "a stack in the middle": (
        "kv",
        lambda p, x: jnp.einsum("btd,dsf->sbtf", x, jnp.stack([p["k"], p["v"]], 1)),
    ),
    "a stack that is a batch": (
        "kv",
        lambda p, x: jnp.einsum("sbd,sdf->sbf", x, jnp.stack([p["k"], p["v"]])),
    ),
    "one of a stack": (
        "kv",
        lambda p, x: x @ jnp.stack([p["k"], p["v"]])[jnp.int32(x.sum() > 0)],
    ),
    "blocks of both sides": (
        "kv",
        lambda p, x: jnp.tile(x, 2) @ jnp.block([[p["k"], p["v"]], [p["v"], p["k"]]]),
    ),
    "inputs repeated": ("k", lambda p, x: jnp.tile(x, 2) @ jnp.repeat(p["k"], 2, 0)),
    "copies for a batch": ("k", lambda p, x: x @ jnp.broadcast_to(p["k"], (2, 6, 4))),
    "repeated beside others": (
        "qk",
        lambda p, x: x @ jnp.concatenate([p["q"], jnp.repeat(p["k"], 2, 1)], 1),
    ),
    "scaled, joined and cut": ("qkv", lambda p, x: x @ (-joined(p) / jnp.arange(1.0, 17))[:, 2:11]),
    "scaled by heads": (
        "k",
        lambda p, x: x @ (p["k"].reshape(6, 2, 2) * jnp.array([2.0, 3.0])[:, None]).reshape(6, 4),
    ),
    "scaled along both sides": (
        "k",
        lambda p, x: x @ (p["k"] * jnp.arange(6.0)[:, None] * jnp.arange(1.0, 5)),
    ),
    "through calls and branches": (
        "qkv",
        lambda p, x: jax.lax.cond(
            x.sum() > 0,
            jax.checkpoint(lambda w: jnp.tanh(x @ w)),
            jax.jit(lambda w: x @ w),
            joined(p),
        ),
    ),
}


def joined(p):
    return jnp.concatenate([p[n] for n in "qkv" if n in p], 1)


@pytest.mark.parametrize("name", FACTORED)
def test_joined_repeated_and_scaled_kernels_stay_factored(name):
    used, fn = FACTORED[name]
    assert not check(fn, {n: KERNELS[n] for n in used}, X, found=used)


FORMED = {
    "a mask that is an argument": (("k",), lambda p, x, m: x @ (p["k"] * m), "mul"),
    "a mask of booleans": (("k",), lambda p, x, m: x @ jnp.where(m > 0, p["k"], 0), "select_n"),
    "centred": (("k",), lambda p, x, m: x @ (p["k"] - p["k"].mean(0)), "sub"),
    "a block of ones and the kernel": (
        ("k",),
        lambda p, x, m: jnp.tile(x, 2) @ jnp.kron(jnp.eye(2), p["k"]),
        "mul",
    ),
    "made symmetric": (
        ("s",),
        lambda p, x, m: x @ (jnp.triu(p["s"]) + jnp.triu(p["s"], 1).T),
        "select_n",
    ),
    "orthogonal": (("s",), lambda p, x, m: x @ jnp.linalg.qr(p["s"])[0], "qr"),
    "a product of two": (
        ("s", "k"),
        lambda p, x, m: x @ (p["s"] @ p["k"]),
        "dot_general with another weight",
    ),
}


@pytest.mark.parametrize("name", FORMED)
def test_what_no_rule_covers_is_found_formed_and_said(name):
    used, fn, primitive = FORMED[name]
    params = {n: random(6, 6, seed=3) if n == "s" else KERNELS[n] for n in used}
    mask = jnp.asarray(np.random.default_rng(2).random((6, 4)) < 0.6, jnp.float64)
    assert primitive in {primitive for _, primitive in check(fn, params, X, mask, found=used)}


def test_roles_are_those_of_the_sides_that_meet_the_product():
    def fn(p, x):
        kernel = jnp.concatenate([p["q"].T / jnp.linalg.norm(p["q"].T), p["k"]])
        return jnp.einsum("btd,fd->btf", x, kernel) + jnp.concatenate([p["b"], p["c"]])

    params = {"q": random(6, 8), "k": random(4, 6), "b": random(8), "c": random(4)}
    sites = jp.sites(fn, params, X)
    roles = {path: [axis.role for axis in site.axes] for path, site in sites.linear.items()}
    assert roles == {"q": ["in", "out"], "k": ["out", "in"]}
    assert set(sites.bias) == {"b", "c"}


def test_vectors_that_make_a_kernel_are_no_matrices():
    """Scales by layer and by output, and the diagonal of a kernel."""

    def fn(p, x):
        w = p["k"] / jnp.linalg.norm(p["k"], axis=0) * p["gains"][1]
        return (x * p["diagonal"]) @ w

    params = {"k": KERNELS["k"], "gains": random(3, 4), "diagonal": random(6)}
    assert list(jp.sites(fn, params, X).matrices) == ["k"]


def test_layers_stacked_by_the_model_are_one_stack_for_its_scan():
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["a"], p["b"]]))[0]

    params = {n: random(6, 6, seed=i) for i, n in enumerate("ab")}
    assert not check(fn, params, X, found="ab")


def lost(p, x):
    """A matrix of inverse Fourier coefficients: nothing says where its axes went."""
    return x @ jnp.fft.irfft(p["w"].reshape(-1), 24).reshape(6, 4)


def test_override_makes_a_matrix_where_the_program_reveals_none():
    params = {"w": random(2, 3, 4), "b": random(4)}
    with pytest.raises(
        ValueError,
        match=r"`lora` selects no parameter.*matrices none, and 'b' \(4,\) \(unused\), "
        r"'w' \(2, 3, 4\) \(other\).*sites.override\('w', 'stack', 'in', 'out'\).match\('w'\)",
    ):
        adapted(lost, params, X, select=lambda sites: sites.linear)
    override = lambda sites: sites.override("w", "stack", "in", "out").linear  # noqa: E731
    for select in (
        override,
        lambda s: jp.Sites.from_json(json.loads(json.dumps(override(s).to_json()))),
    ):
        _, tree = adapted(lost, params, X, select=select)
        formed = []
        lifted = jp.lift(lost, materialize=formed.append)(tree, X)
        assert {event.path for event in formed} == {"w"}
        assert jnp.abs(lost(jp.merge(tree), X) - lost(params, X)).max() > 1e-3
        assert jnp.abs(lifted - lost(jp.merge(tree), X)).max() < 1e-12


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": random(6, 4)}, r"has the matrices 'w', and no other parameters.$"),
        ({}, r"The sites given are empty, and no parameter is known"),
    ],
)
def test_an_empty_selection_says_choices(params, message):
    sites = jp.sites(lambda p, x: x @ p["w"] if p else x, params, X)
    with pytest.raises(ValueError, match=message):
        jp.lora(2, sites - sites)(jax.random.key(0), params)


def ode(p, x):
    """The solver closes over arrays of its own."""
    return odeint(lambda y, t, p: jnp.tanh(y @ p["w"]), x, jnp.linspace(0.0, 1.0, 3), p)


def doubled(p, x):
    @jax.custom_vjp
    def double(x, w):
        return jnp.tanh(x @ w) * KERNELS["k"][0]

    double.defvjp(lambda x, w: (double(x, w), (x, w)), lambda _, ct: (ct, jnp.outer(ct[0], ct[1])))
    return double(x, p["w"])


@pytest.mark.parametrize("fn", [ode, doubled])
def test_the_gradient_goes_through_a_custom_rule_that_closes_over_values(fn):
    params, x = {"w": random(4, 4)}, random(2, 4)
    sites = jp.sites(fn, params, x)
    frozen, adapter = jp.split(jp.lora(2, sites.linear, dtype=jnp.float64)(KEY, params))
    adapter = {k: v + 0.1 for k, v in adapter.items()}
    lifted = jax.grad(lambda a: jnp.sin(jp.lift(fn)(jp.combine(frozen, a), x)).sum())(adapter)
    merged = jax.grad(lambda a: jnp.sin(fn(jp.merge(jp.combine(frozen, a)), x)).sum())(adapter)
    assert all(jnp.abs(a - b).max() < 1e-10 for a, b in both(lifted, merged))


def test_a_custom_rule_that_closes_over_a_weight_is_refused_by_name():
    def fn(p, x):
        @jax.custom_vjp
        def product(x):
            return x @ p["w"]

        product.defvjp(lambda x: (product(x), None), lambda _, ct: (ct @ p["w"].T,))
        return product(x)

    _, tree = adapted(fn, {"w": random(6, 6)}, X)
    with pytest.raises(TypeError, match=r"test_computed_kernels.py.*closes over the weight 'w'"):
        jax.grad(lambda x: jp.lift(fn)(tree, x).sum())(X)


DECIDING = {
    "if": lambda p, x: x @ p["w"] if x.sum() > 0 else -x @ p["w"],
    "int": lambda p, x: x[..., : 6 + int(jnp.argmax(x) * 0)] @ p["w"],
    "numpy": lambda p, x: x @ p["w"] * np.asarray(jnp.sin(x)).sum(),
}


@pytest.mark.parametrize("name", DECIDING)
def test_a_model_that_branches_on_values_gets_the_line_and_the_way_out(name):
    fn, params = DECIDING[name], {"w": random(6, 6)}
    _, tree = adapted(lambda p, x: x @ p["w"], params, X)
    fn(params, X)
    with pytest.raises(
        (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError),
        match=r"test_computed_kernels.py:\d+ \(<lambda>\).*ensure_compile_time_eval",
    ):
        jp.lift(fn)(tree, X)


def test_what_does_not_depend_on_weights_can_be_computed_while_tracing():
    def fn(p, x):
        with jax.ensure_compile_time_eval():
            positive = x.sum() > 0
        return x @ p["w"] if positive else -x @ p["w"]

    _, tree = adapted(lambda p, x: x @ p["w"], {"w": random(6, 6)}, X)
    np.testing.assert_allclose(jp.lift(fn)(tree, X), fn(jp.merge(tree), X), rtol=1e-12)
