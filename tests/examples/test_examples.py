"""The examples run, learn, and are as short as they say."""

import difflib
import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_float32():
    """As the examples run: x64 is for the laws."""
    with jax.enable_x64(False):
        yield


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(name):
    """The lines of an example below its docstring."""
    text = (EXAMPLES / f"{name}.py").read_text()
    return text.split('"""\n', 1)[1].splitlines()


@pytest.mark.parametrize("kind, most", [("linen", 9), ("nnx", 10)])
def test_lora_is_a_diff_of_at_most_ten_lines(kind, most):
    diff = difflib.ndiff(code(f"plain_{kind}_loop"), code(f"existing_{kind}_loop"))
    changed = [line for line in diff if line[0] in "+-" and line[2:].strip()]
    assert 0 < len(changed) <= most


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_flax_loop_learns_with_lora_and_trains_nothing_else(kind):
    losses, trained = example(f"existing_{kind}_loop").main(steps=30)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    _, full = example(f"plain_{kind}_loop").main(steps=1)
    factors = jax.tree_util.tree_leaves_with_path(trained)
    assert factors and all(str(path[-1].key).endswith(("/a", "/b")) for path, _ in factors)
    numbers = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, full)]
    assert numbers[0] < 0.4 * numbers[1]


def test_the_pmap_loop_learns_on_all_devices():
    losses, adapter = example("pmap_loop").main(steps=12)
    assert losses[-1] < 0.5 * losses[0]
    for x in jax.tree.leaves(adapter):
        assert (
            len(x.sharding.device_set) == jax.local_device_count()
            and x.sharding.is_fully_replicated
        )


def test_the_tpu_script_goes_on_where_it_was_stopped(tmp_path):
    tpu_lora = example("tpu_lora")
    options = "--shape tiny --length 16 --rows 8 --rate 1e-2 --save-every 2 --steps 4".split()
    whole, state = tpu_lora.main([*options, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole" / "2", tmp_path / "stopped" / "2")
    rest, resumed = tpu_lora.main([*options, "--out", str(tmp_path / "stopped")])
    assert len(rest) == 1 and len(whole) == 2  # of steps 0 and 3, and of 3 alone
    assert rest[-1] == whole[-1] and int(resumed.step) == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.adapter, state.adapter)


def test_the_tpu_script_reads_a_model_and_a_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("grain")
    tpu_lora = example("tpu_lora")
    config = tpu_lora.SHAPES["tiny"]
    from jaxpeft.models import decoder

    decoder.save(tmp_path / "model", config, decoder.init(config, jax.random.key(1)))
    words = {"<eos>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "data.jsonl").write_text('{"prompt": "a b", "completion": " c a b c"}\n' * 40)
    model, data = str(tmp_path / "model"), str(tmp_path / "data.jsonl")
    losses, state = tpu_lora.main(
        ["--model", model, "--data", data, "--length", "16", "--steps", "6", "--rate", "1e-2"]
    )
    assert losses[-1] < losses[0]


def test_the_base_of_the_tpu_script_is_cut_over_all_devices():
    tpu_lora = example("tpu_lora")
    from jaxpeft.models import decoder

    mesh = jax.make_mesh((8,), ("chips",))
    shapes = decoder.shapes(tpu_lora.SHAPES["8b"])
    shardings = tpu_lora.spread(shapes, mesh)
    whole = sum(x.size for x in jax.tree.leaves(shapes))
    part = sum(
        np.prod(s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )
    assert part == pytest.approx(whole / 8, rel=1e-3)  # the norms are on all
