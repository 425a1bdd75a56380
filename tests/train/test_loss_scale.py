"""What is not finite is not kept, whatever it is, and float16 has its loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resumable
import toy

from jaxpeft import optim, train

FLOAT16 = pytest.mark.filterwarnings("ignore:.* is float16")


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def spoiling(where):
    """SGD whose update, or state, is not finite in the second step."""

    def init(params):
        return {"count": jnp.int32(0), "best": jnp.float32(jnp.inf), "sum": jnp.float32(0)}

    def update(updates, state, params=None):
        second = state["count"] == 1
        updates = jax.tree.map(lambda g: -0.1 * g, updates)
        if where == "update":
            updates["w/b"] = updates["w/b"].at[0, 0].add(jnp.where(second, jnp.nan, 0))
        total = state["sum"] + jnp.where(second & (where == "state"), jnp.inf, 1)
        return updates, {"count": state["count"] + 1, "best": state["best"], "sum": total}

    return optax.GradientTransformation(init, update)


@FLOAT16
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_float16_adapter_that_adam_would_poison_is_kept_and_flagged(on_nan):
    """Its second moments and eps are 0: the update of a finite gradient is 0 / 0."""
    adapter, frozen = toy.model(jnp.float16)
    tx = optax.adam(1e-2)
    state = train.init(adapter, tx)
    step = jax.jit(train.train_step(toy.loss_fn, tx, on_nan=on_nan))
    new, metrics = step(state, frozen, toy.batch(dtype=jnp.float32), None)
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
    assert metrics.nonfinite and not metrics.overflow
    assert_same(new, state._replace(step=state.step + (on_nan == "skip")))


@pytest.mark.parametrize("where", ["update", "state"])
def test_an_update_or_state_that_is_not_finite_is_not_made_and_the_next_step_goes_on(where):
    adapter, frozen = toy.model(jnp.float32)
    tx = spoiling(where)
    step = jax.jit(train.train_step(toy.loss_fn, tx, on_nan="skip"))
    batch = toy.batch(dtype=jnp.float32)
    first, metrics = step(train.init(adapter, tx), frozen, batch, None)
    assert not metrics.nonfinite  # though `best` is infinite from the start
    second, metrics = step(first, frozen, batch, None)
    assert metrics.nonfinite
    assert_same(second, first._replace(step=first.step + 1))
    onward = second._replace(opt_state=second.opt_state | {"count": jnp.int32(2)})
    third, metrics = step(onward, frozen, batch, None)
    assert not metrics.nonfinite and not np.array_equal(third.adapter["w/a"], adapter["w/a"])


@FLOAT16
@pytest.mark.parametrize(
    "size, finite",
    [(1.0, True), pytest.param(1e-5, False, id="0 / 0"), pytest.param(1e4, False, id="moments")],
)
def test_in_host_memory_each_array_whose_update_is_not_finite_is_kept(size, finite):
    """In float16 the second moment is 0, or infinite: then Adam would stand still for good."""

    def loss_fn(adapter, frozen, batch, key):
        return jnp.sum(size * adapter["narrow"].astype(jnp.float32)) + adapter["wide"].sum(), 1.0

    adapter = {"narrow": jnp.ones(4, jnp.float16), "wide": jnp.ones(4, jnp.float32)}
    tx = optim.paged(optax.adam(1e-2), min_size=1)
    state = train.init(jax.device_put(adapter, jax.devices()[0]), tx)
    new, metrics = jax.jit(train.train_step(loss_fn, tx))(state, {}, jnp.zeros((1, 1)), None)
    assert np.isfinite(metrics.grad_norm) and bool(metrics.nonfinite) != finite
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))
    assert np.array_equal(new.adapter["narrow"], state.adapter["narrow"]) != finite
    assert not np.array_equal(new.adapter["wide"], state.adapter["wide"])


@FLOAT16
def test_fit_says_that_it_is_the_update_that_is_not_finite():
    adapter, frozen = toy.model(jnp.float16)
    with pytest.raises(train.UserError, match=r"the optimizer's update is not finite at step 1"):
        train.fit(toy.loss_fn, optax.adam(1e-2), adapter, frozen, [toy.batch()], progress=False)


@pytest.mark.parametrize("page", ["no", "inside", "outside"])
def test_scaling_changes_no_digit_where_nothing_overflows(page):
    adapter, frozen = toy.model()
    batch = toy.batch()
    batch["weights"] = batch["weights"] * 0.3  # no power of two
    batch["weights"][:8:3] = 0  # a microbatch without tokens
    tx = optax.adamw(1e-2)
    scaled = {
        "no": train.loss_scaled(tx),
        "inside": train.loss_scaled(optim.paged(tx, min_size=1)),
        "outside": optim.paged(train.loss_scaled(tx), min_size=1),
    }[page]

    def run(tx):
        start = train.init(jax.device_put(adapter, jax.devices()[0]), tx)
        step = train.train_step(toy.loss_fn, tx, accumulate=3, clip=0.05)
        return jax.jit(step)(start, frozen, batch, None)

    (got, ours), (want, theirs) = run(scaled), run(tx)
    assert_same(got._replace(opt_state=got.opt_state.inner), want)
    assert_same(ours, theirs)


def small_loss_fn(adapter, frozen, batch, key):
    loss, weight = toy.loss_fn(adapter, frozen, batch, key)
    return loss * 1e-7, weight


def test_float16_follows_float32_where_its_gradients_alone_would_be_zeros():
    adapter, frozen = toy.model(jnp.float32)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16), frozen)
    batch = toy.batch(dtype=jnp.float32)
    tx = optax.sgd(1e5)
    run = lambda tx, frozen, dtype: jax.jit(  # noqa: E731
        train.train_step(small_loss_fn, tx, compute_dtype=dtype, accumulate=3)
    )(train.init(adapter, tx), frozen, batch, None)
    want, exact = run(tx, frozen, None)
    got, metrics = run(train.loss_scaled(tx, init_scale=2.0**24), narrow, jnp.float16)
    np.testing.assert_allclose(metrics.grad_norm, exact.grad_norm, rtol=5e-3)
    for path, x in adapter.items():
        moved = np.asarray(want.adapter[path] - x)
        np.testing.assert_allclose(got.adapter[path] - x, moved, atol=2e-2 * np.abs(moved).max())
    cast = jax.tree.map(lambda x: x.astype(jnp.float16), adapter)
    unscaled = jax.grad(lambda a: small_loss_fn(a, narrow, batch, None)[0] / 238)(cast)
    assert max(float(jnp.abs(g).max()) for g in unscaled.values()) == 0


def test_an_overflow_halves_the_scale_and_leaves_the_step_out_until_it_fits():
    """The second microbatch alone overflows, below the 65504 of float16 from a scale of 4 on."""

    def loss_fn(adapter, frozen, batch, key):
        return jnp.sum(adapter["w"] * batch).astype(jnp.float32), jnp.float32(1)

    tx = train.loss_scaled(optax.adam(1e-2), init_scale=16.0, growth_interval=2)
    step = jax.jit(
        train.train_step(loss_fn, tx, compute_dtype=jnp.float16, accumulate=2, on_nan="stop")
    )
    start = train.init({"w": jnp.ones(())}, tx)
    state, batch = start, jnp.asarray([1.0, 3e4], jnp.float16)
    scales, overflows = [], []
    for _ in range(6):
        state, metrics = step(state, {}, batch, None)
        scales.append(float(state.opt_state.scale))
        overflows.append(bool(metrics.overflow))
        assert not metrics.nonfinite
        if overflows == [True] * len(overflows):
            assert_same(state.adapter, start.adapter)
            assert_same(state.opt_state.inner, start.opt_state.inner)
    # Twice the scale is too much again, after every two steps that fit.
    first = overflows.index(False)
    assert scales[:first] == [16.0 / 2 ** (i + 1) for i in range(first)] and first >= 1
    assert scales[first + 1] == 2 * scales[first] and overflows[first + 2]
    assert state.step == 6 and state.opt_state.inner[0].count == overflows.count(False)


def test_an_overflow_at_the_smallest_scale_and_a_loss_that_is_not_finite_are_faults():
    def loss_fn(adapter, frozen, batch, key):
        return jnp.sum(adapter["w"] * batch * frozen), jnp.float32(1)

    tx = train.loss_scaled(optax.sgd(1e-2), init_scale=1.0)
    step = jax.jit(train.train_step(loss_fn, tx, compute_dtype=jnp.float16))
    state = train.init({"w": jnp.zeros(())}, tx)
    for batch in (jnp.float32([jnp.inf]), jnp.float32([1e10])):
        same, metrics = step(state, jnp.float32(1), batch, None)
        assert metrics.nonfinite and not metrics.overflow
        assert_same(same, state)


def test_fit_goes_on_after_an_overflow_and_records_it(tmp_path):
    def loss_fn(adapter, frozen, batch, key):
        return jnp.sum(adapter["w"] * batch).astype(jnp.float32), jnp.float32(1)

    class Stream(resumable.Stream):
        def __next__(self):
            super().__next__()
            return jnp.asarray([3e4], jnp.float16)

    tx = train.loss_scaled(optax.sgd(1e-9), init_scale=8.0)
    run = lambda steps: train.fit(  # noqa: E731
        loss_fn, tx, {"w": jnp.ones(())}, {}, Stream(), steps=steps, compute_dtype=jnp.float16,
        folder=tmp_path, progress=False,
    )  # fmt: skip
    assert run(1).state.opt_state.scale == 4.0
    result = run(3)  # from the checkpoint, and with its scale
    records = train.read_metrics(tmp_path / "metrics.jsonl")
    assert [r.get("skipped", False) for r in records] == [True, False, False]
    assert result.state.opt_state.scale == 4.0 and result.finished


def test_what_cannot_be_trained_in_its_dtype_is_named():
    adapter, frozen = toy.model(jnp.float32)
    batch = toy.batch(dtype=jnp.float32)
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"compute_dtype=float16` makes zeros .*loss_scaled\(tx\)"):
        train.fit(
            toy.loss_fn, tx, adapter, frozen, [batch], compute_dtype=jnp.float16, progress=False
        )
    with pytest.raises(ValueError, match="`compute_dtype=int32` holds no weights"):
        train.train_step(toy.loss_fn, tx, compute_dtype=jnp.int32)
    step = train.train_step(toy.loss_fn, tx)
    ids = adapter | {"ids": jnp.arange(3)}
    with pytest.raises(ValueError, match=r"adapter\['ids'\] is int\d\d\. Leave it to the frozen"):
        step(train.State(jnp.int32(0), ids, tx.init(adapter)), frozen, batch, None)
    small = adapter | {"w/b": adapter["w/b"].astype(jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"adapter\['w/b'\] is float8_e4m3fn, which no update"):
        step(train.State(jnp.int32(0), small, tx.init(adapter)), frozen, batch, None)


def test_float16_in_adapter_or_base_is_said():
    adapter, frozen = toy.model(jnp.float32)
    tx, batch = optax.sgd(0.1), toy.batch(dtype=jnp.float32)
    step = train.train_step(toy.loss_fn, tx)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float16), tree)  # noqa: E731
    with pytest.warns(UserWarning, match=r"frozen\['embed'\] is float16: gradients .*loss_scaled"):
        step(train.init(adapter, tx), half(frozen), batch, None)
    with pytest.warns(UserWarning, match=r"adapter\['w/a'\] is float16, in which small updates"):
        step(train.init(half(adapter), tx), frozen, batch, None)


def test_loss_scaling_inside_of_another_transformation_is_refused():
    adapter, frozen = toy.model()
    tx = optax.chain(optax.clip(1.0), train.loss_scaled(optax.sgd(0.1)))
    step = train.train_step(toy.loss_fn, tx)
    with pytest.raises(ValueError, match=r"outermost .* its state is at opt_state\[1\]"):
        step(train.init(adapter, tx), frozen, toy.batch(), None)


def test_options_of_loss_scaling_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"`init_scale` is a power of two .*, got 1000"):
        train.loss_scaled(optax.sgd(0.1), init_scale=1000)
    with pytest.raises(ValueError, match=r"`growth_interval` counts steps, at least 1; got 0"):
        train.loss_scaled(optax.sgd(0.1), growth_interval=0)
