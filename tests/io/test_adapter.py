"""An adapter folder and a base are all that is needed, and another base is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft._method import FACTORIES, Method
from jaxpeft.io import load_adapter, save_adapter

ROOT = Path(__file__).parents[2]
KEY = jax.random.key(1)


def model(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def params():
    key = jax.random.key(5)
    return {
        "up": jax.random.normal(key, (6, 10)),
        "bias": jnp.ones(10),
        "down": jax.random.normal(key, (10, 3)),
    }


def trained(method, p):
    frozen, adapter = jp.split(method(jax.random.key(1), p))
    adapter = {k: v + 0.3 * jnp.arange(v.size).reshape(v.shape) for k, v in adapter.items()}
    return frozen, adapter


def methods():
    sites = jp.sites(model, params(), jnp.ones((2, 6)))
    up, down = sites.match("up"), sites.match("down")
    return {
        "lora": jp.lora({"up": 3, "*": 2}, sites.linear, alpha=5.0, dtype=jnp.bfloat16),
        "qlora": jp.chain(jp.quantize("int8", sites.linear), jp.lora(2, sites.linear)),
        "loftq": jp.loftq(2, sites.linear, format="nf4", block=2, start="principal"),
        "part": jp.lora(2, up.output_slice(1, 2), dropout=0.1),
        "ia3": jp.ia3(up, down),
        "bottleneck": jp.bottleneck_adapter(4, up, activation="tanh"),
        "parallel": jp.parallel_adapter(4, up, down, scale=2.0),
        "bitfit": jp.bitfit(sites),
        "full": jp.full_finetuning(sites),
    }


@pytest.mark.parametrize("name", list(methods()))
def test_the_folder_gives_the_same_outputs_again(tmp_path, name):
    method, p, x = methods()[name], params(), jnp.ones((2, 6))
    frozen, adapter = trained(method, p)
    save_adapter(tmp_path, adapter, method, p, key=jax.random.key(1))
    loaded = load_adapter(tmp_path, p)
    for path, array in adapter.items():
        assert loaded.adapter[path].dtype == array.dtype
        np.testing.assert_array_equal(loaded.adapter[path], array)
    run = jp.lift(model)
    np.testing.assert_array_equal(
        run(jp.combine(loaded.frozen, loaded.adapter), x), run(jp.combine(frozen, adapter), x)
    )


def test_a_new_process_needs_only_the_folder_and_the_base(tmp_path):
    method, p = methods()["lora"], params()
    frozen, adapter = trained(method, p)
    save_adapter(tmp_path, adapter, method, p, key=jax.random.key(1))
    np.savez(tmp_path / "base.npz", **p)
    code = (
        "import jax, numpy as np, sys; jax.config.update('jax_enable_x64', True)\n"
        "from jaxpeft.io._adapter import load_adapter; import jaxpeft as jp\n"
        "import jax.numpy as jnp\n"
        "p = {k: jnp.asarray(v) for k, v in np.load(sys.argv[1] + '/base.npz').items()}\n"
        "l = load_adapter(sys.argv[1], p)\n"
        "f = lambda p, x: jnp.tanh(x @ p['up'] + p['bias']) @ p['down']\n"
        "y = jp.lift(f)(jp.combine(l.frozen, l.adapter), jnp.ones((2, 6)))\n"
        "np.save(sys.argv[1] + '/y.npy', y)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    here = jp.lift(model)(jp.combine(frozen, adapter), jnp.ones((2, 6)))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), here)


def test_the_arrays_are_plain_safetensors_by_path(tmp_path):
    method, p = methods()["ia3"], params()
    _, adapter = trained(method, p)
    save_adapter(tmp_path, adapter, method, p, key=jax.random.key(1))
    (arrays,) = tmp_path.glob("adapter-*.safetensors")
    assert set(load_file(arrays)) == {"up/scale", "down/scale"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p | {"up": p["up"].at[0, 0].add(1)}, "the values of 'up' differ"),
        (lambda p: p | {"up": jnp.ones((6, 11))}, "the shape of 'up' differ: trained on [6, 10]"),
        (lambda p: p | {"down": p["down"].astype(jnp.float32)}, "the dtype of 'down' differ"),
        (lambda p: {k: v for k, v in p.items() if k != "bias"}, "the given base lacks 'bias'"),
        (lambda p: p | {"more": jnp.ones(2)}, "only the given base has 'more'"),
    ],
)
def test_another_base_is_refused_by_its_first_difference(tmp_path, change, message):
    method, p = methods()["lora"], params()
    save_adapter(tmp_path, trained(method, p)[1], method, p, key=jax.random.key(1))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_adapter(tmp_path, change(p))


def test_a_damaged_folder_is_refused(tmp_path):
    method, p = methods()["lora"], params()
    with pytest.raises(FileNotFoundError, match="holds no adapter.json"):
        load_adapter(tmp_path, p)
    save_adapter(tmp_path, trained(method, p)[1], method, p, key=jax.random.key(1))
    (arrays,) = tmp_path.glob("adapter-*.safetensors")
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cut short"):
        load_adapter(tmp_path, p)
    arrays.write_bytes(whole)
    about = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        load_adapter(tmp_path, p)
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(ValueError, match="no description of an adapter"):
        load_adapter(tmp_path, p)


def test_a_plain_function_cannot_be_described(tmp_path):
    p = params()
    with pytest.raises(ValueError, match="is a plain function"):
        save_adapter(tmp_path, {}, lambda key, tree: tree, p, key=jax.random.key(0))


# What a description holds -------------------------------------------------------------------------


def test_every_factory_of_the_readme_may_be_named():
    table = (ROOT / "README.md").read_text().split("## Methods")[1].split("##")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = {name for cell in first for name in re.findall(r"`([\w.]+)`", cell)}
    of_training = {name for name in named if name.startswith("optim.")}
    assert set(FACTORIES) == named - of_training | {"chain"}


def test_every_method_that_the_package_makes_may_be_named():
    """Whatever its factory says that it returns."""
    source = "".join(path.read_text() for path in (ROOT / "jaxpeft").rglob("*.py"))
    made = set(re.findall(r"\b(?:Method|low_rank)\(\s*\"(\w+)\"", source))
    assert {"lora", "dora", "chain", "quantize", "loftq"} <= made <= set(FACTORIES)


@pytest.mark.parametrize(
    "three", [3.0, np.float32(3), np.float64(3), jnp.float32(3), jnp.bfloat16(3), np.array(3.0)]
)
def test_numbers_of_any_kind_come_back_as_those_of_python(tmp_path, three):
    p, up = params(), methods()["part"].options["sites"]
    method = jp.lora({"up": np.int64(2)}, up, alpha=three, dtype=jnp.dtype("float32"))
    _, adapter = trained(method, p)
    save_adapter(tmp_path, adapter, method, p, key=jax.random.key(1))
    options = load_adapter(tmp_path, p).method.options
    assert options["rank"] == {"up": 2} and type(options["rank"]["up"]) is int
    assert options["alpha"] == 3 and isinstance(options["alpha"], float)
    assert options["dtype"] == jnp.float32


def calibrated(name, sites):
    """A method that starts from what data did, and so holds arrays."""
    x = jax.random.normal(jax.random.key(2), (8, 6))
    if name == "corda":
        return jp.corda(1, sites, jp.calibration.input_moments(model, params(), sites, [x]))
    found = jp.calibration.mean_gradients(
        lambda p, x: jnp.sum(model(p, x) ** 2), params(), sites, [x]
    )
    return jp.lora_ga(1, sites, found)


STARTS = [("corda", "moments", "(6, 6)"), ("lora_ga", "gradients", "(6, 10)")]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name, option, shape", STARTS)
def test_arrays_in_options_are_refused_and_as_lora_is_the_way_out(
    tmp_path, name, option, shape, quantized
):
    sites, p, key = jp.sites(model, params(), jnp.ones((2, 6))).match("up"), params(), KEY
    own = calibrated(name, sites)
    quantize = jp.quantize("int8", sites)
    method = jp.chain(quantize, own) if quantized else own
    frozen, start = jp.split(method(key, p))
    adapter = {k: v + 0.1 for k, v in start.items()}
    folder = tmp_path / "adapter"
    with pytest.raises(
        ValueError,
        match=rf"`{name}\({option}=\.\.\.\)` holds an array, float64 of "
        rf"shape {re.escape(shape)}.*`to_lora`",
    ):
        save_adapter(folder, adapter, method, p, key=key)
    assert not folder.exists()
    plain, low = jp.adapters.to_lora(own, adapter, start)
    save_adapter(folder, low, jp.chain(quantize, plain) if quantized else plain, p, key=key)
    loaded = load_adapter(folder, p)
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(
        jp.lift(model)(jp.combine(loaded.frozen, loaded.adapter), x),
        jp.lift(model)(jp.combine(frozen, adapter), x),
        atol=1e-6,
    )


def test_a_method_made_by_hand_is_refused_before_anything_is_written(tmp_path):
    method, p = methods()["lora"], params()
    mine = jp.chain(Method("mine", {}, method.apply))
    with pytest.raises(ValueError, match=r"knows no method 'mine'.* was made by hand"):
        save_adapter(tmp_path / "adapter", {}, mine, p, key=jax.random.key(0))
    assert not (tmp_path / "adapter").exists()
