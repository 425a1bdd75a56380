import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from jaxpeft import train


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_close(got, want, tolerance=1e-12):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, tolerance, tolerance), got, want)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def mean_loss(adapter, frozen, batch):
    total, weight = toy.loss_fn(adapter, frozen, batch, None)
    return total / weight


def test_one_step_is_the_optimizer_on_the_clipped_gradient_of_the_mean_loss():
    adapter, frozen = toy.model()
    batch, clip = toy.batch(), 0.05
    tx = optax.adamw(1e-2)
    loss, grads = jax.value_and_grad(mean_loss)(adapter, frozen, batch)
    norm = optax.tree.norm(grads)
    assert norm > clip
    updates, _ = tx.update(
        jax.tree.map(lambda g: g * clip / norm, grads), tx.init(adapter), adapter
    )
    want = optax.apply_updates(adapter, updates)

    step = train.train_step(toy.loss_fn, tx, clip=clip)
    state, metrics = jax.jit(step)(train.init(adapter, tx), frozen, batch, None)
    assert_close(state.adapter, want)
    assert state.step == 1
    assert_close(metrics, train.Metrics(loss, norm, batch["weights"].sum(), False))


def test_a_small_gradient_is_not_clipped():
    adapter, frozen = toy.model()
    tx = optax.sgd(0.1)
    run = lambda clip: train.train_step(toy.loss_fn, tx, clip=clip)(  # noqa: E731
        train.init(adapter, tx), frozen, toy.batch(), None
    )
    assert_same(run(1e6), run(None))


@pytest.mark.parametrize("accumulate", [2, 3, 24])
def test_accumulation_changes_nothing_however_the_tokens_are_spread(accumulate):
    adapter, frozen = toy.model()
    batch = toy.batch()
    # Microbatch i has the rows i, i + accumulate, ...: make the first ten times as heavy.
    batch["weights"] = batch["weights"] * np.where(np.arange(24) % accumulate, 0.1, 1)[:, None]
    tx = optax.adamw(1e-2)
    one = train.train_step(toy.loss_fn, tx, clip=0.05)
    many = train.train_step(toy.loss_fn, tx, clip=0.05, accumulate=accumulate)
    state = train.init(adapter, tx)
    assert_close(many(state, frozen, batch, None), one(state, frozen, batch, None))


def test_accumulation_holds_the_activations_of_one_microbatch():
    adapter, frozen = toy.model()
    tx = optax.sgd(0.1)
    batch = toy.batch(rows=512)

    def temporaries(accumulate):
        step = jax.jit(train.train_step(toy.loss_fn, tx, accumulate=accumulate))
        compiled = step.lower(train.init(adapter, tx), frozen, batch, None).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.5 * temporaries(1)


def test_no_tokens_at_all_give_a_loss_of_zero_and_no_nan():
    adapter, frozen = toy.model()
    batch = toy.batch()
    batch["weights"] = 0 * batch["weights"]
    tx = optax.sgd(0.1)
    state, metrics = train.train_step(toy.loss_fn, tx, accumulate=2, clip=1.0)(
        train.init(adapter, tx), frozen, batch, None
    )
    assert metrics == train.Metrics(0, 0, 0, False)
    assert_same(state.adapter, adapter)


def poisoned(batch):
    return batch | {"weights": batch["weights"].at[0, 0].set(jnp.nan)}


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_neither_adapter_nor_moments(on_nan):
    adapter, frozen = toy.model()
    good = jax.tree.map(jnp.asarray, toy.batch())
    tx = optax.adam(1e-2)
    step = jax.jit(train.train_step(toy.loss_fn, tx, on_nan=on_nan, accumulate=3))
    before, _ = step(train.init(adapter, tx), frozen, good, None)
    after, metrics = step(before, frozen, poisoned(good), None)
    assert metrics.nonfinite
    assert_same(after, before._replace(step=before.step + (on_nan == "skip")))
    later, metrics = step(after, frozen, good, None)
    assert not metrics.nonfinite
    assert not np.array_equal(later.adapter["w/a"], after.adapter["w/a"])


def test_every_step_and_microbatch_has_its_own_key():
    adapter, frozen = toy.model()
    tx = optax.sgd(0.0)  # the adapter stays: losses differ by the key alone
    keys = []

    def loss_fn(adapter, frozen, batch, key):
        jax.debug.callback(
            lambda k: keys.append(tuple(k.ravel().tolist())), jax.random.key_data(key)
        )
        return toy.noisy_loss_fn(adapter, frozen, batch, key)

    step = jax.jit(train.train_step(loss_fn, tx, accumulate=3))
    state = train.init(adapter, tx)
    losses = []
    for _ in range(2):
        state, metrics = step(state, frozen, toy.batch(), jax.random.key(0))
        losses.append(float(metrics.loss))
    jax.effects_barrier()
    assert len(set(keys)) == 6
    assert losses[0] != losses[1]
    again, _ = step(train.init(adapter, tx), frozen, toy.batch(), jax.random.key(0))
    assert_same(again, step(train.init(adapter, tx), frozen, toy.batch(), jax.random.key(0))[0])


def test_the_state_is_donated_and_the_frozen_tree_and_the_callers_adapter_are_not():
    adapter, frozen = toy.model()
    tx = optax.contrib.schedule_free_sgd(0.1)  # keeps the adapter itself in its state
    step = jax.jit(train.train_step(toy.loss_fn, tx), donate_argnums=0)
    old = train.init(adapter, tx)
    new, _ = step(old, frozen, toy.batch(), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(old.adapter))
    assert not any(x.is_deleted() for x in jax.tree.leaves((frozen, adapter, new)))


def test_steps_are_traced_once():
    adapter, frozen = toy.model()
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
    traces = []

    def loss_fn(*args):
        traces.append(1)
        return toy.loss_fn(*args)

    step = jax.jit(train.train_step(loss_fn, tx, clip=1.0), donate_argnums=0)
    state = train.init(adapter, tx)
    for seed in range(3):
        state, _ = step(state, frozen, toy.batch(seed=seed), None)
    assert len(traces) == 1


def test_the_state_can_be_had_from_shapes_alone():
    adapter, _ = toy.model()
    tx = optax.adamw(1e-2)
    shapes = jax.eval_shape(lambda a: train.init(a, tx), adapter)
    want = jax.tree.map(jnp.shape, train.init(adapter, tx))
    assert jax.tree.map(lambda x: x.shape, shapes) == want


def test_only_the_adapter_has_gradients_and_optimizer_state():
    adapter, frozen = toy.model()
    tx = optax.adam(1e-2)
    frozen["ids"] = jnp.arange(3, dtype=jnp.uint8)  # would be an error in a gradient
    state = train.init(adapter, tx)
    train.train_step(toy.loss_fn, tx)(state, frozen, toy.batch(), None)
    count = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert count == 2 * sum(x.size for x in adapter.values()) + 1


def test_bfloat16_compute_keeps_adapter_gradient_and_moments_in_float32():
    adapter, frozen = toy.model(jnp.float32)
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    seen = []

    def loss_fn(adapter, frozen, batch, key):
        seen.extend(x.dtype for x in adapter.values())
        return toy.loss_fn(adapter, frozen, batch, key)

    tx = optax.adamw(1e-2)
    batch = toy.batch(dtype=jnp.float32)
    for accumulate in (1, 3):
        step = train.train_step(
            loss_fn, tx, compute_dtype=jnp.bfloat16, clip=1.0, accumulate=accumulate
        )
        state, metrics = jax.jit(step)(train.init(adapter, tx), frozen, batch, None)
        assert {x.dtype for x in jax.tree.leaves((state.adapter, state.opt_state[0].mu))} == {
            jnp.dtype(jnp.float32)
        }
        exact = mean_loss(adapter, frozen, batch)
        np.testing.assert_allclose(metrics.loss, exact, rtol=2e-2)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_a_bfloat16_adapter_keeps_its_dtype_and_sums_microbatches_in_float32():
    adapter, frozen = toy.model(jnp.bfloat16)
    tx = optax.sgd(0.0)
    batch = toy.batch(dtype=jnp.float32)
    step = train.train_step(toy.loss_fn, tx, accumulate=24)
    state, metrics = step(train.init(adapter, tx), frozen, batch, None)
    assert {x.dtype for x in state.adapter.values()} == {jnp.dtype(jnp.bfloat16)}
    grads = jax.vmap(jax.grad(lambda a, b: toy.loss_fn(a, frozen, b, None)[0]), (None, 0))(
        adapter, jax.tree.map(lambda x: x[:, None], batch)
    )
    exact = jax.tree.map(lambda g: g.astype(jnp.float32).sum(0), grads)
    norm = optax.tree.norm(exact) / batch["weights"].sum()
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)


def test_the_step_runs_inside_a_callers_own_scan():
    adapter, frozen = toy.model()
    tx = optax.adamw(1e-2)
    step = train.train_step(toy.loss_fn, tx, accumulate=2)
    batches = [toy.batch(seed=seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, b: step(s, frozen, b, None), state, stacked)

    state = train.init(adapter, tx)
    final, metrics = run(state)
    for batch in batches:
        state, last = jax.jit(step)(state, frozen, batch, None)
    assert_close(final, state)
    assert_close(metrics.loss[-1], last.loss)


def test_options_out_of_range_are_named():
    build = functools.partial(train.train_step, toy.loss_fn, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"`accumulate` counts microbatches.*got 0"):
        build(accumulate=0)
    with pytest.raises(ValueError, match=r"`clip` is the largest norm, above 0; got -1"):
        build(clip=-1)
    with pytest.raises(ValueError, match=r'"stop" or "skip", got \'ignore\''):
        build(on_nan="ignore")


def test_a_batch_that_cannot_be_cut_is_named():
    adapter, frozen = toy.model()
    tx = optax.sgd(0.1)
    step = train.train_step(toy.loss_fn, tx, accumulate=5)
    with pytest.raises(ValueError, match=r"`accumulate=5` .*\(24, 20\) at batch\['targets'\]"):
        step(train.init(adapter, tx), frozen, toy.batch(), None)


def test_a_loss_that_is_a_mean_without_its_weight_is_refused():
    adapter, frozen = toy.model()
    tx = optax.sgd(0.1)
    step = train.train_step(lambda a, f, b, k: mean_loss(a, f, b), tx)
    with pytest.raises(ValueError, match=r"\(loss_sum, weight\), two scalars.*of shapes \(\)"):
        step(train.init(adapter, tx), frozen, toy.batch(), None)
    per_row = train.train_step(lambda a, f, b, k: (jnp.ones(3), jnp.ones(3)), tx)
    with pytest.raises(ValueError, match=r"tuple of shapes \(\(3,\), \(3,\)\)"):
        per_row(train.init(adapter, tx), frozen, toy.batch(), None)
