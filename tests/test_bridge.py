"""Flax modules as functions, and Flax's own training loops around an adapter."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxpeft as jp
from jaxpeft.bridge import from_linen, from_nnx
from tests.compiles import compilations

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))
Y = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))


class LinenNet(nn.Module):
    """Batch statistics, dropout and a second entry point."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, param_dtype=jnp.float64)(x)

    def doubled(self, x):
        return 2 * self(x)


class NNXNet(nnx.Module):
    """The same, with a tied weight, a list of layers, a counter and a bare array."""

    def __init__(self, rngs):
        kind = {"param_dtype": jnp.float64, "rngs": rngs}
        self.layers = nnx.List([nnx.Linear(6, 6, **kind) for _ in range(2)])
        self.norm = nnx.BatchNorm(6, **kind)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(6, 3, **kind)
        self.again = self.head.kernel
        self.calls = nnx.Variable(jnp.array(0))
        self.offset = jnp.ones(3)

    def __call__(self, x):
        self.calls[...] += 1
        for layer in self.layers:
            x = nnx.relu(layer(x))
        x = self.drop(self.norm(x))
        return self.head(x) + self.offset + 0.1 * (x @ self.again[...])

    def doubled(self, x):
        return 2 * self(x)


class Sower(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "seen", y)
        return y


def linen_net():
    module = LinenNet()
    return module, module.init(jax.random.key(0), X)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moved(adapter):
    """An adapter away from its init, so that it changes the output."""
    return {
        name: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, (name, x) in enumerate(adapter.items())
    }


def lora(fn, params, *args, rank=2):
    sites = jp.sites(fn, params, *args)
    return jp.split(jp.lora(rank, sites.linear, dtype=jnp.float64)(jax.random.key(3), params))


# linen ---------------------------------------------------------------------------------------


def test_the_linen_function_is_apply_with_the_params_apart():
    module, variables = linen_net()
    fn, params, rest = from_linen(module, variables)
    assert set(rest) == {"batch_stats"}
    assert_same(fn(params, rest, X), module.apply(variables, X))
    assert_same(fn(params, rest, X, method="doubled"), 2 * module.apply(variables, X))
    assert_same(fn(params, rest, X, method=module.doubled), 2 * module.apply(variables, X))


@pytest.mark.parametrize(
    "mutable, collections",
    [
        (True, {"batch_stats", "other", "intermediates"}),
        ("batch_stats", {"batch_stats", "other"}),
        (["intermediates"], {"batch_stats", "other", "intermediates"}),
    ],
)
def test_a_mutable_linen_call_returns_the_whole_new_rest(mutable, collections):
    module, variables = linen_net()
    fn, params, rest = from_linen(module, variables | {"other": {"untouched": X}})
    call = {"train": mutable != ["intermediates"], "rngs": {"dropout": jax.random.key(5)}}
    out, new = fn(params, rest, X, mutable=mutable, **call)
    expected, changed = module.apply(variables, X, mutable=["batch_stats", "intermediates"], **call)
    assert_same(out, expected)
    assert set(new) == collections and new["other"]["untouched"] is X
    assert_same(new["batch_stats"], changed["batch_stats"])
    if "intermediates" in new:
        assert_same(new["intermediates"], changed["intermediates"])


def test_frozen_dicts_become_plain_ones():
    module, variables = linen_net()
    _, params, rest = from_linen(module, flax.core.freeze(variables))
    assert type(params) is dict and type(params["Dense_0"]) is dict
    assert type(rest["batch_stats"]["BatchNorm_0"]) is dict


def test_variables_without_params_are_refused():
    module, variables = linen_net()
    with pytest.raises(ValueError, match=r"a mapping with 'params'; got one with \['BatchNorm_0'"):
        from_linen(module, variables["params"])


@pytest.mark.parametrize("mutable", ["params", ["params", "batch_stats"]])
def test_params_are_not_mutable(mutable):
    module, variables = linen_net()
    fn, params, rest = from_linen(module, variables)
    with pytest.raises(ValueError, match=r"`mutable=\[?'params'.* includes 'params'"):
        fn(params, rest, X, mutable=mutable)


def test_a_lifted_linen_function_is_the_merged_one_and_updates_its_statistics():
    fn, params, rest = from_linen(*linen_net())
    frozen, adapter = lora(fn, params, rest, X)
    tree = jp.combine(frozen, moved(adapter))
    call = {"train": True, "rngs": {"dropout": jax.random.key(5)}, "mutable": "batch_stats"}
    lifted, new = jp.lift(fn, materialize="error")(tree, rest, X, **call)
    merged, expected = fn(jp.merge(tree), rest, X, **call)
    np.testing.assert_allclose(lifted, merged, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), new, expected)
    assert np.abs(lifted - fn(params, rest, X, **call)[0]).max() > 0.1


def test_a_train_state_holds_an_adapter_in_the_place_of_params():
    fn, params, rest = from_linen(*linen_net())
    frozen, adapter = lora(fn, params, rest, X)
    state = TrainState.create(apply_fn=jp.lift(fn), params=adapter, tx=optax.adam(3e-2))

    @jax.jit
    def step(state, frozen, rest, x, y, key):
        def loss(adapter):
            out, new = state.apply_fn(
                jp.combine(frozen, adapter),
                rest,
                x,
                train=True,
                rngs={"dropout": key},
                mutable="batch_stats",
            )
            return jnp.mean((out - y) ** 2), new

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), rest, value

    before, losses = jax.tree.map(np.asarray, params), []
    with compilations() as counts:
        for i in range(20):
            state, rest, value = step(state, frozen, rest, X, Y, jax.random.key(i % 2))
            losses.append(value)
            if i == 1:
                counts.clear()  # the first step widens the statistics
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert int(state.step) == 20 and not counts["step"]
    assert set(state.params) == set(adapter)
    assert_same(params, before)
    assert {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim} == {
        x.shape for x in adapter.values()
    }


# nnx -----------------------------------------------------------------------------------------


def test_the_nnx_function_is_the_module_and_leaves_it_alone():
    module, twin = NNXNet(nnx.Rngs(0)), NNXNet(nnx.Rngs(0))
    fn, params, rest, to_module = from_nnx(module)
    assert {type(x) for x in jax.tree.leaves(params)} <= {type(X)}
    assert set(params) == {"again", "layers", "norm", "head"}  # the tied kernel stands once
    assert set(rest) == {"norm", "drop", "calls", "offset"}
    expected = twin(X)  # changes its counters and statistics
    out, new = fn(params, rest, X)
    assert_same(out, expected)
    assert int(module.calls[...]) == 0 and int(new["calls"]) == 1
    assert_same(new["norm"]["mean"], twin.norm.mean[...])
    again, newer = fn(params, new, X)
    assert_same(again, twin(X))  # dropout has drawn another mask
    assert int(newer["calls"]) == 2 and np.any(again != out)
    assert jax.tree.structure(new) == jax.tree.structure(rest)


def test_an_nnx_method_is_called_by_name_or_as_a_function():
    fn, params, rest, _ = from_nnx(NNXNet(nnx.Rngs(0)))
    out, _ = fn(params, rest, X)
    assert_same(fn(params, rest, X, method="doubled")[0], 2 * out)
    assert_same(fn(params, rest, X, method=lambda module, x: 3 * module(x))[0], 3 * out)


def test_to_module_gives_a_module_of_the_arrays_given():
    module = NNXNet(nnx.Rngs(0))
    module.eval()
    fn, params, rest, to_module = from_nnx(module)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    other = to_module(doubled, rest)
    assert type(other) is NNXNet and other.again is other.head.kernel
    assert_same(other(X), fn(doubled, rest, X)[0])
    assert_same(module.head.kernel[...], params["again"])


@pytest.mark.filterwarnings("ignore:Using 'Module.sow.*:DeprecationWarning")
def test_what_a_call_sows_stays_out_of_the_rest():
    module = Sower(nnx.Rngs(0))
    module(X)
    fn, params, rest, _ = from_nnx(module)
    assert rest == {}
    out, rest = fn(params, rest, X)
    assert rest == {}
    assert len(module.seen) == 1  # the caller's module still has what it has sown itself
    (_, sown), _ = fn(params, rest, X, method=lambda m, x: (m(x), nnx.pop(m, nnx.Intermediate)))
    assert_same(jax.tree.leaves(sown), [out])


def test_a_lifted_nnx_function_is_the_merged_one():
    fn, params, rest, to_module = from_nnx(NNXNet(nnx.Rngs(0)))
    frozen, adapter = lora(fn, params, rest, X)
    tree = jp.combine(frozen, moved(adapter))
    lifted, new = jax.jit(jp.lift(fn, materialize="error"))(tree, rest, X)
    merged = jp.merge(tree)
    np.testing.assert_allclose(lifted, to_module(merged, rest)(X), rtol=1e-10)
    assert np.abs(lifted - fn(params, rest, X)[0]).max() > 0.1
    assert int(new["calls"]) == 1


def test_an_nnx_optimizer_updates_an_adapter():
    module = NNXNet(nnx.Rngs(0))
    fn, params, rest, _ = from_nnx(module)
    frozen, arrays = lora(fn, params, rest, X)
    adapter = nnx.Dict({path: nnx.Param(array) for path, array in arrays.items()})
    optimizer = nnx.Optimizer(adapter, optax.adam(3e-2), wrt=nnx.Param)
    forward = jp.lift(fn)

    @nnx.jit
    def step(adapter, optimizer, frozen, rest, x, y):
        def loss(adapter):
            tree = jp.combine(frozen, nnx.to_pure_dict(nnx.state(adapter)))
            out, new = forward(tree, rest, x)
            return jnp.mean((out - y) ** 2), new

        (value, rest), grads = nnx.value_and_grad(loss, has_aux=True)(adapter)
        optimizer.update(adapter, grads)
        return value, rest

    losses = []
    for _ in range(20):
        value, rest = step(adapter, optimizer, frozen, rest, X, Y)
        losses.append(value)
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert int(rest["calls"]) == 20
    assert set(adapter) == set(arrays)
    assert_same(params, from_nnx(module).params)
