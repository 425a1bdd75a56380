"""Every method of the table: saved and loaded in a new process, its own gradients, other bases.

Each method stands on one row of the conformance table, its adapter moved away from the start.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.io import save_adapter
from tests.conformance.methods import METHODS
from tests.conformance.rows import ROWS
from tests.conformance.rows.row import D, F, H, L, N, paths
from tests.conformance.subject import Subject, differentiated, lifted_call, scores, subject, worst

KEY = jax.random.key(1)  # the one that `subject` makes its adapters with


def row_of(method):
    """The method's first row whose parameters are a plain tree."""
    name = next(name for name in method.rows if not name.startswith("nnx"))
    return next(row for row in ROWS if row.name == name)


def at(method) -> Subject:
    return subject(row_of(method), method)


each = pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])


#: Of each kind of weight one; `make conformance` has the others.
EVERYDAY = ("lora", "hira", "oft", "ia3", "bottleneck", "prefix", "prompt")


def others(methods):
    """The methods, of which those that are not everyday carry the mark."""
    return pytest.mark.parametrize(
        "method",
        [
            pytest.param(m, id=m.name, marks=() if m.name in EVERYDAY else pytest.mark.conformance)
            for m in methods
        ],
    )


# A new process ------------------------------------------------------------------------------------

# Knows the model, what a call is given, and the folder; the method comes from the folder alone.
READER = """
import sys
from pathlib import Path
import jax
import numpy as np
jax.config.update("jax_enable_x64", True)
import jaxpeft as jp
from jaxpeft.io._adapter import load_adapter
from tests.conformance.methods import METHODS
from tests.methods.test_saved import row_of

for method in METHODS:
    folder = Path(sys.argv[1]) / method.name
    case = row_of(method).build()
    args = method.args(case.args, jp.sites(case.fn, case.params, *case.args))
    loaded = load_adapter(folder, case.params)
    tree = jp.combine(loaded.frozen, loaded.adapter, **method.given(args))
    y = jax.tree.leaves(jax.jit(jp.lift(case.fn))(tree, *args))
    np.savez(folder / "outputs.npz", *y)
"""


def test_a_new_process_has_the_same_outputs_to_the_bit(tmp_path):
    """All of them in one: a process costs more than a method."""
    for method in METHODS:
        s = at(method)
        made = method.make(s.sites, jnp.float64)
        save_adapter(tmp_path / method.name, s.adapter, made, s.case.params, key=KEY)
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", READER, str(tmp_path)], check=True, cwd=root)
    for method in METHODS:
        s = at(method)
        run = jax.jit(jp.lift(s.case.fn))
        here = jax.tree.leaves(run(s.tree(s.case.args), *s.case.args))
        with np.load(tmp_path / method.name / "outputs.npz") as there:
            assert len(there.files) == len(here), method.name
            for name, y in zip(there.files, here, strict=True):
                np.testing.assert_array_equal(there[name], y, method.name)
        start, _ = jp.split(method.make(s.sites, jnp.float64)(KEY, s.case.params))
        fresh = jp.combine(start, untrained(s), **method.given(s.case.args))
        moved = worst(jax.tree.leaves(run(fresh, *s.case.args)), here)
        assert moved > 1e-3, method.name  # else an adapter that is not read would pass


def untrained(s):
    return jp.split(s.method.make(s.sites, jnp.float64)(KEY, s.case.params))[1]


# What is trained ----------------------------------------------------------------------------------

LSTM = 2 * (4 + 3 + 2) * 12 + 2 * (6 + 3 + 2) * 12 + 6 * 6 + 6 + 6 * D + D
KEYS = N * H

#: How many trainable parameters each method has on its row, by the formula of its paper.
NUMBERS = {
    "lora": 2 * (D + F) + 2 * (F + D),
    "ia3": F + D,
    "ia3 on a part": 2 * (D + F) + 2 * (F + D) + 1 + 1,  # over LoRA
    "lora on nf4": 2 * (D + F) + 2 * (F + D),
    "dora": (2 * (D + F) + F) + (2 * (F + D) + D),
    "lora_fa": 2 * F + 2 * D,
    "adalora": 2 * (D + F + 1) + 2 * (F + D + 1),
    "pissa": 2 * (D + F) + 2 * (F + D),
    "olora": 2 * (D + F) + 2 * (F + D),
    "sparse": 2 * round(0.3 * D * F),
    "lora under a mask": 2 * (D + F) + 2 * (F + D),
    "gates": F + D,
    "gates of entries": L * 2 * D * F,
    "hira": 2 * (D + F) + 2 * (F + D),
    "vera": (4 + F) + (4 + D),
    "loha": 2 * 2 * (D + F) + 2 * 2 * (F + D),
    "lokr": (1 + 2 * (D + F)) + (F + 2 * (1 + D)),  # blocks of 13 x 17 and of 1 x 13
    "miss": 2 * F + 2 * D,
    "oft": D * (D - 1) // 2 + F * (F - 1) // 2,  # one block each: their sides are prime
    "boft": D * (D - 1) // 2 + F + F * (F - 1) // 2 + D,
    "hra": 2 * D + 2 * F,
    "road": 2 * (F + 1) + 2 * (D + 1),  # and a zero to make the pairs even
    "bottleneck": (2 * 3 * F + 3 + F) + (2 * 3 * D + 3 + D),
    "parallel": D * 3 + 3 + 3 * D + D,
    "prefix": 2 * 2 * KEYS,
    "prompt": 2 * D,
    "bottleneck on the sum": L * (2 * 3 * D + 3 + D),
    "encoded prefix": 2 * 4 + 4 * 5 + 5 + 2 * (5 + 1) * KEYS,
    "p_tuning": 2 * 4 + LSTM,
    "trainable tokens": 11 * D,
    "moelora": 4 * (D + F) + 4 * (F + D) + 5 * (3 + 2),
    "xlora": 2 * 2 * (5 + 1),
    "poly": 2 * (4 * 2 * (D + F) + 3 * 4),
    "mam": L * (2 * 2 * KEYS + 2 * 3 * D + 3 + D),
    # Each gate is a vector of its input and one number.
    "unipelt": L * (2 * 2 * (D + KEYS) + 2 * 2 * KEYS + 2 * 3 * D + 3 + D + 4 * (D + 1)),
}


@each
def test_it_has_as_many_trainable_parameters_as_its_paper_says(method):
    s = at(method)
    counts = jp.count_params(s.frozen, s.adapter)
    assert counts.trainable == sum(x.size for x in s.adapter.values()) == NUMBERS[method.name]


@others(METHODS)
def test_a_step_moves_every_array_of_the_adapter_and_nothing_else(method):
    s = at(method)
    before = {k: np.array(x) for k, x in paths(s.case.params).items()}
    frozen = [np.array(x) for x in jax.tree.leaves(s.frozen) if hasattr(x, "shape")]
    assert not s.adapter.keys() & before.keys()  # none of the model's own arrays is trained
    f, variables = scores(s, s.case.fn, s.case.args, lifted_call(s))
    gradient = jax.jit(differentiated(s, f))(variables)[1]["adapter"]
    assert gradient.keys() == s.adapter.keys()
    for path, g in gradient.items():
        assert jnp.isfinite(g).all() and (g != 0).any(), path
    moved = {path: x - 0.1 * gradient[path] for path, x in s.adapter.items()}
    tree = s.tree(s.case.args, moved)
    for a, b in zip(
        frozen, (x for x in jax.tree.leaves(s.frozen) if hasattr(x, "shape")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    if method.keeps_base:
        for path, x in paths(jp.base_params(tree)).items():
            np.testing.assert_array_equal(x, before[path])


# Other bases --------------------------------------------------------------------------------------

plain = [m for m in METHODS if m.name != "lora on nf4"]


@functools.cache
def on_its_own_base(s):
    return jax.jit(lambda: s.expected(s.case.fn, s.case.args))()


def check(s, how, params, adapter):
    """The lifted model of `how` is the law's model over these dense parameters."""
    frozen, start = jp.split(how(KEY, s.case.params))
    assert {k: v.shape for k, v in start.items()} == {k: v.shape for k, v in adapter.items()}
    given = s.method.given(s.case.args)
    tree = jp.combine(frozen, adapter, **given)
    got = jax.jit(jp.lift(s.case.fn))(tree, *s.case.args)
    over = dataclasses.replace(s, case=dataclasses.replace(s.case, params=params))
    if s.method.by_hand:
        want = jax.jit(lambda: over.expected(s.case.fn, s.case.args))()
    else:
        make = s.method.make(s.sites, jnp.float64)
        # What is drawn and frozen follows from the key that `chain` gives its second method.
        frozen, _ = jp.split(make(jax.random.fold_in(KEY, 1), params))
        want = s.case.fn(jp.merge(jp.combine(frozen, s.adapter, **given)), *s.case.args)
    assert worst(got, want) < 1e-10
    assert worst(got, on_its_own_base(s)) > 1e-4  # the base does matter


@pytest.mark.parametrize("format", ["int8", pytest.param("nf4", marks=pytest.mark.conformance)])
@others(plain)
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_over_quantized_values_it_is_the_method_over_the_dequantized_ones(method, format):
    s = at(method)
    quantize = jp.quantize(format, s.sites.matrices, **({"block": 4} if format == "nf4" else {}))
    decoded = jp.merge(quantize(KEY, s.case.params))
    check(s, jp.chain(quantize, method.make(s.sites, jnp.float64)), decoded, s.adapter)


def moved(adapter):
    keys = jax.random.split(jax.random.key(5), len(adapter))
    return {
        k: x + 0.3 * jax.random.normal(key, x.shape, x.dtype)
        for key, (k, x) in zip(keys, adapter.items(), strict=True)
    }


@others([m for m in plain if m.on_trained])
def test_over_lora_it_is_the_method_over_the_merged_weights(method):
    """On the same weights and on all others."""
    s = at(method)
    lora = jp.lora(2, s.sites.matrices, dtype=jnp.float64)
    frozen, low = jp.split(lora(KEY, s.case.params))
    low = moved(low)
    merged = jp.merge(jp.combine(frozen, low))
    how = jp.chain(lora, method.make(s.sites, jnp.float64))
    # The path of what stands below grows by `w` for each weight on top.
    names = jp.split(how(KEY, s.case.params))[1].keys() - s.adapter.keys()
    below = {name: low[re.sub("(/w)+/", "/", name)] for name in names}
    assert len(below) == len(low)
    check(s, how, merged, s.adapter | below)
