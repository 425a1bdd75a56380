"""SparseGPT: the kept entries of a pruned matrix compensate, on the inputs of the calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.sparsity import sparsegpt_update
from tests.methods.stack import model, normal, params

L, D, F, OUT = 2, 6, 8, 5
KEY = jax.random.key(0)
PARAMS = params(L, D, F, OUT)
X = normal(3, 40, D) @ (jnp.eye(D) + 0.8 * normal(4, D, D))  # correlated
SITES = jp.sites(model, PARAMS, X).linear
HEAD = SITES.match("head")
MOMENTS = jp.calibration.input_moments(model, PARAMS, SITES, [X])
MASKS = jp.sparsity.topk_mask(
    jp.sparsity.magnitude_scores(PARAMS, SITES), SITES, 0.5, scope="matrix"
)


def linear(p, x):
    return x @ p["w"]


def one(w, x):
    """The tree, sites and moments of one product."""
    sites = jp.sites(linear, {"w": w}, x).linear
    return {"w": w}, sites, jp.calibration.input_moments(linear, {"w": w}, sites, [x])


def by_hand(w, mask, second, damping):
    """One matrix, from the inverse itself."""
    w, h = np.array(w, np.float64), np.array(second, np.float64)
    n = len(h)
    inverse = np.linalg.inv(h + damping * np.trace(h) / n * np.eye(n))
    u = np.linalg.cholesky(inverse).T
    np.testing.assert_allclose(u.T @ u, inverse, rtol=1e-8)
    for column in range(w.shape[1]):
        for i in range(n):
            if mask[i, column]:
                continue
            e = w[i, column] / u[i, i]
            for j in range(i + 1, n):
                w[j, column] -= u[i, j] * e
            w[i, column] = 0
    return w


def flat(tree):
    return {"layers/up": tree["layers"]["up"], "layers/down": tree["layers"]["down"]} | {
        "head": tree["head"]
    }


def test_every_matrix_of_a_stack_is_that_of_the_formula():
    tree = sparsegpt_update(PARAMS, SITES, MASKS, MOMENTS, damping=0.05)
    got, old = flat(tree), flat(PARAMS)
    want = by_hand(old["head"], MASKS["head"], MOMENTS["head"].second, 0.05)
    np.testing.assert_allclose(got["head"], want, rtol=1e-8, atol=1e-12)
    for path in ("layers/up", "layers/down"):
        for i in range(L):
            want = by_hand(old[path][i], MASKS[path][i], MOMENTS[path].second[i], 0.05)
            np.testing.assert_allclose(got[path][i], want, rtol=1e-8, atol=1e-12)
    assert np.abs(got["layers/up"] - jnp.where(MASKS["layers/up"], old["layers/up"], 0)).max() > 0.1


def test_pruning_the_first_inputs_gives_the_least_squares_solution():
    w, lost = normal(7, D, OUT), [1, 3, 0, 2, 5]
    mask = np.arange(D)[:, None] >= np.array(lost)[None]  # the first so many of each column
    tree, sites, moments = one(w, X)
    got = sparsegpt_update(tree, sites, {"w": jnp.asarray(mask)}, moments, damping=1e-12)["w"]
    for j, k in enumerate(lost):
        best = np.linalg.lstsq(np.asarray(X[:, k:]), np.asarray(X @ w[:, j]), rcond=None)[0]
        np.testing.assert_allclose(got[k:, j], best, rtol=1e-7)


def test_outputs_are_nearer_than_without_compensation():
    # 32 inputs that share 8 directions, and noise.
    x = normal(0, 200, 8) @ normal(1, 8, 32) + 0.3 * normal(2, 200, 32)
    _, sites, moments = one(normal(3, 32, OUT), x)
    for seed in range(3, 6):
        tree = {"w": normal(seed, 32, OUT)}
        masks = jp.sparsity.topk_mask(jp.sparsity.magnitude_scores(tree, sites), sites, 0.5)
        off = np.asarray(tree["w"] - sparsegpt_update(tree, sites, masks, moments)["w"])
        plain = np.where(masks["w"], 0, tree["w"])
        assert ((x @ off) ** 2).sum() < 0.75 * ((x @ plain) ** 2).sum()
        # Not because it is nearer to the weight.
        assert (off**2).sum() > (plain**2).sum()


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_and_arrays_keep_their_dtypes(dtype):
    tree = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    sites = SITES if dtype == jnp.float64 else HEAD
    got = sparsegpt_update(tree, sites, MASKS, MOMENTS)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for path in sites:
        w = flat(got)[path]
        assert w.dtype == dtype and w.shape == SITES[path].shape
        np.testing.assert_array_equal(w == 0, ~MASKS[path])


def test_16_bit_weights_are_computed_in_float32():
    w = normal(7, D, OUT).astype(jnp.bfloat16)
    tree, sites, moments = one(w, X)
    assert moments["w"].second.dtype == jnp.float32
    mask = jnp.asarray(np.random.default_rng(0).random((D, OUT)) < 0.5)
    got = sparsegpt_update(tree, sites, {"w": mask}, moments)["w"]
    want = by_hand(w, mask, moments["w"].second, 0.01)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)


def test_what_is_kept_whole_or_not_selected_stays():
    whole = {path: jnp.ones(site.shape, bool) for path, site in SITES.items()}
    for path, w in flat(sparsegpt_update(PARAMS, SITES, whole, MOMENTS)).items():
        np.testing.assert_array_equal(w, flat(PARAMS)[path])
    got = sparsegpt_update(PARAMS, HEAD, MASKS, MOMENTS)
    assert got["layers"]["up"] is PARAMS["layers"]["up"]


def test_kernels_of_several_axes_are_those_of_their_matrices():
    def heads(p, x):
        return jnp.einsum("thk,dhk->td", jnp.einsum("td,dhk->thk", x, p["q"]), p["o"])

    tree = {"q": normal(0, D, 3, 2), "o": normal(1, 5, 3, 2)}  # outputs come first in `o`
    sites = jp.sites(heads, tree, X).linear
    moments = jp.calibration.input_moments(heads, tree, sites, [X])
    masks = jp.sparsity.topk_mask(jp.sparsity.magnitude_scores(tree, sites), sites, 0.5)
    got = sparsegpt_update(tree, sites, masks, moments)
    assert got["q"].shape == (D, 3, 2) and got["o"].shape == (5, 3, 2)
    w, mask = (x["q"].reshape(D, 6) for x in (tree, masks))
    want = by_hand(w, mask, moments["q"].second, 0.01)
    np.testing.assert_allclose(got["q"].reshape(D, 6), want, rtol=1e-8, atol=1e-12)
    w, mask = (x["o"].reshape(5, 6).T for x in (tree, masks))
    want = by_hand(w, mask, moments["o"].second, 0.01)
    np.testing.assert_allclose(got["o"].reshape(5, 6).T, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: sparsegpt_update(PARAMS, HEAD, MASKS, {}),
            "there are no moments of the inputs of 'head'",
        ),
        (
            lambda: sparsegpt_update(
                PARAMS,
                HEAD,
                MASKS,
                {"head": MOMENTS["head"]._replace(second=jnp.eye(5))},
            ),
            r"moments of 'head' have shape \(5, 5\), but must have \(6, 6\)",
        ),
        (
            lambda: sparsegpt_update(PARAMS, HEAD, {}, MOMENTS),
            "`sparsegpt_update`: the mask of 'head' has shape None",
        ),
        (
            lambda: sparsegpt_update(PARAMS, HEAD, {"head": MASKS["head"].T}, MOMENTS),
            r"mask of 'head' has shape \(5, 6\), but must have \(6, 5\)",
        ),
        (
            lambda: sparsegpt_update(PARAMS, HEAD, MASKS, MOMENTS, damping=0.0),
            r"damping=0.0\)`: `damping` must be positive",
        ),
        (
            lambda: sparsegpt_update(
                PARAMS,
                HEAD,
                MASKS,
                {"head": MOMENTS["head"]._replace(second=jnp.zeros((D, D)))},
            ),
            r"moments of 'head' cannot be inverted in float64.*larger damping",
        ),
        (
            lambda: sparsegpt_update(jp.quantize("int8", HEAD)(KEY, PARAMS), HEAD, MASKS, MOMENTS),
            "`sparsegpt_update`: 'head' is not a plain array",
        ),
        (
            lambda: sparsegpt_update({**PARAMS, "head": PARAMS["head"].T}, HEAD, MASKS, MOMENTS),
            r"'head' has shape \(5, 6\), but had \(6, 5\)",
        ),
        (
            lambda: sparsegpt_update(PARAMS, HEAD.output_slice(0, 5), MASKS, MOMENTS),
            "`sparsegpt_update`: a part of the columns of 'head'",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
