"""Folders read straight into codes: equal to quantizing what was loaded, whole and in shards."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft._tree import flatten
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.io._stacked import disassemble
from jaxpeft.models import decoder
from jaxpeft.quant import fp4, int8, nf4

# Blocks of 64 leave a tail in `down`, and the scales of a layer are no multiple of 256.
CONFIG = decoder.Config(
    vocab_size=40, hidden_size=64, intermediate_size=100, num_layers=5, num_heads=4,
    num_kv_heads=2, head_dim=16, model_type="qwen2", qkv_bias=True,
)  # fmt: skip
FORMATS = {
    "nf4": "nf4",
    "nf4+dq": "nf4+dq",
    "fp4+dq": "fp4+dq",
    "nf4+dq, blocks of 32": functools.partial(nf4, double=True, block=32),
    "nf4+dq, flat": functools.partial(nf4, double=True, layout="flat"),
    "fp4, flat, blocks of 48": functools.partial(fp4, layout="flat", block=48),
    "int4": "int4",
    "int4+asym": "int4+asym",
    "int8": "int8",
    "int8, blocks of 16": functools.partial(int8, block=16),
    "fp8": "fp8",
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    decoder.save(folder, CONFIG, decoder.init(CONFIG, jax.random.key(0), dtype=request.param))
    return folder


@functools.cache
def found(dtype):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jp.sites(decoder.apply_fn(CONFIG), decoder.shapes(CONFIG, dtype), tokens)


def quantized(params, format, sites):
    """What `quantize` makes of loaded parameters."""
    name, options = format, {}
    if not isinstance(format, str):
        name, options = format.func.__name__, dict(format.keywords)
        name += "+dq" * options.pop("double", False)
    return jp.quantize(name, sites, **options)(jax.random.key(0), params)


def check_equal(got, want):
    """The same structure, statics of weights included, and the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
def test_a_folder_read_into_codes_is_the_loaded_model_quantized(folder, format):
    _, dense = decoder.load(folder)
    config, got = decoder.load(folder, quantize=format)
    assert config == CONFIG
    check_equal(got, quantized(dense, format, found(got["norm"]["scale"].dtype).hidden))


def test_the_dtype_asked_for_is_what_is_encoded_and_what_the_program_sees(folder):
    _, dense = decoder.load(folder, dtype=jnp.float16)
    _, got = decoder.load(folder, dtype=jnp.float16, quantize="nf4")
    check_equal(got, quantized(dense, "nf4", found(jnp.float16).hidden))
    assert got["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float16


def test_the_first_pattern_that_matches_decides_and_the_rest_stays(folder):
    formats = {"*/q/*": None, "*attn*": "int8", re.compile("up|embed"): "nf4", "*up*": "fp8"}
    _, got = decoder.load(folder, quantize=formats)
    kinds = {
        path: type(leaf.weight).__name__
        for path, leaf in flatten(got, is_leaf=lambda x: isinstance(x, jp.View))[0].items()
        if isinstance(leaf, jp.View)
    }
    assert kinds == {
        "embed/embedding": "Codebook",
        "layers/attn/k/kernel": "PerChannel",
        "layers/attn/o/kernel": "PerChannel",
        "layers/attn/v/kernel": "PerChannel",
        "layers/mlp/up/kernel": "Codebook",
    }
    sites = found(got["norm"]["scale"].dtype)
    _, dense = decoder.load(folder)
    want = quantized(dense, "int8", sites.match("*/[kvo]/kernel"))
    check_equal(got, quantized(want, "nf4", sites.match("*up*", "*embed*")))


def test_the_loaded_codes_run_under_lift(folder):
    _, params = decoder.load(folder, quantize="nf4+dq", dtype=jnp.float32)
    tokens = jnp.arange(6)[None]
    got = jp.lift(decoder.apply_fn(CONFIG))(params, tokens)
    want = decoder.apply_fn(CONFIG)(jp.merge(params), tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)


def mesh():
    return jax.make_mesh((2, 4), ("x", "y"))


@pytest.mark.parametrize(
    "format",
    [
        functools.partial(nf4, block=16),
        functools.partial(nf4, block=8, double=True),
        functools.partial(int8, block=8),
        "int8",
    ],
    ids=["nf4", "nf4+dq", "int8 in blocks", "int8"],
)
@pytest.mark.parametrize("spec", [P("y"), P(None, "x", "y"), P("x", None, "y")], ids=str)
def test_every_field_is_cut_as_the_matrix_would_be(tmp_path, format, spec):
    config = decoder.Config(
        vocab_size=8,
        hidden_size=128,
        intermediate_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=16,
    )
    decoder.save(tmp_path, config, decoder.init(config, jax.random.key(0)))
    whole = decoder.load(tmp_path, quantize={"*gate*": format})[1]
    where = jax.tree.map(lambda x: NamedSharding(mesh(), P()), decoder.shapes(config))
    where["layers"]["mlp"]["gate"]["kernel"] = NamedSharding(mesh(), spec)
    got = decoder.load(tmp_path, quantize={"*gate*": format}, sharding=where)[1]
    check_equal(got, whole)
    quantized = got["layers"]["mlp"]["gate"]["kernel"].weight.values
    assert quantized.sharding.spec == P(*spec, *[None] * (3 - len(spec)))
    parts = np.prod([mesh().shape[name] for name in spec if name])
    assert quantized.addressable_shards[0].data.size * parts == quantized.size


def test_one_replicated_sharding_serves_codes_too(folder):
    whole = decoder.load(folder, quantize="nf4+dq")[1]
    got = decoder.load(folder, quantize="nf4+dq", sharding=NamedSharding(mesh(), P()))[1]
    check_equal(got, whole)
    assert all(array.is_fully_replicated for array in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("format", "spec", "fault"),
    [
        ("nf4", P(None, "x"), r"length 64 \(in\) of 'layers/mlp/up/kernel' into 2 parts, which a "
         "Codebook in blocks of 64"),
        ("nf4", P("y"), r"length 5 \(stack\) of 'layers/mlp/up/kernel' into 4 parts"),
        ("nf4+dq", P(None, None, "y"), r"length 100 \(out\) of .* into 4 parts"),
        (functools.partial(nf4, layout="flat"), P(None, None, "x"), r"\(out\) .* which a Flat in "
         "blocks of 64 cannot be cut into.*Flat weights are cut between layers only"),
    ],
)  # fmt: skip
def test_a_sharding_that_codes_cannot_follow_is_refused(folder, format, spec, fault):
    where = jax.tree.map(lambda x: NamedSharding(mesh(), P()), decoder.shapes(CONFIG))
    where["layers"]["mlp"]["up"]["kernel"] = NamedSharding(mesh(), spec)
    with pytest.raises(ValueError, match=fault):
        decoder.load(folder, quantize={"*up*": format}, sharding=where)


def write(folder, values):
    """A folder of CONFIG with these tensors instead of its own."""
    params = decoder.init(CONFIG, jax.random.key(0))
    tensors = disassemble(params, decoder.plan(CONFIG))
    for name, value in values.items():
        tensors[name] = safetensors.Lazy(value.shape, value.dtype, lambda value=value: value)
    safetensors.write_folder(folder, CONFIG.to_hf(), tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entries_that_are_not_finite_are_refused_by_tensor_and_file(tmp_path, bad):
    name = "model.layers.3.mlp.up_proj.weight"
    value = np.ones((100, 64), np.float32)
    value[3, 5] = value[70, 9] = bad
    write(tmp_path, {name: value})
    message = rf"{name} in {tmp_path}/model.safetensors has 2 entries of 6400 .*'layers/mlp/up/ker"
    with pytest.raises(ValueError, match=message):
        decoder.load(tmp_path, quantize="nf4+dq")


def test_zeros_and_denormals_load_as_quantize_has_them(tmp_path):
    values = np.zeros((100, 64), np.float32)
    values[:50] = np.random.default_rng(0).normal(size=(50, 64)) * 1e-40
    write(tmp_path, {"model.layers.1.mlp.up_proj.weight": values})
    _, got = decoder.load(tmp_path, quantize="nf4+dq")
    check_equal(got, quantized(decoder.load(tmp_path)[1], "nf4+dq", found("float32").hidden))


def test_formats_and_patterns_that_do_not_exist_are_refused(folder):
    with pytest.raises(ValueError, match=r"'nf5'.*the formats are \['fp4'"):
        decoder.load(folder, quantize="nf5")
    with pytest.raises(ValueError, match=r"'\*qkv\*' matches none of the 9 parameters"):
        decoder.load(folder, quantize={"*qkv*": "nf4"})
    with pytest.raises(TypeError, match=r"`quantize=4`: a format is a name such as 'nf4\+dq'"):
        decoder.load(folder, quantize=4)
