"""Folders that earlier versions wrote load, and give what they gave."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

import jaxpeft as jp
from jaxpeft._method import FACTORIES
from jaxpeft.io import load_adapter
from jaxpeft.io._aliases import current_arrays, current_method
from jaxpeft.io._fingerprint import steps
from jaxpeft.quant import FORMATS
from tests.io.saved import BASES, CASES, FOLDERS, Base, outputs

#: Of each kind of weight, of format and of sites one; `make conformance` has the others.
EVERYDAY = set(
    "lora dora vera oft ia3 prompt trainable_tokens prefix bottleneck moelora sparse_masks bitfit "
    "full nf4_dq int8 lora_in_half lora_under_scan lora_on_tied lora_on_conv lora_on_ragged "
    "lora_on_mixed lora_on_gathered lora_on_groups lora_on_ensemble lora_on_parts".split()
)

folders = pytest.mark.parametrize(
    "folder",
    [
        pytest.param(
            folder,
            id=f"{folder.parent.name}-{folder.name}",
            marks=() if folder.name in EVERYDAY else pytest.mark.conformance,
        )
        for folder in sorted(FOLDERS.glob("format*/*"))
    ],
)


@folders
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_a_folder_of_any_format_gives_what_it_gave(folder):
    case = CASES[folder.name]
    loaded = load_adapter(folder, BASES[case.base]().params)
    check_arrays(loaded, folder)
    got = outputs(case, loaded.frozen, loaded.adapter)
    # Bases in bfloat16 have outputs of three digits, whose last one is XLA's to choose.
    near = 2e-2 if case.base == "half" else 1e-10
    np.testing.assert_allclose(got, np.load(folder / "outputs.npy"), rtol=near, atol=near)


def check_arrays(loaded, folder):
    """The adapter holds the arrays of the file, bit for bit."""
    (file,) = folder.glob("adapter*.safetensors")
    stored = load_file(file)
    methods = [step.name for step in steps(loaded.method)]
    names = current_arrays(stored, loaded.adapter, methods)
    assert loaded.adapter.keys() == {names[path] for path in stored}
    for path, want in stored.items():
        got = loaded.adapter[names[path]]
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


#: What starts at the values of a base takes no other; the others are not in float64.
ONLY_THERE = {"half", "quantized"}
OWN_START = {"pissa", "olora", "loftq", "loftq_principal"}


@folders
@pytest.mark.filterwarnings("ignore::jaxpeft.MaterializedWarning")
def test_in_float32_a_folder_gives_nearly_what_it_gave(folder):
    case = CASES[folder.name]
    if case.base in ONLY_THERE or folder.name in OWN_START:
        pytest.skip("cannot be moved to float32")
    base = BASES[case.base]()
    params, args = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, (base.params, base.args)
    )
    loaded = load_adapter(folder, params, base="any precision")
    tree = jp.combine(loaded.frozen, loaded.adapter, **case.given)
    got = jp.lift(base.fn)(tree, *case.args(Base(base.fn, params, args)))
    want = np.load(folder / "outputs.npy")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_every_method_and_every_format_has_a_folder():
    """A new one needs its case in `tests/io/saved.py`, and that to be run."""
    stored = [json.loads((f / "adapter.json").read_text()) for f in FOLDERS.glob("format*/*")]
    nodes = [n for d in stored for n in _nodes(current_method(d["method"], FACTORIES))]
    missing = FACTORIES.keys() - {node.get("method") for node in nodes}
    # What starts from data, of which no folder has any, is saved as LoRA, and the selections
    # as what they select; their cases are there all the same.
    data, selections = {"corda", "eva", "lora_ga"}, {"bitfit", "norm_tuning", "linear_probe"}
    assert missing == data | selections | {"full_finetuning"}
    assert all(any(name in case for case in CASES) for name in data | selections | {"full"})
    assert FORMATS.keys() <= {str(node.get("format")) for node in nodes}
    assert {f.name for f in FOLDERS.glob("format1/*")} <= CASES.keys()
    assert {f.name for f in FOLDERS.glob("format2/*")} == CASES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_adapter_of_a_folder_does_something(name):
    """Else one that is not read would pass."""
    folder = max(FOLDERS.glob(f"format*/{name}"))
    base = BASES[CASES[name].base]()
    plain = jp.lift(base.fn)(base.params, *CASES[name].args(base))
    assert np.abs(np.load(folder / "outputs.npy") - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "method"),
    [("unfreeze", "unfreeze"), ("trainable_tokens", "trainable_tokens"), ("int8", "quantize")],
)
@pytest.mark.filterwarnings("ignore::jaxpeft.io._adapter.UncheckedAdapterWarning")
def test_a_part_that_format_1_passed_over_is_passed_over(name, method, tmp_path):
    """Methods that refuse a part of a weight today acted on all of it."""
    case, folder = CASES[name], shutil.copytree(FOLDERS / "format1" / name, tmp_path / name)
    about = folder / "adapter.json"
    text = about.read_text()
    description = json.loads(text)
    (own,) = (x for x in _nodes(description["method"]) if x.get("method") == method)
    selected = [node for node in _nodes(own) if "part" in node]
    for row in selected:
        columns = next(size for size, role in row["axes"] if role == "out")
        row["part"] = [0, columns, 1]
    about.write_text(json.dumps(description))
    assert selected
    loaded = load_adapter(folder, BASES[case.base]().params)
    got = outputs(case, loaded.frozen, loaded.adapter)
    np.testing.assert_allclose(got, np.load(folder / "outputs.npy"), rtol=1e-9, atol=1e-9)


def _nodes(node):
    """Every mapping in a tree of JSON."""
    if isinstance(node, dict):
        yield node
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(item)
