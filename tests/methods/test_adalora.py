"""AdaLoRA: ranks are pruned to a budget and then dropped from the arrays; LoRA-FA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft import optim, train

from .stack import model, normal, params

L, D, F, R = 2, 6, 10, 3
KEY = jax.random.key(0)


PARAMS = params(L, D, F, 4)
X, TARGET = normal(3, 8, D), normal(4, 8, 4)
SITES = jp.sites(model, PARAMS, X).linear
TOTAL = R * (2 * L + 1)


def loss(frozen, adapter, batch, key):
    del batch, key
    y = jp.lift(model)(jp.combine(frozen, adapter), X)
    return jnp.sum((y - TARGET) ** 2) + 0.1 * jp.adapters.orthogonality_penalty(adapter), X.shape[0]


def fitted(steps=30, budget=6, **options):
    method = jp.adalora(R, SITES, alpha=6.0, dtype=jnp.float64)
    frozen, adapter = jp.split(method(KEY, PARAMS))
    options = {
        "total_steps": steps,
        "warmup_steps": 4,
        "final_steps": 6,
        "update_every": 3,
    } | options
    tx = optim.rank_allocator(optax.adam(3e-2), budget, **options)
    state, counts = train.init(adapter, tx), []
    step = jax.jit(train.train_step(loss, tx))
    for _ in range(steps):
        state, _ = step(state, frozen, X, None)
        counts.append(
            sum(int(np.sum(x)) for x in jp.adapters.effective_ranks(state.adapter).values())
        )
    return method, frozen, state, counts


def test_ranks_fall_along_the_cubic_schedule_to_the_budget_and_stay():
    _, _, state, counts = fitted()
    decisions = {t: counts[t - 1] for t in (6, 9, 12, 15, 18, 21)}
    want = {t: int(6 + (TOTAL - 6) * (1 - (t - 4) / 20) ** 3) for t in decisions}
    assert decisions == want and want[6] < TOTAL
    assert counts[:4] == [TOTAL] * 4 and counts[23:] == [6] * 7
    kept = {path: np.asarray(mask) for path, mask in state.opt_state.kept.items()}
    for path, mask in kept.items():
        np.testing.assert_array_equal(state.adapter[f"{path}/values"] != 0, mask)


def test_the_least_important_values_are_pruned():
    """A triplet whose gradient and value are large is kept, one without a gradient is not."""
    adapter = {"w/a": normal(0, 4, 3), "w/values": jnp.ones(3), "w/b": normal(1, 3, 5)}
    tx = optim.rank_allocator(
        optax.sgd(0.0), 1, total_steps=4, warmup_steps=0, final_steps=1, update_every=1
    )
    state = tx.init(adapter)
    slope = jax.tree.map(jnp.zeros_like, adapter)
    for sign in (1.0, -1.0, 1.0):
        slope["w/values"] = sign * jnp.array([0.1, 3.0, 0.0])
        updates, state = tx.update(slope, state, adapter)
    np.testing.assert_array_equal(state.kept["w"], [False, True, False])
    after = optax.apply_updates(adapter, updates)
    np.testing.assert_array_equal(after["w/values"], [0, 1, 0])
    np.testing.assert_array_equal(after["w/a"], adapter["w/a"])


def test_dropping_pruned_ranks_makes_arrays_smaller_and_keeps_the_outputs():
    method, frozen, state, _ = fitted()
    smaller, adapter = jp.adapters.drop_pruned_ranks(method, state.adapter)
    assert sum(x.size for x in adapter.values()) < sum(x.size for x in state.adapter.values())
    again, start = jp.split(smaller(KEY, PARAMS))
    assert {k: x.shape for k, x in start.items()} == {k: x.shape for k, x in adapter.items()}
    got, want = (
        jp.lift(model)(jp.combine(f, a), X) for f, a in ((again, adapter), (frozen, state.adapter))
    )
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_shrinking_keeps_what_other_methods_have_trained():
    head = jp.unfreeze(SITES.match("head"))
    method = jp.adalora(R, SITES.match("layers/*"), dtype=jnp.float64)
    frozen, adapter = jp.split(jp.chain(method, head)(KEY, PARAMS))
    adapter = {k: x + normal(i, *x.shape) for i, (k, x) in enumerate(adapter.items())}
    adapter["layers/down/values"] *= jnp.array([0, 1, 0])
    adapter["layers/up/values"] *= 0
    smaller, kept = jp.adapters.drop_pruned_ranks(method, adapter)
    assert {k: x.shape for k, x in kept.items()} == {
        "layers/down/a": (L, F, 1),
        "layers/down/values": (L, 1),
        "layers/down/b": (L, 1, D),
        "head": (D, 4),
    }
    again, _ = jp.split(jp.chain(smaller, head)(KEY, PARAMS))
    got, want = (jp.lift(model)(jp.combine(f, a), X) for f, a in ((again, kept), (frozen, adapter)))
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_values_of_another_matrix_do_not_count():
    """All of this method's are zero, whatever a second one has."""
    first, second = (jp.adalora(R, SITES.match(p)) for p in ("layers/*", "head"))
    _, adapter = jp.split(jp.chain(first, second)(KEY, PARAMS))
    adapter["head/values"] += 1
    with pytest.raises(ValueError, match="all values of this adapter are zero"):
        jp.adapters.drop_pruned_ranks(first, adapter)


def test_orthogonality_is_the_sum_of_squared_distances():
    adapter = {"w/a": normal(0, 4, 3), "w/values": jnp.ones(3), "w/b": normal(1, 3, 5)}
    a, b = adapter["w/a"], adapter["w/b"]
    want = np.sum((a.T @ a - np.eye(3)) ** 2) + np.sum((b @ b.T - np.eye(3)) ** 2)
    np.testing.assert_allclose(jp.adapters.orthogonality_penalty(adapter), want)


def test_the_values_of_the_budget_do_not_touch_other_arrays():
    adapter = {"w/a": normal(0, 4, 3), "w/values": jnp.ones(3), "w/b": normal(1, 3, 5)}
    adapter["other/bias"] = jnp.ones(2)
    tx = optim.rank_allocator(
        optax.sgd(1.0), 1, total_steps=3, warmup_steps=0, final_steps=1, update_every=1
    )
    state = tx.init(adapter)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapter), state, adapter)
    np.testing.assert_array_equal(updates["other/bias"], [-1, -1])


PLAIN = {"w/a": jnp.ones((2, 1)), "w/b": jnp.ones((1, 2))}
BUDGET = {"total_steps": 9, "warmup_steps": 2, "final_steps": 2}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jp.adalora(7, SITES)(KEY, PARAMS), r"rank=7\)` needs 1 <= rank"),
        (lambda: jp.adalora(R, SITES, init_std=0.0), r"init_std=0.0\)`: give a positive number"),
        (
            lambda: jp.adalora(R, SITES.output_slice(0, 2)),
            "`adalora`: a part of the columns of 'head'",
        ),
        (
            lambda: jp.adapters.orthogonality_penalty(PLAIN),
            r"no arrays of `adalora`; it has \['w/a', 'w/b'\]",
        ),
        (
            lambda: jp.adapters.drop_pruned_ranks(jp.lora(R, SITES), PLAIN),
            "from `adalora`, but got one from 'lora'",
        ),
        (
            lambda: jp.adapters.drop_pruned_ranks(jp.chain(jp.adalora(R, SITES)), PLAIN),
            "got one from 'chain'. From a `chain`, give that method in it",
        ),
        (
            lambda: jp.adapters.drop_pruned_ranks(len, PLAIN),
            "got one from '<built-in function len>'",
        ),
        (
            lambda: jp.adapters.drop_pruned_ranks(
                jp.adalora(R, SITES.match("head")), PLAIN | {"head/a": X}
            ),
            r"lacks \['head/b', 'head/values'\].* it has \['head/a', 'w/a', 'w/b'\]. Give all",
        ),
        (
            lambda: jp.adapters.drop_pruned_ranks(
                m := jp.adalora(R, SITES), jp.split(m(KEY, PARAMS))[1]
            ),
            "all values of this adapter are zero",
        ),
        (
            lambda: optim.rank_allocator(
                optax.sgd(1), 1, total_steps=4, warmup_steps=2, final_steps=2
            ),
            "together less than `total_steps`",
        ),
        (
            lambda: optim.rank_allocator(optax.sgd(1), 0, **BUDGET),
            "budget=0, update_every=10.*at least 1",
        ),
        (
            lambda: optim.rank_allocator(optax.sgd(1), 1, beta2=1.0, **BUDGET),
            r"beta2=1.0\)`: a decay",
        ),
        (
            lambda: optim.rank_allocator(optax.sgd(1), 99, **BUDGET).init(
                jp.split(jp.adalora(R, SITES)(KEY, PARAMS))[1]
            ),
            f"budget=99.*has {TOTAL} singular values in 3 arrays",
        ),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_update_without_parameters_is_refused():
    adapter = {"w/a": normal(0, 4, 3), "w/values": jnp.ones(3), "w/b": normal(1, 3, 5)}
    tx = optim.rank_allocator(optax.sgd(1.0), 1, **BUDGET)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(adapter, tx.init(adapter))


# LoRA-FA ----------------------------------------------------------------------------------------


def test_lora_fa_trains_b_over_the_a_of_its_key():
    frozen, adapter = jp.split(jp.lora_fa(R, SITES, alpha=6.0)(KEY, PARAMS))
    both = jp.split(jp.lora(R, SITES, alpha=6.0)(KEY, PARAMS))
    assert set(adapter) == {"layers/up/b", "layers/down/b", "head/b"}
    b = {
        path: jnp.asarray(np.random.default_rng(5).normal(size=adapter[path].shape))
        for path in adapter
    }
    got = jp.lift(model)(jp.combine(frozen, b), X)
    want = jp.lift(model)(jp.combine(both[0], {**both[1], **b}), X)
    np.testing.assert_array_equal(got, want)


def test_lora_fa_refuses_an_embedding():
    def embedded(params, ids):
        return params["table"][ids] @ params["head"]

    params = {"table": jnp.ones((7, D)), "head": PARAMS["head"]}
    sites = jp.sites(embedded, params, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="`lora_fa`: 'table' is an embedding"):
        jp.lora_fa(2, sites.matrices)
