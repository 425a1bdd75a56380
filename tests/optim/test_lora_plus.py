"""LoRA+: the second factor of a low-rank weight has the larger learning rate, and nothing else."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpeft as jp
from jaxpeft import optim

KEY = jax.random.key(0)
V, D, F, R = 7, 6, 10, 2


def model(p, ids):
    """Biases are called `b`, as in a model written by hand; the last product is a tied head."""
    h = p["table"][ids] + p["places"][jnp.arange(ids.shape[-1])]
    h = h + jax.nn.relu(h @ p["up"]["w"] + p["up"]["b"]) @ p["down"]["w"] + p["b"]
    return h @ p["table"].T


PARAMS = {
    "table": jnp.ones((V, D)),
    "places": jnp.ones((4, D)),
    "up": {"w": jnp.ones((D, F)), "b": jnp.ones(F)},
    "down": {"w": jnp.ones((F, D))},
    "b": jnp.ones(D),
}
IDS = jnp.zeros((2, 4), int)
SITES = jp.sites(model, PARAMS, IDS)
LINEAR = SITES.linear
FACTORS = {"up/w/b", "down/w/b"}


def moves(tx, adapter, steps=1):
    """How far each array goes at a gradient of ones, in the last of some steps."""
    state = tx.init(adapter)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, adapter), state, adapter)
    return {path: -float(x.ravel()[0]) for path, x in updates.items()}


def fast(method, sites=SITES, params=PARAMS):
    """The arrays that go 16 times as far as the others."""
    frozen, adapter = jp.split(method(KEY, params))
    gone = moves(optim.lora_plus(optax.sgd, 1.0, frozen, sites), adapter)
    assert set(gone.values()) <= {1.0, 16.0}
    return {path for path, far in gone.items() if far == 16}


@pytest.mark.parametrize("rate", [0.5, lambda step: 0.5 / (step + 1)])
def test_b_goes_further_at_any_rate_and_schedule(rate):
    frozen, adapter = jp.split(jp.dora(R, LINEAR)(KEY, PARAMS))
    tx = optim.lora_plus(optax.sgd, rate, frozen, SITES, ratio=4.0)
    for steps in (1, 2):
        now = rate(steps - 1) if callable(rate) else rate
        gone = moves(tx, adapter, steps)
        assert {gone.pop(path) for path in FACTORS} == {4 * now}
        assert set(gone.values()) == {now}


def test_biases_called_b_keep_the_rate():
    method = jp.chain(jp.lora(R, LINEAR), jp.bitfit(SITES))
    assert {"b", "up/b"} < set(jp.split(method(KEY, PARAMS))[1])
    assert fast(method) == FACTORS


def test_a_vector_called_b_keeps_the_rate():
    """Of VeRA, and, in a stack, with as many axes as a factor."""
    vectors = jp.vera(4, SITES.match("down/w"))
    assert "down/w/b" in jp.split(vectors(KEY, PARAMS))[1]
    assert fast(jp.chain(jp.lora(R, SITES.match("up/w")), vectors)) == {"up/w/b"}

    def layers(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0] @ p["head"]

    params = {"w": jnp.ones((3, D, D)), "head": jnp.ones((D, F))}
    sites = jp.sites(layers, params, jnp.ones((2, D)))
    method = jp.chain(jp.vera(4, sites.match("w")), jp.lora(R, sites.match("head")))
    assert fast(method, sites, params) == {"head/b"}


def test_shared_rows_called_b_keep_the_rate_and_those_of_a_frozen_a_do_not():
    """Both are (rank, out) without an `a` in the adapter: only the tree tells them apart."""
    method = jp.chain(jp.miss(R, SITES.match("down/w")), jp.lora_fa(R, SITES.match("up/w")))
    assert set(jp.split(method(KEY, PARAMS))[1]) == FACTORS
    assert fast(method) == {"up/w/b"}


def test_whole_matrices_called_a_and_b_keep_the_rate():
    """Of shapes that would do for factors."""

    def pair(p, x):
        return x @ p["low"]["a"] @ p["low"]["b"] @ p["w"]

    params = {"low": {"a": jnp.ones((6, 3)), "b": jnp.ones((3, 5))}, "w": jnp.ones((5, 4))}
    sites = jp.sites(pair, params, jnp.ones((2, 6)))
    method = jp.chain(jp.unfreeze(sites.match("low/*")), jp.lora(R, sites.match("w")))
    assert fast(method, sites, params) == {"w/b"}


@pytest.mark.parametrize(
    "make",
    [
        jp.lora,
        jp.lora_fa,
        jp.dora,
        jp.hira,
        jp.adalora,
        jp.olora,
        lambda r, sites: jp.moelora(r, sites, experts=2, tasks=2, task_embedding_dim=3),
        lambda r, sites: jp.poly(r, sites, skills=2, tasks=2),
        lambda r, sites: jp.loftq(r, sites, format="int8"),
    ],
)
def test_every_low_rank_weight_has_its_fast_factor(make):
    assert fast(make(R, LINEAR)) == FACTORS


def test_a_factor_below_another_weight_is_found():
    frozen, adapter = jp.split(
        jp.chain(jp.lora(R, LINEAR), jp.ia3(SITES.match("up/w"), SITES.match("down/w")))(
            KEY, PARAMS
        )
    )
    gone = moves(optim.lora_plus(optax.sgd, 1.0, frozen, SITES), adapter)
    assert {k for k, far in gone.items() if far == 16} == {"up/w/w/b", "down/w/w/b"}


@pytest.mark.parametrize("given", ["everything", "a selection"])
def test_embeddings_have_a_rate_of_their_own(given):
    """Also one that is the head."""
    sites = SITES if given == "everything" else LINEAR
    method = jp.lora(R, SITES.matrices)
    assert fast(method, sites) == FACTORS
    frozen, adapter = jp.split(method(KEY, PARAMS))
    assert not adapter["table/a"].any() and adapter["table/b"].any()
    gone = moves(
        optim.lora_plus(optax.sgd, 1.0, frozen, sites, embedding_learning_rate=0.25), adapter
    )
    tables = {f"{path}/{name}": 0.25 for path in ("table", "places") for name in "ab"}
    assert gone == {**tables, "up/w/a": 1, "up/w/b": 16, "down/w/a": 1, "down/w/b": 16}


def test_the_rate_of_embeddings_may_be_a_schedule():
    frozen, adapter = jp.split(jp.lora(R, SITES.matrices)(KEY, PARAMS))
    tx = optim.lora_plus(
        optax.sgd, 1.0, frozen, SITES, embedding_learning_rate=lambda step: 0.5 / (step + 1)
    )
    assert [moves(tx, adapter, steps)["table/a"] for steps in (1, 2)] == [0.5, 0.25]


def split(method):
    return jp.split(method(KEY, PARAMS))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: optim.lora_plus(optax.sgd, 1.0, {}, SITES, ratio=0),
            "`lora_plus(ratio=0)`: `ratio` must be positive",
        ),
        (
            lambda: optim.lora_plus(optax.sgd, 1.0, split(jp.bitfit(SITES))[0], SITES),
            "no low-rank weight whose `b` is trained. Use it with LoRA",
        ),
        (
            lambda: optim.lora_plus(
                optax.sgd, 1.0, split(jp.lora(R, SITES.match("table")))[0], SITES
            ),
            "trained but the embeddings' ['table/a', 'table/b']. Use it with LoRA",
        ),
        (
            lambda: optim.lora_plus(
                optax.sgd,
                1.0,
                split(jp.lora(R, LINEAR))[0],
                jp.sites(lambda p, x: x @ p["other"], {"other": jnp.ones((2, 2))}, jnp.ones(2)),
            ),
            "do not have 'down/w', which has low-rank factors, so it is unknown whether it is an "
            "embedding. They have ['other']",
        ),
        (
            lambda: optim.lora_plus(optax.sgd, 1.0, split(jp.lora(R, LINEAR))[0], SITES).init(
                {"x/c": jnp.ones(2)}
            ),
            "placeholders for ['down/w/b', 'up/w/b'], but this adapter has ['x/c']",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
