"""VeRA, LoHa, LoKr and MiSS: formulas on sides with divisors, and what each alone promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)
SHAPES = {"table": (30, 12), "up": (12, 20), "down": (20, 12)}
IDS = jax.random.randint(jax.random.key(1), (2, 5), 0, 30)


def model(p, ids):
    """A table on both ends, so that every weight is used forwards, transposed or by row."""
    h = p["table"][ids]
    return (h + jnp.tanh(h @ p["up"]) @ p["down"]) @ p["table"].T


@functools.cache
def base():
    params = {name: toy.normal(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return params, jp.sites(model, params, IDS)


METHODS = {
    "vera": lambda sites: jp.vera(5, sites, dtype=F8),
    "loha": lambda sites: jp.loha(2, sites, alpha=3.0, dtype=F8),
    "loha of a rank beyond the sides": lambda sites: jp.loha(4, sites, dtype=F8),
    "lokr": lambda sites: jp.lokr(1, sites, alpha=1.5, dtype=F8),
    "lokr, both of low rank": lambda sites: jp.lokr(
        1, sites, decompose_factor=(2, 4), decompose_both=True, dtype=F8
    ),
    "lokr, both whole": lambda sites: jp.lokr(4, sites, alpha=2.0, dtype=F8),
    "miss": lambda sites: jp.miss(4, sites, dtype=F8),
    "miss of a rank that divides no side": lambda sites: jp.miss(7, sites, dtype=F8),
}
each = pytest.mark.parametrize("name", METHODS)


def split(name):
    params, sites = base()
    return jp.split(METHODS[name](sites.matrices)(KEY, params))


def change(name, of, shape, frozen):
    """The change of a weight, by its formula and entry by entry."""
    n, m = shape
    if name == "vera":
        return np.array(frozen.left) @ np.diag(of["d"]) @ np.array(frozen.right) @ np.diag(of["b"])
    if name.startswith("loha"):
        s = 1.5 if name == "loha" else 1.0
        return s * (of["a1"] @ of["b1"]) * (of["a2"] @ of["b2"])
    if name.startswith("miss"):
        return np.stack([of["b"][i % len(of["b"])] for i in range(n)])
    s = {"lokr": 1.5, "lokr, both whole": 0.5}.get(name, 1.0)
    w1 = of["w1"] if "w1" in of else of["a1"] @ of["b1"]
    w2 = of["w2"] if "w2" in of else of["a2"] @ of["b2"]
    (i2, o2), out = w2.shape, np.zeros(shape)
    for i in range(n):
        for j in range(m):
            out[i, j] = s * w1[i // i2, j // o2] * w2[i % i2, j % o2]
    return out


@each
def test_it_starts_at_the_base_model_and_is_its_formula_afterwards(name):
    (params, _), (frozen, adapter) = base(), split(name)
    lifted = jax.jit(jp.lift(model, materialize="error"))
    plain = jax.jit(model)(params, IDS)
    np.testing.assert_allclose(lifted(jp.combine(frozen, adapter), IDS), plain, rtol=1e-14)
    start = jp.merge(jp.combine(frozen, adapter))
    for path, w in params.items():
        np.testing.assert_array_equal(start[path], w)
    adapter = toy.perturbed(adapter)
    dense = {}
    for path, w in params.items():
        of = {k.split("/")[1]: np.array(x) for k, x in adapter.items() if k.startswith(path)}
        dense[path] = w + change(name, of, w.shape, frozen[path].weight)
    want = model(dense, IDS)
    assert jnp.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(lifted(jp.combine(frozen, adapter), IDS), want, rtol=1e-10)


@each
def test_virtual_tokens_get_no_delta(name):
    params, sites = base()
    virtual = jp.prompts.virtual_token_ids(sites["table"], 2)
    ids = IDS.at[0, :2].set(jnp.asarray(virtual))

    def lookup(tree):
        return jp.lift(lambda p, ids: p["table"][ids])(tree, ids)

    prompt = jp.prompt_tuning(2, sites.embedding, dtype=F8)
    frozen, adapter = jp.split(jp.chain(prompt, METHODS[name](sites.embedding))(KEY, params))
    moved = toy.perturbed(adapter) | {k: x for k, x in adapter.items() if k.endswith("rows")}
    rows, others = lookup(jp.combine(frozen, adapter)), lookup(jp.combine(frozen, moved))
    np.testing.assert_array_equal(rows[0, :2], others[0, :2])
    assert jnp.all(jnp.any(rows != others, axis=-1).at[0, :2].set(True))


@pytest.mark.parametrize("name", ["vera", "loha", "lokr", "miss"])
def test_dropout_acts_where_a_call_gives_a_key(name):
    params, sites = base()
    rank = {"lokr": 1}.get(name, 3)
    make = functools.partial(getattr(jp, name), rank, sites.linear, dtype=F8)
    frozen, adapter = jp.split(make(dropout=0.5)(KEY, params))
    adapter = toy.perturbed(adapter)

    def run(frozen, **call):
        return jp.lift(model)(jp.combine(frozen, adapter, **call), IDS)

    plain = run(jp.split(make()(KEY, params))[0])
    np.testing.assert_array_equal(run(frozen), plain)
    one, again, other = (run(frozen, dropout=jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, plain) and not np.allclose(one, other)


# Each alone ---------------------------------------------------------------------------------------


def test_the_random_matrices_of_vera_are_one_pair():
    """Cut to each weight; weights with sides of one length hold one array, stacks have no more."""
    params = {"q": toy.normal(0, 8, 8), "k": toy.normal(1, 8, 6), "deep": toy.normal(2, 3, 8, 8)}

    def f(p, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["deep"])
        return x @ p["q"] + y, x @ p["k"]

    sites = jp.sites(f, params, toy.normal(3, 2, 8))
    frozen, adapter = jp.split(jp.vera(4, sites.linear, dtype=F8)(KEY, params))
    weights = {path: view.weight for path, view in frozen.items()}
    assert len({id(w.left) for w in weights.values()}) == 1
    assert weights["q"].right is weights["deep"].right
    np.testing.assert_array_equal(weights["k"].right, weights["q"].right[:, :6])
    held = {id(x): x.nbytes for w in weights.values() for x in (w.left, w.right)}
    assert sum(held.values()) == 8 * (8 * 4 + 4 * 8 + 4 * 6)  # `count` says 8 * 184
    assert {path: x.shape for path, x in adapter.items() if "deep" in path} == {
        "deep/d": (3, 4),
        "deep/b": (3, 8),
    }
    # Another selection of the same largest sides has the same matrices.
    fewer, _ = jp.split(jp.vera(4, sites.match("q"), dtype=F8)(KEY, params))
    np.testing.assert_array_equal(fewer["q"].weight.left, weights["q"].left)


def test_loha_reaches_the_square_of_its_rank():
    params, sites = base()
    for rank, reached in ((1, 1), (2, 4), (3, 9), (4, 12)):
        frozen, adapter = jp.split(jp.loha(rank, sites.match("up"), dtype=F8)(KEY, params))
        merged = jp.merge(jp.combine(frozen, toy.perturbed(adapter)))
        assert np.linalg.matrix_rank(merged["up"] - params["up"]) == reached


@pytest.mark.parametrize(
    "sides, factor, blocks",
    [
        ((16, 128), None, [(4, 8), (4, 16)]),
        ((127, 36), None, [(1, 6), (127, 6)]),
        ((128, 12), 4, [(4, 4), (32, 3)]),
        ((12, 10), (6, 1), [(6, 1), (2, 10)]),
        ((12, 10), (None, 5), [(3, 5), (4, 2)]),
    ],
)
def test_lokr_factors_sides_near_their_roots_or_by_the_given_factor(sides, factor, blocks):
    params = {"w": jnp.ones(sides)}
    found = jp.sites(lambda p, x: x @ p["w"], params, jnp.ones((1, sides[0])))
    _, adapter = jp.split(jp.lokr(200, found.linear, decompose_factor=factor)(KEY, params))
    assert [adapter["w/w1"].shape, adapter["w/w2"].shape] == blocks


def test_lokr_follows_a_cut_between_its_blocks_and_is_right_inside_of_one():
    params = {"w": toy.normal(0, 12, 10)}
    for at, events in ((8, 0), (5, 2)):  # 12 inputs in blocks of 4

        def f(p, x, at=at):
            return x[..., :at] @ p["w"][:at] + x[..., at:] @ p["w"][at:]

        x, seen = toy.normal(1, 3, 12), []
        sites = jp.sites(f, params, x)
        frozen, adapter = jp.split(jp.lokr(1, sites.linear, dtype=F8)(KEY, params))
        tree = jp.combine(frozen, toy.perturbed(adapter))
        got = jp.lift(f, materialize=seen.append)(tree, x)
        np.testing.assert_allclose(got, f(jp.merge(tree), x), rtol=1e-10)
        assert len(seen) == events


def test_a_product_of_miss_costs_half_of_loras():
    n, rank = 256, 16
    params, x = {"w": jnp.ones((n, n), jnp.float32)}, jnp.ones((64, n), jnp.float32)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    sites = jp.sites(f, params, x)

    def flops(tree):
        return jax.jit(jp.lift(f)).lower(tree, x).compile().cost_analysis()["flops"]

    plain = flops(params)
    more = {
        name: flops(jp.combine(*jp.split(getattr(jp, name)(rank, sites.linear)(KEY, params))))
        for name in ("miss", "lora")
    }
    assert 0 < more["miss"] - plain < 0.6 * (more["lora"] - plain)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: jp.vera(0, s), r"`vera\(rank=0\)`"),
        (
            lambda s: jp.vera(4, s, d_initial=0.0),
            r"`vera\(d_initial=0\.0\)`.*neither has a gradient",
        ),
        (lambda s: jp.vera(4, s, dropout=1.0), r"`vera\(dropout=1\.0\)`"),
        (lambda s: jp.loha(13, s), r"`loha\(rank=13\)`.*'up' of shape \(12, 20\) is 12 x 20"),
        (lambda s: jp.loha({"up": 0}, s), r"`loha\(rank=0\)`.*'up'"),
        (lambda s: jp.loha(2, s, dropout=-0.1), r"`loha\(dropout=-0\.1\)`"),
        (lambda s: jp.lokr({"up": 0}, s), r"`lokr\(rank=0\)` for 'up'"),
        (
            lambda s: jp.lokr(2, s, decompose_factor=3),
            r"`lokr\(decompose_factor=3\)`: 3 does not divide the out side of 'up' of shape "
            r"\(12, 20\), which is 20\. These do: \[1, 2, 4, 5, 10, 20\]",
        ),
        (
            lambda s: jp.lokr(2, s, decompose_factor=(5, 2)),
            r"5 does not divide the in side of 'up'.*is 12",
        ),
        (
            lambda s: jp.lokr(2, s, decompose_factor={"up": 0}),
            r"0 does not divide the in side of 'up'",
        ),
        (
            lambda s: jp.lokr(2, s, decompose_factor=(2, 2, 3)),
            r"`lokr\(decompose_factor=\(2, 2, 3\)\)` for .up.: give one number, or a pair",
        ),
        (lambda s: jp.lokr(2, s, dropout=2), r"`lokr\(dropout=2\)`"),
        (lambda s: jp.miss(13, s), r"`miss\(rank=13\)`.*'up' of shape \(12, 20\) has 12 inputs"),
        (lambda s: jp.miss({"up": 0}, s), r"`miss\(rank=0\)`.*'up'"),
        (lambda s: jp.miss(2, s, dropout=1), r"`miss\(dropout=1\)`"),
    ],
)
def test_invalid_arguments_are_refused_by_name(call, message):
    params, sites = base()
    with pytest.raises(ValueError, match=message):
        call(sites.match("up"))(KEY, params)


@pytest.mark.parametrize("name", ["vera", "loha", "lokr", "miss"])
def test_a_slice_of_the_outputs_is_refused(name):
    _, sites = base()
    part = r"OutputSlice\(index=1, of=2"
    with pytest.raises(ValueError, match=rf"`{name}`.*columns of 'up' .*\({part}"):
        getattr(jp, name)(2, sites.match("up").output_slice(1, 2))


def test_a_convolution_is_refused_by_lokr():
    params = {"w": jnp.ones((3, 4, 6))}

    def f(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers)

    sites = jp.sites(f, params, jnp.ones((2, 5, 4)))
    with pytest.raises(
        ValueError, match=r"'w' of shape \(3, 4, 6\) is the kernel of a convolution"
    ):
        jp.lokr(2, sites.conv)
