"""Groups are removed from all of their arrays; the smaller model equals the one with zeros."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder
from jaxpeft.sparsity import (
    PrunableGroups,
    group_scores,
    prunable_groups,
    prune_structured,
    topk_groups,
)
from tests.methods.stack import normal

D, F, L, T, N, K, H = 5, 6, 4, 7, 4, 2, 3
X = normal(99, T, D)
KEY = jax.random.key(0)


def arrays(*lead, **shapes):
    return {name: normal(i, *lead, *s) for i, (name, s) in enumerate(sorted(shapes.items()))}


# Models that read their sizes from their arrays -------------------------------------------------


def mlp(p, x):
    return jax.nn.gelu(x @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def scanned(p, x):
    return jax.lax.scan(lambda x, layer: (x + 0.3 * mlp(layer, x), None), x, p["layers"])[0]


def attend(q, k, v):
    """Heads (T, N, H) of q look at those (T, K, H) of k and v, N / K at each."""
    q = q.reshape(T, k.shape[1], -1, H)
    seen = jax.nn.softmax(jnp.einsum("tkgh,skh->kgts", q, k))
    return jnp.einsum("kgts,skh->tkgh", seen, v).reshape(T, -1, H)


def fused(p, x):
    q, k, v = ((x @ p[c] + p[c + "_bias"]).reshape(T, -1, H) for c in "qkv")
    return attend(q, k, v).reshape(T, -1) @ p["o"]


def split(p, x):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, p[c]) + p[c + "_bias"] for c in "qkv")
    return jnp.einsum("tnh,nhd->td", attend(q, k, v), p["o"])


def images(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    convolved = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=numbers,
    )
    x = x.reshape(1, T, D, 1)
    return convolved(jax.nn.relu(convolved(x, p["first"]) * p["scale"] + p["bias"]), p["last"])


MLP = dict(up=(D, F), up_bias=(F,), down=(F, D), down_bias=(D,))
BIASES = dict(q_bias=(N * H,), k_bias=(N * H,), v_bias=(N * H,))


def hidden(p, kept):
    return {
        **p,
        "up": p["up"] * kept[..., None, :],
        "up_bias": p["up_bias"] * kept,
        "down": p["down"] * kept[..., :, None],
    }


def by_heads(p, kept):
    """Zeros in fused kernels and biases, in blocks of as many entries as they hold for a group."""

    def spread(size):
        return np.repeat(kept, size // len(kept))

    out = {c: p[c] * spread(p[c].shape[1]) for c in "qkv"}
    out |= {c + "_bias": p[c + "_bias"] * spread(p[c].shape[1]) for c in "qkv"}
    return {**out, "o": p["o"] * spread(len(p["o"]))[:, None]}


def by_split_heads(p, kept):
    flat = {k: v.reshape(v.shape[0], -1) for k, v in p.items() if k in "qkv"}
    flat |= {k: v.reshape(-1) for k, v in p.items() if "bias" in k}
    zeroed = by_heads({**flat, "o": p["o"].reshape(-1, D)}, kept)
    return {k: v.reshape(p[k].shape) for k, v in zeroed.items()}


# name: (model, params, patterns of outputs, of inputs, of stacks, count, the zeros of a group)
CASES = {
    "mlp": (mlp, arrays(**MLP), "up", "down", None, F, hidden),
    "gated": (
        gated,
        arrays(gate=(D, F), up=(D, F), down=(F, D)),
        "[ug]*",
        "down",
        None,
        F,
        lambda p, kept: {
            "up": p["up"] * kept,
            "gate": p["gate"] * kept,
            "down": p["down"] * kept[:, None],
        },
    ),
    "scanned mlp": (
        scanned,
        {"layers": arrays(L, **MLP)},
        "*/up",
        "*/down",
        None,
        F,
        lambda p, kept: {"layers": hidden(p["layers"], kept)},
    ),
    "layers": (
        scanned,
        {"layers": arrays(L, **MLP)},
        None,
        None,
        "*",
        L,
        lambda p, kept: jax.tree.map(lambda w: w * kept.reshape(-1, *[1] * (w.ndim - 1)), p),
    ),
    "pairs of layers": (
        scanned,
        {"layers": arrays(L, **MLP)},
        None,
        None,
        "*",
        L // 2,
        lambda p, kept: jax.tree.map(
            lambda w: w * np.repeat(kept, 2).reshape(-1, *[1] * (w.ndim - 1)), p
        ),
    ),
    "heads in fused kernels": (
        fused,
        arrays(q=(D, N * H), k=(D, N * H), v=(D, N * H), o=(N * H, D), **BIASES),
        "[qkv]",
        "o",
        None,
        N,
        by_heads,
    ),
    "heads on an axis": (
        split,
        {
            **arrays(q=(D, N, H), k=(D, N, H), v=(D, N, H), o=(N, H, D)),
            **{k: v.reshape(N, H) for k, v in arrays(**BIASES).items()},
        },
        "[qkv]",
        "o",
        None,
        N,
        by_split_heads,
    ),
    "grouped queries": (
        fused,
        arrays(
            q=(D, N * H),
            k=(D, K * H),
            v=(D, K * H),
            o=(N * H, D),
            q_bias=(N * H,),
            k_bias=(K * H,),
            v_bias=(K * H,),
        ),
        "[qkv]",
        "o",
        None,
        K,
        by_heads,
    ),
    "filters": (
        images,
        arrays(first=(3, 3, 1, F), scale=(F,), bias=(F,), last=(3, 3, F, 2)),
        ("first", "scale", "bias"),
        "last",
        None,
        F,
        lambda p, kept: {
            "first": p["first"] * kept,
            "scale": p["scale"] * kept,
            "bias": p["bias"] * kept,
            "last": p["last"] * kept[:, None],
        },
    ),
}


def matched(sites, patterns):
    if patterns is None:
        return None
    return sites.match(*((patterns,) if isinstance(patterns, str) else patterns))


@functools.cache
def found(name):
    model, params, outputs, inputs, stacks, count, _ = CASES[name]
    sites = jp.sites(model, params, X)
    chosen = {
        side: matched(sites, patterns)
        for side, patterns in (("outputs", outputs), ("inputs", inputs), ("stacks", stacks))
    }
    return prunable_groups(count, **chosen)


def half(shape, seed=0):
    """Bools of which every row keeps half, each another half."""
    rng = np.random.default_rng(seed)
    row = np.arange(shape[-1]) < shape[-1] // 2
    return rng.permuted(np.broadcast_to(row, shape), axis=-1)


@pytest.mark.parametrize("name", CASES)
def test_the_smaller_model_is_the_one_with_zeros(name):
    model, params, *_, zeros = CASES[name]
    kept = half(found(name).shape, seed=3)
    smaller, zeroed = prune_structured(params, found(name), kept), zeros(params, kept)
    run = jax.jit(model)
    want = run(zeroed, X)
    np.testing.assert_allclose(run(smaller, X), want, atol=1e-10)
    assert np.abs(want - run(params, X)).max() > 1e-2
    # What is left is what was not zeroed; arrays without a block of any group are the same.
    assert jax.tree.structure(smaller) == jax.tree.structure(params)
    for new, zero, old in zip(*map(jax.tree.leaves, (smaller, zeroed, params)), strict=True):
        if new is old:
            np.testing.assert_array_equal(zero, old)
        else:
            assert new.size == np.count_nonzero(zero) == old.size // 2


def test_the_kept_blocks_stay_in_their_order():
    params = CASES["heads in fused kernels"][1]
    smaller = prune_structured(
        params, found("heads in fused kernels"), np.array([False, True, False, True])
    )
    columns = [3, 4, 5, 9, 10, 11]
    np.testing.assert_array_equal(smaller["q"], params["q"][:, columns])
    np.testing.assert_array_equal(smaller["k_bias"], params["k_bias"][jnp.array(columns)])
    np.testing.assert_array_equal(smaller["o"], params["o"][jnp.array(columns)])


def test_each_layer_of_a_stack_loses_its_own_groups():
    params = CASES["scanned mlp"][1]
    kept = half((L, F), seed=3)
    assert len({tuple(row) for row in kept}) == L
    smaller = prune_structured(params, found("scanned mlp"), kept)["layers"]
    for i in range(L):
        np.testing.assert_array_equal(smaller["up"][i], params["layers"]["up"][i][:, kept[i]])
        np.testing.assert_array_equal(smaller["down"][i], params["layers"]["down"][i][kept[i]])
        np.testing.assert_array_equal(
            smaller["up_bias"][i], params["layers"]["up_bias"][i][kept[i]]
        )


# Layouts ----------------------------------------------------------------------------------------


def test_an_axis_that_the_model_reshapes_is_pruned_inside():
    def model(p, x):
        w = p["w"].reshape(L, D, F)  # layers and inputs on one axis of the array
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w) @ p["back"], None), x, w)[0]

    params = arrays(w=(L * D, F), back=(F, D))
    sites = jp.sites(model, params, X)
    assert [axis.role for axis in sites["w"].axes] == ["stack", "in", "out"]
    layers = prunable_groups(L, stacks=sites.match("w"))
    kept = np.array([True, False, False, True])
    rows = params["w"].reshape(L, D, F)
    got = prune_structured(params, layers, kept)["w"]
    np.testing.assert_array_equal(got, rows[kept].reshape(-1, F))
    scores = group_scores({"w": params["w"]}, layers)
    np.testing.assert_allclose(scores, rows.sum((1, 2)), rtol=1e-12)
    # Inputs of each layer, on the part of the axis behind that of the layers.
    kept = half((L, D), seed=1)
    got = prune_structured(params, prunable_groups(D, inputs=sites.match("w")), kept)["w"]
    want = [rows[i][kept[i]] for i in range(L)]
    np.testing.assert_array_equal(got, np.concatenate(want))


def test_layers_on_the_last_axis_have_their_own_groups_too():
    def model(p, x):
        w = jnp.moveaxis(p["w"], -1, 0)
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w) @ p["back"], None), x, w)[0]

    params = arrays(w=(D, F, L), back=(F, D))
    sites = jp.sites(model, params, X)
    assert [axis.role for axis in sites["w"].axes] == ["in", "out", "stack"]
    columns = prunable_groups(F, outputs=sites.match("w"))
    scores = group_scores(params, columns)
    np.testing.assert_allclose(scores, params["w"].sum(0).T, rtol=1e-12)
    kept = topk_groups(scores, columns, 0.5)
    got = prune_structured(params, columns, kept)["w"]
    for i in range(L):
        np.testing.assert_array_equal(got[..., i], params["w"][:, kept[i], i])


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_an_axis_of_that_length_goes_before_one_that_divides(shape):
    def model(p, x):
        return jnp.einsum("td,dnh->tnh", x, p["w"])

    params = arrays(w=(D, *shape))
    four = prunable_groups(4, outputs=jp.sites(model, params, X))
    want = [2 if size == 4 else size for size in shape]
    assert prune_structured(params, four, np.arange(4) < 2)["w"].shape == (D, *want)


@pytest.mark.parametrize(
    "kernel, bias", [((N, H), (N * H,)), ((N * H,), (N, H)), ((H, N), (N * H,))]
)
def test_a_bias_is_pruned_where_the_outputs_of_its_kernel_are(kernel, bias):
    def model(p, x):
        y = jnp.tensordot(x, p["w"], 1).reshape(-1, *bias)
        return y + p["b"]

    params = arrays(w=(D, *kernel), b=bias)
    sites = jp.sites(model, params, X)
    kept = np.array([True, False, True, True])
    smaller = prune_structured(params, prunable_groups(N, outputs=sites.match("w")), kept)
    outputs = np.arange(N * H).reshape(kernel)
    left = (outputs[:, kept] if kernel == (H, N) else outputs.reshape(N, H)[kept]).ravel()
    np.testing.assert_array_equal(smaller["b"].ravel(), params["b"].ravel()[left])
    np.testing.assert_array_equal(smaller["w"].reshape(D, -1), params["w"].reshape(D, -1)[:, left])


def test_a_bias_that_is_also_selected_is_pruned_once():
    sites = mlp_sites()
    both = prunable_groups(F, outputs=sites.match("up", "up_bias"), inputs=sites.match("down"))
    assert both == found("mlp")


def test_a_scalar_for_all_outputs_is_left_alone():
    def model(p, x):
        return x @ p["w"] + p["b"]

    params = arrays(w=(D, F), b=(1,))
    sites = jp.sites(model, params, X)
    assert sites["w"].bias == "b"
    smaller = prune_structured(
        params, prunable_groups(F, outputs=sites.match("w")), np.arange(F) < 2
    )
    assert smaller["w"].shape == (D, 2) and smaller["b"] is params["b"]


def test_axes_of_one_length_are_told_apart_by_hand():
    def model(p, x):
        return jnp.einsum("td,dnh->tnh", x, p["w"]) + p["b"]

    params = arrays(w=(D, 4, 4), b=(4, 4))
    sites = jp.sites(model, params, X)
    with pytest.raises(ValueError, match=r"output axes of 'w' \(5, 4, 4\) have lengths \[4, 4\]"):
        prunable_groups(4, outputs=sites.match("w"))
    told = sites.override("w", "in", "in", "out").override("b", "in", "out")
    kept = np.array([True, False, False, True])
    smaller = prune_structured(params, prunable_groups(4, outputs=told.match("w")), kept)
    np.testing.assert_array_equal(smaller["w"], params["w"][..., kept])
    np.testing.assert_array_equal(smaller["b"], params["b"][..., kept])


def test_an_expert_is_a_slice_of_a_stack_and_an_output_of_its_router():
    def layer(x, p):
        share = jax.nn.softmax(x @ p["router"])
        return x + jnp.einsum("te,td,edf->tf", share, x, p["experts"]), None

    def model(p, x):
        return jax.lax.scan(layer, x, p)[0]

    params = arrays(L, router=(D, 3), experts=(3, D, D))
    sites = jp.sites(model, params, X).override("experts", "stack", "stack", "in", "out")
    experts = prunable_groups(3, outputs=sites.match("router"), stacks=sites.match("experts"))
    assert experts.shape == (L, 3)
    kept = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], bool)
    smaller = prune_structured(params, experts, kept)
    for i in range(L):
        np.testing.assert_array_equal(smaller["router"][i], params["router"][i][:, kept[i]])
        np.testing.assert_array_equal(smaller["experts"][i], params["experts"][i][kept[i]])
    # Layers are whole slices, with all of their experts.
    assert prunable_groups(L, stacks=sites).shape == (L,)


def test_a_group_may_be_an_input_and_an_output_of_one_kernel():
    def model(p, x):
        h = x @ p["in"]
        for _ in range(2):
            h = jnp.tanh(h @ p["again"])
        return h @ p["out"]

    params = {"in": normal(0, D, F), "again": normal(1, F, F), "out": normal(2, F, D)}
    sites = jp.sites(model, params, X)
    state = prunable_groups(
        F, outputs=sites.match("in", "again"), inputs=sites.match("again", "out")
    )
    kept = half((F,))
    smaller = prune_structured(params, state, kept)
    np.testing.assert_array_equal(smaller["again"], params["again"][kept][:, kept])
    zeroed = {
        "in": params["in"] * kept,
        "again": params["again"] * kept * kept[:, None],
        "out": params["out"] * kept[:, None],
    }
    np.testing.assert_allclose(model(smaller, X), model(zeroed, X), atol=1e-10)


# Scores -----------------------------------------------------------------------------------------


def test_the_score_of_a_group_is_the_sum_over_its_blocks():
    params = CASES["grouped queries"][1]
    scores = {c: jnp.abs(params[c]) for c in "qko"}
    want = np.zeros(K)
    for i in range(K):
        want[i] += np.abs(params["q"][:, i * 6 : i * 6 + 6]).sum()
        want[i] += np.abs(params["k"][:, i * 3 : i * 3 + 3]).sum()
        want[i] += np.abs(params["o"][i * 6 : i * 6 + 6]).sum()
    np.testing.assert_allclose(group_scores(scores, found("grouped queries")), want, rtol=1e-12)


def test_scores_of_a_stack_are_by_layer_and_those_of_layers_are_not():
    p = CASES["scanned mlp"][1]["layers"]
    scores = {f"layers/{name}": p[name] ** 2 for name in ("up", "down")}
    by_layer = (p["up"] ** 2).sum(1) + (p["down"] ** 2).sum(2)
    got = group_scores(scores, found("scanned mlp"))
    np.testing.assert_allclose(got, by_layer, rtol=1e-12)
    got = group_scores(scores, found("layers"))
    np.testing.assert_allclose(got, by_layer.sum(1), rtol=1e-12)


def test_as_many_of_the_best_groups_are_kept_in_every_layer():
    p = CASES["scanned mlp"][1]["layers"]
    scores = {"layers/up": jnp.abs(p["up"]) * jnp.arange(1.0, L + 1)[:, None, None]}
    kept = topk_groups(scores, found("scanned mlp"), 0.7)
    own = np.abs(p["up"]).sum(1)
    assert kept.shape == (L, F) and kept.dtype == bool
    for row, mask in zip(own, kept, strict=True):
        assert mask.sum() == 4 and row[mask].min() > row[~mask].max()


def test_groups_may_have_scores_of_their_own_and_the_first_of_equals_are_kept():
    kept = topk_groups(jnp.array([1.0, 2, 1, 1, 0, 1]), found("mlp"), 0.5)
    np.testing.assert_array_equal(kept, [True, True, True, False, False, False])
    assert topk_groups(jnp.arange(6.0), found("mlp"), 1.0).all()
    assert 1 / 49 * 49 < 1  # rounding removes no group
    assert topk_groups(jnp.ones(49), PrunableGroups(49, (), ()), 1 / 49).sum() == 1


def test_small_scores_of_narrow_arrays_are_not_lost():
    scores = {"up": jnp.full((D, F), 1 / 256, jnp.bfloat16).at[0].set(1)}
    got = group_scores(scores, found("mlp"))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full(F, 1 + 4 / 256, np.float32))


# Errors -----------------------------------------------------------------------------------------


def sites_of(name):
    return jp.sites(CASES[name][0], CASES[name][1], X)


def mlp_sites():
    return sites_of("mlp")


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: prunable_groups(4, outputs=mlp_sites().match("up")),
            r"output axes of 'up' \(5, 6\) have le",
        ),
        (
            lambda: prunable_groups(4, inputs=mlp_sites().match("down")),
            r"lengths \[6\], none.* 4 equal",
        ),
        (
            lambda: prunable_groups(2, stacks=mlp_sites().match("up")),
            r"stack axes of 'up' .*lengths \[\], no",
        ),
        (
            lambda: prunable_groups(3, inputs=sites_of("filters").match("last")),
            r"input axes of 'last' \(3, 3, 6, 2\) have lengths \[3, 3, 6\].*override\('last'",
        ),
        (lambda: prunable_groups(3), r"groups\(3\)` selects no parameter"),
        (lambda: prunable_groups(3, outputs=jp.Sites({})), r"groups\(3\)` selects no parameter"),
        (
            lambda: prunable_groups(0, outputs=mlp_sites()),
            r"groups\(0\)`: `count` must be at least 1",
        ),
        (
            lambda: prunable_groups(3, outputs=mlp_sites().match("up").output_slice(0, 2)),
            r"`prunable_groups`: a part of the columns of 'up'",
        ),
    ],
)
def test_what_cannot_be_found_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_members_of_different_stacks_are_refused():
    def model(p, x):
        return scanned(p, x) @ p["head"]

    params = {"layers": arrays(L, **MLP), "head": normal(8, D, 2)}
    sites = jp.sites(model, params, X)
    message = r"'layers/down' has a stack \(4,\), but 'head' of shape \(5, 2\) has a stack \(\)"
    with pytest.raises(ValueError, match=message):
        prunable_groups(D, outputs=sites.match("*/down"), inputs=sites.match("head"))


def test_a_bias_of_another_length_is_refused():
    def model(p, x):
        return jnp.einsum("td,dnh->tnh", x, p["w"]) + p["b"]

    sites = jp.sites(model, arrays(w=(D, 4, 8), b=(8,)), X)
    with pytest.raises(ValueError, match=r"adds 'b' of shape \(8,\).* 8 entries for 32 outputs"):
        prunable_groups(4, outputs=sites.match("w"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda u: group_scores({}, u), r"none of \['up', 'up_bias', 'down'\] has scores"),
        (
            lambda u: group_scores({"up": jnp.ones((6, 5))}, u),
            r"'up' have shape \(6, 5\), but must have \(5, 6\)",
        ),
        (lambda u: group_scores({"up": jnp.full((5, 6), jnp.nan)}, u), "not all finite"),
        (lambda u: topk_groups(jnp.full(6, jnp.inf), u, 0.5), "not all finite"),
        (lambda u: topk_groups(jnp.ones(5), u, 0.5), r"have shape \(5,\), but must have \(6,\)"),
        (lambda u: topk_groups(jnp.ones(6), u, 0.1), r"density=0.1\)` keeps none of 6 .* 0.167"),
        (
            lambda u: topk_groups(jnp.ones(6), u, 1.5),
            r"density=1.5\)`: `density` must be in \(0, 1\]",
        ),
    ],
)
def test_scores_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(found("mlp"))


P = CASES["mlp"][1]


@pytest.mark.parametrize(
    "params, kept, message",
    [
        (P, np.ones(5, bool), r"shape \(5,\) and dtype bool, but must be bool \(6,\)"),
        (P, np.arange(6), r"dtype int64, but must be bool \(6,\)"),
        (P, np.zeros(6, bool), "keeps none of 6 groups"),
        ({**P, "up": None}, half((6,)), r"does not have 'up'. It has \['down'"),
        ({**P, "up": P["up"].T}, half((6,)), r"'up' has shape \(6, 5\), but had \(5, 6\)"),
        (
            jp.quantize("int8", jp.Sites({"down": mlp_sites()["down"]}))(KEY, P),
            half((6,)),
            "'down' is a structured weight.*Merge first",
        ),
        ({**P, "up_bias": jp.Trainable(P["up_bias"])}, half((6,)), "'up_bias' is a structured"),
    ],
)
def test_what_cannot_be_pruned_is_refused(params, kept, message):
    with pytest.raises(ValueError, match=message):
        prune_structured(params, found("mlp"), kept)


def test_layers_that_keep_different_numbers_are_refused():
    kept = np.tile(np.arange(F) < 3, (L, 1))
    kept[1, 4] = True
    with pytest.raises(ValueError, match=r"keeps 3 or 4 groups, by slice of the stack \(4,\)"):
        prune_structured(CASES["scanned mlp"][1], found("scanned mlp"), kept)


# The decoder ------------------------------------------------------------------------------------


def test_a_decoder_without_half_of_its_hidden_units_and_heads():
    config = decoder.Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qkv_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    shapes, treedef = jax.tree.flatten(decoder.shapes(config))
    params = jax.tree.unflatten(treedef, [normal(i, *x.shape) for i, x in enumerate(shapes)])
    tokens = jnp.array([[1, 5, 2, 9], [3, 3, 0, 7]])
    forward = jax.jit(decoder.apply_fn(config))
    sites = jp.sites(forward, params, tokens)
    inner = prunable_groups(
        12, outputs=sites.match("*/gate/kernel", "*/up/kernel"), inputs=sites.match("*/down/kernel")
    )
    groups = prunable_groups(
        2, outputs=sites.match("*/[qkv]/kernel"), inputs=sites.match("*/o/kernel")
    )
    scores = jp.sparsity.magnitude_scores(params, sites.hidden)
    kept = topk_groups(scores, inner, 0.5), topk_groups(scores, groups, 0.5)
    smaller = prune_structured(prune_structured(params, inner, kept[0]), groups, kept[1])

    ffn, heads = kept[0], jnp.repeat(kept[1], 4, axis=-1)  # a key-value head has 4 numbers
    queries = jnp.repeat(kept[1], 8, axis=-1)  # two query heads
    zeroed = jax.tree.map(lambda x: x, params)
    mlp, attn = zeroed["layers"]["mlp"], zeroed["layers"]["attn"]
    for name, mask in (("gate", ffn), ("up", ffn)):
        mlp[name] = {
            "kernel": mlp[name]["kernel"] * mask[:, None],
            "bias": mlp[name]["bias"] * mask,
        }
    mlp["down"]["kernel"] *= ffn[..., None]
    for name, mask in (("q", queries), ("k", heads), ("v", heads)):
        old = attn[name]
        attn[name] = {"kernel": old["kernel"] * mask[:, None], "bias": old["bias"] * mask}
    attn["o"]["kernel"] *= queries[..., None]

    small = dataclasses.replace(config, intermediate_size=6, num_heads=2, num_kv_heads=1)
    assert jax.tree.map(jnp.shape, smaller) == jax.tree.map(jnp.shape, decoder.shapes(small))
    want = forward(zeroed, tokens)
    got = jax.jit(decoder.apply_fn(small))(smaller, tokens)
    np.testing.assert_allclose(got, want, atol=1e-10)
    assert np.abs(want - forward(params, tokens)).max() > 1e-2

    # Of a layer: 6 of 12 inner units (3 * 8 + 2 numbers each) and one of two groups, of two heads
    # in q and o and one in k and v, 4 numbers a head, 8 for each of those and biases of q, k, v.
    fewer = 3 * (6 * (3 * 8 + 2) + 8 * (2 * 2 + 2) * 4 + (2 + 1 + 1) * 4)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert bytes_of(params) - bytes_of(smaller) == 8 * fewer
