"""lift: what passes through, what is reported, what is refused."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._lift import _warned
from jaxpeft._weight import PositionsError, Weight, axes, base_weight, dense, static, weight

F8 = jnp.float64
KEY = jax.random.key(0)


def tree_of(fn, params, *args, pick=lambda s: s.matrices):
    """A perturbed LoRA on the model's matrices, as its two parts."""
    sites = jp.sites(fn, params, *args)
    frozen, adapter = jp.split(jp.lora(2, pick(sites), dtype=F8)(KEY, params))
    return jp.combine(frozen, {k: v + 0.1 for k, v in adapter.items()})


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, F8)


def test_everything_but_weights_reaches_the_function_as_it_was_given():
    seen = {}

    def fn(params, x, flag, *, name, module):
        seen.update(flag=flag, name=name, module=module, x=x)
        return {"y": x @ params["w"], "flag": flag, "nothing": None, "name": name}

    params, x, module = {"w": normal(0, 4, 3)}, normal(1, 2, 4), object()
    tree = tree_of(lambda p, x: x @ p["w"], params, x)
    out = jp.lift(fn)(tree, x, True, name="n", module=module)
    assert seen["flag"] is True and seen["name"] == "n" and seen["module"] is module
    assert seen["x"] is x
    assert out["flag"] is True and out["name"] == "n" and out["nothing"] is None
    np.testing.assert_allclose(out["y"], x @ jp.merge(tree)["w"], rtol=1e-12)


def test_a_tree_without_weights_is_the_function_itself():
    params, x = {"w": normal(0, 4, 3)}, normal(1, 2, 4)
    np.testing.assert_array_equal(jp.lift(lambda p, x: x @ p["w"])(params, x), x @ params["w"])


def test_a_weight_that_is_returned_as_it_came_comes_back_as_a_weight():
    params, x = {"w": normal(0, 4, 3)}, normal(1, 2, 4)
    tree = tree_of(lambda p, x: x @ p["w"], params, x)
    _, back = jp.lift(lambda p, x: (x @ p["w"], p))(tree, x)
    assert isinstance(back["w"], jp.View)
    np.testing.assert_array_equal(jp.merge(back)["w"], jp.merge(tree)["w"])


def test_params_are_never_changed():
    params, x = {"w": normal(0, 4, 3)}, normal(1, 2, 4)
    before = np.asarray(params["w"]).copy()
    tree = tree_of(lambda p, x: x @ p["w"], params, x)
    jp.merge(tree)
    jax.jit(jp.lift(lambda p, x: x @ p["w"]))(tree, x)
    np.testing.assert_array_equal(params["w"], before)


def gram(p, x):
    return x @ jnp.tanh(p["w"])


def test_an_unknown_use_is_right_and_warned_of_once_with_path_primitive_and_line():
    params, x = {"deep": {"w": normal(0, 4, 3)}}, normal(1, 2, 4)

    def fn(p, x):
        return gram(p["deep"], x) + x @ p["deep"]["w"]

    tree = tree_of(fn, params, x)
    _warned.clear()
    with pytest.warns(jp.MaterializedWarning, match=r"'deep/w' at tanh \(.*test_lift.py:\d+"):
        out = jp.lift(fn)(tree, x)
    np.testing.assert_allclose(out, fn(jp.merge(tree), x), rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.lift(fn)(tree, x)


def test_an_unknown_use_is_an_error_where_the_caller_asks():
    params, x = {"w": normal(0, 4, 3)}, normal(1, 2, 4)

    def fn(p, x):
        return gram(p, x) + x @ p["w"]

    tree = tree_of(fn, params, x)
    with pytest.raises(ValueError, match=r"'w' at tanh .*would be turned into a dense array"):
        jp.lift(fn, materialize="error")(tree, x)
    events = []
    jp.lift(fn, materialize=events.append)(tree, x)
    assert [(e.path, e.primitive) for e in events] == [("w", "tanh")]
    with pytest.raises(ValueError, match=r"materialize='maybe'"):
        jp.lift(fn, materialize="maybe")


def test_a_strict_program_stays_strict_around_the_weights():
    """Adapters mix dtypes and ranks; the caller's own rules hold for the caller's own code."""
    params, x = {"w": normal(0, 4, 3).astype(jnp.bfloat16)}, jnp.ones((2, 4), jnp.bfloat16)
    sites = jp.sites(lambda p, x: x @ p["w"], params, x)
    tree = jp.combine(*jp.split(jp.lora(2, sites.linear)(KEY, params)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert jp.lift(lambda p, x: x @ p["w"])(tree, x).dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="jax_numpy_dtype_promotion=strict"):
            jp.lift(lambda p, x: x @ p["w"] + jnp.ones((2, 3), jnp.float32))(tree, x)


def test_named_scopes_of_the_model_are_kept():
    def fn(p, x):
        with jax.named_scope("my_block"):
            return x @ p["w"]

    params, x = {"w": normal(0, 4, 3)}, normal(1, 2, 4)
    tree = tree_of(fn, params, x)
    text = jax.jit(jp.lift(fn)).lower(tree, x).as_text(debug_info=True)
    assert text.count("my_block") >= 3


def test_effects_of_the_model_are_kept():
    def fn(p, x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return x @ p["w"]

    seen = []
    params, x = {"w": normal(0, 4, 3)}, jnp.ones((2, 4), F8)
    jax.jit(jp.lift(fn))(tree_of(fn, params, x), x).block_until_ready()
    jax.effects_barrier()
    assert seen == [8.0]


def test_adapters_are_stacked_by_vmap_without_copying_the_base():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    params, x = {"w": normal(0, 37, 41)}, normal(1, 5, 37)
    sites = jp.sites(fn, params, x)
    frozen, adapter = jp.split(jp.lora(2, sites.linear, dtype=F8)(KEY, params))
    many = {k: normal(i, 3, *v.shape) for i, (k, v) in enumerate(adapter.items())}

    def run(adapter):
        return jp.lift(fn)(jp.combine(frozen, adapter), x)

    out = jax.vmap(run)(many)
    for i in range(3):
        one = run({k: v[i] for k, v in many.items()})
        np.testing.assert_allclose(out[i], one, rtol=1e-10)
    text = jax.jit(jax.vmap(run)).lower(many).as_text()
    assert "3x37x41" not in text


def test_merge_computes_wide_and_rounds_once():
    w = normal(0, 64, 64).astype(jnp.bfloat16)
    sites = jp.sites(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((1, 64), jnp.bfloat16))
    frozen, adapter = jp.split(jp.lora(4, sites.linear)(KEY, {"w": w}))
    adapter = {k: v + 0.05 for k, v in adapter.items()}
    merged = jp.merge(jp.combine(frozen, adapter))["w"]
    wide = np.asarray(w, np.float32) + np.asarray(adapter["w/a"]) @ np.asarray(adapter["w/b"])
    assert merged.dtype == jnp.bfloat16
    # At most half a unit in the last place: bfloat16 has 7 bits behind the leading one.
    error = np.abs(np.asarray(merged, np.float32) - wide) / np.abs(wide)
    assert error.max() <= 2**-8 * 1.001


def test_a_whole_axis_of_length_one_changes_nothing():
    def fn(p, x):
        def step(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(step, x, p["w"])[0] @ p["out"]

    params, x = {"w": normal(0, 1, 4, 4), "out": normal(2, 4, 1)}, normal(1, 2, 4)
    sites = jp.sites(fn, params, x)
    assert [a.role for a in sites["w"].axes] == ["stack", "in", "out"]
    frozen, adapter = jp.split(jp.lora(1, sites.linear, dtype=F8)(KEY, params))
    tree = jp.combine(frozen, {k: v + 0.3 for k, v in adapter.items()})
    out = jp.lift(fn, materialize="error")(tree, x)
    np.testing.assert_allclose(out, fn(jp.merge(tree), x), rtol=1e-12)


def test_a_parameter_that_is_stored_flat_is_cut_into_its_sides():
    def fn(p, x):
        return x @ p["w"].reshape(4, 6)

    params, x = {"w": normal(0, 24)}, normal(1, 2, 4)
    sites = jp.sites(fn, params, x)
    assert [(a.size, a.role) for a in sites["w"].axes] == [(4, "in"), (6, "out")]
    tree = tree_of(fn, params, x)
    out = jp.lift(fn, materialize="error")(tree, x)
    np.testing.assert_allclose(out, fn(jp.merge(tree), x), rtol=1e-12)
    assert jp.merge(tree)["w"].shape == (24,)


# Values per position, where batch and time have one length --------------------------------------


@weight
class PerPosition(Weight):
    """The matrix `w`, which is given a value for each entry of its input (batch, time)."""

    w: Any = base_weight()
    positions: Any = axes(shared=True)
    only_for: int | None = static(None)

    per_position = "positions"

    def materialize(self):
        return dense(self.w)

    def forward(self, x):
        if self.only_for not in (None, x.shape[0]):
            raise RuntimeError(f"{x.shape[0]} examples")
        if self.positions.array.shape != x.shape[:-1]:
            raise PositionsError(f"{self.positions.array.shape} is not {x.shape[:-1]}")
        return x @ self.w


def tree_with_positions(fn, params, x, **options):
    """A tree with a `PerPosition` at 'w' and a LoRA at 'v', if it is there, for a square x."""
    site = jp.sites(fn, params, x)["w"]
    view = site.view(params["w"])
    held = PerPosition(params["w"], jnp.zeros(x.shape[:2]), **options)
    rest = {k: v for k, v in params.items() if k != "w"}
    if rest:
        rest = tree_of(lambda p, x: fn({**p, "w": params["w"]}, x), rest, x)
    return {**rest, "w": dataclasses.replace(view, weight=held)}


def test_a_materialization_is_reported_once_where_batch_and_time_have_one_length():
    params, x = {"w": normal(0, 3, 3), "v": normal(1, 3, 3)}, normal(2, 4, 4, 3)

    def fn(p, x):
        return x @ p["w"] @ jnp.tanh(p["v"]) @ p["v"]

    tree, events = tree_with_positions(fn, params, x), []
    jp.lift(fn, materialize=events.append)(tree, x)
    assert [(e.path, e.primitive) for e in events] == [("v", "tanh")]


def test_a_model_with_time_first_is_refused_where_batch_and_time_have_one_length():
    params, x = {"w": normal(0, 3, 3)}, normal(2, 4, 4, 3)

    def fn(p, x):
        return x.transpose(1, 0, 2) @ p["w"]

    with pytest.raises(PositionsError, match=r"\(3, 4\) is not \(4, 3\)"):
        jp.lift(fn)(tree_with_positions(fn, params, x), x)


class OnlyFour(Exception):
    """What a model may raise for a batch of another size."""


@pytest.mark.parametrize("kind", [OnlyFour, ValueError])
def test_a_model_of_one_batch_size_runs_with_a_warning_that_its_axes_are_unchecked(kind):
    params, x = {"w": normal(0, 3, 3)}, normal(2, 4, 4, 3)

    def fn(p, x):
        if x.shape[0] != 4:
            raise kind("four examples only")
        return x @ p["w"]

    tree = tree_with_positions(fn, params, x)
    told = (
        rf"shape \(4, 4\) and could not check .* 3 examples \({kind.__name__}: four examples only"
    )
    with pytest.warns(UserWarning, match=told):
        out = jp.lift(fn)(tree, x)
    np.testing.assert_allclose(out, fn(params, x), rtol=1e-12)


def test_an_error_of_a_weight_is_not_taken_for_a_model_of_one_batch_size():
    params, x = {"w": normal(0, 3, 3)}, normal(2, 4, 4, 3)

    def fn(p, x):
        return x @ p["w"]

    with pytest.raises(RuntimeError, match="3 examples"):
        jp.lift(fn)(tree_with_positions(fn, params, x, only_for=4), x)
