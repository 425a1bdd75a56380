"""split, combine, and the one-tree form with a masked optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp

KEY = jax.random.key(0)


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def params():
    k = jax.random.split(jax.random.key(1), 3)
    return {
        "w": jax.random.normal(k[0], (6, 8)),
        "b": jax.random.normal(k[1], (8,)),
        "v": jax.random.normal(k[2], (8, 3)),
    }


def qlora():
    sites = jp.sites(model, params(), jnp.ones((2, 6)))
    return jp.chain(jp.quantize("int8", sites.linear), jp.lora(2, sites.linear))


def test_split_and_combine_are_inverse():
    tree = qlora()(KEY, params())
    frozen, adapter = jp.split(tree)
    assert sorted(adapter) == ["v/a", "v/b", "w/a", "w/b"]
    again, same = jp.split(tree)
    jax.tree.map(np.testing.assert_array_equal, adapter, same)
    assert jax.tree.structure(jp.combine(frozen, adapter)) == jax.tree.structure(
        jp.combine(again, same)
    )


def test_the_base_is_still_there():
    p = params()
    sites = jp.sites(model, p, jnp.ones((2, 6)))
    tree = jp.lora(2, sites.linear)(KEY, p)
    for t in (tree, jp.combine(*jp.split(tree))):
        back = jp.base(t)
        assert all(back[k] is p[k] for k in p)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"u/a": 1}, r"has \['u/a'\], for which the tree has no place"),
        (lambda a: {k: v for k, v in a.items() if k != "w/a"}, r"Nothing is given for 'w/a'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, message):
    frozen, adapter = jp.split(qlora()(KEY, params()))
    with pytest.raises(KeyError, match=message):
        jp.combine(frozen, change(adapter))


def test_a_value_of_the_call_that_nothing_takes_is_refused():
    frozen, adapter = jp.split(qlora()(KEY, params()))
    with pytest.raises(KeyError, match=r"takes no value called \['dropout'\].*none"):
        jp.combine(frozen, adapter, dropout=KEY)


def test_a_tree_without_marks_is_refused():
    with pytest.raises(ValueError, match="Nothing in this tree is trained"):
        jp.split(params())


def test_counts_and_memory_need_shapes_only():
    shapes = jax.eval_shape(params)
    tree = jax.eval_shape(qlora(), KEY, shapes)
    frozen, adapter = jp.split(tree)
    counts = jp.count(frozen, adapter)
    assert counts.trainable == 2 * (6 + 8) + 2 * (8 + 3)
    # int8 codes, float32 scales, the float64 bias
    assert counts.frozen_bytes == (48 + 24) + 8 * (8 + 3) + 8 * 8
    assert "trainable 50 of" in str(counts)


def test_the_one_tree_form_gives_the_same_adapter_and_leaves_the_rest_bit_unchanged():
    tree = qlora()(KEY, params())
    frozen, adapter = jp.split(tree)
    whole, labels = jp.combine(frozen, adapter), jp.labels(tree)
    xs = jax.random.normal(jax.random.key(2), (10, 4, 6))

    def tx():
        return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))

    def loss(tree, x):
        return jnp.sum(jp.lift(model)(tree, x) ** 2)

    both = optax.partition({"train": tx(), "freeze": optax.set_to_zero()}, labels)

    def arrays(tree):
        return {k: v for k, v in zip(paths, jax.tree.leaves(tree), strict=True)}

    paths = [jp.tree.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
    state, alone = both.init(whole), tx().init(adapter)
    # No moments for frozen leaves: count, mu and nu of the four trained ones.
    assert len([x for x in jax.tree.leaves(state) if hasattr(x, "shape")]) == 2 * 4 + 1
    one, two = whole, adapter
    for x in xs:
        grads = jax.grad(loss, allow_int=True)(one, x)
        grads = jax.tree.map(
            lambda g, w: jnp.zeros_like(w) if g.dtype == jax.dtypes.float0 else g, grads, one
        )
        updates, state = both.update(grads, state, one)
        one = jax.tree.map(lambda w, u: w + u.astype(w.dtype), one, updates)
        grads = jax.grad(lambda a, x=x: loss(jp.combine(frozen, a), x))(two)
        updates, alone = tx().update(grads, alone, two)
        two = optax.apply_updates(two, updates)
    before, after = arrays(whole), arrays(one)
    for path in before:
        if path in adapter:
            np.testing.assert_allclose(after[path], two[path], rtol=1e-10)
            assert not np.array_equal(after[path], before[path])
        else:
            np.testing.assert_array_equal(after[path], before[path])


def test_mask_and_labels_have_the_structure_of_the_combined_tree():
    tree = qlora()(KEY, params())
    whole = jp.combine(*jp.split(tree))
    mask = jp.mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(whole)
    assert sum(jax.tree.leaves(mask)) == 4


def test_a_trained_array_that_stands_twice_cannot_be_masked():
    p = params()
    sites = jp.sites(model, p, jnp.ones((2, 6)))
    method = jp.chain(jp.bitfit(sites), jp.bottleneck(2, sites.match("w")))
    with pytest.raises(ValueError, match=r"\['b'\] are trained and stand at several places"):
        jp.labels(method(KEY, p))
