"""A method of one's own, written with `jaxpeft` and `jaxpeft.extend` alone."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft._method import FACTORIES
from jaxpeft.extend import (
    apply_to_sites,
    axes,
    base_weight,
    by_pattern,
    check_rank,
    check_rate,
    check_whole,
    dense,
    dropout_key,
    dropped,
    register_method,
    static,
    takes_sites,
    weight,
)

KEY, F64 = jax.random.key(0), jnp.float64


@weight
class Projected(jp.Weight):
    """The matrix `w + scale * p @ c`, where `p` is fixed and `c` is trained."""

    w: Any = base_weight()
    p: Any = axes("in", "rank")
    c: Any = axes("rank", "out")
    key: Any = axes(optional=True)
    scale: float = static(1.0)
    dropout: float = static(0.0)

    local_in = local_out = True

    def forward(self, x):
        return x @ self.w + self.scale * (dropped(x, self.key, self.dropout) @ self.p @ self.c)

    def transposed(self, y):
        return y @ self.w.T + self.scale * (y @ self.c.T @ self.p.T)

    def lookup(self, ids):
        delta = self.scale * (self.p[ids] @ self.c)
        return self.with_delta(self.w[ids], ids, delta, self.p.site.rows)

    def materialize(self):
        return dense(self.w) + self.scale * self.p @ self.c


def projected(
    rank: Any, sites: jp.Sites, *, dropout: float = 0.0, dtype: Any = jnp.float32
) -> jp.Method:
    """A low-rank update of which one factor is fixed."""
    check_whole("projected", sites)
    check_rate("projected", dropout)
    ranks = by_pattern(rank, sites, "rank")
    for path, site in sites.items():
        check_rank("projected", ranks[path], site)

    def make(key: jax.Array, site: jp.Site, view: jp.View) -> jp.View:
        r = ranks[site.path]
        p = jax.random.normal(key, (*site.stack, site.size("in"), r), dtype)
        c = jp.Trainable(jnp.zeros((*site.stack, r, site.size("out")), dtype))
        key_ = dropout_key(site, view, dropout)
        own = Projected(view.weight, p, c, key=key_, scale=1 / r, dropout=dropout)
        return dataclasses.replace(view, weight=own)

    def apply(key: jax.Array, tree: Any) -> Any:
        return apply_to_sites(key, tree, sites, make, caller="projected")

    options = {"rank": rank, "sites": sites, "dropout": dropout, "dtype": dtype}
    return jp.Method("projected", options, apply)


@pytest.fixture
def registry():
    """The registry, from which other tests do not see what this one adds."""
    before = dict(FACTORIES)
    yield FACTORIES
    FACTORIES.clear()
    FACTORIES.update(before)


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def tied(p, ids):
    """A table that is looked up and is the head, and a stack of layers between."""
    x = p["embed"][ids]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return jnp.einsum("btd,vd->btv", x, p["embed"])


PARAMS = {"embed": random(7, 4), "layers": random(3, 4, 4)}
IDS = jnp.array([[1, 6, 2]])
SITES = jp.sites(tied, PARAMS, IDS)


def moved(adapter):
    return {path: x + 0.1 * random(*x.shape).astype(x.dtype) for path, x in adapter.items()}


@pytest.mark.parametrize(
    "method",
    [
        projected({"embed": 3, "*": 2}, SITES.matrices, dtype=F64),
        jp.chain(
            jp.quantize("int8", SITES.linear),
            projected(2, SITES.matrices, dtype=F64),
            jp.lora(1, SITES.linear, dtype=F64),
        ),
    ],
    ids=["alone", "between a quantized base and LoRA"],
)
def test_it_starts_at_the_base_trains_and_merges(method):
    frozen, adapter = jp.split(method(KEY, PARAMS))
    base = jp.base_params(jp.combine(frozen, adapter))
    forward = jp.lift(tied, materialize="error")
    np.testing.assert_allclose(
        forward(jp.combine(frozen, adapter), IDS), tied(base, IDS), rtol=1e-12
    )

    @jax.jit
    def loss(adapter):
        return jnp.mean((forward(jp.combine(frozen, adapter), IDS) - 1) ** 2)

    grads = jax.grad(loss)(adapter)
    assert sum(path.endswith("/c") for path in grads) == 2
    assert all(np.any(np.asarray(g)) for path, g in grads.items() if path.endswith("/c"))
    assert loss(jax.tree.map(lambda x, g: x - 1e-3 * g, adapter, grads)) < loss(adapter)

    tree = jp.combine(frozen, moved(adapter))
    np.testing.assert_allclose(forward(tree, IDS), tied(jp.merge(tree), IDS), rtol=1e-10)


def test_dropout_draws_where_a_key_is_given():
    method = projected(2, SITES.linear, dropout=0.5, dtype=F64)
    frozen, adapter = jp.split(method(KEY, PARAMS))
    forward, adapter = jp.lift(tied), moved(adapter)
    without = forward(jp.combine(frozen, adapter), IDS)
    np.testing.assert_allclose(
        without, tied(jp.merge(jp.combine(frozen, adapter)), IDS), rtol=1e-10
    )
    one, two = (
        forward(jp.combine(frozen, adapter, dropout=jax.random.key(i)), IDS) for i in range(2)
    )
    assert np.any(one != two) and np.any(one != without)


def test_a_registered_method_is_saved_and_loaded_by_its_name(registry, tmp_path):
    mine = register_method(projected)
    frozen, adapter = jp.split(mine(2, SITES.linear)(KEY, PARAMS))
    adapter = moved(adapter)
    method = jp.chain(mine({"*": 2}, SITES.linear))
    jp.io.save_adapter(tmp_path, adapter, method, PARAMS, key=KEY)
    loaded = jp.io.load_adapter(tmp_path, PARAMS)
    assert loaded.method.options["methods"][0].name == "projected"
    frozen, _ = jp.split(method(KEY, PARAMS))
    np.testing.assert_array_equal(
        jp.lift(tied)(jp.combine(loaded.frozen, loaded.adapter), IDS),
        jp.lift(tied)(jp.combine(frozen, adapter), IDS),
    )


def test_a_folder_of_a_method_that_is_not_registered_says_what_to_import(registry, tmp_path):
    method = register_method(projected)(2, SITES.linear)
    _, adapter = jp.split(method(KEY, PARAMS))
    jp.io.save_adapter(tmp_path, adapter, method, PARAMS, key=KEY)
    del registry["projected"]
    way = r"import the module that registers it \(`jaxpeft.extend.register_method`\)"
    with pytest.raises(ValueError, match=rf"knows no method 'projected'.*{way}"):
        jp.io.load_adapter(tmp_path, PARAMS)


def test_a_function_that_is_defined_again_replaces_itself(registry):
    """As the cell of a notebook that is run twice."""
    register_method(projected)
    again = register_method(projected)
    assert registry["projected"] is again


def test_a_name_that_is_taken_is_refused(registry):
    def lora(sites: jp.Sites) -> jp.Method:
        return jp.Method("lora", {"sites": sites}, lambda key, tree: tree)

    way = "'lora' is registered already, by `jaxpeft._methods.lora`. Give the function another name"
    with pytest.raises(ValueError, match=re.escape(way)):
        register_method(lora)
    assert registry["lora"] is jp.lora


def test_sites_of_a_registered_method_are_checked(registry):
    for mine in (register_method(projected), takes_sites(projected)):
        with pytest.raises(
            TypeError, match=r"`projected\(sites='embed'\)`.*sites.match\('embed'\)"
        ):
            mine(2, "embed")
