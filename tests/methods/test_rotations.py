"""OFT, BOFT, HRA and RoAd against their formulas with dense rotations, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft._methods.oft import cayley_rotations

KEY = jax.random.key(0)
N, F, M = 12, 16, 10
X = jax.random.normal(jax.random.key(5), (4, N))


def model(p, x):
    return jnp.tanh(x @ p["up"] + p["b"]) @ p["down"]


def params():
    shapes = dict(up=(N, F), b=(F,), down=(F, M))
    keys = jax.random.split(KEY, 3)
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def linear(p=None):
    return jp.sites(model, p or params(), X).linear


def moved(adapter, size=0.3):
    keys = jax.random.split(jax.random.key(9), len(adapter))
    return {
        n: v + size * jax.random.normal(k, v.shape, v.dtype)
        for k, (n, v) in zip(keys, adapter.items(), strict=True)
    }


def split(name, *args, **options):
    return jp.split(getattr(jp, name)(*args, dtype=jnp.float64, **options)(KEY, params()))


def outputs(frozen, adapter):
    return jp.lift(model, materialize="error")(jp.combine(frozen, adapter), X)


# Dense, by hand -----------------------------------------------------------------------------------


def cayley(skew, block):
    q = np.zeros((block, block))
    q[np.triu_indices(block, 1)] = skew
    q -= q.T
    one = np.eye(block)
    return (one + q) @ np.linalg.inv(one - q)


def diagonal(blocks):
    return np.asarray(jax.scipy.linalg.block_diag(*blocks))


def butterfly(turns, block, n):
    """R_m ... R_1 with the inputs of each block written out one by one."""
    whole = np.eye(n)
    for k, factor in enumerate(turns):
        r, run = np.zeros((n, n)), block // 2
        width = block * 2**k  # inputs that this factor and those before it join
        places = []
        for start in range(0, n, width):
            for first in range(start, start + width // 2, run) if k else [start]:
                second = first + (width // 2 if k else run)
                places.append([*range(first, first + run), *range(second, second + run)])
        for place, turn in zip(places, factor, strict=True):
            r[np.ix_(place, place)] = turn
        whole = r @ whole
    return whole


def reflections(u):
    whole = np.eye(u.shape[0])
    for column in u.T:
        n = column / np.linalg.norm(column)
        whole = (np.eye(len(n)) - 2 * np.outer(n, n)) @ whole
    return whole


def test_oft_rotates_the_inputs_by_cayley_transforms():
    frozen, adapter = split("oft", {"up": 4, "down": 2}, linear())
    np.testing.assert_array_equal(outputs(frozen, adapter), model(params(), X))
    adapter = moved(adapter)
    p = params()
    for name, block in (("up", 4), ("down", 2)):
        r = diagonal([cayley(q, block) for q in adapter[f"{name}/skew"]])
        np.testing.assert_allclose(r @ r.T, np.eye(len(r)), atol=1e-12)
        p[name] = r @ p[name]
    np.testing.assert_allclose(outputs(frozen, adapter), model(p, X), rtol=1e-10)


def test_a_shared_block_rotates_all_blocks_of_inputs_alike():
    frozen, adapter = split("oft", 4, linear(), block_share=True)
    assert {k: v.shape for k, v in adapter.items()} == {"up/skew": (1, 6), "down/skew": (1, 6)}
    adapter = moved(adapter)
    p = params()
    for name, times in (("up", N // 4), ("down", F // 4)):
        p[name] = diagonal([cayley(adapter[f"{name}/skew"][0], 4)] * times) @ p[name]
    np.testing.assert_allclose(outputs(frozen, adapter), model(p, X), rtol=1e-10)


def test_the_series_comes_to_the_solution_as_its_terms_grow():
    skew = 0.05 * jax.random.normal(KEY, (3, 15))
    exact = cayley_rotations(skew, 6)
    size = float(jnp.linalg.norm(cayley_rotations(skew, 6) - jnp.eye(6), 2, (-2, -1)).max()) / 2
    for terms in range(1, 6):
        error = float(jnp.abs(cayley_rotations(skew, 6, terms) - exact).max())
        # By a power of about |Q| for each.
        assert 0.01 * size ** (terms + 1) < error < 3 * size ** (terms + 1)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_is_a_product_of_butterfly_factors_and_a_scale(factors):
    site = linear() & linear().match("down")
    frozen, adapter = split("boft", 4, site, n_butterfly_factors=factors)
    np.testing.assert_array_equal(outputs(frozen, adapter), model(params(), X))
    adapter = moved(adapter)
    turns = [[cayley(q, 4) for q in factor] for factor in adapter["down/skew"]]
    p = params()
    r = butterfly(turns, 4, F)
    p["down"] = r @ p["down"] * adapter["down/scale"]
    np.testing.assert_allclose(outputs(frozen, adapter), model(p, X), rtol=1e-10)
    assert np.all(r != 0) == (factors == 3)  # log2(2 * 16 / 4): every input meets every other


def test_hra_is_a_product_of_reflections():
    frozen, adapter = split("hra", 4, linear())
    np.testing.assert_allclose(outputs(frozen, adapter), model(params(), X), rtol=1e-12)
    for u in adapter.values():
        np.testing.assert_array_equal(u[:, ::2], u[:, 1::2])
    adapter = moved(adapter)
    p = params()
    for name in ("up", "down"):
        p[name] = reflections(np.asarray(adapter[f"{name}/u"])) @ p[name]
    np.testing.assert_allclose(outputs(frozen, adapter), model(p, X), rtol=1e-10)


def test_hra_does_not_depend_on_the_norms_of_its_columns():
    frozen, adapter = split("hra", 4, linear())
    adapter = moved(adapter)
    longer = {name: 7 * u for name, u in adapter.items()}
    np.testing.assert_allclose(outputs(frozen, longer), outputs(frozen, adapter), rtol=1e-12)


@pytest.mark.parametrize(
    ("variant", "group"),
    [(1, {"*": 2}), (2, {"up": 8, "down": 5}), (4, {"up": 16, "down": 5})],
    ids=str,
)
def test_road_rotates_pairs_of_outputs_and_the_bias_with_them(variant, group):
    frozen, adapter = split("road", linear(), variant=variant, group_size=group)
    np.testing.assert_array_equal(outputs(frozen, adapter), model(params(), X))
    adapter = moved(adapter)
    p = params()
    for name, out in (("up", F), ("down", M)):
        g = group.get(name) or group["*"]
        half, r = (g + 1) // 2, np.zeros((out, out))  # y @ r
        pairs = [(k + i, k + i + half) for k in range(0, out, g) for i in range(half)]
        t, a = adapter[f"{name}/theta"], adapter[f"{name}/alpha"]
        which = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 4: (0, 1, 2, 3)}[variant]
        for n, (i, j) in enumerate(pairs):
            one, two, three, four = (
                (a[n, k] * jnp.cos(t[n, k]), a[n, k] * jnp.sin(t[n, k])) for k in which
            )
            r[i, i] = one[0]
            if j // g == i // g:  # else it is alone
                r[j, j], r[j, i], r[i, j] = two[0], -three[1], four[1]
        p[name] = p[name] @ r
        if name == "up":
            p["b"] = p["b"] @ r
    np.testing.assert_allclose(outputs(frozen, adapter), model(p, X), rtol=1e-10)
    merged = jp.merge(jp.combine(frozen, adapter))
    np.testing.assert_allclose(merged["b"], p["b"], rtol=1e-10)


# In other places ----------------------------------------------------------------------------------

METHODS = {
    "boft": lambda sites: jp.boft(2, sites, n_butterfly_factors=2, dtype=jnp.float64),
    "oft, shared": lambda sites: jp.oft(4, sites, block_share=True, dtype=jnp.float64),
    "road": lambda sites: jp.road(sites, variant=4, group_size=4, dtype=jnp.float64),
}
each = pytest.mark.parametrize("name", METHODS)


@each
def test_in_a_scan_of_layers_with_heads_under_lora_it_is_the_merged_model(name):
    def layers(p, x):
        def layer(x, p):
            h = jnp.tanh(jnp.einsum("bd,dnh->bnh", x, p["q"]) + p["bias"])
            return x + jnp.einsum("bnh,nhd->bd", h, p["o"]), None

        return jax.lax.scan(layer, x, p)[0]

    shapes = dict(q=(3, 8, 2, 6), bias=(3, 2, 6), o=(3, 2, 6, 8))
    p = {
        n: 0.3 * jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(shapes.items())
    }
    x = jax.random.normal(KEY, (5, 8))
    sites = jp.sites(layers, p, x).linear
    how = jp.chain(METHODS[name](sites), jp.lora(2, sites, dtype=jnp.float64))
    frozen, adapter = jp.split(how(KEY, p))

    def both(a):
        tree = jp.combine(frozen, a)
        y = jp.lift(layers, materialize="error")(tree, x), layers(jp.merge(tree), x)
        return [jnp.cos(out).sum() for out in y], y

    slopes, (y, want) = jax.jit(jax.jacrev(both, has_aux=True))(moved(adapter))
    np.testing.assert_allclose(y, want, rtol=1e-9)
    for path, slope in slopes[0].items():
        np.testing.assert_allclose(slope, slopes[1][path], atol=1e-9, err_msg=path)


def test_a_shard_of_the_inputs_holds_whole_butterflies_or_the_weight_is_materialized():
    """A device has 8 inputs: a butterfly of 2 factors joins 4 of them, one of 4 all 16."""
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("t",), axis_types=kind, devices=jax.devices()[:2])

    @jax.shard_map(mesh=mesh, in_specs=(P("t"), P(None, "t")), out_specs=P())
    def rows(w, x):
        return jax.lax.psum(x @ w, "t")

    p = {"w": jax.random.normal(KEY, (16, 6))}
    x = jax.random.normal(KEY, (3, 16))
    fn = lambda p, x: rows(p["w"], x)  # noqa: E731
    for factors, events in ((2, 0), (4, 1)):
        method = jp.boft(
            2, jp.sites(fn, p, x).linear, n_butterfly_factors=factors, dtype=jnp.float64
        )
        frozen, adapter = jp.split(method(KEY, p))
        tree, made = jp.combine(frozen, moved(adapter)), []
        y = jax.jit(jp.lift(fn, materialize=made.append))(tree, x)
        np.testing.assert_allclose(y, x @ jp.merge(tree)["w"], rtol=1e-9)
        assert len(made) == events


def test_a_convolution_that_oft_cannot_rotate_is_materialized():
    """With as many groups as the window has places, its channels are as many as `in`."""

    def conv(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", feature_group_count=3, dimension_numbers=("NWC", "WIO", "NWC")
        )

    p = {"w": jax.random.normal(KEY, (3, 2, 6))}
    x = jax.random.normal(KEY, (2, 7, 6))
    frozen, adapter = jp.split(jp.oft(2, jp.sites(conv, p, x).conv, dtype=jnp.float64)(KEY, p))
    tree, made = jp.combine(frozen, moved(adapter)), []
    y = jp.lift(conv, materialize=made.append)(tree, x)
    np.testing.assert_allclose(y, conv(jp.merge(tree), x), rtol=1e-10)
    assert [event.primitive for event in made] == ["conv_general_dilated"]


def test_nothing_of_the_size_of_the_inputs_squared_is_formed():
    n = 64
    p, x = {"w": jnp.ones((n, 8))}, jnp.ones((3, n))
    f = lambda p, x: x @ p["w"]  # noqa: E731
    sites = jp.sites(f, p, x).linear

    def lowered(method):
        frozen, adapter = jp.split(method(KEY, p))
        step = jax.grad(lambda a: jp.lift(f)(jp.combine(frozen, a), x).sum())
        return jax.jit(step).lower(adapter).as_text()

    for method in (jp.oft(4, sites), jp.boft(4, sites, n_butterfly_factors=3), jp.hra(4, sites)):
        assert f"<{n}x{n}x" not in lowered(method)
    assert f"<{n}x{n}x" in lowered(jp.oft(n, sites))  # where one block is all there is


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s: jp.oft(5, s),
            r"oft\(block_size=5\)`: 'down' of shape \(16, 10\) has 16 inputs.*such as 2, 4, 8, 16;",
        ),
        (lambda s: jp.oft(1, s), r"oft\(block_size=1\)`: 'down'"),
        (
            lambda s: jp.oft({"up": 8, "*": 2}, s),
            r"block_size=8\)`: 'up' .* 12 inputs.*such as 2, 3, 4, 6, 12;",
        ),
        (lambda s: jp.oft(4, s, neumann_terms=0), r"oft\(neumann_terms=0\)"),
        (
            lambda s: jp.boft(4, s.match("up"), n_butterfly_factors=3),
            r"boft\(block_size=4\)`: 'up' .* 12 inputs.*even number, 4 times .*such as none;",
        ),
        (
            lambda s: jp.boft(3, s.match("up"), n_butterfly_factors=2),
            r"boft\(block_size=3\)`: 'up' .* 2 times .*such as 2, 6;",
        ),
        (
            lambda s: jp.boft(4, s, n_butterfly_factors=0),
            r"boft\(n_butterfly_factors=0\)` for 'down'",
        ),
        (lambda s: jp.hra(3, s), r"hra\(rank=3\)`: 'down' .* 16 inputs .* even rank from 2 to 16"),
        (lambda s: jp.hra(0, s), r"hra\(rank=0\)`: 'down'"),
        (lambda s: jp.hra(14, s), r"hra\(rank=14\)`: 'up' .* from 2 to 12"),
        (lambda s: jp.road(s, variant=3), r"road\(variant=3\)`: choose 1, 2 or 4"),
        (
            lambda s: jp.road(s, group_size=4),
            r"road\(group_size=4\)`: 'down' .* 10 outputs.*such as 2, 5, 10;",
        ),
        (lambda s: jp.oft(2, s.output_slice(0, 2)), r"`oft`.*part of the columns of 'down'"),
        (lambda s: jp.boft(2, s.output_slice(0, 2)), r"`boft`.*part of the columns of 'down'"),
        (lambda s: jp.hra(2, s.output_slice(0, 2)), r"`hra`.*part of the columns of 'down'"),
        (lambda s: jp.road(s.output_slice(0, 2)), r"`road`.*part of the columns of 'down'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(linear())


def test_road_refuses_a_bias_that_cannot_rotate_with_its_weight():
    def shared(p, x):
        return jnp.tanh(x @ p["v"] + p["b"]) + jnp.tanh(x @ p["w"] + p["b"])

    p = dict(v=jnp.ones((4, 6)), w=jnp.ones((4, 6)), b=jnp.ones(6))
    sites = jp.sites(shared, p, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"'b' is the bias of 'v' and of 'w'"):
        jp.road(sites.linear)

    def scalar(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])

    p = dict(w=jnp.ones((4, 6)), b=jnp.ones(1))
    sites = jp.sites(scalar, p, jnp.ones((2, 4)))
    with pytest.raises(
        ValueError, match=r"'b' of shape \(1,\).*'w'.*has 1 entries .* should have 6"
    ):
        jp.road(sites.linear)
