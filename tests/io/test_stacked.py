"""Stacked arrays from tensors and back, whole and in shards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft.io import _buffers, _stacked
from jaxpeft.io import _safetensors as folders
from jaxpeft.io._stacked import Stack, assemble, disassemble

# The largest crosses the strips in which matrices are transposed.
PLAN = {
    "layers/up/kernel": Stack((4, 6, 200), tuple(f"layer{i}.up" for i in range(4)), True, True),
    "layers/up/bias": Stack((4, 200), tuple(f"layer{i}.bias" for i in range(4)), True, False),
    "table": Stack((16, 6), ("table",), False, False),
    "head": Stack((6, 16), ("head",), False, True),
}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=stack.tensor_shape).astype(np.float32)
        for stack in PLAN.values()
        for name in stack.names
    }


def write(folder, values, dtype=None):
    arrays = {name: value.astype(dtype or value.dtype) for name, value in values.items()}
    lazies = {
        name: folders.Lazy(array.shape, array.dtype, lambda array=array: array)
        for name, array in arrays.items()
    }
    folders.write_folder(folder, {}, lazies, shard_bytes=5000)
    return folders.open_folder(folder)[1]


def expected(values):
    kernels = np.stack([values[f"layer{i}.up"].T for i in range(4)])
    biases = np.stack([values[f"layer{i}.bias"] for i in range(4)])
    return {
        "layers": {"up": {"kernel": kernels, "bias": biases}},
        "table": values["table"],
        "head": values["head"].T,
    }


def check_equal(got, want, dtype=np.float32):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


def test_layers_are_stacked_and_matrices_transposed(tmp_path, values):
    check_equal(assemble(write(tmp_path, values), PLAN), expected(values))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("source", [np.float16, jnp.bfloat16, np.float32])
def test_dtypes_are_converted_as_by_astype(tmp_path, values, source, dtype):
    want = jax.tree.map(lambda x: x.astype(source), expected(values))
    check_equal(assemble(write(tmp_path, values, source), PLAN, dtype=dtype), want, dtype)


def test_without_a_dtype_the_widest_of_the_layers_is_kept(tmp_path, values):
    mixed = {
        name: value.astype(jnp.bfloat16 if name in ("layer0.up", "table") else np.float32)
        for name, value in values.items()
    }
    got = assemble(write(tmp_path, mixed), PLAN)
    assert got["layers"]["up"]["kernel"].dtype == np.float32
    assert got["table"].dtype == jnp.bfloat16


SPECS = {
    "layers": {"up": {"kernel": P(None, "x", "y"), "bias": P("x", "y")}},
    "table": P("y", "x"),
    "head": P("x", None),
}


def test_shards_hold_what_the_whole_array_has_there(tmp_path, values):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    sharding = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    got = assemble(write(tmp_path, values), PLAN, sharding=sharding)
    check_equal(got, expected(values))
    assert jax.tree.map(lambda array: array.sharding, got) == sharding


def test_one_sharding_serves_all_arrays(tmp_path, values):
    mesh = jax.make_mesh((8,), ("x",))
    got = assemble(write(tmp_path, values), PLAN, sharding=NamedSharding(mesh, P()))
    check_equal(got, expected(values))
    assert all(array.is_fully_replicated for array in jax.tree.leaves(got))


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x"), P(("x", "y"))], ids=str)
def test_no_row_is_read_twice_and_at_most_a_strip_at_once(tmp_path, values, monkeypatch, spec):
    """However an array is divided or replicated over devices."""
    parts = []

    def spy(tensor, rows):
        parts.append(read(tensor, rows))
        return parts[-1]

    read = _stacked.read
    monkeypatch.setattr(_stacked, "read", spy)
    monkeypatch.setattr(_stacked, "STRIP", 1000)
    monkeypatch.setattr(_stacked, "BLOCK", 8)
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    plan = {"table": PLAN["table"], "layers/up/kernel": PLAN["layers/up/kernel"]}
    where = {"table": NamedSharding(mesh, spec), "layers": {"up": {"kernel": None}}}
    where["layers"]["up"]["kernel"] = NamedSharding(mesh, P("x", None, "y"))
    wanted = {name: values[name] for stack in plan.values() for name in stack.names}
    got = assemble(write(tmp_path, wanted), plan, sharding=where)
    np.testing.assert_array_equal(got["table"], values["table"])
    whole = sum(value.nbytes for value in wanted.values())
    # Columns of a row-major file are cut out of whole rows: one time for each part.
    columns = values["table"].nbytes * (spec == P(None, "x"))
    assert sum(part.nbytes for part in parts) == whole + columns
    assert max(part.nbytes for part in parts) <= 1000


def test_on_cpu_the_buffer_is_taken_over_without_a_copy(tmp_path, values, monkeypatch):
    tensors, buffers = write(tmp_path, values), set()
    aligned = _buffers.aligned

    def spy(shape, dtype):
        out = aligned(shape, dtype)
        buffers.add(out.ctypes.data)
        return out

    monkeypatch.setattr(_buffers, "aligned", spy)
    got = assemble(tensors, PLAN)
    assert {array.unsafe_buffer_pointer() for array in jax.tree.leaves(got)} == buffers


def test_taking_apart_is_the_inverse(tmp_path, values):
    lazies = disassemble(jax.tree.map(jnp.asarray, expected(values)), PLAN)
    assert lazies.keys() == values.keys()
    for name, value in values.items():
        assert (lazies[name].shape, lazies[name].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(lazies[name].value(), value)


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path, values):
    wrong = {name: value for name, value in values.items() if name != "layer2.up"}
    wrong["head"] = wrong["head"].T
    wrong["table"] = wrong["table"].astype(np.int8)
    wrong["extra"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as info:
        assemble(write(tmp_path, wrong), PLAN)
    message = str(info.value)
    assert message.startswith(f"{tmp_path} does not hold the tensors that its config.json")
    for fault in (
        "missing: layer2.up of shape (200, 6)",
        "wrong shape: head is (6, 16), should be (16, 6)",
        "not floating-point: table is I8",
        "left over: extra of shape (3,)",
    ):
        assert f"\n  {fault}" in message
    assert "Download the folder again" in message


def test_a_long_list_of_faults_is_cut(tmp_path):
    tensors = write(tmp_path, {f"t{i:02}": np.zeros(1, np.float32) for i in range(30)})
    with pytest.raises(ValueError, match=r"t19 of shape \(1,\)\n  and 10 more\nDownload"):
        assemble(tensors, {})


def test_tensors_that_may_be_left_over_are(tmp_path, values):
    tensors = write(tmp_path, values | {"extra": np.zeros(3)})
    check_equal(assemble(tensors, PLAN, ignore=lambda name: name == "extra"), expected(values))


def test_a_sharding_for_other_arrays_is_refused(tmp_path, values):
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), P())
    with pytest.raises(ValueError, match=r"`sharding` does not fit(.|\n)*left over: tabel"):
        assemble(write(tmp_path, values), PLAN, sharding={"tabel": sharding})


def test_all_that_is_wrong_with_the_arrays_is_said_at_once(values):
    params = expected(values)
    params["table"] = params["table"].T
    params["head"] = "no array"
    params["layers"]["up"] = {"kernel": params["layers"]["up"]["kernel"], "scale": np.ones(3)}
    faults = [
        "missing: layers/up/bias",
        "left over: layers/up/scale",
        "wrong shape: table is (6, 16), should be (16, 6)",
        "wrong shape: head is a str, should be (6, 16)",
    ]
    for fault in faults:
        with pytest.raises(ValueError, match=re.escape(f"\n  {fault}")):
            disassemble(params, PLAN)
