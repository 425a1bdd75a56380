"""split, combine, and the one-tree form with a masked optimizer."""

import functools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import _tree as tree_module

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
        back = jp.base_params(t)
        assert all(back[k] is p[k] for k in p)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"u/a": 1}, r"has \['u/a'\], for which the tree has no placeholder"),
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


# What an adapter is compared with ---------------------------------------------------------------


@functools.cache
def low_rank(rank=4, alpha=8, **options):
    sites = jp.sites(model, params(), jnp.ones((2, 6)))
    return jp.split(jp.lora(rank, sites.match("w"), alpha=alpha, **options)(KEY, params()))


MADE = "'w/b' has shape (2, 8), where `lora` trains an array of shape (4, 8)"


def refused(message, error=ValueError):
    return pytest.raises(error, match=re.escape(message))


def test_an_adapter_of_another_rank_is_refused():
    """At half strength it would act without a word: `alpha / r` is the frozen tree's."""
    frozen, adapter = low_rank()
    other = low_rank(2)[1]
    with refused("'w/a' has shape (6, 2), where `lora` trains an array of shape (6, 4)"):
        jp.combine(frozen, other)
    with refused(MADE):
        jp.merge(jp.combine(frozen, {**adapter, "w/b": other["w/b"]}))
    with refused(MADE):
        jax.jit(lambda a: jp.combine(frozen, {**adapter, "w/b": a}))(other["w/b"])
    with refused(MADE):
        jax.eval_shape(lambda f, a: jp.combine(f, a), frozen, {**adapter, "w/b": other["w/b"]})
    with refused(MADE):
        jax.grad(lambda a: jnp.sum(jp.merge(jp.combine(frozen, a))["w"]))(
            {**adapter, "w/b": other["w/b"]}
        )


@pytest.mark.parametrize("shape", [(4,), (8, 4), (4, 8, 1), (5, 8), ()])
def test_an_array_of_another_shape_is_refused(shape):
    frozen, adapter = low_rank()
    for x in (jnp.ones(shape), np.ones(shape), jax.ShapeDtypeStruct(shape, jnp.float32)):
        with refused(f"'w/b' has shape {shape}, where `lora` trains an array of shape (4, 8)"):
            jp.combine(frozen, {**adapter, "w/b": x})


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "int4"])
def test_an_array_of_another_kind_of_dtype_is_refused(dtype):
    frozen, adapter = low_rank()
    for x in (jnp.ones((4, 8), dtype), jax.ShapeDtypeStruct((4, 8), jnp.dtype(dtype))):
        with refused(f"'w/b' is {dtype} of shape (4, 8), where `lora` trains float32 of shape"):
            jp.combine(frozen, {**adapter, "w/b": x})


def test_keys_and_gradients_of_integers_are_refused():
    frozen, adapter = low_rank()
    with refused("'w/b' is key<fry> of shape (4, 8), where `lora` trains float32"):
        jp.combine(frozen, {**adapter, "w/b": jax.random.split(KEY, (4, 8))})
    float0 = np.zeros((4, 8), jax.dtypes.float0)
    with refused("where `lora` trains float32 of shape (4, 8)"):
        jp.combine(frozen, {**adapter, "w/b": float0})


@pytest.mark.parametrize("x", [1.0, True, [[1.0] * 8] * 4, 2 + 1j])
def test_numbers_of_python_are_refused(x):
    frozen, adapter = low_rank()
    with refused(f"'w/b' is a {type(x).__name__}, where `lora` trains an array of shape (4, 8)"):
        jp.combine(frozen, {**adapter, "w/b": x})


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "float8_e4m3fn"])
def test_an_adapter_in_another_floating_dtype_is_taken(dtype):
    frozen, adapter = low_rank()
    tree = jp.combine(frozen, {k: v.astype(dtype) for k, v in adapter.items()})
    assert tree["w"].weight.a.dtype == dtype


def test_a_complex_array_that_is_trained_stays_complex():
    def f(p, x):
        return x @ p["w"]

    p = {"w": jnp.ones((6, 3), jnp.complex64)}
    frozen, adapter = jp.split(jp.full_finetuning(jp.sites(f, p, jnp.ones((2, 6))))(KEY, p))
    assert jp.combine(frozen, {"w": adapter["w"].astype(jnp.complex128)})["w"].dtype == "complex128"
    with refused(
        "'w' is float32 of shape (6, 3), where `full_finetuning` trains complex64 of shape (6, 3)"
    ):
        jp.combine(frozen, {"w": adapter["w"].real})


def test_shapes_are_those_of_one_call():
    frozen, adapter = low_rank()
    many = {k: jnp.stack([v, 2 * v, 3 * v]) for k, v in adapter.items()}
    x = jax.random.normal(jax.random.key(3), (2, 6))

    def out(a):
        return jp.lift(model)(jp.combine(frozen, a), x)

    np.testing.assert_allclose(jax.vmap(out)(many)[1], out({k: v[1] for k, v in many.items()}))
    with refused("shape (3, 6, 4), where `lora` trains an array of shape (6, 4). It looks like"):
        out(many)
    with refused("a stack of 3 adapters. Map over them with `jax.vmap`"):
        out(many)
    # A tree that was made under vmap knows the shapes of one example too.
    keys = jax.random.split(KEY, 3)
    sites = jp.sites(model, params(), jnp.ones((2, 6)))
    method = jp.lora(2, sites.match("w"))
    stack, several = jax.vmap(lambda key: jp.split(method(key, params())))(keys)
    outs = jax.vmap(lambda f, a: jp.lift(model)(jp.combine(f, a), x))(stack, several)
    assert outs.shape == (3, 2, 3)


def test_shapes_will_do_for_combine():
    frozen, adapter = low_rank()
    shapes = jax.eval_shape(lambda: adapter)
    whole = jp.combine(jax.eval_shape(lambda: frozen), shapes)
    assert whole["w"].weight.a is shapes["w/a"]


def test_other_things_than_arrays_still_go_in():
    """JAX builds trees with shardings, specs and labels in the place of arrays."""
    frozen, adapter = low_rank()
    spec = jax.sharding.PartitionSpec("x", None)
    assert jp.combine(frozen, dict.fromkeys(adapter, spec))["w"].weight.a is spec
    assert jp.combine(frozen, dict.fromkeys(adapter, "train"))["w"].weight.b == "train"


def test_two_adapters_of_a_method_share_one_program():
    # Without an alpha the scale is 1 at every rank: only the places differ.
    one, two, other = (
        low_rank(r, None, dtype=d) for r, d in ((4, "float32"), (4, "bfloat16"), (2, "float32"))
    )
    assert jax.tree.structure(one[0]) == jax.tree.structure(two[0])
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])
    assert jax.tree.structure(one[0]) != jax.tree.structure(other[0])
    traced = []

    @jax.jit
    def step(frozen, adapter):
        traced.append(1)
        return jp.merge(jp.combine(frozen, adapter))["w"]

    step(*one)
    step(low_rank.__wrapped__(4, None)[0], {k: 2 * v for k, v in one[1].items()})
    assert len(traced) == 1
    # The program of one tree never serves an adapter that belongs to another.
    with refused("'w/a' has shape (6, 4), where `lora` trains an array of shape (6, 2)"):
        step(other[0], one[1])


def test_places_are_pickled_with_what_they_expect():
    frozen, adapter = low_rank()
    again = pickle.loads(pickle.dumps(frozen))
    assert jax.tree.structure(again) == jax.tree.structure(frozen)
    with refused("'w/a' has shape (6, 2), where `lora` trains an array of shape (6, 4)"):
        jp.combine(again, low_rank(2)[1])


def test_every_way_to_train_an_array_knows_its_shape():
    """Shared arrays, the model's own, and a part of one; each names its method."""
    p = params()
    sites = jp.sites(model, p, jnp.ones((2, 6)))
    methods = {
        "vera": (jp.vera(3, sites.linear), "w/d", (3,)),
        "ia3": (jp.ia3(sites.match("w")), "w/scale", (8,)),
        "moelora": (
            jp.moelora(2, sites.linear, experts=2, tasks=3, task_embedding_dim=4),
            "v/gate",
            (4, 2),
        ),
        "bitfit": (jp.bitfit(sites), "b", (8,)),
        "dora": (jp.dora(2, sites.match("w")), "w/magnitude", (8,)),
        "sparse_delta": (jp.sparse_delta(0.5, sites.match("w")), "w/values", (24,)),
    }
    for name, (method, path, shape) in methods.items():
        frozen, adapter = jp.split(method(KEY, p))
        call = {"task": 0} if name == "moelora" else {}
        jp.combine(frozen, adapter, **call)
        assert path in adapter, sorted(adapter)
        with refused(f"'{path}' has shape (9, 9), where `{name}` trains an array of shape {shape}"):
            jp.combine(frozen, {**adapter, path: jnp.ones((9, 9))}, **call)


def test_shapes_are_compared_after_a_conversion_too():
    def table(p, ids):
        return p["table"][ids]

    p = {"table": jnp.ones((7, 4))}
    sites = jp.sites(table, p, jnp.zeros((2, 3), int))
    tuned = jp.p_tuning(2, sites.embedding, encoder="mlp")
    frozen, adapter = jp.adapters.drop_reparameterization(*jp.split(tuned(KEY, p)))
    trained = "`drop_reparameterization` trains an array of shape (2, 4)"
    with refused(f"'table/rows' has shape (3, 4), where {trained}"):
        jp.combine(frozen, {"table/rows": jnp.ones((3, 4))})
    sites = jp.sites(model, params(), jnp.ones((2, 6))).match("w")
    method = jp.lora(2, sites)
    experts = jp.mixtures.stack_adapters([(method, jp.split(method(KEY, params()))[1])] * 2)
    gates = jp.xlora(experts.sites, experts.ranks, gate_input="input")
    frozen, adapter = jp.split(gates(KEY, params()))
    wrong = {k: x[..., :1] for k, x in experts.arrays.items()}
    with refused("'w/experts/a' has shape (6, 1), where `xlora` trains an array of shape (6, 4)"):
        jp.combine(frozen, {**wrong, **adapter})


def test_an_adapter_of_pruned_ranks_has_a_tree_of_its_own():
    p = params()
    method = jp.adalora(3, jp.sites(model, p, jnp.ones((2, 6))).match("w"))
    frozen, adapter = jp.split(method(KEY, p))
    adapter["w/values"] = jnp.array([1.0, 0.0, 2.0], jnp.float32)
    smaller, less = jp.adapters.drop_pruned_ranks(method, adapter)
    tree = jp.combine(jp.split(smaller(KEY, p))[0], less)
    whole = jp.combine(frozen, adapter)
    np.testing.assert_allclose(jp.merge(tree)["w"], jp.merge(whole)["w"], rtol=1e-6)
    with refused("'w/a' has shape (6, 2), where `adalora` trains an array of shape (6, 3)"):
        jp.combine(frozen, less)


def test_paths_are_derived_once_for_a_structure(monkeypatch):
    frozen, adapter = low_rank()
    want = jp.combine(frozen, adapter)
    monkeypatch.setattr(tree_module, "flatten", lambda *_, **__: pytest.fail("paths derived anew"))
    again = jp.combine(jax.tree.map(lambda x: x + 0, frozen), adapter)
    assert jax.tree.structure(again) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, again, want)


def test_a_tree_whose_static_parts_have_no_hash_is_put_together():
    @jax.tree_util.register_pytree_node_class
    class Node(dict):
        def tree_flatten(self):
            return list(self.values()), {"names": list(self), "array": np.ones(2)}

        @classmethod
        def tree_unflatten(cls, meta, children):
            return cls(zip(meta["names"], children, strict=True))

    frozen, adapter = low_rank()
    for _ in range(2):
        jp.combine({"a": Node(frozen)}, adapter)
        with refused("'w/a' has shape (6, 2)"):
            jp.combine({"a": Node(frozen)}, low_rank(2)[1])


def test_structures_that_are_no_longer_used_are_forgotten():
    for i in range(100):
        jp.combine({f"x{i}": jnp.ones(1)}, {})
    assert len(tree_module._plans) <= 32


def test_a_tree_without_marks_is_refused():
    with pytest.raises(ValueError, match="nothing in this tree is trainable"):
        jp.split(params())


def test_counts_and_memory_need_shapes_only():
    shapes = jax.eval_shape(params)
    tree = jax.eval_shape(qlora(), KEY, shapes)
    frozen, adapter = jp.split(tree)
    counts = jp.count_params(frozen, adapter)
    assert counts.trainable == 2 * (6 + 8) + 2 * (8 + 3)
    # int8 codes, float32 scales, the float64 bias
    assert counts.frozen_bytes == (48 + 24) + 8 * (8 + 3) + 8 * 8
    assert "trainable 50 of" in str(counts)


def test_the_one_tree_form_gives_the_same_adapter_and_leaves_the_rest_bit_unchanged():
    tree = qlora()(KEY, params())
    frozen, adapter = jp.split(tree)
    whole, labels = jp.combine(frozen, adapter), jp.param_labels(tree)
    xs = jax.random.normal(jax.random.key(2), (10, 4, 6))

    def tx():
        return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))

    def loss(tree, x):
        return jnp.sum(jp.lift(model)(tree, x) ** 2)

    both = optax.partition({"train": tx(), "freeze": optax.set_to_zero()}, labels)

    def arrays(tree):
        return {k: v for k, v in zip(paths, jax.tree.leaves(tree), strict=True)}

    paths = [tree_module.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
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
    mask = jp.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(whole)
    assert sum(jax.tree.leaves(mask)) == 4


def test_a_trained_array_that_stands_twice_cannot_be_masked():
    p = params()
    sites = jp.sites(model, p, jnp.ones((2, 6)))
    method = jp.chain(jp.bitfit(sites), jp.bottleneck_adapter(2, sites.match("w")))
    with pytest.raises(ValueError, match=r"\['b'\] are trained and have several places"):
        jp.param_labels(method(KEY, p))
