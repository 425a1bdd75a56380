"""Adam in 8 bits: its dynamic map, nearest values, update rule, bytes and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import optim, train
from jaxpeft.optim._adam8bit import (
    QuantizedMoment,
    block_axis,
    block_scales,
    dequantize,
    dynamic_map,
    quantize,
)
from tests.train import toy


def described_map(signed):
    """The 256 numbers in float64: centers of equal parts of each decade, 0, 1, and negatives."""
    numbers = [0.0, 1.0]
    for e in range(7):
        edges = np.linspace(0.1, 1, 2 ** (e + (not signed)) + 1) * 10.0 ** (e - 6)
        middles = (edges[1:] + edges[:-1]) / 2
        numbers += [*middles, *-middles] if signed else [*middles]
    return np.sort(numbers)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_described_one(signed):
    got = dynamic_map(signed)
    assert got.dtype == jnp.float32 and got.shape == (256,)
    np.testing.assert_allclose(got, described_map(signed), rtol=4e-7)


def test_known_entries_of_the_maps():
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    exact = [signed[127], signed[255], unsigned[0], unsigned[255]]
    assert [float(x) for x in exact] == [0, 1, 0, 1]
    np.testing.assert_allclose(signed[jnp.array([0, 128])], [-0.99296875, 5.5e-7], rtol=1e-6)
    np.testing.assert_allclose(
        unsigned[jnp.array([1, 2, 254])], [3.25e-7, 7.75e-7, 0.996484375], rtol=1e-6
    )


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_of_the_map_has_its_own_quantized_value(signed):
    numbers = dynamic_map(signed)
    quantized = quantize(numbers, jnp.ones(1), signed=signed)
    np.testing.assert_array_equal(quantized, np.arange(256))


@pytest.mark.parametrize("signed", [True, False])
def test_quantized_values_are_nearest(signed):
    random = np.random.default_rng(0)
    table = described_map(signed)
    middles = (table[1:] + table[:-1]) / 2
    spread = np.exp(random.uniform(np.log(1e-8), 0, 20000)) * random.choice([-1, 1], 20000)
    x = np.concatenate([spread, middles * (1 + 1e-5), middles * (1 - 1e-5), [0, 1, -1, 1e-30]])
    x = (x if signed else np.abs(x)).astype(np.float32)
    quantized = np.asarray(quantize(x, jnp.ones(1), signed=signed, block=len(x)))
    nearest = np.searchsorted(middles, x.astype(np.float64))
    # The part is computed in float32: what lies this close to a middle may go either way.
    wrong = quantized != nearest
    off = np.abs(np.abs(x - table[quantized]) - np.abs(x - table[nearest]))
    assert (off[wrong] < 1e-6 * np.abs(x[wrong])).all()
    assert np.abs(quantized.astype(int) - nearest).max() <= 1
    assert wrong.mean() < 1e-3


@pytest.mark.parametrize(
    "shape, axis, scales",
    [
        ((512, 300), 0, (2, 300)),
        ((300, 7), 0, (2, 7)),
        ((64, 1000), 1, (64, 4)),
        ((3, 600, 8), 1, (3, 3, 8)),
        ((3, 8, 600), 2, (3, 8, 3)),
        ((4097,), 0, (17,)),
        ((9, 100, 50), 1, (9, 1, 50)),
    ],
)
def test_blocks_run_along_one_axis_and_err_by_their_own_largest(shape, axis, scales):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert block_axis(shape) == axis
    found = block_scales(x)
    assert found.shape == scales
    quantized = quantize(x, found, signed=True)
    assert quantized.shape == shape and quantized.dtype == jnp.uint8
    got = np.asarray(dequantize(QuantizedMoment(quantized, found), signed=True))
    length = -(-shape[axis] // scales[axis])
    pieces = np.array_split(np.arange(shape[axis]), range(length, shape[axis], length))
    for i, piece in enumerate(pieces):
        part, own = (np.take(np.asarray(a), piece, axis) for a in (x, got))
        largest = np.abs(part).max(axis)
        np.testing.assert_array_equal(np.take(np.asarray(found), i, axis), largest)
        # Half of the widest gap: the highest decade in 64 parts, and no -1 on the negative side.
        error = np.abs(part - own).max(axis)
        assert (error <= largest * (0.9 / 64) / 2 * 1.001).all()


def test_blocks_of_zeros_and_of_equal_values():
    x = np.zeros((512, 3), np.float32)
    x[:256, 1], x[256:, 2] = 7.5, 1e-42  # a denormal
    scales = block_scales(x)
    got = dequantize(QuantizedMoment(quantize(x, scales, signed=False), scales), signed=False)
    np.testing.assert_array_equal(got[:, :2], x[:, :2])
    assert np.isfinite(got).all()


def by_hand(grads, b1=0.9, b2=0.999, eps=1e-8):
    """The updates of Adam with moments rounded to the described maps; blocks along columns."""

    def stored(x, signed):
        table = described_map(signed)
        cut = x.reshape(-1, 256, x.shape[1])
        scale = np.abs(cut).max(1, keepdims=True)
        quantized = np.searchsorted((table[1:] + table[:-1]) / 2, cut / scale)
        return (table[quantized] * scale).reshape(x.shape)

    m = v = np.zeros(grads[0].shape)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        m, v = stored(m, True), stored(v, False)


def test_updates_are_those_of_adam_with_rounded_moments():
    random = np.random.default_rng(0)
    grads = [
        random.normal(size=(512, 8)) * 10.0 ** random.integers(-3, 2, (512, 8)) for _ in "1234"
    ]
    tx = optim.scale_by_adam8bit()
    state = tx.init(jnp.zeros((512, 8)))
    for g, want in zip(grads, by_hand(grads), strict=True):
        got, state = jax.jit(tx.update)(jnp.asarray(g, jnp.float32), state)
        assert got.dtype == jnp.float32
        close = np.isclose(got, want, rtol=1e-4, atol=1e-6)
        assert close.mean() > 0.995  # others: shares within float32's rounding of a middle
    assert state.count == 4


def test_small_parameters_take_the_steps_of_optax():
    random = np.random.default_rng(0)
    small = {"w": jnp.asarray(random.normal(size=(8, 9)), jnp.float32)}
    ours, theirs = (f(1e-2, weight_decay=0.1) for f in (optim.adamw8bit, optax.adamw))
    states = [ours.init(small), theirs.init(small)]
    assert states[0][0].mu["w"].dtype == jnp.float32
    for _ in range(5):
        grads = {"w": jnp.asarray(random.normal(size=(8, 9)), jnp.float32)}
        got, states[0] = ours.update(grads, states[0], small)
        want, states[1] = theirs.update(grads, states[1], small)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


def test_adamw8bit_follows_adamw():
    """A regression with 4096 weights, 300 steps: loss within 2 %, weights within 3 % of the way."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(256, 64)), jnp.float32)
    y = x @ jnp.asarray(random.normal(size=(64, 64)), jnp.float32)
    y += jnp.asarray(random.normal(size=y.shape), jnp.float32)

    def loss(w):
        return jnp.mean(jnp.square(x @ w - y))

    def run(tx):
        @jax.jit
        def step(_, carry):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return optax.apply_updates(w, updates), state

        w = jnp.zeros((64, 64), jnp.float32)
        return jax.lax.fori_loop(0, 300, step, (w, tx.init(w)))[0]

    got, want = run(optim.adamw8bit(1e-2)), run(optax.adamw(1e-2))
    assert loss(want) < 0.2 * loss(jnp.zeros_like(want))
    np.testing.assert_allclose(loss(got), loss(want), rtol=0.02)
    assert jnp.linalg.norm(got - want) < 0.03 * jnp.linalg.norm(want)


def test_decay_is_masked_as_in_optax():
    tx = optim.adamw8bit(0.5, weight_decay=0.1, mask={"w": True, "b": False})
    ones = {"w": jnp.ones((64, 64)), "b": jnp.ones(5)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    np.testing.assert_allclose(updates["w"], -0.05)
    np.testing.assert_array_equal(updates["b"], 0)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "shape, most",
    [
        ((4096, 4096), 2.032),
        ((32, 4096, 64), 2.032),
        ((32, 64, 11008), 2.032),
        ((576, 1536), 2.042),
    ],
)
def test_bytes_per_parameter(shape, most):
    weights = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    state = jax.eval_shape(optim.scale_by_adam8bit().init, weights)
    per = (size(state) - 4) / np.prod(shape)
    assert 2 < per <= most


def test_a_larger_block_has_fewer_scales():
    state = optim.scale_by_adam8bit(block=2048).init(jnp.zeros((4096, 2)))
    assert state.mu.scales.shape == (2, 2)


def test_no_table_is_looked_up():
    """A gather or a search would make float32 copies of the moments on a TPU."""
    tx = optim.scale_by_adam8bit()
    w = jnp.zeros((512, 16))
    text = str(jax.make_jaxpr(tx.update)(w, tx.init(w)))
    assert "gather" not in text and "while" not in text and "sort" not in text
    assert "256,512,16" not in text and "512,16,256" not in text


@pytest.mark.parametrize("spec", [P("x", None), P(None, "x")])
def test_the_moments_are_sharded_like_their_parameter(spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, spec)
    w = jax.device_put(jnp.ones((4096, 16), jnp.float32), place)
    tx = optim.adamw8bit(1e-2)
    for state in (tx.init(w), jax.jit(tx.update)(w, tx.init(w), w)[1]):
        for moment in (state[0].mu, state[0].nu):
            assert moment.values.sharding.is_equivalent_to(place, 2)
            assert moment.scales.sharding.is_equivalent_to(place, 2)
    text = jax.jit(tx.update).lower(w, tx.init(w), w).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text


def test_a_checkpoint_holds_the_moments_bit_for_bit(tmp_path):
    tx = optim.adamw8bit(1e-2)
    adapter = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    state = train.init(adapter, tx)
    _, opt_state = tx.update(adapter, state.opt_state, adapter)
    state = state._replace(opt_state=opt_state)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        got, _ = checkpoints.restore(train.init(adapter, tx))
    assert jax.tree.structure(got) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, got, state)


def test_the_step_takes_it_and_it_can_be_paged():
    frozen, adapter = toy.model(jnp.float32)
    adapter["unused"] = jnp.ones((64, 64), jnp.float32)
    adapter = jax.device_put(adapter, jax.devices()[0])

    def run(tx):
        step = jax.jit(train.train_step(toy.loss_fn, tx), donate_argnums=0)
        state = train.init(adapter, tx)
        for seed in range(3):
            state, _ = step(state, frozen, toy.batch(seed=seed, dtype=jnp.float32), None)
        return state

    tx = optim.adamw8bit(1e-2, min_size=1)
    got, want = run(optim.paged(tx, min_size=1)), run(tx)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    quantized = got.opt_state[0].mu["w/a"].values
    assert quantized.dtype == jnp.uint8 and quantized.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize(
    "options, told",
    [
        ({"b1": 1.0}, r"b1=1.0\)`: a decay rate must be in"),
        ({"b2": -0.1}, r"b2=-0.1\)`: a decay rate must be in"),
        ({"block": 1}, r"block=1\)`: `block` must be at least 2"),
        ({"min_size": 0}, r"min_size=0\)`: `min_size` must be at least 1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, told):
    with pytest.raises(ValueError, match=r"`scale_by_adam8bit\(" + told):
        optim.scale_by_adam8bit(**options)
    with pytest.raises(ValueError, match=r"`adamw8bit\(" + told):
        optim.adamw8bit(1e-3, **options)
