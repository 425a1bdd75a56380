"""One tree with what is trained and what is frozen in it, and an optimizer that knows which."""

import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft._tree import flatten
from tests.test_tree import model, params

KEY, F64 = jax.random.key(0), jnp.float64


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


ONE_TREE = {
    "lora": lambda s: jp.lora(2, s.linear, dtype=F64),
    "bitfit": lambda s: jp.bitfit(s),
    "nf4 + lora": lambda s: jp.chain(
        jp.quantize("nf4", s.linear, block=2), jp.lora(2, s.linear, dtype=F64)
    ),
    "nf4+dq + hra": lambda s: jp.chain(
        jp.quantize("nf4+dq", s.linear, block=2), jp.hra(2, s.match("w"), dtype=F64)
    ),
    "int4 + bitfit": lambda s: jp.chain(jp.quantize("int4", s.linear, block=2), jp.bitfit(s)),
    "vera": lambda s: jp.vera(2, s.linear, dropout=0.5, dtype=F64),
}


def bits(tree):
    """{path: bytes} of every array."""
    flat, _ = flatten(tree)
    return {path: np.asarray(x).tobytes() for path, x in flat.items()}


def with_signed_zeros(p):
    return {k: x.at[0].set(-0.0) for k, x in p.items()}


def as_the_docstring_of_mask_says(optimizer, marked):
    trained = jp.trainable_mask(marked)
    frozen = jax.tree.map(operator.not_, trained)
    return optax.chain(optax.masked(optimizer, trained), optax.masked(optax.set_to_zero(), frozen))


def stepped(form, name):
    """(the adapter's paths, all arrays before, and after two steps of the one-tree form).

    What is trained has gone where the two-tree form takes it.
    """
    p = {k: x.at[0].set(-0.0) for k, x in params().items()}
    x = jax.random.normal(jax.random.key(2), (4, 6))
    marked = ONE_TREE[name](jp.sites(model, p, x))(KEY, p)
    frozen, adapter = jp.split(marked)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    tx = form(inner, marked)

    @jax.jit
    def step(tree, state):
        grads = jax.grad(lambda t: jnp.sum(jp.lift(model)(t, x) ** 2), allow_int=True)(tree)
        return tx.update(grads, state, tree)

    @jax.jit
    def alone(adapter, state):
        tree = lambda a: jp.combine(frozen, a)  # noqa: E731
        grads = jax.grad(lambda a: jnp.sum(jp.lift(model)(tree(a), x) ** 2))(adapter)
        updates, state = inner.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    tree = jp.combine(frozen, adapter)
    after, state, two, own = tree, tx.init(tree), adapter, inner.init(adapter)
    for _ in range(2):
        updates, state = step(after, state)
        after = optax.apply_updates(after, updates)  # eagerly: XLA takes x + 0.0 for x
        two, own = alone(two, own)
    assert jax.tree.structure(after) == jax.tree.structure(tree)
    old, new = flatten(tree)[0], flatten(after)[0]
    for path in adapter:
        np.testing.assert_allclose(new[path], two[path], rtol=1e-10)
        assert not np.array_equal(new[path], old[path])
    return set(adapter), old, new


@pytest.mark.parametrize("name", ONE_TREE)
def test_a_real_step_leaves_every_frozen_array_bit_identical(name):
    trained, old, new = stepped(jp.trainable_only, name)
    for path in set(old) - trained:
        assert np.asarray(old[path]).tobytes() == np.asarray(new[path]).tobytes(), path


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_a_mask_used_as_its_docstring_says_leaves_the_base_as_it_is(name):
    trained, old, new = stepped(as_the_docstring_of_mask_says, name)
    for path in set(old) - trained:
        np.testing.assert_array_equal(old[path], new[path])


def test_a_mask_alone_would_move_the_base():
    """What `optax.masked` does where a mask is False, which the docstring of `mask` warns of."""
    marked = jp.lora(2, jp.sites(model, params(), jnp.ones((2, 6))).linear)(KEY, params())
    tree = jp.combine(*jp.split(marked))
    tx = optax.masked(optax.sgd(0.1), jp.trainable_mask(marked))
    grads = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    assert float(updates["b"][0]) == 1.0  # the raw gradient, uphill
    tx = jp.trainable_only(optax.sgd(0.1), marked)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    assert float(updates["b"][0]) == 0.0


def test_gradients_of_integers_need_the_params():
    p, x = params(), jnp.ones((2, 6))
    sites = jp.sites(model, p, x)
    marked = jp.chain(jp.quantize("int8", sites.match("w")), jp.bitfit(sites))(KEY, p)
    tree, tx = jp.combine(*jp.split(marked)), jp.trainable_only(optax.sgd(0.1), marked)
    grads = jax.grad(lambda t: jnp.sum(jp.lift(model)(t, x)), allow_int=True)(tree)
    with refused("integers of shape (6, 8)"):
        tx.update(grads, tx.init(tree))


def test_a_table_that_is_trained_in_part_has_no_mask():
    p = {"layers": jnp.ones((3, 4, 4))}

    def stacked(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0]

    marked = jp.last_layers(jp.sites(stacked, p, jnp.ones((2, 4))), 1)(KEY, p)
    for form in (
        jp.param_labels,
        jp.trainable_mask,
        lambda tree: jp.trainable_only(optax.sgd(0.1), tree),
    ):
        with refused("An array of this tree is trained in part"):
            form(marked)
