"""Old names of methods, options, values and arrays are read as today's, and never written."""

import inspect
import json
import shutil
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft._method import FACTORIES
from jaxpeft.io import _aliases, load_adapter, save_adapter
from jaxpeft.io._aliases import (
    FIELDS,
    METHODS,
    OPTIONS,
    VALUES,
    WEIGHTS,
    current_arrays,
    current_method,
    first_field,
)
from jaxpeft.quant import FORMATS
from tests.io.saved import BASES, CASES, FOLDERS, KEY, outputs

pytestmark = pytest.mark.filterwarnings("ignore::jaxpeft.io.UncheckedAdapterWarning")


def test_every_row_leads_to_a_name_of_today():
    for old, new in METHODS.items():
        assert new in FACTORIES and old not in FACTORIES
    for method, names in OPTIONS.items():
        taken = inspect.signature(FACTORIES[method]).parameters
        for old, new in names.items():
            assert (old in taken) != (new in taken), (method, old, new)
    for (method, option), names in VALUES.items():
        taken = inspect.signature(FACTORIES[method]).parameters
        today = option if option in taken else OPTIONS[method][option]
        allowed = set(get_args(taken[today].annotation)) or FORMATS
        for old, new in names.items():
            if option != "slots":  # takes any name
                assert (old in allowed) != (new in allowed), (method, option, old, new)


@pytest.mark.parametrize(
    "table", [METHODS, WEIGHTS, *OPTIONS.values(), *VALUES.values(), *FIELDS.values()]
)
def test_no_name_of_today_is_an_old_one(table):
    assert not table.keys() & set(table.values())
    assert len(set(table.values())) == len(table)


def describe(method, **options):
    return {"method": method, "options": options}


def test_methods_options_and_values_are_renamed_wherever_they_stand(monkeypatch):
    monkeypatch.setitem(OPTIONS, "lora", {"size": "rank"})
    monkeypatch.setitem(VALUES, ("lora", "init"), {"he": "kaiming"})
    old = describe("lora", size=2, init="he")
    by_pattern = describe("lora", size={"mapping": {"he": 3}}, init={"mapping": {"*": "he"}})
    stored = describe("chain", methods=[describe("sparse", masks=0.3), old, by_pattern])
    assert current_method(stored, FACTORIES) == describe(
        "chain",
        methods=[
            describe("sparse_delta", masks=0.3),
            describe("lora", rank=2, init="kaiming"),
            describe("lora", rank={"mapping": {"he": 3}}, init={"mapping": {"*": "kaiming"}}),
        ],
    )
    assert stored["options"]["methods"][1] is old and old == describe("lora", size=2, init="he")


def test_an_option_that_the_method_still_takes_keeps_its_name(monkeypatch):
    monkeypatch.setitem(OPTIONS, "lora", {"alpha": "rank"})
    assert current_method(describe("lora", alpha=2), FACTORIES) == describe("lora", alpha=2)


def test_a_value_that_the_option_still_takes_keeps_its_name(monkeypatch):
    monkeypatch.setitem(VALUES, ("lora", "init"), {"kaiming": "later", "he": "kaiming"})
    stored = describe("lora", init="kaiming")
    assert current_method(stored, FACTORIES) == stored
    assert current_method(describe("lora", init="he"), FACTORIES) == stored


def test_a_value_under_todays_name_of_an_option_is_todays(monkeypatch):
    """One that anybody may choose is renamed only together with its option."""
    monkeypatch.setitem(OPTIONS, "lora", {"begin": "init"})
    monkeypatch.setitem(VALUES, ("lora", "begin"), {"he": "kaiming"})
    assert current_method(describe("lora", begin="he"), FACTORIES) == describe(
        "lora", init="kaiming"
    )
    assert current_method(describe("lora", init="he"), FACTORIES) == describe("lora", init="he")


def test_of_two_names_of_one_option_the_old_one_is_left_to_be_refused(monkeypatch):
    monkeypatch.setitem(OPTIONS, "lora", {"size": "rank"})
    both = describe("lora", rank=1, size=2)
    assert current_method(both, FACTORIES) == both


@pytest.mark.parametrize(
    "junk",
    [
        None,
        3,
        "sparse",
        [["prompt"]],
        {"method": "sparse"},
        describe([]),
        {"method": "prompt", "options": 3},
        {"method": {}, "options": {}},
        describe("no such method", width=3),
        {"prompt": {"sparse": "full"}},
    ],
)
def test_what_describes_no_method_of_old_stays_as_it_is(junk):
    assert current_method(junk, FACTORIES) == junk


def test_arrays_are_renamed_by_the_last_part_of_their_path(monkeypatch, tmp_path):
    """A folder as it would be if the factors of LoRA had once been called `down` and `up`."""
    monkeypatch.setitem(_aliases.ARRAYS, "lora", {"down": "a", "up": "b"})
    stored, trained = ["up/down", "up/up", "up"], ["up/a", "up/b", "b"]
    names = dict(zip(stored, trained, strict=True))
    assert current_arrays(stored, trained, ["dora", "lora"]) == names
    assert current_arrays(stored, trained, ["dora"]) == dict(zip(stored, stored, strict=True))
    # An array that is trained under its old name, or under none, keeps it.
    assert current_arrays(stored, [*trained, "up"], ["lora"]) == names | {"up": "up"}
    assert current_arrays(stored, [], ["lora"]) == dict(zip(stored, stored, strict=True))
    folder = shutil.copytree(FOLDERS / "format1" / "lora", tmp_path / "lora")
    about = json.loads((folder / "adapter.json").read_text())
    old = {"a": "down", "b": "up"}

    def renamed(paths):
        return {f"{path[:-1]}{old[path[-1]]}": value for path, value in paths.items()}

    about["adapter"] = renamed(about["adapter"])
    (folder / "adapter.json").write_text(json.dumps(about))
    save_file(renamed(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors")
    case = CASES["lora"]
    loaded = load_adapter(folder, BASES[case.base]().params)
    got = outputs(case, loaded.frozen, loaded.adapter)
    np.testing.assert_allclose(got, np.load(folder / "outputs.npy"), rtol=1e-10, atol=1e-10)


OLD = [
    ("bottleneck", "bottleneck_adapter"),
    ("parallel", "parallel_adapter"),
    ("prefix", "prefix_tuning"),
    ("prompt", "prompt_tuning"),
    ("sparse", "sparse_delta"),
]


@pytest.mark.parametrize(("name", "method"), OLD)
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_loaded_under_an_old_name_is_saved_under_todays(name, method, number, tmp_path):
    case = CASES[name]
    params = BASES[case.base]().params
    folder = FOLDERS / f"format{number}" / name
    loaded = load_adapter(folder, params)
    save_adapter(tmp_path, loaded.adapter, loaded.method, params, key=KEY)
    old, new = (json.loads((f / "adapter.json").read_text()) for f in (folder, tmp_path))
    assert (old["method"]["method"], new["method"]["method"]) == (name, method)
    again = load_adapter(tmp_path, params)
    for path, x in loaded.adapter.items():
        assert np.asarray(again.adapter[path]).tobytes() == np.asarray(x).tobytes()


def test_an_old_format_is_loaded_and_saved_under_its_name_of_today(tmp_path):
    case = CASES["int4_asym"]
    params = BASES[case.base]().params
    for number in (1, 2):
        loaded = load_adapter(FOLDERS / f"format{number}" / "int4_asym", params)
        save_adapter(tmp_path, loaded.adapter, loaded.method, params, key=KEY)
        text = (tmp_path / "adapter.json").read_text()
        assert '"int4+asym"' in text and "int4/asym" not in text


def test_hashes_of_a_base_are_taken_over_the_first_names_of_fields():
    def like(name):
        return type(name, (), {})()

    for weight in ("PerChannel", "Columns"):
        assert first_field(like(weight), "values") == "codes"
        assert first_field(like(weight), "codes") == "codes"
        assert first_field(like(weight), "scale") == "scale"
    assert first_field(like("SparseDelta"), "values") == "values"


@pytest.mark.parametrize("number", [1, 2])
def test_a_weight_of_the_base_may_have_had_another_name(number, monkeypatch):
    """The class of int8 is called as it may be one day."""
    case = CASES["lora_on_quantized"]
    params = BASES[case.base]().params
    weight = type(params["v"].weight)
    name = weight.__name__
    monkeypatch.setitem(_aliases.WEIGHTS, "Columns", "Later")
    monkeypatch.setitem(_aliases.WEIGHTS, "PerChannel", "Later")
    monkeypatch.setitem(_aliases.FIELDS, "Later", _aliases.FIELDS["PerChannel"])
    try:
        weight.__name__ = "Later"
        load_adapter(FOLDERS / f"format{number}" / "lora_on_quantized", params)
    finally:
        weight.__name__ = name
