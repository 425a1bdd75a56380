"""An adapter takes the place of another in one step, whatever happens in between."""

import json
import os
import re
import stat
import threading
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.io import UncheckedAdapterWarning, load_adapter, save_adapter
from jaxpeft.io import _adapter as module
from jaxpeft.io import _description as description
from jaxpeft.io import _replacing as replacing
from tests.io.saved import CASES, FOLDERS, KEY, made, mlp

METHOD, _, ADAPTER = made(CASES["ia3"])
OTHER = {path: x + 1 for path, x in ADAPTER.items()}
PATH = next(iter(ADAPTER))


def save(folder, adapter=ADAPTER):
    save_adapter(folder, adapter, METHOD, mlp().params, key=KEY)


def load(folder):
    return load_adapter(folder, mlp().params).adapter


def check(folder, want):
    for path, x in load(folder).items():
        np.testing.assert_array_equal(x, want[path])


def test_the_description_names_the_arrays_by_their_hash(tmp_path):
    save(tmp_path)
    about = json.loads((tmp_path / "adapter.json").read_text())
    assert about["format"] == 2
    name = about["arrays"]["file"]
    assert name == f"adapter-{about['arrays']['sha256'][:16]}.safetensors"
    assert sorted(f.name for f in tmp_path.iterdir()) == [name, "adapter.json"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_new_adapter_leaves_nothing_of_the_old_one(tmp_path):
    save(tmp_path)
    save(tmp_path, OTHER)
    check(tmp_path, OTHER)
    assert len(list(tmp_path.iterdir())) == 2


def test_it_takes_the_place_of_one_of_format_1(tmp_path):
    for file in (FOLDERS / "format1" / "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save(tmp_path)
    check(tmp_path, ADAPTER)
    names = {f.name for f in tmp_path.iterdir()}
    assert "adapter.safetensors" not in names
    assert "outputs.npy" in names  # other files stay


class Killed(BaseException):
    """As a process ends that is killed: no handler of errors runs."""


@pytest.mark.parametrize("call, stands", [(0, ADAPTER), (1, ADAPTER), (2, OTHER), (3, OTHER)])
def test_a_writer_that_is_killed_leaves_one_of_the_two(tmp_path, monkeypatch, call, stands):
    """Before the arrays are in place, before the description is, and before old arrays go."""
    save(tmp_path)
    calls = []

    def or_killed(function):
        def run(*args):
            calls.append(function)
            if len(calls) > call:
                raise Killed
            return function(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", or_killed(os.replace))
        patch.setattr(replacing, "remove", or_killed(replacing.remove))
        # Neither is a draft taken away.
        patch.setattr(replacing.Path, "unlink", lambda *args, **options: None)
        if call < 3:
            with pytest.raises(Killed):
                save(tmp_path, OTHER)
        else:
            save(tmp_path, OTHER)
    assert len(list(tmp_path.iterdir())) > 2
    check(tmp_path, stands)
    save(tmp_path, OTHER)
    check(tmp_path, OTHER)
    assert len(list(tmp_path.iterdir())) == 2  # what the first one left is gone


def test_a_full_disk_leaves_the_old_adapter_alone(tmp_path, monkeypatch):
    save(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replacing, "on_disk", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, OTHER)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("locks", [True, False])
def test_writers_and_readers_at_once_see_whole_adapters(tmp_path, monkeypatch, locks):
    if not locks:  # a file system, or a system, that has none
        monkeypatch.setattr(replacing, "fcntl", None)
    adapters = [{path: x + i for path, x in ADAPTER.items()} for i in range(4)]
    save(tmp_path, adapters[0])
    faults, ended = [], threading.Event()

    def run(work):
        def loop():
            try:
                work()
            except Exception as error:
                faults.append(error)

        return threading.Thread(target=loop)

    def write(adapter):
        for _ in range(8):
            save(tmp_path, adapter)

    def read():
        while not ended.is_set():
            description, arrays = module._read(tmp_path)
            assert any(all(np.array_equal(arrays[p], a[p]) for p in arrays) for a in adapters), (
                description
            )

    writers = [run(lambda a=a: write(a)) for a in adapters[1:]][: 2 if locks else 1]
    readers = [run(read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in readers:
        thread.join()
    assert not faults, faults[0]
    assert len(list(tmp_path.iterdir())) == 2
    assert any(all(np.array_equal(load(tmp_path)[p], a[p]) for p in a) for a in adapters)


def test_arrays_that_are_gone_are_named(tmp_path):
    save(tmp_path)
    (arrays,) = tmp_path.glob("adapter-*")
    arrays.unlink()
    with pytest.raises(FileNotFoundError, match=rf"'{re.escape(str(arrays))}' is missing"):
        load(tmp_path)


def test_a_folder_that_never_stands_still_is_said(tmp_path, monkeypatch):
    save(tmp_path)
    texts = iter(range(100))
    whole = (tmp_path / "adapter.json").read_bytes()

    def gone(*args):
        raise FileNotFoundError

    monkeypatch.setattr(module, "_bytes", lambda about: whole + b" " * next(texts))
    monkeypatch.setattr(module, "_arrays", gone)
    with pytest.raises(ValueError, match=rf"'{tmp_path}' was replaced 10 times while it was read"):
        load(tmp_path)


# What is in the files -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad, count", [(jnp.nan, 1), (jnp.inf, 1), (-jnp.inf, 1)])
def test_numbers_that_are_none_are_not_saved(tmp_path, bad, count):
    broken = ADAPTER | {PATH: ADAPTER[PATH].at[2].set(bad)}
    size = ADAPTER[PATH].size
    with pytest.raises(ValueError, match=f"'{PATH}' has {count} entries of {size} that are inf"):
        save(tmp_path / "new", broken)
    assert not (tmp_path / "new").exists()
    broken = {path: x * bad for path, x in ADAPTER.items()}
    with pytest.raises(ValueError, match=f"has {size} entries .*other arrays with such entries: 1"):
        save(tmp_path / "new", broken)


def test_format_1_says_once_that_it_carries_no_hash(monkeypatch):
    monkeypatch.setattr(description, "_warned", False)
    folder = FOLDERS / "format1" / "lora"
    with pytest.warns(UncheckedAdapterWarning, match=f"'{folder}/adapter.json' has format 1"):
        load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d | {"format": 1}, r"says format 1, but has \['arrays', 'sha256'\]"),
        (lambda d: d | {"format": 3}, "has format 3, written by jaxpeft '0.1.0'.* up to 2"),
        (lambda d: d | {"format": 0}, "has format 0"),
        (lambda d: d | {"format": True}, "`format` should be int, and is True"),
        (lambda d: d | {"more": 1}, r"Missing: none. Not expected: \['more'\]"),
        (lambda d: d | {"key": {"impl": "dice", "data": [0, 1]}}, "its `sha256` is"),
        (lambda d: d | {"arrays": d["arrays"] | {"file": "../x"}}, "`arrays.file` is '../x'"),
        (
            lambda d: d | {"arrays": d["arrays"] | {"sha256": "x"}},
            "`arrays.sha256` is not a SHA-256",
        ),
        (lambda d: d | {"adapter": {PATH: [[-1], "float64"]}}, rf"`adapter.{PATH}` has the shape"),
        (
            lambda d: d | {"adapter": {PATH: [[1], "real"]}},
            rf"`adapter.{PATH}` has an unknown dtype: 'rea",
        ),
        (lambda d: [d], "`description` should be Mapping.*, and is "),
    ],
)
def test_a_description_that_was_changed_is_refused_by_its_field(tmp_path, change, message):
    save(tmp_path)
    about = tmp_path / "adapter.json"
    about.write_text(json.dumps(change(json.loads(about.read_text()))))
    with pytest.raises(ValueError, match=rf"'{about}': .*{message}"):
        load(tmp_path)


def test_whitespace_and_the_order_of_fields_do_not_matter(tmp_path):
    save(tmp_path)
    about = tmp_path / "adapter.json"
    turned = dict(reversed(json.loads(about.read_text()).items()))
    about.write_text(json.dumps(turned, indent=3))
    check(tmp_path, ADAPTER)


def change_method(folder, **options):
    about = json.loads((folder / "adapter.json").read_text())
    about["method"]["options"].update(options)
    del about["sha256"]
    (folder / "adapter.json").write_text(description.written(about))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 1.5}, r"`method.options.rank` should be int or Mapping\[str, int\], and is 1.5"),
        ({"rank": 10**10}, "`method.options.rank` is 10000000000, and may be 2147483647 at most"),
        ({"rank": 5}, r"`lora\(rank=5\)` needs 1 <= rank <= .*'\w+' of shape"),
        ({"rank": 1}, r"'down/a' has shape \(6, 2\) in the file of arrays, but .* needs \(6, 1\)"),
        ({"rnk": 2}, "`method.options` has 'rnk', which is not one of its options"),
        ({"scaling": "alpha"}, r"`method.options.scaling` should be one of .*, and is 'alpha'"),
        ({"dropout": "a bit"}, "`method.options.dropout` should be float, and is 'a bit'"),
        ({"dtype": {"dtype": "int8"}}, "`method.options.dtype` should be a floating-point dtype"),
        ({"dtype": {"dtype": "floaty"}}, "`method.options.dtype.dtype` is not a dtype: 'floaty'"),
        ({"sites": {"sites": {}}}, "`method.options.sites.sites` should have the fields"),
    ],
)
def test_options_are_checked_even_under_a_right_hash(tmp_path, options, message):
    method, _, adapter = made(CASES["lora"])
    save_adapter(tmp_path, adapter, method, mlp().params, key=KEY)
    change_method(tmp_path, **options)
    with pytest.raises(ValueError, match=rf"'{tmp_path}/adapter.json': .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": [[4, "in"], [5, "out"]]}, r"parameters\[2\].axes` are .* up the shape \(4, 6\)"),
        ({"axes": [[4, "in"], [6, "up"]]}, r"parameters\[2\].axes` should be .*\['stack', 'in', "),
        ({"path": "down"}, "`method.options.sites.sites.parameters` has 'down' twice"),
        ({"path": "upward"}, "`.*sites.selected` names 'up', which is not one of the parameters"),
        ({"bias": "bios"}, "`.*sites.parameters` names 'bios', which is not one"),
        ({"part": [3, 3, 1]}, "Block 3 of 3 in 1 groups does not exist in the output axis of 'up'"),
    ],
)
def test_sites_are_checked_by_field(tmp_path, change, message):
    method, _, adapter = made(CASES["lora"])
    save_adapter(tmp_path, adapter, method, mlp().params, key=KEY)
    about = json.loads((tmp_path / "adapter.json").read_text())
    sites = about["method"]["options"]["sites"]["sites"]
    assert sites["parameters"][2]["path"] == "up"
    sites["parameters"][2] |= change
    change_method(tmp_path, sites={"sites": sites})
    with pytest.raises(ValueError, match=rf"'{tmp_path}/adapter.json': .*{message}"):
        load(tmp_path)


# What is no adapter folder ------------------------------------------------------------------------


def test_a_folder_of_another_library_is_recognised(tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "a/b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"PEFT, type LORA, for the base 'a/b'.*`lora\(8, sites"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"use_rslora": True, "bias": "none", "rank_pattern": {}})
    )
    with pytest.raises(ValueError, match=r"alpha=16, scaling='alpha/sqrt\(r\)'\)`"):
        load(tmp_path)
    # What two matrices per weight do not say is not advised to be copied.
    for more in ({"use_dora": True}, {"rank_pattern": {"q": 4}}, {"bias": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | more))
        with pytest.raises(ValueError, match="load the merged model as a base.$"):
            load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match=rf"'{tmp_path}' is .* PEFT, type IA3.*merge_and_unload"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match="PEFT, type unknown"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="PEFT, type unknown"):
        load(tmp_path)


def test_what_is_no_folder_of_an_adapter_is_said(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(
        FileNotFoundError, match=r"It holds \['config.json'\]. It is the folder of a model"
    ):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is a file"):
        load(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"hub.*snapshot_download\('someone/adapter-7b'\)"):
        load("someone/adapter-7b")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "adapter.json").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        load(tmp_path)
