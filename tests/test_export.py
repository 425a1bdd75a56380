"""Trees with structured weights as arguments of a function that `jax.export` writes to a file."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxpeft as jp
from jaxpeft import _export as exporting
from jaxpeft._weight import Weight
from jaxpeft.extend import base_weight, static, weight

KEY = jax.random.key(0)
P = {
    "w": jax.random.normal(KEY, (8, 12), jnp.float32),
    "b": jnp.ones(12, jnp.float32),
    "v": jax.random.normal(KEY, (12, 8), jnp.float32),
}
X = jax.random.normal(KEY, (2, 8), jnp.float32)


def model(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


S = jp.sites(model, P, X)

METHODS = {
    "lora": jp.lora(2, S.linear),
    "nf4+dq + lora with dropout": jp.chain(
        jp.quantize("nf4+dq", S.linear, block=4), jp.lora(2, S.match("w"), dropout=0.5)
    ),
    "fp4 flat + dora": jp.chain(
        jp.quantize("fp4", S.linear, block=8, layout="flat"), jp.dora(2, S.match("v"))
    ),
    "int8 + part of the outputs": jp.chain(
        jp.quantize("int8", S.linear), jp.lora(2, S.match("w").output_slice(1, 2))
    ),
    "fp8 + vera + bitfit": jp.chain(
        jp.quantize("fp8", S.linear), jp.vera(2, S.linear), jp.bitfit(S)
    ),
    "moelora": jp.moelora(2, S.linear, experts=2, tasks=3, task_embedding_dim=4),
    "bottleneck": jp.bottleneck_adapter(2, S.match("v")),
}


def written(function, *args):
    pytest.importorskip("flatbuffers", reason="`jax.export` writes files with flatbuffers")
    exported = export.export(jax.jit(function))(*args)
    return export.deserialize(bytearray(exported.serialize()))


def shaken(adapter):
    return {k: v + 0.1 for k, v in adapter.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_tree_goes_through_a_file_and_is_called(name):
    frozen, adapter = jp.split(METHODS[name](KEY, P))
    call = {"task": jnp.array([0, 2])} if name == "moelora" else {}
    tree = jp.combine(frozen, shaken(adapter), **call)
    again = written(jp.lift(model), tree, X)
    np.testing.assert_allclose(again.call(tree, X), jp.lift(model)(tree, X), rtol=1e-5)


def test_a_frozen_tree_and_an_adapter_go_through_a_file():
    """With the places, what they expect, and shared ones; and a tree as the result."""
    method = jp.chain(jp.quantize("int8", S.linear), jp.vera(2, S.linear), jp.ia3(S.match("w")))
    frozen, adapter = jp.split(method(KEY, P))

    def out(frozen, adapter, x):
        return jp.lift(model)(jp.combine(frozen, adapter), x), frozen

    again = written(out, frozen, adapter, X)
    y, same = again.call(frozen, shaken(adapter), X)
    np.testing.assert_allclose(y, out(frozen, shaken(adapter), X)[0], rtol=1e-5)
    assert jax.tree.structure(same) == jax.tree.structure(frozen)
    assert same["w"].weight.scale.expects == frozen["w"].weight.scale.expects
    with pytest.raises(ValueError, match=re.escape("'w/w/d' has shape (3,), where `vera` trains")):
        jp.combine(same, {**adapter, "w/w/d": jnp.ones(3)})


def test_marks_and_parts_go_through_a_file():
    def stacked(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    p = {"layers": jax.random.normal(KEY, (3, 8, 8), jnp.float32)}
    marked = jp.last_layers(jp.sites(stacked, p, X), 1)(KEY, p)
    again = written(lambda tree, x: jp.lift(stacked)(jp.combine(*jp.split(tree)), x), marked, X)
    np.testing.assert_allclose(again.call(marked, X), stacked(p, X), rtol=1e-5)


def test_every_class_of_nodes_is_registered():
    """Their static parts come back equal, without the file itself."""
    for name, method in METHODS.items():
        frozen, adapter = jp.split(method(KEY, P))
        call = {"task": 0} if name == "moelora" else {}
        for tree in (method(KEY, P), frozen, jp.combine(frozen, adapter, **call)):
            for kind, static_part in nodes(jax.tree.structure(tree)):
                if kind.__module__.startswith("jaxpeft."):
                    text = json.dumps(exporting._encode(static_part, kind.__name__))
                    assert exporting._decode(json.loads(text)) == static_part


def nodes(treedef):
    if treedef.node_data() is not None:
        yield treedef.node_data()
    for child in treedef.children():
        yield from nodes(child)


# A weight of the user's own --------------------------------------------------------------------


@weight
class Doubled(Weight):
    """Twice the matrix."""

    w: Any = base_weight()
    note: Any = static(None)

    def forward(self, x):
        return 2 * (x @ self.w)

    def materialize(self):
        return 2 * self.w


def doubled(note):
    view = S["w"].view(P["w"])
    return {**P, "w": dataclasses.replace(view, weight=Doubled(P["w"], note))}


@pytest.mark.parametrize(
    "note",
    [
        None,
        "a",
        1,
        0.1,
        float("inf"),
        True,
        (1, (2.5, None)),
        [1, "b"],
        np.float32(0.1),
        np.int64(3),
        jnp.dtype("bfloat16"),
        jp.OutputSlice(1, 2),
    ],
)
def test_a_static_field_of_plain_values_comes_back_equal(note):
    text = json.dumps(exporting._encode((note,), "Doubled", ["note"]))
    (again,) = exporting._decode(json.loads(text))
    assert again == note and (type(again) is type(note) or isinstance(note, np.generic))


def test_a_weight_of_the_users_own_goes_through_a_file():
    tree = doubled((1, "x", 0.1))
    again = written(jp.lift(model), tree, X)
    np.testing.assert_allclose(again.call(tree, X), jp.lift(model)(tree, X), rtol=1e-6)


@pytest.mark.parametrize("note", [print, object, str, np.generic, {1, 2}, P["b"]], ids=str)
def test_a_static_field_without_a_form_in_a_file_is_named(note):
    kind = type(note).__name__
    with pytest.raises(
        ValueError, match=rf"(?s)tests.test_export.Doubled.note` holds .*, a {kind}, which has no"
    ):
        exporting._encode((note,), "tests.test_export.Doubled", ["note"])


def test_a_class_that_is_defined_again_may_be_used():
    """As the cell of a notebook that is run twice: JAX keeps the first name for the first class."""

    def define():
        @weight
        class Again(Weight):
            w: Any = base_weight()

        return Again

    assert define() is not define()
