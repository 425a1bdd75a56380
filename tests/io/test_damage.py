"""Damaged adapter folders: each one loads the same numbers, or is refused by name."""

import json
import random
import resource
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from jaxpeft._method import to_json
from jaxpeft.io import load_adapter, save_adapter
from jaxpeft.io._description import written
from tests.io.saved import BASES, CASES, FOLDERS, KEY, made, mlp

ABOUT = "adapter.json"
CASE = "lora_by_pattern"
JUNK = [
    None, True, -1, 0, 7, 10**9, 2**70, -(2**31), 0.5, 1e308, float("nan"), float("inf"), "", "x",
    "../../adapter", "float32", "\u0000", [], [0], [[]], {}, {"x": 1}, {"sites": {}},
    {"mapping": 3}, {"dtype": "flot"}, {"method": "lora"}, {"method": "chain", "options": {}},
    ["a"] * 50,
]  # fmt: skip


def params():
    return mlp().params


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "outputs.npy"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of two adapters of one base: the one that is damaged, and another."""
    found = []
    for name in (CASE, "int8"):
        folder = tmp_path_factory.mktemp(name)
        method, _, adapter = made(CASES[name])
        save_adapter(folder, adapter, method, params(), key=KEY)
        found.append(contents(folder))
    return found


def put(folder, files):
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def numbers(loaded):
    """Everything that the loaded model's outputs follow from."""
    leaves = [np.asarray(x) for x in jax.tree.leaves((loaded.frozen, loaded.adapter))]
    return to_json(loaded.method), sorted(loaded.adapter), leaves


def same(a, b):
    pairs = zip(a[2], b[2], strict=True)
    return a[:2] == b[:2] and all(np.array_equal(x, y) for x, y in pairs)


# Mutations ----------------------------------------------------------------------------------------


def arrays_of(files):
    return next(name for name in files if name.endswith(".safetensors"))


def damaged_bytes(rng, files, other):
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    at, end = sorted(rng.sample(range(len(data)), 2))
    match rng.choice(["bit", "byte", "cut", "append", "zeros", "twice", "out"]):
        case "bit":
            data[at] ^= 1 << rng.randrange(8)
        case "byte":
            data[at] = rng.randrange(256)
        case "cut":
            del data[at:]
        case "append":
            data += bytes(rng.randrange(256) for _ in range(9))
        case "zeros":
            data[at:end] = bytes(end - at)
        case "twice":
            data[at:at] = data[at:end]
        case "out":
            del data[at:end]
    return files | {name: bytes(data)}


def damaged_folder(rng, files, other):
    arrays, theirs = arrays_of(files), arrays_of(other)
    match rng.choice(["gone", "renamed", "swapped", "description", "both", "extra", "less", "old"]):
        case "gone":
            return {k: v for k, v in files.items() if k != rng.choice([ABOUT, arrays])}
        case "renamed":
            return {rng.choice([k, k + ".bak", "adapter.safetensors"]): v for k, v in files.items()}
        case "swapped":
            return files | {arrays: other[theirs]}
        case "description":
            return files | {ABOUT: other[ABOUT]}
        case "both":  # the other adapter's arrays are there too, and are not asked for
            return files | {theirs: other[theirs]}
        case "extra":
            return files | {arrays: save(load(files[arrays]) | {"more": np.ones(3)})}
        case "less":
            return files | {arrays: save(dict(list(load(files[arrays]).items())[1:]))}
        case "old":
            about = json.loads(files[ABOUT]) | {"format": 1}
            return files | {ABOUT: json.dumps(about).encode()}


def places(tree, at=()):
    """Of every value in a tree of JSON."""
    yield at
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, key))


def value_at(tree, at):
    for key in at:
        tree = tree[key]
    return tree


def edited(rng, about, other):
    """A description with one value changed, left out or put in."""
    *above, key = rng.choice([at for at in places(about) if at])
    parent = value_at(about, above)
    value = parent[key]
    match rng.choice(["junk", "junk", "gone", "more", "near", "theirs"]):
        case "junk":
            parent[key] = rng.choice(JUNK)
        case "gone":
            del parent[key]
        case "more" if isinstance(parent, dict):
            parent["more"] = rng.choice(JUNK)
        case "more":
            parent.insert(key, rng.choice([value, *JUNK]))
        case "near" if isinstance(value, (int, float)):
            parent[key] = rng.choice([value + 1, -value, value * 1000, float(value), str(value)])
        case "near":
            parent[key] = [value] if isinstance(value, str) else str(value)
        case "theirs":
            try:
                parent[key] = value_at(other, (*above, key))
            except (KeyError, IndexError, TypeError):
                parent[key] = other
    return about


def damaged_fields(rng, files, other):
    about = edited(rng, json.loads(files[ABOUT]), json.loads(other[ABOUT]))
    return files | {ABOUT: json.dumps(about).encode()}


def outcome(folder, *args, **options):
    """The numbers that a folder gives, or `None` where it is refused as it should be."""
    try:
        return numbers(load_adapter(folder, params(), *args, **options))
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        return None


def fuzz(folder, whole, seeds):
    files, other = whole
    put(folder, files)
    want = outcome(folder)
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        kind = rng.choice([damaged_bytes, damaged_folder, damaged_fields, damaged_fields])
        put(folder, kind(rng, files, other))
        try:
            got = outcome(folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {kind.__name__}") from error
        assert got is None or same(got, want), f"seed {seed}, {kind.__name__}"
        refused += got is None
    assert refused > 0.7 * len(seeds)  # else little was damaged


def test_a_hundred_damaged_folders_are_whole_or_refused(tmp_path, whole):
    fuzz(tmp_path, whole, range(100))


@pytest.mark.conformance
def test_a_thousand_damaged_folders_are_whole_or_refused(tmp_path, whole):
    fuzz(tmp_path, whole, range(100, 1100))


def resealed(about):
    """The description with the hash that it ought to have."""
    try:
        return written({k: v for k, v in about.items() if k != "sha256"})
    except ValueError:  # NaN, which no description has
        return json.dumps(about)


def fields(folder, files, seeds):
    """Fields that no hash speaks for: nothing but a clear error, and no time or memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    about = json.loads(files[ABOUT])
    for seed in seeds:
        rng = random.Random(seed)
        changed = edited(rng, json.loads(files[ABOUT]), about)
        text = json.dumps(changed) if about["format"] == 1 else resealed(changed)
        put(folder, files | {ABOUT: text.encode()})
        try:
            outcome(folder)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert time.perf_counter() - start < 60 + 2 * len(seeds)


def test_fields_are_checked_where_no_hash_speaks_for_them(tmp_path, whole):
    fields(tmp_path, contents(FOLDERS / "format1" / CASE), range(30))
    fields(tmp_path, whole[0], range(30, 60))


@pytest.mark.conformance
@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name].base == "mlp" and name != CASE]
)
def test_fields_of_any_method_are_checked(tmp_path, name):
    fields(tmp_path, contents(FOLDERS / "format1" / name), range(50))


SIZES = [
    ("lora", "rank", 10**9),
    ("bottleneck", "width", 10**9),
    ("prompt", "length", 10**9),
    ("encoded_prefix", "hidden", 10**9),
    ("p_tuning", "layers", 10**9),
    ("oft_shared", "terms", 10**9),
    ("loftq", "steps", 10**9),
    ("int4", "block", 10**12),
    ("moelora", "tasks", 10**9),
    ("poly", "skills", 10**9),
    ("xlora", "width", 10**9),
    ("vera", "rank", 10**8),
]


@pytest.mark.parametrize("name, option, value", SIZES)
def test_nothing_of_a_damaged_size_is_made(tmp_path, name, option, value):
    case = CASES[name]
    put(tmp_path, contents(FOLDERS / "format1" / name))
    about = json.loads((tmp_path / ABOUT).read_text())
    method = about["method"]
    if method["method"] == "chain":
        method = next(m for m in method["options"]["methods"] if option in m["options"])
    method["options"][option] = value
    (tmp_path / ABOUT).write_text(json.dumps(about))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_adapter(tmp_path, BASES[case.base]().params)
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
