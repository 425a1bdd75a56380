"""Shifted sparse attention against itself head by head, written with masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models import decoder, shifted_sparse

CONFIG = decoder.Config(
    vocab=19, width=12, mlp_width=20, layers=2, heads=4, kv_heads=2, head_dim=6, context=64
)
T, G = 32, 8


@functools.cache
def params(config=CONFIG):
    key = jax.random.key(0)
    return jax.tree.map(lambda x: 8 * x.astype(jnp.float64), decoder.init(config, key))


def ids(rows=2, seed=0):
    return np.random.default_rng(seed).integers(0, 19, (rows, T))


def run(config=CONFIG, group=G, tokens=None, **where):
    forward = decoder.pure(config, attention_fn=shifted_sparse(group))
    return jax.jit(forward)(params(config), ids() if tokens is None else tokens, **where)


def by_masks(q, k, v, *, queries, keys, window):
    """Every head over all tokens, with the pairs that it may see."""
    heads = q.shape[2]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    t = np.arange(q.shape[1])
    out = []
    for head in range(heads):
        group = t // G if head < heads // 2 else (t + G // 2) // G
        seen = (group[:, None] == group) & (t[:, None] >= t)
        if window is not None:
            seen = seen & (t[:, None] - t < window)
        scores = jnp.einsum("bth,bsh->bts", q[:, :, head], k[:, :, head]) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
        out.append(jnp.einsum("bts,bsh->bth", weights, v[:, :, head]))
    return jnp.stack(out, axis=2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_half_the_heads_see_shifted_groups(kv_heads):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    want = decoder.pure(config, attention_fn=by_masks)(params(config), ids())
    np.testing.assert_allclose(run(config), want, rtol=1e-9, atol=1e-9)


def test_a_window_holds_too():
    config = dataclasses.replace(CONFIG, family="mistral", window=3)
    want = decoder.pure(config, attention_fn=by_masks)(params(config), ids())
    np.testing.assert_allclose(run(config), want, rtol=1e-9, atol=1e-9)


def test_no_token_sees_a_later_one_and_the_last_not_the_first():
    tokens = ids()
    base = run(tokens=tokens)
    for at in (0, 5, 20):
        other = tokens.copy()
        other[:, at] = (other[:, at] + 1) % 19
        moved = np.abs(run(tokens=other) - base).max((0, 2)) > 1e-9
        assert not moved[:at].any() and moved[at]
    other = tokens.copy()
    other[:, 0] = (other[:, 0] + 1) % 19
    # Two layers carry what it says over at most two groups and a half.
    moved = np.abs(run(tokens=other) - base).max((0, 2)) > 1e-9
    assert moved[G] and not moved[-G // 2 :].any()


def test_short_texts_see_full_attention():
    want = decoder.pure(CONFIG)(params(), ids())
    np.testing.assert_allclose(run(group=T), want, rtol=1e-9, atol=1e-9)


def test_packed_texts_do_not_see_each_other():
    segments = np.repeat([[1, 2]], T // 2, axis=1)
    tokens = ids()
    base = run(tokens=tokens, segment_ids=np.broadcast_to(segments, tokens.shape))
    other = tokens.copy()
    other[:, 15] = (other[:, 15] + 1) % 19
    got = run(tokens=other, segment_ids=np.broadcast_to(segments, tokens.shape))
    np.testing.assert_allclose(got[:, 16:], base[:, 16:], rtol=1e-9)
    assert np.abs(got[:, 15] - base[:, 15]).max() > 1e-3


def test_the_scores_of_all_pairs_are_never_formed():
    shapes = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
            for x in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(x, "jaxpr") or hasattr(x, "eqns"):
                    visit(getattr(x, "jaxpr", x))

    forward = decoder.pure(CONFIG, attention_fn=shifted_sparse(G))
    visit(jax.make_jaxpr(forward)(params(), ids()).jaxpr)
    assert any(shape[-2:] == (G, G) for shape in shapes)
    assert not any(shape[-2:] == (T, T) for shape in shapes)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: shifted_sparse(5), r"shifted_sparse\(5\)`: an even number"),
        (lambda: run(group=10), "32 tokens must be a multiple of the group, and 4 heads of 2"),
        (
            lambda: decoder.pure(CONFIG, attention_fn=shifted_sparse(G))(
                params(), ids()[:, :1], cache=decoder.init_cache(CONFIG, 2, 9, jnp.float64)
            ),
            "is for training: 1 queries meet 9 keys",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_longlora_trains_factors_the_embedding_and_the_norms():
    forward = decoder.pure(CONFIG)
    sites = jp.sites(forward, params(), ids())
    attention = sites.match("layers/attn/*/kernel")
    method = jp.longlora(2, attention, sites.embedding, sites.norm)
    _, adapter = jp.split(method(jax.random.key(0), params()))
    own = {path for path in adapter if path.rpartition("/")[2] not in "ab"}
    norms = {"norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale"}
    assert own == {"embed/embedding"} | norms
    with pytest.raises(ValueError, match=r"longlora\(norms=...\)` selects no parameter"):
        jp.longlora(2, attention, sites.embedding, sites.norm - sites.norm)
