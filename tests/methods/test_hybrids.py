"""What hybrids refuse; their formulas are held in tests/conformance and tests/adapters_oracle."""

import jax
import pytest

import jaxpeft as jp

from . import toy


@pytest.fixture(scope="module")
def sites():
    return jp.sites(toy.model, toy.params(), toy.ids())


def test_unipelt_takes_keys_and_values_in_pairs(sites):
    keys, down = sites.match("*/k/kernel"), sites.match("*/down/kernel")
    with pytest.raises(ValueError, match=r"pairs, but got \['layers/k/kernel'\] and \[\]"):
        jp.unipelt(keys, keys, keys - keys, down)


def test_a_gate_names_the_weight_where_positions_do_not_fit(sites):
    layer = [sites.match(f"*/{name}/kernel") for name in ("q", "k", "v", "down")]
    frozen, adapter = jp.split(jp.unipelt(*layer)(jax.random.key(0), toy.params()))
    virtual_positions = jax.numpy.full((toy.B, toy.T + 1), -1)
    told = (
        rf"gate at 'layers/q/kernel' was given virtual positions of shape \({toy.B}, {toy.T + 1}\)"
    )
    with pytest.raises(ValueError, match=told):
        jp.lift(toy.model)(
            jp.combine(frozen, adapter, virtual_positions=virtual_positions), toy.ids()
        )
