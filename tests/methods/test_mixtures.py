"""Mixtures: routing weights by the task of an example, and one task as plain LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.io import load_adapter, save_adapter

from .stack import model, normal, params

L, D, F, N, T = 2, 5, 7, 4, 3
KEY = jax.random.key(0)


PARAMS = params(L, D, F, 4)
X = normal(3, N, T, D)
SITES = jp.sites(model, PARAMS, X).linear
MAKE = {
    "moelora": lambda: jp.moelora(4, SITES, experts=2, tasks=3, alpha=6.0, dtype=jnp.float64),
    "poly": lambda: jp.poly(2, SITES, skills=3, tasks=3, alpha=3.0, dtype=jnp.float64),
}
each = pytest.mark.parametrize("name", MAKE)


def trained(name):
    method = MAKE[name]()
    frozen, adapter = jp.split(method(KEY, PARAMS))
    return method, frozen, {k: v + normal(i, *v.shape) for i, (k, v) in enumerate(adapter.items())}


def run(frozen, adapter, x=X, **call):
    return jp.lift(model)(jp.combine(frozen, adapter, **call), x)


@each
def test_training_starts_at_the_base(name):
    frozen, adapter = jp.split(MAKE[name]()(KEY, PARAMS))
    np.testing.assert_allclose(
        run(frozen, adapter, task=jnp.array(1)), model(PARAMS, X), rtol=1e-12
    )


@each
def test_every_example_has_its_own_task(name):
    _, frozen, adapter = trained(name)
    ids = jnp.array([2, 0, 1, 2])
    together = run(frozen, adapter, task=ids)
    for i, task in enumerate(ids):
        alone = run(frozen, adapter, X[i : i + 1], task=task)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-10)
    assert np.abs(run(frozen, adapter, X[:1], task=ids[1:2]) - together[0]).max() > 1e-3


@each
def test_one_tasks_mixture_is_plain_lora(name, tmp_path):
    method, frozen, adapter = trained(name)
    for task in range(3):
        plain, own = jp.mixtures.select_task(method, adapter, task)
        save_adapter(tmp_path, own, plain, PARAMS, key=KEY)
        loaded = load_adapter(tmp_path, PARAMS)
        want = run(frozen, adapter, task=jnp.array(task))
        np.testing.assert_allclose(run(loaded.frozen, loaded.adapter), want, rtol=1e-10)
        merged = jp.merge(jp.combine(loaded.frozen, loaded.adapter))
        np.testing.assert_allclose(model(merged, X), want, rtol=1e-9)


def test_skills_are_sampled_in_calls_with_a_key():
    _, frozen, adapter = trained("poly")
    ids = jnp.zeros(N, int)
    calls = [run(frozen, adapter, task=ids, skill_sampling=jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert np.abs(calls[0] - calls[2]).max() > 1e-3
    assert np.abs(calls[0] - run(frozen, adapter, task=ids)).max() > 1e-3


@each
def test_a_task_id_out_of_range_gives_nan(name):
    _, frozen, adapter = trained(name)
    y = run(frozen, adapter, task=jnp.array([0, 3, 1, 2]))
    assert jnp.isnan(y[1]).all() and jnp.isfinite(y[jnp.array([0, 2, 3])]).all()
    # The usual padding is the last task to whoever counts from the end.
    y = run(frozen, adapter, task=jnp.array([2, -1, -3, 0], jnp.int8))
    assert jnp.isnan(y[1:3]).all() and jnp.isfinite(y[jnp.array([0, 3])]).all()
    for task in (-1, 3, jnp.array(-3)):
        assert jnp.isnan(run(frozen, adapter, task=task)).all()


@each
def test_task_ids_may_be_numbers_lists_or_arrays(name):
    _, frozen, adapter = trained(name)
    jitted = jax.jit(jp.lift(model))
    for task in (1, [2, 0, 1, 2], (2, 0, 1, 2)):
        want = run(frozen, adapter, task=jnp.array(task))
        np.testing.assert_array_equal(run(frozen, adapter, task=task), want)
        got = jitted(jp.combine(frozen, adapter, task=task), X)
        np.testing.assert_allclose(got, want, rtol=1e-10)
    traced = jax.jit(lambda task: run(frozen, adapter, task=task))  # a list of traced numbers
    np.testing.assert_allclose(traced([2, 0, 1, 2]), want, rtol=1e-10)


@each
@pytest.mark.parametrize("task, dtype", [(1.0, "float64"), ([0.0] * N, "float64"), (True, "bool")])
def test_task_ids_that_are_not_integers_are_refused(name, task, dtype):
    frozen, adapter = jp.split(MAKE[name]()(KEY, PARAMS))
    message = rf"`combine\(task=...\)` got {dtype} of shape \({'4,' * isinstance(task, list)}\)"
    for given in (task, jnp.array(task)):
        with pytest.raises(ValueError, match=message):
            jp.combine(frozen, adapter, task=given)


@each
def test_selecting_a_task_keeps_the_arrays_of_other_methods(name):
    head = jp.unfreeze(SITES.match("head"))
    sites = SITES.match("layers/*")
    method = {
        "moelora": lambda: jp.moelora(4, sites, experts=2, tasks=3, dtype=jnp.float64),
        "poly": lambda: jp.poly(2, sites, skills=3, tasks=3, dtype=jnp.float64),
    }[name]()
    frozen, adapter = jp.split(jp.chain(method, head)(KEY, PARAMS))
    adapter = {k: v + normal(i, *v.shape) for i, (k, v) in enumerate(adapter.items())}
    plain, own = jp.mixtures.select_task(method, adapter, 1)
    again, start = jp.split(jp.chain(plain, head)(KEY, PARAMS))
    assert own.keys() == start.keys()
    want = run(frozen, adapter, task=1)
    np.testing.assert_allclose(run(again, own), want, rtol=1e-10)


@each
def test_task_ids_of_another_batch_are_refused(name):
    _, frozen, adapter = trained(name)
    message = r"got task ids of shape \(2,\) \(batch,\), but its input has shape \(4, 3, 5\)"
    with pytest.raises(ValueError, match=message):
        run(frozen, adapter, task=jnp.zeros(2, int))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: jp.moelora(4, SITES, experts=3, tasks=2),
            r"rank=4, experts=3.*Choose one of \[1, 2, 4\]",
        ),
        (
            lambda: jp.moelora(4, SITES, experts=2, tasks=0),
            r"tasks=0, experts=2.*must both be at least 1",
        ),
        (
            lambda: jp.poly(4, SITES, skills=0, tasks=2),
            r"tasks=2, skills=0.*must both be at least 1",
        ),
        (
            lambda: jp.poly(4, SITES.output_slice(0, 1), skills=1, tasks=1),
            "`poly`: a part of the col",
        ),
        (
            lambda: jp.moelora(0, SITES, experts=2, tasks=2),
            r"`moelora\(rank=0\)` needs .* 'head' of shape \(5, 4\) is 5 x 4",
        ),
        (lambda: jp.moelora(6, SITES, experts=2, tasks=2), r"`moelora\(rank=6\)` needs 1 <= rank"),
        (lambda: jp.poly(0, SITES, skills=2, tasks=2), r"`poly\(rank=0\)` needs 1 <= rank <= min"),
        (
            lambda: jp.moelora(4, SITES, experts=2, tasks=2, task_embedding_dim=0),
            r"`moelora\(task_embedding_dim=0\)`: give at least 1; .*cannot tell tasks apart",
        ),
        (
            lambda: jp.mixtures.select_task(jp.lora(2, SITES), {}, 0),
            "from `moelora` or `poly`, but got one from 'lora'",
        ),
        (
            lambda: jp.mixtures.select_task(jp.chain(MAKE["poly"]()), {}, 0),
            "'chain'. From a `chain`, give that m",
        ),
        (lambda: jp.mixtures.select_task(len, {}, 0), "got one from '<built-in function len>'"),
        (
            lambda: jp.mixtures.select_task(MAKE["moelora"](), {"head/a": X}, 0),
            r"lacks \['head/b', 'head/gate', 'head/tasks', 'lay.* it has \['head/a'\]. Give",
        ),
        (
            lambda: jp.mixtures.select_task(MAKE["poly"](), {}, 0),
            r"lacks \['head/a', 'head/b', 'head/logits'",
        ),
        (lambda: jp.mixtures.select_task(MAKE["poly"](), {}, 3), "task=3.*there are 3 tasks"),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", MAKE)
def test_a_convolution_in_groups_has_the_mixture_in_each(name):
    """It is the plain LoRA of its task, whose merged kernel JAX convolves in groups."""

    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (1, 1),
            "SAME",
            feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    params, x = {"w": normal(0, 1, 1, 3, 8)}, normal(1, 2, 3, 3, 6)
    sites = jp.sites(convolve, params, x).conv
    make = {
        "moelora": lambda: jp.moelora(2, sites, experts=2, tasks=2, dtype=jnp.float64),
        "poly": lambda: jp.poly(1, sites, skills=2, tasks=2, dtype=jnp.float64),
    }
    method = make[name]()
    frozen, adapter = jp.split(method(KEY, params))
    adapter = {k: v + normal(i, *v.shape) for i, (k, v) in enumerate(adapter.items())}
    got = jp.lift(convolve)(jp.combine(frozen, adapter, task=jnp.array([1, 0])), x)
    for example, task in enumerate((1, 0)):
        plain, own = jp.mixtures.select_task(method, adapter, task)
        merged = jp.merge(jp.combine(jp.split(plain(KEY, params))[0], own))
        np.testing.assert_allclose(got[example], convolve(merged, x)[example], rtol=1e-10)
