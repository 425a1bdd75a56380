"""A part of a weight's outputs: each method acts on it alone, or says that it cannot."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

F8 = jnp.float64
KEY = jax.random.key(0)
PARAMS = {"w": toy.normal(0, 4, 6), "b": toy.normal(1, 6), "o": toy.normal(2, 6, 4)}
X = toy.normal(9, 3, 5, 4)


def fused(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["o"]


SITES = jp.sites(fused, PARAMS, X)
W, OUT = SITES.match("w"), SITES.match("o")
MIDDLE = W.output_slice(1, 3)


def trained(method, params=PARAMS):
    frozen, adapter = jp.split(method(KEY, params))
    return frozen, toy.perturbed(adapter, 1.0)


# IA3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part, columns", [((1, 3), [2, 3]), ((2, 3), [4, 5]), ((1, 3, 2), [1, 4]), ((0, 2), [0, 1, 2])]
)
def test_ia3_scales_the_outputs_of_the_part_and_their_biases(part, columns):
    frozen, adapter = trained(jp.ia3(W.output_slice(*part), dtype=F8))
    (scale,) = adapter.values()
    w, b = np.array(PARAMS["w"]), np.array(PARAMS["b"])
    w[:, columns] *= scale
    b[columns] *= scale
    want = np.tanh(np.array(X) @ w + b) @ np.array(PARAMS["o"])
    tree = jp.combine(frozen, adapter)
    np.testing.assert_allclose(jp.lift(fused)(tree, X), want, rtol=1e-12)
    np.testing.assert_allclose(jp.merge(tree)["w"], w, rtol=1e-12)
    _, start = jp.split(jp.ia3(W.output_slice(*part))(KEY, PARAMS))
    assert [x.tolist() for x in start.values()] == [[1.0] * len(columns)]


def test_ia3_of_keys_and_of_values_in_one_fused_kernel_are_a_chain():
    method = jp.chain(jp.ia3(MIDDLE, dtype=F8), jp.ia3(W.output_slice(2, 3), OUT, dtype=F8))
    frozen, adapter = trained(method)
    assert {k: v.shape for k, v in adapter.items()} == {
        "w/scale_1_of_3": (2,),
        "w/scale_2_of_3": (2,),
        "o/scale": (6,),
    }
    scale = np.concatenate([np.ones(2), adapter["w/scale_1_of_3"], adapter["w/scale_2_of_3"]])
    inner = np.tanh((X @ PARAMS["w"] + PARAMS["b"]) * scale) * adapter["o/scale"]
    got = jp.lift(fused)(jp.combine(frozen, adapter), X)
    np.testing.assert_allclose(got, inner @ PARAMS["o"], rtol=1e-12)


def test_ia3_scales_a_part_of_each_layer_of_a_stack_and_of_a_tied_table():
    p = {"w": toy.normal(0, 3, 4, 4)}
    stacked = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    frozen, adapter = trained(
        jp.ia3(jp.sites(stacked, p, X).match("w").output_slice(1, 2), dtype=F8), p
    )
    scale = jnp.concatenate([jnp.ones((3, 2)), adapter["w/scale_1_of_2"]], axis=1)
    got = jp.lift(stacked)(jp.combine(frozen, adapter), X)
    np.testing.assert_allclose(got, stacked({"w": p["w"] * scale[:, None]}, X), rtol=1e-12)

    p = {"t": toy.normal(0, 7, 4)}
    tied = lambda p, ids: jnp.tanh(p["t"][ids]) @ p["t"].T  # noqa: E731
    ids = jnp.array([[1, 6]])
    frozen, adapter = trained(
        jp.ia3(jp.sites(tied, p, ids).match("t").output_slice(0, 4), dtype=F8), p
    )
    scaled = p["t"].at[:, 0].multiply(adapter["t/scale_0_of_4"][0])
    got = jp.lift(tied)(jp.combine(frozen, adapter), ids)
    np.testing.assert_allclose(got, tied({"t": scaled}, ids), rtol=1e-12)


# Kernels that the program cuts --------------------------------------------------------------------


def halves(p, x):
    return jnp.tanh(x @ p["w"][:, :3]) * (x @ p["w"][:, 3:])


def thirds(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


@pytest.mark.parametrize("fn, part", [(halves, (0, 2)), (halves, (1, 3)), (thirds, (2, 3))])
@pytest.mark.parametrize("make", [lambda s: jp.lora(1, s, dtype=F8), lambda s: jp.ia3(s, dtype=F8)])
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_a_part_of_a_kernel_that_is_cut_before_its_use_is_formed(fn, part, make):
    """The cuts need not fall where the part's columns begin and end."""
    found = jp.sites(fn, PARAMS, X).match("w").output_slice(*part)
    tree = jp.combine(*trained(make(found)))
    merged = jp.merge(tree)
    np.testing.assert_allclose(jp.lift(fn)(tree, X), fn(merged, X), rtol=1e-12)
    assert np.abs(merged["w"] - PARAMS["w"]).max() > 0.01


# Every method -------------------------------------------------------------------------------------

TABLE = {"t": toy.normal(3, 7, 6), "o": PARAMS["o"]}
TABLE_PART = (
    jp.sites(lambda p, ids: p["t"][ids] @ p["o"], TABLE, jnp.zeros((1, 3), int))
    .match("t")
    .output_slice(1, 3)
)
MASKS = {"w": np.ones((4, 6), bool)}


def moments():
    return jp.calibration.input_moments(fused, PARAMS, MIDDLE, [X])


#: Each method on an output slice.
ON_A_PART = {
    "adalora": lambda: jp.adalora(1, MIDDLE),
    "stack_adapters": lambda: jp.mixtures.stack_adapters([(jp.lora(1, MIDDLE), {})] * 2),
    "boft": lambda: jp.boft(2, MIDDLE),
    "bottleneck_adapter": lambda: jp.bottleneck_adapter(2, MIDDLE),
    "corda": lambda: jp.corda(1, MIDDLE, moments()),
    "dora": lambda: jp.dora(1, MIDDLE),
    "eva": lambda: jp.eva(1, MIDDLE, moments()),
    "gates": lambda: jp.gates(MIDDLE),
    "hira": lambda: jp.hira(1, MIDDLE),
    "hra": lambda: jp.hra(2, MIDDLE),
    "ia3": lambda: jp.ia3(MIDDLE),
    "ia3 of inputs": lambda: jp.ia3(OUT, MIDDLE),
    "loftq": lambda: jp.loftq(1, MIDDLE),
    "loha": lambda: jp.loha(1, MIDDLE),
    "lokr": lambda: jp.lokr(1, MIDDLE),
    "longlora": lambda: jp.longlora(1, OUT, MIDDLE, OUT),
    "lora": lambda: jp.lora(1, MIDDLE),
    "lora_fa": lambda: jp.lora_fa(1, MIDDLE),
    "lora_ga": lambda: jp.lora_ga(1, MIDDLE, {"w": PARAMS["w"]}),
    "mam": lambda: jp.mam(2, 2, MIDDLE, OUT - OUT, W, OUT),
    "miss": lambda: jp.miss(1, MIDDLE),
    "moelora": lambda: jp.moelora(2, MIDDLE, experts=2, tasks=2),
    "olora": lambda: jp.olora(1, MIDDLE),
    "oft": lambda: jp.oft(2, MIDDLE),
    "p_tuning": lambda: jp.p_tuning(2, TABLE_PART),
    "parallel_adapter": lambda: jp.parallel_adapter(2, MIDDLE, OUT),
    "pissa": lambda: jp.pissa(1, MIDDLE),
    "poly": lambda: jp.poly(1, MIDDLE, skills=1, tasks=1),
    "prefix_tuning": lambda: jp.prefix_tuning(2, MIDDLE, OUT - OUT),
    "prompt_tuning": lambda: jp.prompt_tuning(2, TABLE_PART),
    "prune": lambda: jp.prune(MASKS, MIDDLE),
    "quantize": lambda: jp.quantize("int8", MIDDLE),
    "road": lambda: jp.road(MIDDLE),
    "sparse_delta": lambda: jp.sparse_delta(0.5, MIDDLE),
    "trainable_tokens": lambda: jp.trainable_tokens([1], TABLE_PART),
    "unfreeze": lambda: jp.unfreeze(MIDDLE),
    "unipelt": lambda: jp.unipelt(MIDDLE, W, OUT, OUT, rank=1, length=2, bottleneck_dim=2),
    "vera": lambda: jp.vera(2, MIDDLE),
    "xlora": lambda: jp.xlora(MIDDLE, {"w": [1]}, hidden_size=2),
}
ACT_ON_SLICES = {"lora", "lora_fa", "eva", "ia3"}
#: These take all parameters of the model, and choose among them themselves.
CHOOSING = {"bitfit", "full_finetuning", "last_layers", "linear_probe", "norm_tuning"}


@pytest.mark.parametrize("name", ON_A_PART)
def test_a_method_acts_on_the_output_slice_alone_or_refuses_it(name):
    if name not in ACT_ON_SLICES:
        with pytest.raises(
            ValueError, match=r"a part of the columns of '[wt]' is selected \(OutputSlice"
        ):
            ON_A_PART[name]()(
                KEY, TABLE if name in ("prompt_tuning", "p_tuning") else {**PARAMS, **TABLE}
            )
        return
    merged = jp.merge(jp.combine(*trained(ON_A_PART[name]())))
    moved = np.abs(merged["w"] - PARAMS["w"]).max(0) > 0
    assert moved.tolist() == [False, False, True, True, False, False]


def test_no_method_is_missing_here():
    made = {
        name
        for name in jp.__all__
        if inspect.isfunction(f := getattr(jp, name))
        and "Sites" in str(inspect.signature(f).parameters.values())
        and f.__annotations__.get("return") in (jp.Method, "Method")
    }
    assert made <= set(ON_A_PART) | CHOOSING
    assert set(ON_A_PART) - {"ia3 of inputs"} <= made | {"stack_adapters"}


# Selections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: MIDDLE | W.output_slice(2, 3),
            "`|` of two selections with different columns of 'w': OutputSlice(index=1, of=3, "
            "groups=1) and OutputSlice(index=2, of=3, groups=1)",
        ),
        (lambda: SITES.linear & MIDDLE, "`&` of two selections with different columns of 'w': all"),
        (lambda: SITES.linear - MIDDLE, "`-` of two selections with different columns of 'w': all"),
        (
            lambda: MIDDLE.output_slice(1, 2),
            "Of 'w', OutputSlice(index=1, of=3, groups=1) is selected already",
        ),
        (
            lambda: jp.prefix_tuning(2, MIDDLE, W.output_slice(2, 3)),
            "`prefix_tuning`: ['w'] are among the keys and among the values",
        ),
    ],
)
def test_set_operations_keep_output_slices(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_output_slice_is_united_with_other_weights_and_with_itself():
    assert (MIDDLE | OUT)["w"].part == (MIDDLE | MIDDLE)["w"].part == jp.OutputSlice(1, 3)
    assert list((MIDDLE | OUT) - MIDDLE) == ["o"]
