"""Selection methods are only splits of the tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

from . import toy

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def sites():
    return jp.sites(toy.model, toy.params(), toy.ids())


def test_bitfit_trains_all_biases_or_those_the_paper_names(sites):
    _, adapter = jp.split(jp.bitfit(sites)(KEY, toy.params()))
    assert sorted(adapter) == [f"layers/{n}/bias" for n in ("down", "k", "o", "q", "up", "v")]


def test_bitfit_knows_the_papers_names_on_berts_paths():
    layer = "bert/encoder/layer/3"
    names = {
        "query": f"{layer}/attention/self/query/bias",
        "key": f"{layer}/attention/self/key/bias",
        "value": f"{layer}/attention/self/value/bias",
        "attention_layernorm": f"{layer}/attention/output/LayerNorm/bias",
        "intermediate": f"{layer}/intermediate/dense/bias",
        "output": f"{layer}/output/dense/bias",
        "output_layernorm": f"{layer}/output/LayerNorm/bias",
        None: f"{layer}/attention/output/dense/bias",
    }
    p = {path: jnp.ones(3) for path in names.values()}

    def fn(p, x):
        for b in p.values():
            x = jnp.tanh(x @ jnp.eye(3) + b)
        return x

    sites = jp.sites(fn, p, jnp.ones((1, 3)))
    for name, path in names.items():
        if name is not None:
            _, adapter = jp.split(jp.bitfit(sites, [name])(KEY, p))
            assert list(adapter) == [path]
    with pytest.raises(ValueError, match=r"subset=\['pooler'\].*'query'"):
        jp.bitfit(sites, ["pooler"])


def test_bitfit_says_where_a_name_fits_no_bias():
    p = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    sites = jp.sites(lambda p, x: x @ p["w"] + p["b"], p, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"recognized as 'query'. Its biases are \['b'\]"):
        jp.bitfit(sites, ["query"])


def test_norms_heads_and_everything(sites):
    def trained(method):
        return sorted(jp.split(method(KEY, toy.params()))[1])

    assert trained(jp.norm_tuning(sites)) == ["layers/norm1/scale", "layers/norm2/scale"]
    assert trained(jp.linear_probe(sites, "embed")) == ["embed"]
    assert trained(jp.full_finetuning(sites.linear)) == sorted(sites)
    with pytest.raises(ValueError, match="'head' matches none of the 16"):
        jp.linear_probe(sites, "head")


def test_the_last_layers_of_a_stack_are_cut_off_and_joined_again(sites):
    p, ids = toy.params(), toy.ids()
    frozen, adapter = jp.split(jp.last_layers(sites, 2)(KEY, p))
    tree = jp.combine(frozen, adapter)
    jax.tree.map(np.testing.assert_array_equal, tree, p)
    assert adapter["layers/q/kernel/trained_part"].shape == (2, toy.D, toy.D)
    moved = toy.perturbed(adapter)
    out = jp.combine(frozen, moved)["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(out[0], p["layers"]["q"]["kernel"][0])
    np.testing.assert_array_equal(out[1:], moved["layers/q/kernel/trained_part"])
    assert jax.jit(jp.lift(toy.model))(jp.combine(frozen, moved), ids).shape == (3, 6, 50)
    with pytest.raises(ValueError, match="k=4.*3 layers"):
        jp.last_layers(sites, 4)
    with pytest.raises(ValueError, match="trained in part"):
        jp.param_labels(jp.last_layers(sites, 2)(KEY, p))


def test_the_last_layers_with_paths_of_their_own():
    p = {"layer_0": jnp.ones((2, 2)), "layer_1": jnp.ones((2, 2)), "layer_10": jnp.ones((2, 2))}
    sites = jp.sites(
        lambda p, x: x @ p["layer_0"] @ p["layer_1"] @ p["layer_10"], p, jnp.ones((1, 2))
    )
    assert list(jp.split(jp.last_layers(sites, 1)(KEY, p))[1]) == ["layer_10"]


def test_split_copies_what_is_the_callers_so_that_donation_leaves_params_alone(sites):
    p = toy.params()
    frozen, adapter = jp.split(jp.bitfit(sites)(KEY, p))
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(adapter)
    assert np.isfinite(p["layers"]["q"]["bias"]).all()


def test_training_under_an_adapter_trains_the_array_at_the_bottom(sites):
    method = jp.chain(jp.lora(2, sites.match("*/q/kernel")), jp.unfreeze(sites.match("*/q/kernel")))
    _, adapter = jp.split(method(KEY, toy.params()))
    assert sorted(adapter) == [f"layers/q/kernel/{n}" for n in ("a", "b", "w")]


def test_what_a_method_trains_stays_trained_under_the_next(sites):
    """chain(lora, ia3): the second must not freeze the first."""
    chosen = sites.match("*/v/kernel")
    _, adapter = jp.split(jp.chain(jp.lora(2, chosen), jp.ia3(chosen))(KEY, toy.params()))
    assert sorted(adapter) == [
        "layers/v/kernel/scale",
        "layers/v/kernel/w/a",
        "layers/v/kernel/w/b",
    ]
