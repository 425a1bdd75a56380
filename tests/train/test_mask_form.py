"""One tree and a masked optimizer: the same adapter as with two trees, the rest untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import jaxpeft as jp
from jaxpeft import train

STEPS, CLIP = 10, 0.05


def forward(params, tokens):
    """The toy model, with ids renamed by a table of uint8 codes before they are looked up."""
    x = params["embed"][params["rename"][tokens].astype(jnp.int32)]
    return jnp.tanh(x @ params["w"]) @ params["head"]


@pytest.fixture(scope="module")
def setting():
    _, frozen = toy.model()
    params = frozen | {"rename": jnp.arange(toy.VOCABULARY, dtype=jnp.uint8)[::-1]}
    sites = jp.sites(forward, params, jnp.zeros((1, 2), jnp.int32))
    method = jp.chain(
        jp.quantize("int8", sites.match("w", "head")),
        jp.lora(2, sites.match("w"), dtype=jnp.float64),
    )
    tree = method(jax.random.key(0), params)
    frozen, adapter = jp.split(tree)
    noise = np.random.default_rng(0)  # away from the init, at which half the gradients are 0
    adapter = {path: x + 0.3 * noise.normal(size=x.shape) for path, x in adapter.items()}
    return tree, frozen, adapter


def mean_loss(tree, batch):
    logits = jp.lift(forward)(tree, batch["tokens"])
    total, weight = train.cross_entropy(logits, batch["targets"], batch["weights"])
    return total / weight


def optimizer():
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(1e-2, weight_decay=0.1))


def batches():
    return [toy.batch(seed=seed) for seed in range(STEPS)]


@pytest.fixture(scope="module")
def two_trees(setting):
    _, frozen, adapter = setting
    tx = optimizer()
    state = tx.init(adapter)

    @jax.jit
    def step(adapter, state, batch):
        grads = jax.grad(lambda a: mean_loss(jp.combine(frozen, a), batch))(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, optax.tree.norm(grads)

    for batch in batches():
        adapter, state, norm = step(adapter, state, batch)
        assert norm > CLIP
    return adapter


def test_one_tree_with_a_partitioned_optimizer_trains_the_same_adapter(setting, two_trees):
    tree, frozen, adapter = setting
    labels = jp.param_labels(tree)
    tx = optax.partition({"train": optimizer(), "freeze": optax.set_to_zero()}, labels)
    start = jp.combine(frozen, adapter)
    state = tx.init(start)

    @jax.jit
    def step(tree, state, batch):
        grads = jax.grad(mean_loss, allow_int=True)(tree, batch)
        grads = train.fill_float0(grads, tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    one = start
    for batch in batches():
        one, state = step(one, state, batch)

    trained = jp.combine(frozen, two_trees)
    for path, (got, want, before, label) in enumerate(
        zip(
            *(jax.tree.leaves(t) for t in (one, trained, start, labels)),
            strict=True,
        )
    ):
        assert got.dtype == before.dtype, path
        if label == "train":
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
            assert not np.array_equal(got, before)
        else:
            np.testing.assert_array_equal(got, before)
    dtypes = {x.dtype for x in jax.tree.leaves(one)}
    assert jnp.dtype(jnp.uint8) in dtypes and jnp.dtype(jnp.int8) in dtypes

    moments = sum(x.size for x in jax.tree.leaves(state))
    assert moments == 2 * sum(x.size for x in adapter.values()) + 1


def test_the_train_step_takes_the_same_steps(setting, two_trees):
    _, frozen, adapter = setting

    def loss_fn(adapter, frozen, batch, key):
        logits = jp.lift(forward)(jp.combine(frozen, adapter), batch["tokens"])
        return train.cross_entropy(logits, batch["targets"], batch["weights"])

    tx = optax.adamw(1e-2, weight_decay=0.1)
    step = jax.jit(train.train_step(loss_fn, tx, clip=CLIP, accumulate=2), donate_argnums=0)
    state = train.init(adapter, tx)
    for batch in batches():
        state, _ = step(state, frozen, batch, None)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12),
        state.adapter,
        two_trees,
    )
