"""Paged states: the values of the optimizer as it is, in host memory, where the parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import optim, train
from jaxpeft.optim import _paging as paging
from tests.compiles import compilations
from tests.train import toy

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
SMALL = 4  # elements from which on arrays are paged in these tests


def params():
    random = np.random.default_rng(0)
    shapes = {"a": (6, 4), "b": {"c": (3,), "d": (5, 2)}}
    tree = jax.tree.map(lambda s: random.normal(size=s), shapes, is_leaf=lambda s: type(s) is tuple)
    return jax.device_put(tree, jax.devices()[0])


def norm_of_moments():
    """A transformation that mixes the paged states of all parameters."""
    adam = optax.scale_by_adam()

    def update(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        norm = optax.tree.norm(state.mu)
        return jax.tree.map(lambda u: u / (1 + norm), updates), state

    return optax.GradientTransformation(adam.init, update)


def labelled(params):
    return {"a": "x", "b": {"c": "y", "d": "x"}}


OPTIMIZERS = {
    "adamw": optax.adamw(1e-1),
    "momentum": optax.sgd(1e-1, momentum=0.9),
    "adafactor": optax.adafactor(1e-1, min_dim_size_to_factor=2),
    "clipped by the norm over all": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-1)),
    "masked": optax.masked(optax.adam(1e-1), {"a": True, "b": {"c": True, "d": False}}),
    "partitioned": optax.partition({"x": optax.adam(1e-1), "y": optax.lion(1e-2)}, labelled),
    "mixing all states": norm_of_moments(),
    "with a rate in the state": optax.inject_hyperparams(optax.adam)(1e-1),
    "with random noise": optax.chain(optax.adam(1e-1), optax.add_noise(0.1, 0.5, 3)),
    "every second step": optax.MultiSteps(optax.adam(1e-1), 2).gradient_transformation(),
    "if finite": optax.apply_if_finite(optax.adam(1e-1), 3),
}


def after(tx, steps=3, jit=jax.jit, start=None):
    @jit
    def step(params, state, i):
        updates, state = tx.update(jax.tree.map(lambda x: jnp.sin(x * i), params), state, params)
        return optax.apply_updates(params, updates), state

    current = params() if start is None else start
    state = tx.init(current)
    for i in range(1, steps + 1):
        current, state = step(current, state, i)
    return current, state


def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(raw(g), raw(w)), got, want)


def kind(x):
    return x.sharding.memory_kind


def assert_paged(state, min_size=SMALL):
    for x in jax.tree.leaves(state):
        assert kind(x) == ("pinned_host" if x.size >= min_size else "device"), x.shape


@pytest.mark.parametrize("max_in_flight", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_paging_changes_no_value_and_the_state_stays_on_the_host(name, max_in_flight):
    tx = OPTIMIZERS[name]
    got = after(optim.paged(tx, min_size=SMALL, max_in_flight=max_in_flight))
    assert_same(got, after(tx))
    assert_paged(got[1])
    assert any(kind(x) == "pinned_host" for x in jax.tree.leaves(got[1]))


def test_scalars_stay_on_the_device_whatever_their_size():
    state = optim.paged(optax.adamw(1e-1), min_size=1).init({"w": jnp.ones(1), "s": jnp.ones(())})
    assert [kind(x) for x in (state[0].mu["w"], state[0].mu["s"])] == ["pinned_host", "device"]
    assert kind(state[0].count) == "device"


def test_paging_outside_jit_changes_no_value():
    tx = OPTIMIZERS["adamw"]
    eager = lambda f: f  # noqa: E731
    got = after(optim.paged(tx, min_size=SMALL), jit=eager)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-12), got, after(tx))
    assert_paged(got[1])


def test_paging_inside_of_optax_wrappers_changes_no_value():
    adam = optax.adam(1e-1)

    def wrapped(tx):
        return optax.chain(
            optax.clip_by_global_norm(0.1),
            optax.MultiSteps(
                optax.masked(tx, {"a": True, "b": {"c": True, "d": False}}), 2
            ).gradient_transformation(),
        )

    got = after(wrapped(optim.paged(adam, min_size=SMALL)), steps=5)
    assert_same(got, after(wrapped(adam), steps=5))
    inner = got[1][1].inner_opt_state.inner_state[0]
    assert [kind(x) for x in (inner.mu["a"], inner.count)] == ["pinned_host", "device"]


def test_arguments_of_the_wrapped_transformation_pass_through():
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.ones_like, p), update)
    paged = optim.paged(tx, min_size=SMALL)
    updates, state = paged.update(params(), paged.init(params()), params(), value=3.0)
    assert_same(updates, jax.tree.map(lambda x: 3 * x, params()))
    assert_paged(state)


@pytest.mark.parametrize(
    "name", ["adamw", "adafactor", "partitioned", "clipped by the norm over all"]
)
def test_a_step_that_is_not_taken_leaves_state_and_parameters(name):
    tx = optim.paged(OPTIMIZERS[name], min_size=SMALL)
    current, state = after(tx)
    current["a"] = current["a"].at[0, 0].set(-0.0)
    grads = jax.tree.map(lambda x: x * jnp.nan, current)

    @jax.jit
    def step(bad):
        updates, new = tx.update(grads, state, current, unless=bad)
        return optax.apply_updates(current, updates), new

    got = step(True)
    assert_same(got, (current, state))
    assert np.signbit(got[0]["a"][0, 0])
    assert_paged(got[1])
    assert np.isnan(step(False)[0]["a"]).all()


def barriers(tx):
    shapes = jax.eval_shape(tx.init, params())
    text = str(jax.make_jaxpr(tx.update)(params(), shapes, params()))
    return text.count("= optimization_barrier")


@pytest.mark.parametrize(
    "name, stages",
    [
        ("adamw", 2),
        ("momentum", 2),
        ("clipped by the norm over all", 2),
        ("masked", 1),
        ("mixing all states", 1),
        ("every second step", 1),
    ],
)
def test_a_stage_is_what_depends_on_no_other_state(name, stages):
    """Each stage ends with a barrier, and each but the first waits for one before it."""
    assert barriers(optim.paged(OPTIMIZERS[name], min_size=SMALL)) == stages + stages - 1
    assert barriers(optim.paged(OPTIMIZERS[name], min_size=SMALL, max_in_flight=2)) == stages


def test_a_state_that_the_update_leaves_alone_is_not_fetched():
    tx = optax.GradientTransformation(
        lambda p: {"fixed": jnp.ones(100), "m": jnp.zeros(100)},
        lambda u, s, p=None: (u, {"fixed": s["fixed"], "m": s["m"] + 1}),
    )
    paged = optim.paged(tx, min_size=SMALL)
    state = paged.init(params())
    text = str(jax.make_jaxpr(paged.update)(params(), state, params()))
    assert text.count("MemorySpace.Device") == 1
    assert_same(paged.update(params(), state)[1], {"fixed": jnp.ones(100), "m": jnp.ones(100)})


@pytest.mark.parametrize("kind_of_axis", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_state_keeps_its_spec_and_changes_its_memory(kind_of_axis):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind_of_axis,))
    sharded = NamedSharding(mesh, P(None, "x"))
    start = {"w": jax.device_put(jnp.ones((4, 16)), sharded)}
    tx = optim.paged(optax.adamw(1e-1), min_size=SMALL)
    with jax.set_mesh(mesh):
        state = tx.init(start)
        mu = state[0].mu["w"]
        assert mu.sharding.is_equivalent_to(sharded.with_memory_kind("pinned_host"), 2)
        assert state[0].count.sharding.mesh == mesh
        got, state = after(tx, start=start)
        mu = state[0].mu["w"]
        assert kind(mu) == "pinned_host" and mu.sharding.shard_shape(mu.shape) == (4, 2)
        assert_same(got, after(optax.adamw(1e-1), start=start)[0])


def test_a_state_that_its_parameters_sharding_does_not_divide_is_replicated():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    start = {"w": jax.device_put(jnp.ones((16, 16)), NamedSharding(mesh, P(None, "x")))}
    tx = optax.GradientTransformation(
        lambda p: {"rows": {"w": jnp.zeros((16, 3))}, "apart": jnp.ones(9)}, optax.identity().update
    )
    state = optim.paged(tx, min_size=SMALL).init(start)
    for x in (state["rows"]["w"], state["apart"]):
        assert x.sharding.is_fully_replicated and x.sharding.mesh == mesh
        assert kind(x) == "pinned_host"


def test_a_step_compiles_from_shapes_with_the_state_on_the_host():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("x"))
    tx = optim.paged(optax.adamw(1e-1), min_size=SMALL)
    weights = {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=spread)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=spread if x.ndim else NamedSharding(mesh, P())
        ),
        jax.eval_shape(tx.init, weights),
    )
    state = optim.to_host(state, min_size=SMALL)
    assert kind(state[0].mu["w"]) == "pinned_host" and kind(state[0].count) == "device"
    step = jax.jit(tx.update, donate_argnums=1).lower(weights, state, weights).compile()
    into = step.input_shardings[0][1][0].mu["w"]
    out = step.output_shardings[1][0].mu["w"]
    assert into.memory_kind == out.memory_kind == "pinned_host"


def test_arrays_go_to_the_host_and_stay_on_their_mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("x")))
    got = optim.to_host({"x": x, "count": jnp.zeros(())}, min_size=SMALL)
    assert got["x"].sharding == x.sharding.with_memory_kind("pinned_host")
    assert kind(got["count"]) == "device"
    assert_same(got["x"], x)


class Batches(list):
    """Four batches that a run can go on with."""

    def __init__(self):
        super().__init__(toy.batch(seed=i) for i in range(4))

    def __iter__(self):
        return Position(self)


class Position:
    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __next__(self):
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def fitted(tx, folder, steps=None):
    frozen, adapter = toy.model()
    adapter = jax.device_put(adapter, jax.devices()[0])
    run = train.fit(
        toy.loss_fn,
        tx,
        frozen,
        adapter,
        Batches(),
        max_steps=steps,
        output_dir=folder,
        max_grad_norm=0.5,
    )
    return run.state


def test_fit_with_checkpoints_ends_where_it_ends_without_paging(tmp_path):
    tx = optax.adamw(1e-2)
    want = fitted(tx, tmp_path / "plain")
    got = fitted(optim.paged(tx, min_size=SMALL), tmp_path / "paged")
    assert_same(got, want)
    assert_paged(got.opt_state)


def test_fit_goes_on_from_a_checkpoint_with_paged_states(tmp_path):
    tx = optim.paged(optax.adamw(1e-2), min_size=SMALL)
    fitted(tx, tmp_path, 2)
    assert_same(fitted(tx, tmp_path), fitted(tx, None))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_a_checkpoint_of_a_paged_state_is_one_of_the_optimizer_as_it_is(tmp_path, before, now):
    tx = optax.adamw(1e-2)
    paged = optim.paged(tx, min_size=SMALL)
    saved = fitted(paged if before else tx, tmp_path, 2)
    frozen, adapter = toy.model()
    like = train.init(jax.device_put(adapter, jax.devices()[0]), paged if now else tx)
    with train.Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(like)
    assert_same(state, saved)
    if now:
        state = state._replace(opt_state=optim.to_host(state.opt_state, min_size=SMALL))
        assert_paged(state.opt_state)
    step = jax.jit(train.train_step(toy.loss_fn, paged if now else tx, max_grad_norm=0.5))
    for batch in Batches()[2:]:
        state, _ = step(state, frozen, batch, None)
    assert_same(state, fitted(tx, None))


def test_a_step_with_a_paged_state_compiles_once():
    frozen, adapter = toy.model()
    frozen, adapter = jax.device_put((frozen, adapter), jax.devices()[0])
    tx = optim.paged(optax.adamw(1e-2), min_size=SMALL)
    step = jax.jit(train.train_step(toy.loss_fn, tx), donate_argnums=0)
    state = jax.device_put(train.init(adapter, optax.identity()), jax.devices()[0])
    state = state._replace(opt_state=tx.init(adapter))
    with compilations() as counts:
        for seed in range(3):
            state, _ = step(state, frozen, toy.batch(seed=seed), None)
    assert_paged(state.opt_state)
    assert counts["step"] == 1


@pytest.mark.parametrize(
    "options, told",
    [
        ({"min_size": 0}, r"`paged\(min_size=0\)`: `min_size` must be at least 1"),
        ({"max_in_flight": 0}, r"`paged\(max_in_flight=0\)`: `max_in_flight` must be at least 1"),
        (
            {"if_unsupported": "ignore"},
            r"`paged\(if_unsupported='ignore'\)`: .* 'error' or 'device'",
        ),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        optim.paged(optax.sgd(1.0), **options)


def test_a_backend_without_host_memory_is_refused_or_keeps_the_state(monkeypatch):
    monkeypatch.setattr(paging, "_memory_kinds", lambda device: ["device"])
    tx = optax.adamw(1e-1)
    told = r"'pinned_host' memory, .*0.* has \['device'\].*if_unsupported='device'"
    with pytest.raises(ValueError, match=told):
        optim.paged(tx, min_size=SMALL).init(params())
    got = after(optim.paged(tx, min_size=SMALL, if_unsupported="device"))
    assert_same(got, after(tx))
    assert all(kind(x) == "device" for x in jax.tree.leaves(got))


def test_a_shape_without_sharding_is_refused():
    state = {"m": jax.ShapeDtypeStruct((64,), jnp.float32)}
    with pytest.raises(ValueError, match=r"shape=\(64,\).* at \['m'\] has no sharding"):
        optim.to_host(state, min_size=SMALL)


def test_a_state_that_changes_its_form_is_refused():
    tx = optax.GradientTransformation(
        lambda p: {"m": jnp.zeros(8)}, lambda u, s, p=None: (u, {"m": jnp.zeros((9, 9))})
    )
    paged = optim.paged(tx, min_size=SMALL)
    with pytest.raises(ValueError, match=r"at \['m'\] it was float64\[8\].* is float64\[9, 9\]"):
        paged.update(params(), paged.init(params()))
