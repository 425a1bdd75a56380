"""`make demo`'s entry point, on a tiny model of one's own."""

import json
import re
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
    config = decoder.Config(
        2048,
        16,
        32,
        1,
        2,
        1,
        8,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        eos_token_ids=(0,),
    )
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


def options_for(own):
    options = ["--model", own / "model", "--data", own / "data.jsonl"]
    return [*options, "--rank", 4, "--steps", 40, "--rate", 0.01]


@pytest.fixture(scope="module")
def whole(own):
    """A run of all methods from begin to end, its last line, and where its adapter is."""
    out = own / "adapter"
    done = demo(*options_for(own), "--methods", "lora,full,probe", "--out", out)
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1]), out


def test_a_model_of_ones_own_gives_the_table_and_a_last_line_of_json(whole):
    done, result, out = whole
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


def test_output_to_a_file_has_a_line_for_each_evaluation(whole):
    lines = whole[0].stdout.splitlines()
    for name in ("lora", "full", "probe"):
        begin = lines.index(f"{name}:")
        for line, step in zip(lines[begin + 1 :], (0, 10, 20, 30, 40), strict=False):
            assert re.match(rf"step {step}/40  .*eval loss \d\.\d{{4}}", line), line


def test_a_run_that_was_stopped_goes_on_from_its_folder_and_ends_the_same(own, whole, tmp_path):
    options = [*options_for(own), "--folder", tmp_path / "run"]
    command = [sys.executable, str(DEMO / "run.py"), *map(str, options)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in first.stdout:  # known while it runs, and not at its end
        if line.startswith("step 10/40"):
            first.terminate()
            break
    _, err = first.communicate()
    assert first.returncode == 2
    stopped = re.search(r"error: lora was stopped at step (\d+) of 40. Use the same command", err)
    assert 10 <= int(stopped[1]) < 40, err
    merged = tmp_path / "merged"
    done = demo(*options, "--merged", merged)
    assert done.returncode == 0, done.stderr
    assert "step 0/40" not in done.stdout and "step 40/40" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loss"]["lora"] == whole[1]["loss"]["lora"]
    assert (tmp_path / "run" / "adapter" / "adapter.json").exists()
    # What was merged is a model to start from: it has its tokenizer.
    config, _ = decoder.load(merged)
    assert run.TextTokenizer(merged).eos_id == config.eos_token_ids[0]


def test_a_folder_of_another_run_is_refused_by_name(own, tmp_path):
    given = lambda *more: run.arguments(["--data", str(own / "data.jsonl"), *more])  # noqa: E731
    run.claim(tmp_path, given("--steps", "40"))
    run.claim(tmp_path, given("--steps", "40", "--methods", "lora,full"))
    with pytest.raises(UserError, match=rf"{tmp_path} holds a run with steps 40, not 20"):
        run.claim(tmp_path, given("--steps", "20"))
    with pytest.raises(UserError, match="holds a run with rank 16, not 2"):
        run.claim(tmp_path, given("--steps", "40", "--rank", "2"))


def test_samples_begin_with_the_whole_prompt_of_a_record(own):
    tokenizer = run.TextTokenizer(own / "model")
    file = own / "asked.jsonl"
    question = "Which of these modules reads files of configuration, and how is it used? " * 2
    asked = [{"prompt": question, "completion": "configparser"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in asked))
    examples = run.read_examples(file, tokenizer, max_length=256)
    prompt = run.sample_prompt(examples, room=200)
    assert len(prompt) > 24
    assert tokenizer.tokenizer.decode(prompt.tolist()).strip() == question.strip()
    # A shorter one where the first leaves no room for what is to be written.
    asked.append({"prompt": "What is cmd? ", "completion": "a module"})
    file.write_text("".join(json.dumps(record) + "\n" for record in asked))
    examples = run.read_examples(file, tokenizer, max_length=256)
    for room in (20, 1):  # and the shortest where none does
        prompt = run.sample_prompt(examples, room)
        assert tokenizer.tokenizer.decode(prompt.tolist()).strip() == "What is cmd?"
    texts = run.read_examples(own / "data.jsonl", tokenizer, max_length=64)
    assert len(run.sample_prompt(texts, room=200)) == 24


def test_faults_of_the_user_are_one_line(own, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    for options, message in (
        (["--model", own / "model"], "--model needs --data"),
        (["--model", own / "model", "--data", bad], f"{bad}, line 2"),
        (["--model", tmp_path / "none", "--data", bad], "none"),
        (
            ["--model", own / "model", "--data", own / "data.jsonl", "--prompt", "one two " * 40],
            "tokens, the model's context 64",
        ),
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
