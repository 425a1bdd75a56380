"""A tree prints by shapes: in a terminal, a notebook or a traceback, no array is written out."""

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft._printing import summary
from jaxpeft._view import is_view
from tests.conformance.methods import METHODS
from tests.methods.test_saved import at

KEY = jax.random.key(0)


def qlora():
    params = {"w": jnp.ones((128, 96), jnp.float32), "b": jnp.ones(96, jnp.float32)}
    sites = jp.sites(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((2, 128), jnp.float32))
    return jp.chain(jp.quantize("nf4", sites.linear), jp.lora(2, sites.linear))(KEY, params)


def test_a_view_prints_its_weights_and_the_shape_and_dtype_that_a_program_sees():
    tree = qlora()
    assert repr(tree["w"]) == ("View(LowRank(Codebook), shape=(128, 96), dtype=float32, path='w')")
    frozen, adapter = jp.split(tree)
    whole = jp.combine(frozen, adapter)
    assert repr(frozen["w"]) == repr(whole["w"]) == str(tree["w"]) == repr(tree["w"])


def test_a_weight_prints_the_shapes_of_its_fields_and_what_is_not_a_default():
    weight = jp.combine(*jp.split(qlora()))["w"].weight
    assert repr(weight).startswith("LowRank(w=Codebook(values=uint8[64,96], scales=float32[2,96], ")
    assert repr(weight).endswith("a=float32[128,2], b=float32[2,96])")
    # Under a transformation, and with shapes in the place of arrays, they print alike.
    assert repr(jax.eval_shape(lambda: weight)) == repr(weight)


def test_marks_print_the_shape_of_what_they_hold():
    tree = qlora()
    assert repr(tree["w"].weight.a) == (
        f"{type(tree['w'].weight.a).__name__}(value=float32[128,2], method='lora', path='w')"
    )
    hole = jp.split(tree)[0]["w"].weight.a
    assert repr(hole).startswith(f"{type(hole).__name__}(name='w/a', expects=")
    assert "optional" not in repr(hole) and repr(hole).count("\n") == 0


def test_keys_trees_and_other_values_print_as_they_are():
    assert summary([KEY, {"a": jnp.ones(3, jnp.int8)}, "name", 1.5, None]) == (
        "[key<fry>[], {'a': int8[3]}, 'name', 1.5, None]"
    )


@pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])
def test_no_method_prints_an_array(method):
    s = at(method)
    whole = s.tree(s.case.args)
    views = [x for x in jax.tree.leaves((s.frozen, whole), is_leaf=is_view) if is_view(x)]
    for text in [repr(x) for view in views for x in (view, view.weight)]:
        assert "Array(" not in text and "array(" not in text and "\n" not in text
