"""An adapter over another base than that of training: taken where that is said."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.io._fingerprint import _leaf_fingerprint
from tests.io.saved import FOLDERS, KEY, V, layers, mlp, perturbed, tied

SITES = mlp().sites
RANK = dict(alpha=3.0, dtype=jnp.float64)


def wide():
    """The base of training, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), mlp().params)


def rounded(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), wide())


def nudged():
    """One that was trained further."""
    return jax.tree.map(lambda x: x * 1.1, wide())


def quantized(params, format="nf4", **options):
    return jp.quantize(format, SITES.linear, **options)(jax.random.key(7), params)


METHODS = {
    "lora": jp.lora(2, SITES.linear, **RANK),
    "lora_fa": jp.lora_fa(2, SITES.linear, **RANK),
    "qlora": jp.chain(
        jp.quantize("nf4", SITES.linear, block=2), jp.lora_fa(2, SITES.linear, **RANK)
    ),
    "full": jp.full_finetuning(SITES),
    "pissa": jp.pissa(1, SITES.linear, **RANK),
    "olora": jp.chain(jp.olora(1, SITES.linear, **RANK), jp.bitfit(SITES)),
    "loftq": jp.loftq(1, SITES.linear, format="nf4", block=2, dtype=jnp.float64),
}


@functools.cache
def adapter_of(name, over=wide):
    return perturbed(jp.split(METHODS[name](KEY, over()))[1])


def saved(folder, name, over=wide):
    save_adapter(folder, adapter_of(name, over), METHODS[name], over(), key=KEY)
    return folder


def check(loaded, want):
    """The model's arrays are these."""
    got = jp.merge(jp.combine(loaded.frozen, loaded.adapter))
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-6)


def expected(name, params, key=KEY):
    """The arrays of a method over a base, its adapter trained elsewhere."""
    frozen, fresh = jp.split(METHODS[name](key, params))
    adapter = {p: x.astype(fresh[p].dtype) for p, x in adapter_of(name).items()}
    return jp.merge(jp.combine(frozen, adapter))


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float64]


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_moves_to_another_dtype_where_that_is_said(tmp_path, name, dtype):
    saved(tmp_path, name)
    params = rounded(dtype)
    if name == "lora":
        with pytest.raises(ValueError, match=r"the dtype of 'down' differs: trained on float32"
                           r".*weights in another precision.*base='any precision'"):  # fmt: skip
            load_adapter(tmp_path, params)
    loaded = load_adapter(tmp_path, params, base="any precision")
    check(loaded, expected(name, params))
    merged = jp.merge(jp.combine(loaded.frozen, loaded.adapter))
    assert {x.dtype for x in merged.values()} == {jnp.dtype(dtype)}


def test_from_a_rounded_base_it_moves_to_the_one_that_was_rounded(tmp_path):
    """In the dtype of training, too: what was rounded once may lie in float32."""
    params = rounded(jnp.bfloat16)
    save_adapter(tmp_path, adapter_of("lora"), METHODS["lora"], params, key=KEY)
    check(load_adapter(tmp_path, wide(), base="any precision"), expected("lora", wide()))
    save_adapter(tmp_path, adapter_of("lora"), METHODS["lora"], wide(), key=KEY)
    again = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with pytest.raises(ValueError, match="the values of 'down' differ.*base='any precision'"):
        load_adapter(tmp_path, again)
    check(load_adapter(tmp_path, again, base="any precision"), expected("lora", again))


def test_other_values_are_no_other_precision(tmp_path):
    saved(tmp_path, "lora")
    with pytest.raises(ValueError, match="the values of 'down' differ.*base='any values'"):
        load_adapter(tmp_path, nudged())
    other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nudged())
    for params in (nudged(), other):
        with pytest.raises(ValueError, match="'down' differ.*by more than rounding"):
            load_adapter(tmp_path, params, base="any precision")
    check(load_adapter(tmp_path, nudged(), base="any values"), expected("lora", nudged()))
    check(load_adapter(tmp_path, other, base="any values"), expected("lora", other))


@pytest.mark.parametrize("base", ["any precision", "any values"])
def test_another_model_is_refused_whatever_is_allowed(tmp_path, base):
    saved(tmp_path, "lora")
    load = functools.partial(load_adapter, tmp_path, base=base)
    with pytest.raises(
        ValueError, match=r"shape of 'up' differs: trained on \[4, 6\], given \[4, 7"
    ):
        load(wide() | {"up": jnp.ones((4, 7))})
    with pytest.raises(ValueError, match="the given base lacks 'up'"):
        load({path: x for path, x in wide().items() if path != "up"})
    with pytest.raises(ValueError, match="All paths differ by 'params/': give what is in it"):
        load({"params": wide()})
    with pytest.raises(ValueError, match="`load_adapter.base='any'.` should be one of .'same', "):
        load_adapter(tmp_path, wide(), base="any")


def test_of_numbers_that_are_whole_none_is_rounded(tmp_path):
    params = wide() | {"steps": jnp.arange(10, 20)}
    save_adapter(tmp_path, adapter_of("lora"), METHODS["lora"], params, key=KEY)
    other = rounded(jnp.bfloat16) | {"steps": jnp.arange(10, 20, dtype=jnp.int16)}
    load_adapter(tmp_path, other, base="any precision")
    with pytest.raises(ValueError, match="the values of 'steps' differ.*more than rounding"):
        load_adapter(tmp_path, other | {"steps": jnp.arange(11, 21)}, base="any precision")


# Quantized bases ----------------------------------------------------------------------------------


def test_trained_over_codes_it_is_used_over_the_dense_base(tmp_path):
    saved(tmp_path, "qlora")
    loaded = load_adapter(tmp_path, wide(), quantize=None)
    # What is drawn and frozen is what it was: the key is that of the second method of a chain.
    dense = jp.lora_fa(2, SITES.linear, **RANK)
    frozen, _ = jp.split(dense(jax.random.fold_in(KEY, 1), wide()))
    check(loaded, jp.merge(jp.combine(frozen, adapter_of("qlora"))))
    # And it may be trained on from there, and saved.
    again = tmp_path / "again"
    save_adapter(again, loaded.adapter, loaded.method, wide(), key=KEY)
    check(load_adapter(again, wide()), jp.merge(jp.combine(frozen, adapter_of("qlora"))))


def test_trained_over_codes_it_is_used_over_other_codes(tmp_path):
    saved(tmp_path, "qlora")
    loaded = load_adapter(tmp_path, wide(), quantize="int8")
    other = jp.chain(jp.quantize("int8", SITES.linear), METHODS["qlora"].options["methods"][1])
    frozen, _ = jp.split(other(KEY, wide()))
    check(loaded, jp.merge(jp.combine(frozen, adapter_of("qlora"))))
    # Over params that were quantized by other means, the step is left out.
    params = quantized(wide(), "int4", block=2)
    with pytest.raises(
        ValueError,
        match=r"'down' was a plain array in training, and is structured \(\w+\) here.*"
        r"base='any precision', quantize=None",
    ):
        load_adapter(tmp_path, params)
    loaded = load_adapter(tmp_path, params, base="any precision", quantize=None)
    other = jp.chain(jp.chain(), METHODS["qlora"].options["methods"][1])
    frozen, _ = jp.split(other(KEY, params))
    check(loaded, jp.merge(jp.combine(frozen, adapter_of("qlora"))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trained_over_the_dense_base_it_is_used_over_codes(tmp_path, dtype):
    saved(tmp_path, "lora_fa")
    params = quantized(rounded(dtype), block=2)
    with pytest.raises(ValueError, match=r"is structured \(\w+\) here.*base='any precision'\)"):
        load_adapter(tmp_path, params)
    loaded = load_adapter(tmp_path, params, base="any precision")
    frozen, _ = jp.split(METHODS["lora_fa"](KEY, params))
    check(loaded, jp.merge(jp.combine(frozen, adapter_of("lora_fa"))))


@pytest.mark.parametrize("format", [1, 2])
def test_trained_over_params_in_codes_it_is_used_over_dense_ones(tmp_path, format):
    """As those that a loader has quantized, without a method that does."""
    params = quantized(wide(), block=2)
    save_adapter(tmp_path, adapter_of("lora"), METHODS["lora"], params, key=KEY)
    if format == 1:
        in_format_1(tmp_path, params)
    with pytest.raises(ValueError, match="structured .* in training, and is a plain array here"):
        load_adapter(tmp_path, wide())
    check(load_adapter(tmp_path, params), expected("lora", params))
    check(load_adapter(tmp_path, wide(), base="any precision"), expected("lora", wide()))
    other = quantized(wide(), "int8")
    with pytest.raises(ValueError, match=r"of 'down' differ|\(\w+\) in training, and is struct"):
        load_adapter(tmp_path, other)
    check(load_adapter(tmp_path, other, base="any precision"), expected("lora", other))


def in_format_1(folder, params):
    """The folder as the first version would have written it."""
    about = json.loads((folder / "adapter.json").read_text())
    (folder / about["arrays"]["file"]).rename(folder / "adapter.safetensors")
    for name in ("arrays", "sha256"):
        del about[name]
    about |= {"format": 1, "base": _leaf_fingerprint(params)}
    (folder / "adapter.json").write_text(json.dumps(about))


def test_a_folder_of_format_1_moves_too(tmp_path):
    saved(tmp_path, "lora")
    in_format_1(tmp_path, wide())
    check(load_adapter(tmp_path, wide()), expected("lora", wide()))
    params = rounded(jnp.bfloat16)
    with pytest.raises(ValueError, match="the dtype of 'down' differs.*base='any precision'"):
        load_adapter(tmp_path, params)
    check(load_adapter(tmp_path, params, base="any precision"), expected("lora", params))
    with pytest.raises(ValueError, match="the values of 'down' differ.*more than rounding"):
        load_adapter(tmp_path, nudged(), base="any precision")
    check(load_adapter(tmp_path, nudged(), base="any values"), expected("lora", nudged()))


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("base", ["any precision", "any values"])
def test_what_starts_from_the_base_takes_no_other(tmp_path, name, base):
    saved(tmp_path, name)
    way_out = "merge" if name == "loftq" else "to_lora"
    for params in (rounded(jnp.bfloat16), quantized(wide(), "int8")):
        with pytest.raises(
            ValueError,
            match=f"`{name}` computes its initial update .*exactly the base.*`{way_out}`",
        ):
            load_adapter(tmp_path, params, base=base)
    check(load_adapter(tmp_path, wide(), base=base), expected(name, wide()))
    with pytest.raises(ValueError, match=rf"quantize=None\)`: '{tmp_path}/.*' holds `{name}`"):
        load_adapter(tmp_path, wide(), quantize=None)


def test_a_format_where_nothing_is_quantized_is_refused(tmp_path):
    saved(tmp_path, "lora")
    message = rf"quantize='int8'\)`: the method of '{tmp_path}/adapter.json' quantizes nothing"
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, wide(), quantize="int8")
    check(load_adapter(tmp_path, wide(), quantize=None), expected("lora", wide()))


# What the adapter replaces ------------------------------------------------------------------------


def test_rows_that_the_adapter_has_do_not_matter(tmp_path):
    ids, base = [1, V - 1, 3], tied()
    method = jp.chain(
        jp.lora(2, base.sites.linear, dtype=jnp.float64),
        jp.trainable_tokens(ids, base.sites.embedding, dtype=jnp.float64),
    )
    frozen, start = jp.split(method(KEY, base.params))
    adapter = perturbed(start)
    save_adapter(tmp_path, adapter, method, base.params, key=KEY)
    table = base.params["table"].at[jnp.array(ids)].set(7.0)
    loaded = load_adapter(tmp_path, base.params | {"table": table})
    np.testing.assert_array_equal(
        jp.lift(base.fn)(jp.combine(loaded.frozen, loaded.adapter), *base.args),
        jp.lift(base.fn)(jp.combine(frozen, adapter), *base.args),
    )
    with pytest.raises(ValueError, match="the values of 'table' differ"):
        load_adapter(tmp_path, base.params | {"table": table.at[0].set(7.0)})


def test_layers_that_the_adapter_has_do_not_matter(tmp_path):
    base = layers()
    method = jp.last_layers(base.sites, 1, "*")
    _, start = jp.split(method(KEY, base.params))
    adapter = perturbed(start)
    save_adapter(tmp_path, adapter, method, base.params, key=KEY)
    last = {path: x.at[-1].set(7.0) for path, x in base.params.items()}
    loaded = load_adapter(tmp_path, last)
    want = {p: x.at[-1:].set(adapter[f"{p}/trained_part"]) for p, x in base.params.items()}
    check(loaded, want)
    with pytest.raises(ValueError, match="the values of 'attn_bias' differ"):
        load_adapter(tmp_path, {path: x.at[0].set(7.0) for path, x in base.params.items()})


def test_a_prompt_needs_every_row_of_its_table(tmp_path):
    base = tied()
    method = jp.prompt_tuning(2, base.sites.embedding, dtype=jnp.float64)
    adapter = perturbed(jp.split(method(KEY, base.params))[1])
    save_adapter(tmp_path, adapter, method, base.params, key=KEY)
    for row in range(V):
        table = base.params["table"].at[row].add(1.0)
        with pytest.raises(ValueError, match=re.escape("the values of 'table' differ")):
            load_adapter(tmp_path, base.params | {"table": table})


def test_the_fixtures_of_format_1_are_strict_by_default():
    params = mlp().params
    with pytest.raises(ValueError, match="the values of 'down' differ"):
        load_adapter(FOLDERS / "format1" / "lora", jax.tree.map(lambda x: x + 1, params))
