"""Four-bit tensors of bitsandbytes: read as they are, written again, every fault named."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft.io import _safetensors as safetensors
from jaxpeft.models import decoder
from jaxpeft.quant import nf4

# 100 * 64 entries in 100 blocks; one row of `down` is no whole number of blocks.
CONFIG = decoder.Config(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=100,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
UP = "model.layers.{}.mlp.up_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"


@functools.cache
def found():
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jp.sites(decoder.apply_fn(CONFIG), decoder.shapes(CONFIG), tokens)


def params(format="nf4+dq", sites=None, **options):
    dense = decoder.init(CONFIG, jax.random.key(0))
    options = {"layout": "flat"} | options
    return jp.quantize(format, found().hidden if sites is None else sites, **options)(
        jax.random.key(0), dense
    )


def check_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def rewrite(folder, changes, config=None):
    """The folder with some tensors replaced, added or (`None`) left out."""
    about, tensors = safetensors.open_folder(folder)
    values = {name: safetensors.read(tensor) for name, tensor in tensors.items()} | changes
    lazies = {
        name: safetensors.Lazy(value.shape, value.dtype, lambda value=value: value)
        for name, value in values.items()
        if value is not None
    }
    safetensors.write_folder(folder, about if config is None else config, lazies)


def state(folder, **changes):
    """The state of a weight of layer 1 as a tensor, changed; `None` removes an entry."""
    _, tensors = safetensors.open_folder(folder)
    tensor = tensors[f"{UP.format(1)}.{STATE}"]
    about = json.loads(safetensors.read(tensor).tobytes()) | changes
    about = {key: value for key, value in about.items() if value is not None}
    return np.frombuffer(json.dumps(about).encode(), np.uint8)


@pytest.mark.parametrize("shard_bytes", [5_000_000, 3_000])
@pytest.mark.parametrize(
    ("format", "options"),
    [("nf4+dq", {}), ("nf4", {"block": 128}), ("fp4+dq", {"block": 32}), ("fp4", {})],
)
def test_what_is_written_is_read_as_it_was(tmp_path, format, options, shard_bytes):
    want = params(format, **options)
    decoder.save(tmp_path, CONFIG, want, shard_bytes=shard_bytes)
    config, got = decoder.load(tmp_path)
    assert config == CONFIG
    check_equal(got, want)


def test_one_kind_of_matrix_alone_may_be_quantized(tmp_path):
    want = params(sites=found().match("*up*", "*attn/o*"))
    decoder.save(tmp_path, CONFIG, want)
    check_equal(decoder.load(tmp_path)[1], want)
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["load_in_4bit"]) == ("bitsandbytes", True)
    assert (about["bnb_4bit_quant_type"], about["bnb_4bit_use_double_quant"]) == ("nf4", True)
    skipped = about["llm_int8_skip_modules"]
    assert "lm_head" in skipped and "model.layers.2.mlp.down_proj" in skipped
    assert not [name for name in skipped if "up_proj" in name or "o_proj" in name]


def test_a_head_may_be_quantized_too(tmp_path):
    want = params(sites=found().linear)
    decoder.save(tmp_path, CONFIG, want)
    check_equal(decoder.load(tmp_path)[1], want)


def test_dense_matrices_beside_stored_ones_can_be_quantized_on_the_way(tmp_path):
    decoder.save(tmp_path, CONFIG, params(sites=found().match("*up*")))
    _, got = decoder.load(tmp_path, quantize={"*down*": functools.partial(nf4, layout="flat")})
    want = params(sites=found().match("*up*"))
    check_equal(got, jp.quantize("nf4", found().match("*down*"), layout="flat")(
        jax.random.key(0), want
    ))  # fmt: skip


def test_the_dtype_is_what_the_program_sees_and_leaves_codes_alone(tmp_path):
    decoder.save(tmp_path, CONFIG, params())
    view = decoder.load(tmp_path, dtype=jnp.bfloat16)[1]["layers"]["mlp"]["up"]["kernel"]
    assert view.dtype == jnp.bfloat16 and view.materialize().dtype == jnp.bfloat16
    check_equal(view.weight, params()["layers"]["mlp"]["up"]["kernel"].weight)


def test_codes_stored_under_another_dtype_are_bytes_all_the_same(tmp_path):
    decoder.save(tmp_path, CONFIG, params())
    name = UP.format(0)
    codes = safetensors.read(safetensors.open_folder(tmp_path)[1][name])
    rewrite(tmp_path, {name: codes.reshape(-1).view(jnp.bfloat16)[:, None]})
    check_equal(decoder.load(tmp_path)[1], params())


def test_a_map_may_differ_in_the_last_bit(tmp_path):
    decoder.save(tmp_path, CONFIG, params())
    name = f"{UP.format(0)}.nested_quant_map"
    values = safetensors.read(safetensors.open_folder(tmp_path)[1][name])
    rewrite(tmp_path, {name: np.nextafter(values, np.float32(2))})
    with pytest.raises(ValueError, match="nested_quant_map in .* is not the signed dynamic map"):
        decoder.load(tmp_path)  # the next of zero is not near it
    values = np.where(values == 0, values, np.nextafter(values, np.float32(2)))
    rewrite(tmp_path, {name: values})
    check_equal(decoder.load(tmp_path)[1], params())


def test_layers_are_cut_over_devices_and_matrices_are_not(tmp_path):
    config = decoder.Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=100,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    dense = decoder.init(config, jax.random.key(0))
    decoder.save(tmp_path / "dense", config, dense)
    flat = functools.partial(nf4, double=True, layout="flat")
    whole = decoder.load(tmp_path / "dense", quantize={"*up*": flat})[1]
    decoder.save(tmp_path / "coded", config, whole)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    where = jax.tree.map(lambda x: NamedSharding(mesh, P()), dense)
    where["layers"]["mlp"]["up"]["kernel"] = NamedSharding(mesh, P("x"))
    got = decoder.load(tmp_path / "coded", sharding=where)[1]
    check_equal(got, whole)
    for field in jax.tree.leaves(got["layers"]["mlp"]["up"]["kernel"]):
        assert field.addressable_shards[0].data.shape == (1, *field.shape[1:])
    where["layers"]["mlp"]["up"]["kernel"] = NamedSharding(mesh, P(None, "y"))
    with pytest.raises(ValueError, match=r"64 \(in\) of 'layers/mlp/up/kernel' into 2 .*a Flat"):
        decoder.load(tmp_path / "coded", sharding=where)


def test_what_is_quantized_already_is_not_quantized_again(tmp_path):
    decoder.save(tmp_path, CONFIG, params(sites=found().match("*up*")))
    message = r"quantize='nf4'\)`: 'layers/mlp/up/kernel' of .* are quantized already"
    with pytest.raises(ValueError, match=message):
        decoder.load(tmp_path, quantize="nf4")


NESTED = np.zeros(256, np.float32)
FAULTS = {
    "codes": (lambda f: {UP.format(1): None}, "missing: {name}, whose parts are in {file}"),
    "scales": (lambda f: {f"{UP.format(1)}.absmax": None}, "{at}: absmax is missing"),
    "map": (lambda f: {f"{UP.format(1)}.quant_map": None}, "{at}: quant_map is missing"),
    "scales of scales": (
        lambda f: {f"{UP.format(1)}.nested_absmax": None},
        "{at}: nested_absmax is missing",
    ),
    "map of scales": (
        lambda f: {f"{UP.format(1)}.nested_quant_map": None},
        "{at}: nested_quant_map is missing",
    ),
    "state": (
        lambda f: {f"{UP.format(1)}.{STATE}": None},
        "{at}: quant_state.bitsandbytes__nf4 or quant_state.bitsandbytes__fp4 is missing",
    ),
    "all but the codes": (
        lambda f: {
            f"{UP.format(1)}.{part}": None
            for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
        },
        "{at}: absmax is missing",
    ),
    "two states": (
        lambda f: {f"{UP.format(1)}.quant_state.bitsandbytes__fp4": state(f)},
        "{at}: there are quant_state.bitsandbytes__fp4 and quant_state.bitsandbytes__nf4",
    ),
    "an unknown type": (
        lambda f: {
            f"{UP.format(1)}.{STATE}": None,
            f"{UP.format(1)}.quant_state.bitsandbytes__nf3": state(f),
        },
        "{at}: unknown quant_type: quant_state.bitsandbytes__nf3, known are nf4, fp4",
    ),
    "another type": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, quant_type="fp4")},
        "{state} says quant_type='fp4'",
    ),
    "no JSON": (
        lambda f: {f"{UP.format(1)}.{STATE}": np.frombuffer(b"{nf4", np.uint8)},
        "{state} cannot be read: Expecting property name",
    ),
    "no block size": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, blocksize=None)},
        "{state} cannot be read: it lacks blocksize",
    ),
    "no offset": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, nested_offset=None)},
        "{state} cannot be read: it lacks nested_offset",
    ),
    "an unknown dtype": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, dtype="int3")},
        "{state} says dtype='int3', should be one of float32, float16, bfloat16",
    ),
    "an infinite offset": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, nested_offset=float("inf"))},
        "{state} cannot be read: `nested_offset` should be float, and is inf",
    ),
    "a block of zero": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, blocksize=0)},
        "{state} has blocksize=0, should be 1 to 6400",
    ),
    "blocks of other scales": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, nested_blocksize=128)},
        "{state} has nested_blocksize=128, only 256 is read",
    ),
    "scales of scales said to be of another dtype": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, nested_dtype="float16")},
        "{state} has nested_dtype='float16', only float32 is read",
    ),
    "an offset beyond float32": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, nested_offset=1e39)},
        "{state} has nested_offset=1e+39, too large for a float32",
    ),
    "a block size in quotes": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, blocksize="64")},
        "{state} cannot be read: `blocksize` should be int, and is '64'",
    ),
    "a block of more than the weight": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, blocksize=6401)},
        "{state} has blocksize=6401, should be 1 to 6400",
    ),
    "no object": (
        lambda f: {f"{UP.format(1)}.{STATE}": np.frombuffer(b"[64]", np.uint8)},
        "{state} cannot be read: `quant_state` should be Mapping[str, anything], and is [64]",
    ),
    "a state in floats": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f).astype(np.float32)},
        "{state} cannot be read: it is F32 (",
    ),
    "a state without end": (
        lambda f: {f"{UP.format(1)}.{STATE}": np.frombuffer(b" " * 10_001, np.uint8)},
        "{state} cannot be read: it is U8 (10001,), and should be U8, of at most 10000 bytes",
    ),
    "another block size than the scales": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, blocksize=128)},
        "{name}.absmax in {file} is U8 (100,), should be U8 (50,) for (100, 64) in blocks of 128",
    ),
    "another shape": (
        lambda f: {f"{UP.format(1)}.{STATE}": state(f, shape=[64, 100])},
        "{state} has the wrong shape: (64, 100), should be (100, 64)",
    ),
    "too few codes": (
        lambda f: {UP.format(1): np.zeros((3100, 1), np.uint8)},
        "{at} has 3100 bytes of quantized values, should have 3200 for (100, 64)",
    ),
    "scales in another dtype": (
        lambda f: {f"{UP.format(1)}.absmax": np.zeros(100, np.float32)},
        "{name}.absmax in {file} is F32 (100,), should be U8 (100,)",
    ),
    "too many scales of scales": (
        lambda f: {f"{UP.format(1)}.nested_absmax": np.zeros(2, np.float32)},
        "{name}.nested_absmax in {file} is F32 (2,), should be F32 (1,)",
    ),
    "a foreign map": (
        lambda f: {f"{UP.format(1)}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)},
        "{name}.quant_map in {file} is not the values of nf4, so that the quantized values mean",
    ),
    "a foreign map of scales": (
        lambda f: {f"{UP.format(1)}.nested_quant_map": NESTED},
        "{name}.nested_quant_map in {file} is not the signed dynamic map of 8 bits",
    ),
    "a dense layer": (
        lambda f: {
            UP.format(1): np.zeros((100, 64), np.float32),
            **{
                f"{UP.format(1)}.{part}": None
                for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
            },
        },
        "layers of 'layers/mlp/up/kernel' differ: {at} is dense, "
        "model.layers.0.mlp.up_proj.weight is quantized",
    ),
    "a layer in other blocks": (
        lambda f: {
            f"{UP.format(1)}.{STATE}": state(f, blocksize=128),
            f"{UP.format(1)}.absmax": np.zeros(50, np.uint8),
        },
        "layers of 'layers/mlp/up/kernel' differ: {at} is nf4 in blocks of 128 with nested "
        "scales, model.layers.0.mlp.up_proj.weight in {file} is nf4 in blocks of 64",
    ),
    "a table of embeddings": (
        lambda f: {"model.embed_tokens.weight.absmax": np.zeros(40, np.float32)},
        "model.embed_tokens.weight ('embed/embedding') is not a linear weight",
    ),
}


@pytest.mark.parametrize(("change", "fault"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_named_with_its_tensor_and_file(tmp_path, change, fault):
    decoder.save(tmp_path, CONFIG, params())
    rewrite(tmp_path, change(tmp_path))
    file = tmp_path / "model.safetensors"
    name = UP.format(1)
    fault = fault.format(
        at=f"{name} in {file}", name=name, state=f"{name}.{STATE} in {file}", file=file
    )
    with pytest.raises(ValueError, match=re.escape(fault)) as info:
        decoder.load(tmp_path)
    head = f"{tmp_path} holds weights in four bits that cannot be read:\n  "
    assert str(info.value).startswith(head) and "Download the folder again" in str(info.value)


@pytest.mark.parametrize(("format", "part"), [("nf4", "absmax"), ("nf4+dq", "nested_absmax")])
def test_scales_that_are_not_finite_are_refused(tmp_path, format, part):
    decoder.save(tmp_path, CONFIG, params(format))
    name = f"{UP.format(2)}.{part}"
    values = safetensors.read(safetensors.open_folder(tmp_path)[1][name])
    values[0] = np.nan
    rewrite(tmp_path, {name: values})
    message = rf"{name} in {tmp_path}/model.safetensors has 1 entries of {values.size} that are inf"
    with pytest.raises(ValueError, match=message):
        decoder.load(tmp_path)


def test_parts_of_a_weight_that_the_model_lacks_are_left_over(tmp_path):
    decoder.save(tmp_path, CONFIG, params())
    rewrite(tmp_path, {f"{UP.format(7)}.absmax": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="left over: model.layers.7.mlp.up_proj.weight.absmax"):
        decoder.load(tmp_path)


@pytest.mark.parametrize(
    "about", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}]
)
def test_quantization_of_another_kind_is_refused(tmp_path, about):
    decoder.save(tmp_path, CONFIG, decoder.init(CONFIG, jax.random.key(0)))
    hf, _ = safetensors.open_folder(tmp_path)
    rewrite(tmp_path, {}, hf | {"quantization_config": about})
    with pytest.raises(ValueError, match=f"quantization_config={re.escape(repr(about))}"):
        decoder.load(tmp_path)


def adapted():
    return jp.lora(2, found().match("*up*"))(jax.random.key(0), params())


def in_float64():
    dense = decoder.init(CONFIG, jax.random.key(0), dtype=jnp.float64)
    return jp.quantize("nf4", found().match("*up*"), layout="flat")(jax.random.key(0), dense)


def of_two_layers():
    small = decoder.Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=100,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    tree = params(sites=found().match("*up*"))
    dense = decoder.init(small, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    sites = jp.sites(decoder.apply_fn(small), dense, tokens).match("*up*")
    other = jp.quantize("nf4", sites, layout="flat")(jax.random.key(0), dense)
    tree["layers"]["mlp"]["up"] = other["layers"]["mlp"]["up"]
    return tree


REFUSED = {
    "rows": (lambda: params(layout="rows"), "'layers/mlp/up/kernel' is a Codebook"),
    "int8": (
        lambda: jp.quantize("int8", found().match("*up*"))(
            jax.random.key(0), decoder.init(CONFIG, jax.random.key(0))
        ),
        "'layers/mlp/up/kernel' is a PerChannel",
    ),
    "an adapter": (adapted, "'layers/mlp/up/kernel' is a LowRank"),
    "an embedding": (
        lambda: params(sites=found().embedding),
        "'embed/embedding' is a Flat of no linear weight",
    ),
    "float64": (in_float64, "is a Flat with scales of float64, should be float32"),
    "layers": (of_two_layers, "is a Flat of shape (2, 64, 100), should be (3, 64, 100)"),
}


@pytest.mark.parametrize(("make", "fault"), REFUSED.values(), ids=list(REFUSED))
def test_weights_that_no_such_folder_holds_are_refused(tmp_path, make, fault):
    with pytest.raises(ValueError, match=re.escape(fault)) as info:
        decoder.save(tmp_path, CONFIG, make())
    assert "jp.merge(params)" in str(info.value) and "layout='flat'" in str(info.value)
    assert not (tmp_path / "config.json").exists()
