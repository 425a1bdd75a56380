"""`make demo`'s entry point, on a tiny model of one's own."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tokenizers", reason="the demo needs jaxpeft[train]")
pytest.importorskip("grain", reason="the demo needs jaxpeft[train]")

from jaxpeft.models import decoder  # noqa: E402
from jaxpeft.train import UserError  # noqa: E402
from tests.demo import DEMO  # noqa: E402

import run  # noqa: E402  # isort: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with random weights and the demo's tokenizer, and a file of records."""
    folder = tmp_path_factory.mktemp("own")
    config = decoder.Config(2048, 16, 32, 1, 2, 1, 8, tied=True, context=64, eos=(0,))
    decoder.save(folder / "model", config, decoder.init(config, jax.random.key(0), jnp.bfloat16))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base" / name, folder / "model")
    lines = (DEMO / "data" / "heldout.jsonl").read_text().splitlines(keepends=True)[:40]
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


def demo(*options):
    # In a process of its own: the tests' float64 and eight devices are not the demo's.
    command = [sys.executable, str(DEMO / "run.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_model_of_ones_own_gives_the_table_and_a_last_line_of_json(own, tmp_path):
    out = tmp_path / "adapter"
    options = ["--model", own / "model", "--data", own / "data.jsonl", "--out", out]
    done = demo(
        *options, "--methods", "lora,full,probe", "--rank", 4, "--steps", 40, "--rate", 0.01
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == [
        "loss", "recovered", "trainable", "adapter_bytes", "seconds", "reload_diff",
        "merge_max_diff",
    ]  # fmt: skip
    assert list(result["loss"]) == ["base", "lora", "full", "probe"]
    assert result["loss"]["lora"] < result["loss"]["base"] - 0.02
    assert result["reload_diff"] == 0
    assert result["merge_max_diff"] <= 1e-4
    # q, o: 2 * 16 * 16; k, v: 16 * 8; gate, up, down: 16 * 32, at rank 4
    assert result["trainable"] == 4 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    (arrays,) = out.glob("adapter-*.safetensors")
    size = arrays.stat().st_size
    assert size == result["adapter_bytes"]
    assert 4 * result["trainable"] < size < 4 * result["trainable"] + 3000
    for text in ("LoRA, rank 4", "full", "probe", "perplexity", "LoRA goes on"):
        assert text in done.stdout


def test_faults_of_the_user_are_one_line(own, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    for options, message in (
        (["--model", own / "model"], "--model needs --data"),
        (["--model", own / "model", "--data", bad], f"{bad}, line 2"),
        (["--model", tmp_path / "none", "--data", bad], "none"),
    ):
        done = demo(*options)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and message in done.stderr


def test_methods_are_checked():
    with pytest.raises(UserError, match=r"--methods: \['dora'\] are none of lora,full,probe"):
        run.arguments(["--methods", "lora,dora"])
    with pytest.raises(UserError, match="--methods needs lora"):
        run.arguments(["--methods", "full"])


def test_records_without_a_held_out_file_are_split_without_overlap(own):
    options = run.arguments(["--data", str(own / "data.jsonl")])
    train, held_out = run.read(options, run.TextTokenizer(own / "model"), 64)
    assert (len(train), len(held_out)) == (36, 4)
    ids = {train[i].ids.tobytes() for i in range(len(train))}
    assert not ids & {held_out[i].ids.tobytes() for i in range(len(held_out))}


def test_the_shipped_rates_are_the_best_of_those_swept():
    swept = json.loads((DEMO / "rates.json").read_text())
    assert set(swept) == set(run.METHODS)
    for found in swept.values():
        losses = {float(rate): loss for rate, loss in found["losses"].items()}
        assert len(losses) >= 3
        assert found["rate"] == min(losses, key=losses.get)
        # Neither end of the grid: a better rate could lie beyond it.
        assert min(losses) < found["rate"] < max(losses)
