"""Folders of safetensors files: what is written is read again, and what is damaged is refused."""

import errno
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxpeft.io import _safetensors as folders

CONFIG = {"model_type": "toy"}


def lazy(array):
    return folders.Lazy(array.shape, array.dtype, lambda: array)


def write(folder, arrays, **options):
    lazies = {name: lazy(array) for name, array in arrays.items()}
    folders.write_folder(folder, CONFIG, lazies, **options)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    named = {dtype.name: rng.normal(0, 9, (3, 5)).astype(dtype) for dtype in folders.NAMES}
    return named | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.int8)}


def read_all(folder):
    _, tensors = folders.open_folder(folder)
    return {name: folders.read(tensor) for name, tensor in tensors.items()}


def check_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, arrays):
    write(tmp_path, arrays)
    assert folders.open_folder(tmp_path)[0] == CONFIG
    check_same(read_all(tmp_path), arrays)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_reference_library_reads_what_is_written(tmp_path, arrays):
    write(tmp_path, arrays)
    check_same(safetensors.numpy.load_file(tmp_path / "model.safetensors"), arrays)


def test_what_the_reference_library_writes_is_read(tmp_path, arrays):
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    check_same(read_all(tmp_path), arrays)


def test_files_are_cut_at_the_size_asked_for(tmp_path):
    sizes = {"a": 10, "b": 20, "c": 5, "d": 90, "e": 1}
    arrays = {name: np.arange(size, dtype=np.int8) for name, size in sizes.items()}
    write(tmp_path, arrays, shard_bytes=35)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 126}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 1, 1, 2, 3)]
    assert index["weight_map"] == dict(zip(sizes, names, strict=True))
    check_same(read_all(tmp_path), arrays)


def test_rows_are_read_alone(tmp_path):
    write(tmp_path, {"a": np.arange(30).reshape(6, 5)})
    tensor = folders.open_folder(tmp_path)[1]["a"]
    np.testing.assert_array_equal(
        folders.read(tensor, slice(2, 4)), np.arange(10, 20).reshape(2, 5)
    )
    assert folders.read(tensor, slice(2, 2)).shape == (0, 5)


def test_a_save_replaces_the_weights_before_it_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    write(tmp_path, {name: np.zeros(4) for name in "abc"}, shard_bytes=32)
    write(tmp_path, {"a": np.ones(4)})
    files = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(f.name for f in tmp_path.iterdir()) == files
    check_same(read_all(tmp_path), {"a": np.ones(4)})


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path, {"a": np.ones(4)})

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    lazies = {"a": lazy(np.zeros(4)), "b": folders.Lazy((4,), np.dtype(np.float64), full)}
    with pytest.raises(OSError, match=re.escape(f"64 bytes to {tmp_path}: No space left")) as info:
        folders.write_folder(tmp_path, CONFIG, lazies)
    assert info.value.errno == errno.ENOSPC
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    check_same(read_all(tmp_path), {"a": np.ones(4)})


def test_a_save_cut_short_while_files_move_in_is_not_taken_for_whole(tmp_path, monkeypatch):
    write(tmp_path, {"a": np.ones(4)})

    class Killed(BaseException):
        pass

    def replace(source, target):
        raise Killed

    monkeypatch.setattr(folders.os, "replace", replace)
    with pytest.raises(Killed):
        write(tmp_path, {"a": np.zeros(4)})
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no config.json")):
        folders.open_folder(tmp_path)


def test_shard_bytes_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="`shard_bytes` must be positive, got 0"):
        write(tmp_path, {}, shard_bytes=0)


# Bad input ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A good folder of two files, to be damaged."""
    write(tmp_path, {"a": np.ones(4), "b": np.ones(4)}, shard_bytes=32)
    return tmp_path


def refuses(folder, message, error=ValueError):
    with pytest.raises(error, match=re.escape(message)):
        folders.open_folder(folder)


def edit_index(folder, change):
    file = folder / folders.INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def header_of(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refuses(tmp_path / "x", f"There is no folder {tmp_path / 'x'}", FileNotFoundError)


def test_a_folder_without_config_says_what_it_has(folder):
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json, only model-00001-of-00002", FileNotFoundError)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    message = "has neither model.safetensors nor model.safetensors.index.json, only config.json, "
    refuses(tmp_path, message + "pytorch_model.bin", FileNotFoundError)


def test_a_config_that_is_no_json_is_named(folder):
    (folder / "config.json").write_text("{'a'")
    refuses(folder, f"{folder / 'config.json'} is not valid JSON: Expecting property name")
    (folder / "config.json").write_text("[1]")
    refuses(folder, f"{folder / 'config.json'} must hold a JSON object, it holds a list")


@pytest.mark.parametrize("where", ["data", "header", "length", "start"])
def test_a_truncated_file_is_named(folder, where):
    file = folder / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kept, needed = {
        "data": (len(data) - 1, len(data)),
        "header": (30, 8 + length),
        "length": (8, 8 + length),
        "start": (3, None),
    }[where]
    file.write_bytes(data[:kept])
    if needed:
        refuses(
            folder, f"{file} is truncated: its header describes {needed} bytes, but it has {kept}"
        )
    else:
        refuses(folder, f"{file} is not a safetensors file: it has no header (3 bytes)")


def test_a_file_of_another_kind_is_named(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(b"PK\x03\x04 a zip file, say, of some length")
    refuses(folder, f"{file} is not a safetensors file: it has no header")
    for header in (b"[1, 2]", b"[" * 100_000):
        put_header(file, header, b"")
        refuses(folder, f"{file} has a header that cannot be read: ")
    (folder / "config.json").write_bytes(b"[" * 100_000)
    refuses(folder, f"{folder / 'config.json'} is not valid JSON: ")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "F8_E4M3"}, "F8_E4M3 is none of the types F64, F32, F16, BF16, "),
        ({"shape": [5]}, "do not agree"),
        ({"shape": [4.0]}, "do not agree"),
        ({"shape": [True, 4]}, "do not agree"),
        ({"shape": [float("inf")]}, "do not agree"),
        ({"shape": [0, 2**70], "data_offsets": [0, 0]}, "do not agree"),
        ({"data_offsets": [0.0, 32.0]}, "do not agree"),
        ({"shape": [-4]}, "do not agree"),
        ({"data_offsets": [0, 24]}, "do not agree"),
        ({"data_offsets": [8, 40]}, "tensor 'a' starts at byte"),
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(folder, change, message):
    file = folder / "model-00001-of-00002.safetensors"
    header, data = header_of(file)
    header["a"] |= change
    put_header(file, header, data)
    refuses(folder, str(file))
    refuses(folder, message)


def test_a_file_longer_than_its_header_says_is_refused(folder):
    file = folder / "model-00001-of-00002.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"xyz")
    refuses(folder, f"{file} is damaged: its header describes {size} bytes, but it has {size + 3}")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..\\x", "..", ""])
def test_an_index_that_points_outside_its_folder_is_refused(folder, name):
    edit_index(folder, lambda where: where.update(b=name))
    refuses(folder, f"{folders.INDEX} points outside its folder, to '{name}'")


def test_files_that_are_links_are_followed(folder, tmp_path_factory):
    # So the hub's cache is laid out.
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    file = folder / "model-00001-of-00002.safetensors"
    blob.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(blob)
    assert read_all(folder).keys() == {"a", "b"}


def test_an_index_that_disagrees_with_its_files_is_refused(folder):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    edit_index(folder, lambda where: where.update(b="model-3.safetensors"))
    refuses(folder, f"{folder} lacks model-3.safetensors", FileNotFoundError)
    edit_index(folder, lambda where: where.update(b=first))
    (folder / second).unlink()
    refuses(folder, f"places tensor 'b' in {first}, which does not hold it")
    edit_index(folder, lambda where: (where.pop("a"), where.update(c=first)))
    refuses(folder, f"{first} holds tensor 'a', which the index places in None")
    (folder / folders.INDEX).write_text("{}")
    refuses(folder, f"{folder / folders.INDEX} has no 'weight_map'")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(folder):
    tensor = folders.open_folder(folder)[1]["a"]
    tensor.file.write_bytes(tensor.file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{tensor.file} became shorter")):
        folders.read(tensor)


def test_bfloat16_is_kept_as_it_is(tmp_path):
    values = jnp.asarray([1.0, 3.140625, -0.0, jnp.inf], jnp.bfloat16)
    write(tmp_path, {"a": np.asarray(values)})
    got = read_all(tmp_path)["a"]
    assert got.view(np.uint16).tolist() == np.asarray(values).view(np.uint16).tolist()
