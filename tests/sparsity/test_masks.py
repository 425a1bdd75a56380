"""Scores, masks, pruning, and training of chosen entries alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.calibration import Moments
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.sparsity._masks import pack_mask, unpack_mask
from tests.methods.stack import model, normal, params

L, D, F = 2, 4, 6
KEY = jax.random.key(0)


PARAMS = params(L, D, F, 3)
BATCHES = [(normal(3 + i, 5, D), normal(9 + i, 5, 3)) for i in range(2)]
X = BATCHES[0][0]
SITES = jp.sites(model, PARAMS, X).linear
HEAD = SITES.match("head")


def loss(params, batch):
    x, y = batch
    return jnp.sum((model(params, x) - y) ** 2)


def flat(params):
    return {"layers/up": params["layers"]["up"], "layers/down": params["layers"]["down"]} | {
        "head": params["head"]
    }


def random_masks(share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.random(site.shape) < share) for path, site in SITES.items()}


# Scores -----------------------------------------------------------------------------------------


@functools.cache
def head_loss(index):
    """The loss of a batch as a function of the head alone, as one vector."""
    return lambda w: loss({**PARAMS, "head": w.reshape(D, 3)}, BATCHES[index])


def by_hand(rule):
    w = PARAMS["head"].ravel()
    g = jnp.stack([jax.grad(head_loss(i))(w) for i in range(2)])
    h = jnp.stack([jax.hessian(head_loss(i))(w) for i in range(2)])
    return {
        "snip": lambda: jnp.abs(w * g.mean(0)),
        "taylor": lambda: ((w * g) ** 2).mean(0),
        "fisher": lambda: (g**2).mean(0),
        "obd": lambda: w**2 * jnp.diagonal(h, axis1=1, axis2=2).mean(0) / 2,
        "grasp": lambda: w * (h.mean(0) @ g.mean(0)),
    }[rule]().reshape(D, 3)


@pytest.mark.parametrize("rule", ["snip", "taylor", "fisher", "grasp"])
def test_scores_are_those_of_the_formula(rule):
    got = jp.sparsity.saliency_scores(rule, loss, PARAMS, HEAD, BATCHES)["head"]
    np.testing.assert_allclose(got, by_hand(rule), rtol=1e-9)


def test_grasp_takes_the_gradient_of_all_batches_and_all_weights_together():
    """w_i times row i of the whole Hessian, and batches may come from an iterator."""
    chosen = flat(PARAMS)

    def total(chosen):
        layers = {"up": chosen["layers/up"], "down": chosen["layers/down"]}
        tree = {**PARAMS, "layers": {**PARAMS["layers"], **layers}, "head": chosen["head"]}
        return sum(loss(tree, batch) for batch in BATCHES) / 2

    g = jax.grad(total)(chosen)
    h = jax.hessian(total)(chosen)
    got = jp.sparsity.saliency_scores("grasp", loss, PARAMS, SITES, iter(BATCHES))
    for path, w in chosen.items():
        product = sum(jnp.tensordot(h[path][other], g[other], g[other].ndim) for other in g)
        np.testing.assert_allclose(got[path], w * product, rtol=1e-8)


@pytest.mark.parametrize("rule", ["snip", "taylor", "fisher", "grasp", "obd"])
def test_a_base_in_bf16_is_scored_by_as_many_batches_as_there_are(rule):
    """A sum in bfloat16 stops growing after some hundred equal terms."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, BATCHES[0]))
    few, many = (
        jp.sparsity.saliency_scores(rule, loss, narrow[0], HEAD, [narrow[1]] * n, key=KEY)["head"]
        for n in (1, 600)
    )
    assert many.dtype == jnp.float32
    if rule != "obd":  # whose signs differ by batch
        np.testing.assert_allclose(many, few, rtol=1e-4)


def test_the_diagonal_of_the_hessian_is_estimated_without_bias():
    many = [batch for _ in range(300) for batch in BATCHES]
    got = jp.sparsity.saliency_scores("obd", loss, PARAMS, HEAD, many, key=KEY)["head"]
    want = by_hand("obd")
    np.testing.assert_allclose(got, want, atol=0.1 * float(want.max()))
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.99


def test_obs_is_the_error_of_the_best_column_without_the_entry():
    moments = jp.calibration.input_moments(lambda p, b: model(p, b[0]), PARAMS, HEAD, BATCHES[:1])
    got = jp.sparsity.obs_scores(PARAMS, HEAD, moments, damping=1e-9)["head"]
    h = np.asarray(moments["head"].second)
    for i, j in ((0, 0), (2, 1), (3, 2)):
        w = np.asarray(PARAMS["head"][:, j])
        others = [k for k in range(D) if k != i]
        best = np.zeros(D)
        best[others] = np.linalg.solve(h[np.ix_(others, others)], (h @ w)[others])
        np.testing.assert_allclose(got[i, j], (w - best) @ h @ (w - best), rtol=1e-6)


def test_magnitudes_are_absolute():
    np.testing.assert_array_equal(
        jp.sparsity.magnitude_scores(PARAMS, SITES)["layers/up"], jnp.abs(PARAMS["layers"]["up"])
    )


# Masks ------------------------------------------------------------------------------------------


def test_the_largest_of_all_are_kept_or_of_each_matrix():
    scores = jp.sparsity.magnitude_scores(PARAMS, SITES)
    every = np.concatenate([np.ravel(x) for x in scores.values()])
    masks = jp.sparsity.topk_mask(scores, SITES, 0.25)
    limit = np.sort(every)[::-1][int(0.25 * every.size) - 1]
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, scores[path] >= limit)
    assert jp.sparsity.mask_density(masks)[""] == pytest.approx(0.25, abs=1 / every.size)
    masks = jp.sparsity.topk_mask(scores, SITES, 0.5, scope="matrix")
    assert {int(x.sum()) for x in masks["layers/up"]} == {D * F // 2}


@pytest.mark.parametrize(
    "structure, sides",
    [("input", (1, 3)), ("output", (4, 1)), ((2, 3), (2, 3)), ((None, 1), (4, 1))],
)
def test_groups_are_kept_together(structure, sides):
    mask = jp.sparsity.topk_mask(
        jp.sparsity.magnitude_scores(PARAMS, HEAD), HEAD, 0.5, structure=structure
    )["head"]
    rows, columns = sides
    blocks = mask.reshape(D // rows, rows, 3 // columns, columns).transpose(0, 2, 1, 3)
    means = np.abs(PARAMS["head"]).reshape(D // rows, rows, 3 // columns, columns).mean((1, 3))
    chosen = blocks.reshape(*means.shape, -1)
    assert (chosen.all(-1) == chosen.any(-1)).all() and chosen.any()
    assert means[chosen.any(-1)].min() > means[~chosen.any(-1)].max()


def test_whole_layers_are_kept():
    layers = SITES.match("layers/*")
    scores = {
        path: jnp.stack([jnp.ones(s.shape[1:]), 2 * jnp.ones(s.shape[1:])])
        for path, s in layers.items()
    }
    masks = jp.sparsity.topk_mask(scores, layers, 0.5, structure="matrix", allow_empty=True)
    assert all(not mask[0].any() and mask[1].all() for mask in masks.values())


def test_masks_of_a_kernel_by_heads_follow_its_layout():
    def heads(params, x):
        return jnp.einsum("td,dhk->thk", x, params["q"])

    params = {"q": normal(0, D, 3, 2)}
    sites = jp.sites(heads, params, X).linear
    scores = {"q": jnp.broadcast_to(jnp.array([1.0, 3, 2])[:, None], (D, 3, 2))}
    mask = jp.sparsity.topk_mask(scores, sites, 1 / 3, structure=(None, 2))["q"]
    assert mask[:, 1].all() and mask.sum() == 2 * D


def test_masks_survive_packing():
    (site,) = HEAD.values()
    mask = random_masks()["head"]
    np.testing.assert_array_equal(unpack_mask(pack_mask(mask), site, "f"), mask)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: jp.sparsity.topk_mask(s, SITES, 0.0), r"density=0.0\)`: `density` must be in"),
        (
            lambda s: jp.sparsity.topk_mask(s, SITES, 0.5, scope="row"),
            "scope='row'.*must be 'all' or 'matrix'",
        ),
        (
            lambda s: jp.sparsity.topk_mask(s, SITES, 0.5, structure="ring"),
            "structure='ring' is unknown; it must be one of entry",
        ),
        (
            lambda s: jp.sparsity.topk_mask(s, HEAD, 0.5, structure=(2,)),
            r"structure=\(2,\) has 1 numbers, but must have two, \(rows, columns\)",
        ),
        (
            lambda s: jp.sparsity.topk_mask(s, HEAD, 0.5, structure=(3, 1)),
            r"structure=\(3, 1\): blocks of 3 x 1 do not.*'head'.*4 x 3",
        ),
        (
            lambda s: jp.sparsity.topk_mask({}, HEAD, 0.5),
            r"scores of 'head' have shape None, but must have \(4, 3\)",
        ),
        (
            lambda s: jp.sparsity.topk_mask({"head": s["head"] / 0}, HEAD, 0.5),
            "'head' are not all finite",
        ),
        (
            lambda s: jp.sparsity.topk_mask({**s, "head": 0 * s["head"]}, SITES, 0.3),
            "keeps no entry of 'head'.*scope='matrix'",
        ),
        (
            lambda s: jp.sparsity.topk_mask(
                {"layers/up": s["layers/up"].at[1].set(0)}, SITES.match("*up"), 0.3
            ),
            "keeps no entry of matrix 1 of 'layers/up'",
        ),
        (
            lambda s: jp.sparsity.topk_mask({}, SITES - SITES, 0.5),
            "`topk_mask` selects no parameter",
        ),
        (
            lambda s: jp.prune(s, HEAD),
            "`prune`: the mask of 'head' has dtype float64, but must be b",
        ),
        (
            lambda s: jp.prune({}, HEAD),
            r"`prune`: the mask of 'head' has shape None, but must have",
        ),
        (
            lambda s: jp.sparse_delta(0.0, HEAD),
            r"`sparse_delta\(masks=0.0\)`: a density must be in \(0, 1\]",
        ),
        (
            lambda s: jp.sparse_delta({"head": jnp.zeros((D, 3), bool)}, HEAD)(KEY, PARAMS),
            "`sparse_delta`: the mask of 'head' has no entry. Leave",
        ),
        (
            lambda s: jp.sparsity.saliency_scores("snap", loss, PARAMS, HEAD, BATCHES),
            "criterion must be one of snip, taylor",
        ),
        (
            lambda s: jp.sparsity.saliency_scores("obd", loss, PARAMS, HEAD, BATCHES),
            "needs `key=jax.random.key",
        ),
        (
            lambda s: jp.sparsity.saliency_scores("snip", loss, PARAMS, HEAD, []),
            "iterator was exhausted after 0 batches, of at least one",
        ),
        (
            lambda s: jp.sparsity.obs_scores(PARAMS, HEAD, {}, damping=0.0),
            r"damping=0.0\)`: `damping` must be positive",
        ),
        (
            lambda s: jp.sparsity.obs_scores(
                PARAMS, HEAD, {"head": Moments(jnp.zeros((D, D)), X[0], 5)}
            ),
            "moments of 'head' cannot be inverted.*Leave the weight out",
        ),
        (
            lambda s: jp.chain(jp.full_finetuning(HEAD), jp.prune(random_masks(), HEAD))(
                KEY, PARAMS
            ),
            "`prune`: 'head' is already trained as a whole",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jp.sparsity.magnitude_scores(PARAMS, SITES))


@pytest.mark.parametrize(
    "second, name",
    [
        (jp.prune(random_masks(), SITES), "prune"),
        (jp.sparse_delta(0.5, SITES), "sparse"),
        (jp.hira(1, SITES), "hira"),
        (jp.gates(SITES), "gates"),
    ],
)
def test_entries_of_a_weight_without_dense_equivalent_are_refused(second, name):
    with pytest.raises(
        ValueError, match=rf"{name}.*: 'head' holds TaskGatedExperts, .*behind `{name}"
    ):
        jp.chain(jp.moelora(2, SITES, experts=2, tasks=2), second)(KEY, PARAMS)


# Uses -------------------------------------------------------------------------------------------


def test_pruned_entries_are_zero_and_cost_nothing():
    masks = random_masks()
    tree = jp.prune(masks, SITES)(KEY, PARAMS)
    for path, w in flat(tree).items():
        assert isinstance(w, jax.Array)
        np.testing.assert_array_equal(w, jnp.where(masks[path], flat(PARAMS)[path], 0))


def test_lora_on_a_pruned_base_merges_under_the_mask():
    masks = random_masks()
    pruned = jp.prune(masks, SITES)
    frozen, adapter = jp.split(jp.chain(pruned, jp.lora(2, SITES), pruned)(KEY, PARAMS))
    adapter = {path: x + 0.3 for path, x in adapter.items()}
    tree = jp.combine(frozen, adapter)
    merged = jp.merge(tree)
    for path, w in flat(merged).items():
        assert not w[~masks[path]].any() and (w[masks[path]] != 0).all()
    np.testing.assert_allclose(jp.lift(model)(tree, X), model(merged, X), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_only_entries_of_the_mask_are_trained(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    masks = random_masks(0.3)
    frozen, adapter = jp.split(jp.sparse_delta(masks, SITES)(KEY, params))
    assert adapter["head/values"].shape == (int(masks["head"].sum()),)
    widest = max(int(m.sum()) for m in masks["layers/up"])
    assert adapter["layers/up/values"].shape == (L, widest)
    x = X.astype(dtype)
    run = lambda adapter: jp.lift(model)(jp.combine(frozen, adapter), x)  # noqa: E731
    np.testing.assert_array_equal(run(adapter), model(params, x))
    # The gradient of the values is the dense one, at their entries.
    slope = jax.grad(lambda a: jnp.sum(run(a).astype(float) ** 2))(adapter)["head/values"]
    dense = jax.grad(lambda p: jnp.sum(model(p, x).astype(float) ** 2))(params)["head"]
    np.testing.assert_allclose(
        slope, dense[masks["head"]], rtol=1e-6 if dtype != jnp.bfloat16 else 0.05
    )
    moved = {path: v + 0.1 for path, v in adapter.items()}
    merged = flat(jp.merge(jp.combine(frozen, moved)))
    for path, w in merged.items():
        np.testing.assert_array_equal(w[~masks[path]], flat(params)[path][~masks[path]])
        assert (w[masks[path]] != flat(params)[path][masks[path]]).all()


def test_random_entries_have_one_density_in_every_matrix_and_no_duplicates():
    frozen, adapter = jp.split(jp.sparse_delta(0.5, SITES)(KEY, PARAMS))
    assert {k: v.shape for k, v in adapter.items()} == {
        "layers/up/values": (L, D * F // 2),
        "layers/down/values": (L, D * F // 2),
        "head/values": (6,),
    }
    merged = flat(jp.merge(jp.combine(frozen, {k: v + 1.0 for k, v in adapter.items()})))
    for path, w in merged.items():
        np.testing.assert_allclose(np.unique(np.round(w - flat(PARAMS)[path], 6)), [0, 1])


def test_a_file_holds_the_masks_too(tmp_path):
    masks = random_masks(0.3)
    method = jp.sparse_delta(masks, SITES, dtype=jnp.float64)
    frozen, adapter = jp.split(method(KEY, PARAMS))
    adapter = {path: x + 0.1 for path, x in adapter.items()}
    save_adapter(tmp_path, adapter, method, PARAMS, key=KEY)
    loaded = load_adapter(tmp_path, PARAMS)
    got, want = (jp.lift(model)(jp.combine(*pair), X) for pair in (loaded[1:], (frozen, adapter)))
    np.testing.assert_array_equal(got, want)
