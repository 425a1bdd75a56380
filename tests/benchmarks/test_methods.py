"""The comparison of methods on a handful of examples and models of a few thousand numbers."""

import ast
import concurrent.futures
import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the models' tokenizers need it")
pytest.importorskip("seqeval", reason="span F1 needs it: pip install 'jaxpeft[bench]'")
pytest.importorskip("sacrebleu", reason="BLEU needs it: pip install 'jaxpeft[bench]'")

import carry  # noqa: E402
import prompts  # noqa: E402
from comparison import (  # noqa: E402
    calibration,
    cell,
    code,
    command,
    files,
    protocol,
    records,
    report,
    rows,
    sharing,
    significance,
    tasks,
)

import jaxpeft as jp  # noqa: E402

WHOLE = protocol.WHOLE
CELLS = [
    (row.name, task)
    for task, row in WHOLE.cells()
    # The descendants on the model of odd sizes alone.
    if task == "e2e" or task == "snips" and row in rows.ROWS
    if protocol.unfit(task, row) is None
]


# What a row is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, name", CELLS)
def test_every_method_fits_its_model_and_trains_numbers_of_its_own(task, method, name):
    work = calibration.cell_of(task(name), WHOLE.row(method), steps=30)
    frozen, adapter = work.untrained(0)
    batch = next(work.batches(0))
    loss, count = jax.eval_shape(work.loss, frozen, adapter, batch, None)
    assert loss.shape == count.shape == ()
    assert set(work.labels.values()) == ({"head"} if method == "probe" else {"head", "adapter"})


@pytest.mark.parametrize(
    "method, name",
    [
        ("probe", "e2e"),
        ("lora", "snips"),
        ("unipelt", "e2e"),
        ("p-tuning v2", "snips"),
        ("lora_ga", "e2e"),
        ("moelora", "e2e"),
    ],
)
def test_a_step_moves_a_methods_numbers_and_the_head(task, method, name):
    work = calibration.cell_of(task(name), WHOLE.row(method), steps=1)
    before = work.untrained(0).adapter
    after = work.train(1e-2, seed=0).adapter
    moved = {work.labels[path] for path in before if not np.array_equal(before[path], after[path])}
    assert moved == ({"head"} if method == "probe" else {"head", "adapter"})


def test_lora_plus_moves_b_further_by_its_ratio(task):
    work = calibration.cell_of(task("snips"), WHOLE.row("lora+"), steps=1)
    adapter = work.untrained(0).adapter
    tx = work.tx(1e-3)
    slopes = jax.tree.map(jnp.ones_like, adapter)
    moved, _ = tx.update(slopes, tx.init(adapter), adapter)
    found = {path: float(jnp.max(jnp.abs(x))) for path, x in moved.items()}
    for path, size in found.items():
        rate = {"a": 1e-3, "b": 16e-3}.get(path.rpartition("/")[2], cell.HEAD_RATE)
        assert size == pytest.approx(rate, rel=1e-3), path


@pytest.mark.parametrize("name", ["snips", "e2e"])
def test_a_method_is_told_of_the_tasks_own_batches(task, name):
    seen = calibration.calibration(task(name))
    kernels = seen.probe.sites.match("trunk/layers/*kernel")
    real = sum(int(batch.mask.sum()) for batch in seen.batches)
    for moments in seen.moments(kernels).values():
        np.testing.assert_array_equal(moments.count, real)  # padding does not count

    def mean_loss(params):
        return sum(seen.loss(params, batch) for batch in seen.batches) / len(seen.batches)

    slopes = jax.grad(mean_loss)(seen.params)["trunk"]["layers"]["mlp"]["down"]["kernel"]
    found = seen.gradients(kernels)["trunk/layers/mlp/down/kernel"]
    np.testing.assert_allclose(found, slopes, rtol=1e-4, atol=1e-4 * float(jnp.abs(slopes).max()))


def test_every_row_has_the_same_head_and_batches_for_a_seed(task):
    cells = [cell.Cell(task("snips"), WHOLE.row(m), steps=2) for m in ("probe", "lora", "prefix")]
    kernels = [np.asarray(work.untrained(3).adapter["head/kernel"]) for work in cells]
    assert all(np.array_equal(kernels[0], kernel) for kernel in kernels)
    assert not np.array_equal(kernels[0], cells[0].untrained(4).adapter["head/kernel"])
    batches = [np.stack([batch.tokens for batch in work.batches(3)]) for work in cells]
    assert all(np.array_equal(batches[0], batch) for batch in batches)


def test_the_head_moves_at_its_own_rate_whatever_the_methods_is(task):
    work = cell.Cell(task("snips"), WHOLE.row("lora"), steps=1)
    heads = [work.train(rate, 0).adapter["head/bias"] for rate in (1e-4, 1e-1)]
    assert np.array_equal(*heads) and np.any(heads[0])
    assert np.allclose(np.abs(heads[0][heads[0] != 0]), cell.HEAD_RATE, rtol=1e-3)


def test_one_program_serves_all_rates_and_seeds(task):
    work = cell.Cell(task("snips"), WHOLE.row("prefix"), steps=1)
    first = work.step
    results = [work.train(rate, seed).adapter for rate, seed in ((1e-3, 0), (1e-2, 0), (1e-3, 1))]
    assert work.step is first  # a compiled program, which takes no other shapes
    a, b, c = (result["trunk/layers/attn/k/kernel/up"] for result in results)
    assert not np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generation_through_the_cache_says_what_whole_passes_would(task, method):
    work = cell.Cell(task("e2e"), WHOLE.row(method), steps=1)
    frozen, adapter = work.untrained(0)
    key, far = jax.random.key(1), ("rows", "table", "up")  # what virtual tokens are made of
    trained = cell.Trained(
        frozen,
        {
            path: x + 0.2 * jax.random.normal(key, x.shape) if path.rpartition("/")[2] in far else x
            for path, x in adapter.items()
        },
    )
    prompts = [[1, *ids] for ids in np.random.default_rng(0).integers(3, 200, (12, 3)).tolist()]
    for prompt, said in zip(prompts, cell.Run(work, trained).write(prompts), strict=True):
        again = []
        for length in range(4, 8):
            ids = np.zeros((1, 8), np.int32)
            ids[0, :length] = prompt + again
            logits = work.compiled(*trained, ids, np.arange(8)[None] < length)
            again.append(int(jnp.argmax(logits[0, length - 1])))
        assert said == [token for token in again if token != 2]


def test_padding_on_the_left_changes_nothing_that_is_written(task):
    work = cell.Cell(task("e2e"), WHOLE.row("prefix"), steps=1)
    run = cell.Run(work, work.untrained(0))
    short, longer = [1, 7, 20], [1, 9, 30, 31, 32, 33]
    assert run.write([short, longer])[0] == run.write([short])[0]


def test_a_batch_is_cut_to_the_shortest_length_that_holds_it():
    width = jax.jit(lambda batch: cell.trimmed(lambda x: jnp.sum(x.mask[0] | True), batch, (6, 12)))
    for longest, expected in ((6, 6), (7, 12)):
        mask = np.arange(12) < np.array([[3], [longest]])
        split = tasks.Split(np.zeros((2, 12), np.int32), mask, np.zeros(2, np.int32))
        assert width(split) == expected


def test_cutting_padding_off_changes_no_prediction(task, monkeypatch):
    questions = task("snips").questions["test"].split
    found = []
    for lengths in ((6, 12), (12,)):
        monkeypatch.setitem(tasks.LENGTHS, "minilm", lengths)
        work = cell.Cell(task("snips"), WHOLE.row("prefix"), steps=1)
        found.append(cell.Run(work, work.untrained(0)).predict(questions))
    (classes, loss), (others, other) = found
    assert np.array_equal(classes[questions.mask], others[questions.mask])
    assert loss == pytest.approx(other, rel=1e-5)


# Data and scores ---------------------------------------------------------------------------------


def test_sentences_of_test_are_dropped_from_train_letters_and_digits_compared():
    train = [files.Labelled("What's 2+2 ?", "a"), files.Labelled("Who?", "b")]
    parts = files.without_overlap(train, [], [files.Labelled("what s 22", "c")])
    assert [x.text for x in parts.train] == ["Who?"] and parts.dropped == 1


def test_a_meaning_is_shortened_to_its_values():
    text = "name[The Mill], eatType[pub], near[Zizzi], familyFriendly[no]"
    assert files.shorter(text) == "The Mill, pub, near Zizzi, kids no"


def test_a_missing_data_folder_says_what_it_lacks_and_how_to_give_it(monkeypatch, capsys):
    monkeypatch.setenv("JAXPEFT_DATA", "/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="'trec/TREC.train'.*/nowhere/at/all.*JAXPEFT_DATA"):
        files.trec()


def test_tags_stand_at_the_first_token_of_a_word(task):
    snips = task("snips")
    gold = snips.questions["test"].answers
    assert [len(at) for at in gold.starts] == [len(tags) for tags in gold.tags]
    for row, at in enumerate(gold.starts):
        labelled = np.flatnonzero(gold.split.labels[row] != -100)
        assert set(labelled) <= set(at) and gold.split.labels[row, 0] == -100


def test_span_counts_add_up_to_seqevals_score():
    from seqeval.metrics import f1_score

    true = [["B-a", "I-a", "O", "B-b"], ["O", "B-c"], ["B-a", "B-a"]]
    said = [["B-a", "O", "O", "B-b"], ["I-c", "I-c"], ["B-a", "I-a"]]
    total = sum(np.array(tasks.span_counts(s, t)) for s, t in zip(said, true, strict=True))
    assert tasks.f1(total) == pytest.approx(100 * f1_score(true, said))


def test_ngram_counts_add_up_to_sacrebleus_score():
    from sacrebleu.metrics import BLEU

    said = ["the cat sat on the mat today", "a dog ran home fast"]
    true = [["the cat sat on a mat today", "cats sit"], ["the dog ran home fast", "a dog ran"]]
    total = sum(np.array(tasks.ngram_counts(s, t)) for s, t in zip(said, true, strict=True))
    expected = BLEU().corpus_score(said, [list(x) for x in zip(*true, strict=True)]).score
    assert tasks.bleu(total) == pytest.approx(expected) and expected > 20


def test_the_error_of_a_gap_is_that_of_a_mean_of_paired_differences():
    rng = np.random.default_rng(1)
    mine, theirs = (rng.random((2, 500)) < [[0.9], [0.8]]).astype(int)
    outcomes = [np.stack([x, np.ones_like(x)], axis=-1) for x in (mine, theirs)]
    difference, error = significance.gap(*outcomes, tasks.accuracy)
    assert difference == pytest.approx(100 * (mine - theirs).mean())
    assert error == pytest.approx(100 * np.std(mine - theirs) / 500**0.5, rel=0.1)


def test_outcomes_survive_the_file_under_their_hash(tmp_path):
    first, second = np.array([[1, 2, 300], [0, 5, 6]]), np.array([[1, 2], [300, 0], [5, 6]])
    store = records.Outcomes(tmp_path / "x.outcomes.xz")
    digests = [store.add(x) for x in (first, second, first)]
    assert digests[0] == digests[2] != digests[1]  # the same numbers, laid out otherwise
    again = records.Outcomes(store.path)
    assert np.array_equal(again[digests[0]], first) and np.array_equal(again[digests[1]], second)
    other = records.Outcomes(store.path)  # as another process has it open meanwhile
    third = again.add(first + 1)
    assert third in other and np.array_equal(other[third], first + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.outcomes.xz"]


def test_outcomes_that_are_not_there_are_asked_for_by_name(tmp_path):
    results = records.Results(tmp_path / "x.jsonl")
    line = {"method": "lora", "task": "snips", "part": "validation", "outcomes": None}
    with pytest.raises(ValueError, match=r"lora on snips \(validation\) were not kept"):
        results.outcomes(line)
    with pytest.raises(ValueError, match=r"x\.outcomes\.xz' has no outcomes 0123.*--cell"):
        results.outcomes(line | {"outcomes": "0123"})


@pytest.mark.parametrize("name", ["methods", "named", "prompts"])
def test_recorded_lines_are_small_and_their_outcomes_are_there(name):
    results = records.Results(command.RESULTS / f"{name}.jsonl")
    lines = results.path.read_text().splitlines()
    assert max(map(len, lines)) < 1_000
    for line in results.lines:
        kept = line["part"] == "test" or line["method"] == "probe"
        assert (line["outcomes"] is not None) == kept
        if kept:
            score = tasks.METRICS[line["metric"]](results.outcomes(line).sum(axis=0))
            assert score == pytest.approx(line["score"], rel=1e-9)


# Runs --------------------------------------------------------------------------------------------

PLAN = protocol.Plan(
    tuple(row for row in rows.ROWS if row.name in ("probe", "full", "bitfit", "prefix")),
    {"e2e": None, "snips": ("probe", "full", "prefix"), "trec": ("probe", "full")},
    steps=2,
    seeds=(0, 1),
    repeats=1,
)
FIELDS = """method task rate seed steps code program device score probe_gap probe_gap_error
trainable trainable_with_head peak_bytes step_time_vs_full latency_vs_base flops_vs_base
context_used forgetting""".split()


def copied(path, folder):
    """The results file in another folder, with its outcomes."""
    outcomes = records.Results(path).own_outcomes.path
    shutil.copy(outcomes, folder / outcomes.name)
    return shutil.copy(path, folder / path.name)


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """A whole plan, run: the file and what was said."""
    path, said = tmp_path_factory.mktemp("results") / "methods.jsonl", []
    with jax.enable_x64(False):
        protocol.Protocol(PLAN, sharing.SharedResults(path), said.append).run()
    return path, said


def test_every_line_has_all_that_is_asked_of_it(finished):
    lines = [json.loads(line) for line in finished[0].read_text().splitlines()]
    assert {(line["task"], line["method"]) for line in lines} == {
        (task, row.name) for task, row in PLAN.cells() if (task, row.name) != ("e2e", "bitfit")
    }
    for line in lines:
        assert set(FIELDS) <= set(line)
        assert line["peak_bytes"] > 0 and line["step_time_vs_full"] > 0
        assert set(line["latency_vs_base"]) == {"1x16", "32x128"}
        merged = [times["merged"] for times in line["latency_vs_base"].values()]
        assert all(x is not None for x in merged)  # dense, or folded
        assert line["flops_vs_base"] == pytest.approx(1) or line["method"] == "prefix"
        assert (line["trainable"] == 0) == (line["method"] == "probe")
        if line["method"] == "probe" and line["task"] == "snips":
            assert line["forgetting"] == pytest.approx(1)


def test_what_is_dropped_from_train_is_said_once_for_each_task(finished):
    said = [text for text in finished[1] if "dropped" in text]
    assert said == [
        "e2e: 0 sentences of train stand in test too: dropped",
        "snips: 1 sentences of train stand in test too: dropped",
        "trec: 6 sentences of train stand in test too: dropped",
    ]


def test_three_rates_are_swept_and_one_more_beyond_an_edge(finished):
    results = records.Results(finished[0])
    for task in ("snips", "e2e"):
        for method in ("full", "prefix"):
            swept = results.of(task=task, method=method, part="validation")
            rates = [line["rate"] for line in swept]
            assert rates[:3] == list(WHOLE.row(method).rates) and len(rates) in (3, 4)
            scores = {line["rate"]: line["score"] for line in swept}
            if max(rates[:3], key=scores.__getitem__) == rates[1]:
                assert len(rates) == 3
            else:
                assert len(rates) == 4
            best = max(rates, key=scores.__getitem__)
            tested = results.of(task=task, method=method, part="test")
            assert {(x["rate"], x["seed"]) for x in tested} == {(best, 0), (best, 1)}


def test_trec_takes_the_rate_of_the_encoder(finished):
    results = records.Results(finished[0])
    mine, theirs = (results.of(task=t, method="full", part="test") for t in ("trec", "snips"))
    assert {x["rate"] for x in mine} == {x["rate"] for x in theirs}
    assert not results.of(task="trec", part="validation")


def test_a_repeated_command_runs_nothing_and_a_killed_one_goes_on(finished, tmp_path, monkeypatch):
    whole = finished[0].read_text()
    path = copied(finished[0], tmp_path)

    def refuse(*args):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(cell.Cell, "train", refuse)
        protocol.Protocol(PLAN, sharing.SharedResults(path), str).run()
    assert path.read_text() == whole

    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote the last one
    protocol.Protocol(PLAN, sharing.SharedResults(path), str).run()
    again = path.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    first, second = json.loads(lines[-1]), json.loads(again[-1])
    for name in ("method", "task", "seed", "score", "outcomes", "peak_bytes"):
        assert first[name] == second[name]


def test_runs_of_other_code_count_where_the_programs_are_the_same(finished, tmp_path, monkeypatch):
    lines = [json.loads(line) for line in finished[0].read_text().splitlines()]
    plan = dataclasses.replace(PLAN, tasks={"snips": ("probe", "prefix"), "e2e": ("probe",)})

    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(cell.Cell, "train", refuse)

    def run(name, change):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line | change) + "\n" for line in lines))
        protocol.Protocol(plan, sharing.SharedResults(path), str).run()
        return records.Results(path)

    results = run("same.jsonl", {"code": "0"})
    for task, row in plan.cells():
        current = results.of(task=task, method=row.name, code=code.code_hash(row))
        old = results.of(task=task, method=row.name, code="0")
        assert [x["score"] for x in current] == [x["score"] for x in old] != []
    with pytest.raises(AssertionError, match="trained again"):
        run("other.jsonl", {"code": "0", "program": "0"})


# Carried runs ------------------------------------------------------------------------------------


def test_a_run_of_carried_code_counts_and_keeps_the_hash_it_was_measured_with(finished, tmp_path):
    path = copied(finished[0], tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    full = next(line["code"] for line in lines if line["method"] == "full")
    old = [line | {"code": "old"} if line["method"] == "full" else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    found = report.summary(report.latest(records.Results(path), PLAN), PLAN)
    assert found["of_earlier_code"] == ["full on e2e", "full on snips", "full on trec"]

    steps = [{"codes": {"old": "newer"}}, {"codes": {"newer": full, full: "old"}}]  # there and back
    (tmp_path / "carried.json").write_text(json.dumps(steps[:1] + [{"codes": {"newer": full}}]))
    for results in (records.Results(path), sharing.SharedResults(path)):
        assert {x["code"] for x in results.of(method="full")} == {full}
        assert {x["measured"] for x in results.of(method="full")} == {"old"}
    found = report.summary(report.latest(records.Results(path), PLAN), PLAN)
    assert found["of_earlier_code"] == []
    assert found["tasks"]["snips"]["full"]["code"] == "old"
    (tmp_path / "carried.json").write_text(json.dumps(steps))
    assert records.Carried(tmp_path / "carried.json")("old") == full  # and no endless round


def test_what_is_carried_are_recorded_runs_of_methods_that_do_not_differ():
    codes = lambda state: {"methods": {m: f"{m} {state}" for m in ("a", "b", "c", "d")}}  # noqa: E731
    ones, cells = [np.ones(3)], [("snips", "a"), ("snips", "b"), ("e2e", "b"), ("snips", "d")]
    before = {"codes": codes("then"), "cells": {cell: ones for cell in cells}}
    now = {"codes": codes("now"), "cells": before["cells"] | {("e2e", "b"): [np.ones(3) * 1.001]}}
    recorded = {"methods": {"a then", "b then", "c then", "d of earlier code"}}
    about = dict(reason="renamed", since="0123", say=str)
    found, differ = carry.entry(before, now, recorded, **about)
    assert found["codes"] == {"a then": "a now"} and differ == ["b"]
    assert found["checked"] == ["a on snips", "d on snips"]
    assert (found["reason"], found["since"]) == ("renamed", "0123")
    found, differ = carry.entry(before, now, recorded, unchecked=True, **about)
    assert found["codes"] == {"a then": "a now", "c then": "c now"}
    found, differ = carry.entry(before, now, recorded, tolerance=0.01, **about)
    assert found["codes"] == {"a then": "a now", "b then": "b now"} and not differ


def test_arrays_of_other_shapes_or_another_number_of_them_differ():
    ones = np.ones((2, 3))
    assert carry.farthest([ones], [ones]) == 0
    assert carry.farthest([ones, 2 * ones], [ones, ones]) == 1
    assert carry.farthest([ones], [ones.T]) == carry.farthest([ones], [ones, ones]) == np.inf


def test_nothing_is_carried_without_saying_what_was_checked(capsys):
    for arguments, said in (
        (["HEAD", "--reason", "x"], "--unchecked"),
        (["HEAD", "--reason", "x", "--check", "lora"], "a method and a task each are needed"),
    ):
        with pytest.raises(SystemExit):
            carry.main(arguments)
        assert said in capsys.readouterr().err


def test_carried_hashes_lead_from_recorded_runs_on():
    """A hash that no line has is a typing error, or of a line that was dropped."""
    entries = json.loads((command.RESULTS / "carried.json").read_text())
    lines = (
        line
        for name in ("methods", "named", "prompts")
        for line in (command.RESULTS / f"{name}.jsonl").read_text().splitlines()
    )
    known = {json.loads(line)["code"] for line in lines}
    for entry in entries:
        assert entry["reason"] and entry["since"]
        assert set(entry["codes"]) <= known
        known |= set(entry["codes"].values())


def test_the_hash_of_the_programs_sees_what_is_computed(task, monkeypatch):
    """And nothing else: neither the row's name nor how its function is written."""
    lora = WHOLE.row("lora")
    hashes = {}
    for name, row in {
        "as it is": lora,
        "renamed": dataclasses.replace(lora, name="x", make=lambda p: lora.make(p)),
        "stronger": dataclasses.replace(
            lora, make=lambda p: jp.lora(rows.RANK, p.kernels, alpha=3 * rows.RANK)
        ),
        "elsewhere": dataclasses.replace(
            lora, make=lambda p: jp.lora(rows.RANK, p.keys, alpha=2 * rows.RANK)
        ),
        "otherwise started": dataclasses.replace(
            lora,
            make=lambda p: jp.lora(rows.RANK, p.kernels, alpha=2 * rows.RANK, init="gaussian"),
        ),
    }.items():
        hashes[name] = code.program_hash(cell.Cell(task("snips"), row, steps=2))
    assert hashes["as it is"] == hashes["renamed"]
    assert len(set(hashes.values())) == 4
    longer = code.program_hash(cell.Cell(task("snips"), lora, steps=3))
    monkeypatch.setattr(cell, "CLIP", 2.0)
    clipped = code.program_hash(cell.Cell(task("snips"), lora, steps=2))
    assert len({longer, clipped, *hashes.values()}) == 6


def test_a_cell_is_redone_and_takes_the_place_of_the_old_one(finished, tmp_path):
    path = copied(finished[0], tmp_path)
    before = len(records.Results(path).lines)
    results = sharing.SharedResults(path)
    protocol.Protocol(PLAN, results, str).redo("trec", "probe")
    assert len(records.Results(path).lines) == before + len(PLAN.seeds)
    assert len(records.Results(path).of(task="trec", method="probe")) == len(PLAN.seeds)


def test_a_cell_is_redone_though_earlier_code_had_the_same_programs(
    finished, tmp_path, monkeypatch
):
    lines = [json.loads(line) for line in finished[0].read_text().splitlines()]
    path, trained = tmp_path / "methods.jsonl", []
    both = [line | {"code": "0"} for line in lines] + lines
    path.write_text("".join(json.dumps(line) + "\n" for line in both))
    train = cell.Cell.train
    monkeypatch.setattr(
        cell.Cell, "train", lambda self, *run: trained.append(run) or train(self, *run)
    )
    protocol.Protocol(PLAN, sharing.SharedResults(path), str).redo("trec", "probe")
    assert len(trained) == len(PLAN.seeds)


def test_a_cell_that_does_not_exist_is_refused(tmp_path):
    work = protocol.Protocol(PLAN, sharing.SharedResults(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="no task 'treck'; there are e2e, snips, trec\\."):
        work.redo("treck", "full")
    with pytest.raises(
        ValueError, match="no method 'lorra' in the table; it has probe, full, bitfit, prefix"
    ):
        work.redo("trec", "lorra")
    with pytest.raises(ValueError, match="no row of 'bitfit' on 'e2e': the decoder.*no biases"):
        work.redo("e2e", "bitfit")
    assert not (tmp_path / "x.jsonl").exists()


def test_a_result_depends_on_the_program_and_not_on_its_words():
    source = 'def f(x):\n    """What."""\n    return x + 1  # why\n'
    said = [code.program(ast.parse(text)) for text in (source, "def f(x):\n    return (x + 1)\n")]
    assert said[0] == said[1] != code.program(ast.parse("def f(x):\n    return x + 2\n"))


def test_a_result_depends_on_its_own_method_and_on_no_other():
    hashes = {row.name: code.code_hash(row) for row in WHOLE.rows}
    assert len(set(hashes.values())) == len(hashes)
    files = {row.name: {x.name for x in code.method_files(row.make)} for row in WHOLE.rows[1:]}
    assert files["lora"] == {"lora.py", "_dropout.py"} and "mam.py" in files["mam"]
    faster = code.method_files(WHOLE.row("lora+").wrap)
    assert "_lora_plus.py" in {x.name for x in faster}
    told = dataclasses.replace(WHOLE.row("eva"), needs="gradients")
    assert code.code_hash(told) != hashes["eva"]
    assert "fill" in code.declared(WHOLE.row("poly").make)  # what helps it
    lora = WHOLE.row("lora")
    other = dataclasses.replace(lora, make=lambda p: jp.lora(rows.RANK, p.queries))
    assert code.code_hash(other) != hashes["lora"]
    assert "'RANK': 8" in code.declared(lora.make)


def test_names_in_a_room_of_the_library_lead_to_their_own_file():
    def make(p):
        return jp.adapters.to_lora, jp.lora(rows.RANK, p.kernels).name.upper()

    names = {path.name for path in code.method_files(make)}
    assert {"_to_lora.py", "lora.py"} <= names and "__init__.py" not in names


def test_a_file_that_results_depend_on_cannot_go_unseen(monkeypatch):
    code._common.cache_clear()
    monkeypatch.setattr(code, "COMMON", ("jaxpeft/_lift.py", "jaxpeft/lift.py"))
    with pytest.raises(FileNotFoundError, match=r"\['jaxpeft/lift.py'\], which are not there"):
        code._common()
    code._common.cache_clear()


# Several processes -------------------------------------------------------------------------------


def test_a_cell_that_another_process_is_at_is_left_to_it(task, tmp_path):
    plan = dataclasses.replace(PLAN, tasks={"trec": ("probe",)}, seeds=(0,))
    mine, theirs = (sharing.SharedResults(tmp_path / "methods.jsonl") for _ in range(2))
    with theirs.claim("trec", "probe", wait=False):
        protocol.Protocol(plan, mine, str).run()
    assert not mine.lines
    protocol.Protocol(plan, mine, str).run()
    assert len(mine.lines) == 1


def test_cells_that_rest_on_what_another_process_is_at_come_last(tmp_path, monkeypatch):
    mine, theirs = (sharing.SharedResults(tmp_path / "methods.jsonl") for _ in range(2))
    done = []
    monkeypatch.setattr(
        protocol.Protocol, "cell", lambda self, task, row: done.append((task, row.name))
    )
    with theirs.claim("e2e", "probe", wait=False), theirs.claim("snips", "full", wait=False):
        protocol.Protocol(PLAN, mine, str).run()
    assert done == [
        *(("snips", "probe"), ("snips", "prefix"), ("trec", "probe")),
        *(("e2e", "full"), ("e2e", "prefix"), ("trec", "full")),
    ]


def test_a_cell_that_others_rest_on_is_waited_for_and_not_done_again(finished, tmp_path):
    """As when a method needs the probe's run."""
    lines = records.Results(finished[0]).of(task="trec", method="probe")
    mine, theirs = (sharing.SharedResults(tmp_path / "methods.jsonl") for _ in range(2))
    work = protocol._Work(protocol.Protocol(PLAN, mine, str), "trec", WHOLE.row("probe"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with theirs.claim("trec", "probe", wait=False):
            waiting = pool.submit(work.line, "test", 0.0, 0)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            for line in lines:
                theirs.add(line | {"score": -1.0})  # so that it is seen whose it is
        assert waiting.result(timeout=60)["score"] == -1.0


def test_lines_of_two_processes_are_each_there_once(tmp_path):
    path = tmp_path / "x.jsonl"
    mine, theirs = sharing.SharedResults(path), sharing.SharedResults(path)
    for number, results in enumerate((mine, theirs, theirs, mine)):
        results.add({"number": number})
    assert [line["number"] for line in records.Results(path).lines] == [0, 1, 2, 3]
    with theirs.claim("a task", "a/method", wait=True):
        assert [line["number"] for line in theirs.lines] == [0, 1, 2, 3]
    mine.forget(number=1)
    with mine.claim("a task", "a/method", wait=True):
        assert [line["number"] for line in mine.lines] == [0, 2, 3]


def test_a_line_that_comes_between_is_neither_lost_nor_another_taken_twice(tmp_path, monkeypatch):
    """Another process adds one after this one has read the file, and before it writes to it."""
    path = tmp_path / "x.jsonl"
    mine, theirs = sharing.SharedResults(path), sharing.SharedResults(path)
    write = records.Results.add

    def interrupted(self, line, outcomes=None):
        if self is mine:
            theirs.add({"number": 0})
        return write(self, line, outcomes)

    monkeypatch.setattr(records.Results, "add", interrupted)
    mine.add({"number": 1})
    with mine.claim("a task", "a method", wait=True):
        assert [line["number"] for line in mine.lines] == [0, 1]


def test_runs_of_another_comparison_are_not_done_again(finished, tmp_path, monkeypatch, capsys):
    """Where it has the same row; its "prefix" is another one."""
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    lines = [json.loads(line) for line in finished[0].read_text().splitlines()]
    for line in lines:
        line["code"] = "0" if line["method"] == "prefix" else line["code"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = records.Results(finished[0]).own_outcomes.path
    shutil.copy(outcomes, tmp_path / "a.outcomes.xz")
    known = {}
    monkeypatch.setattr(
        protocol.Protocol,
        "cell",
        lambda self, task, row: known.update({(task, row.name): self.lines(row, task=task)}),
    )
    assert command.main("b", PLAN, PLAN, also={"a": ()}, arguments=["--json"]) == 0
    assert {cell for cell, found in known.items() if not found} == {
        ("e2e", "prefix"),
        ("snips", "prefix"),
    }
    found = json.loads(capsys.readouterr().out)
    assert {task: set(cells) for task, cells in found["tasks"].items()} == dict.fromkeys(
        PLAN.tasks, {"probe", "full"}
    )
    # In a table, those of earlier code are there as such where the row is the same.
    pytest.importorskip("matplotlib")
    assert command.main("b", PLAN, PLAN, also={"a": PLAN.rows}, arguments=["--table"]) == 0
    text = (tmp_path / "b.md").read_text().split("## Of earlier code")[1]
    assert "- prefix on e2e\n- prefix on snips" in text


def test_workers_are_processes_on_cores_of_their_own(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "cores = ' '.join(map(str, sorted(os.sched_getaffinity(0))))\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.txt').write_text(cores)\n"
        "sys.exit(3 if sys.argv[1:] == ['--methods', 'wrong'] else 0)\n"
    )
    monkeypatch.setattr("sys.argv", [str(script)])
    before = os.sched_getaffinity(0)
    assert sharing.spread(2, ["--short"]) == 0
    assert os.sched_getaffinity(0) == before
    cores = [set(map(int, file.read_text().split())) for file in tmp_path.glob("*.txt")]
    assert len(cores) == 2 and set.union(*cores) == before
    assert len(before) == 1 or not set.intersection(*cores)
    assert sharing.spread(2, ["--methods", "wrong"]) == 3


# Reports -----------------------------------------------------------------------------------------


def test_the_summary_has_gaps_with_errors_and_says_what_was_not_run(finished):
    lines = report.latest(records.Results(finished[0]), PLAN)
    found = report.summary(lines, PLAN)
    assert found["not_run"] == [
        {
            "task": "e2e",
            "method": "bitfit",
            "why": "the decoder of this benchmark has no biases",
        }
    ]
    full, probe = (found["tasks"]["snips"][method] for method in ("full", "probe"))
    assert full["probe_gap"] == pytest.approx(full["score"] - probe["score"])
    assert probe["probe_gap"] == probe["probe_gap_error"] == 0
    assert json.loads(json.dumps(found)) == found
    less = [line for line in lines if line["method"] != "full"]
    why = [x["why"] for x in report.summary(less, PLAN)["not_run"] if x["method"] == "full"]
    assert why == ["not finished"] * 3  # tasks
    assert found["of_earlier_code"] == []
    old = [line | {"code": "0"} if line["method"] == "full" else line for line in lines]
    found = report.summary(old, PLAN)
    assert found["of_earlier_code"] == ["full on e2e", "full on snips", "full on trec"]
    text = report.table(found, PLAN)
    assert "## Of earlier code" in text and "The code that 3 of 8 rows depend on" in text
    marked = [line for line in text.splitlines() if line.endswith("` earlier |")]
    assert len(marked) == 3 and all(line.startswith("| full") for line in marked)
    assert f"| `{lines[0]['code']}` |" in text


def test_the_table_and_the_figure_are_made_from_the_file_alone(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_DATA", "/nowhere/at/all")
    lines = report.latest(records.Results(finished[0]), PLAN)
    found = report.summary(lines, PLAN)
    text = report.table(found, PLAN)
    assert "| full (full fine-tuning) | " in text and "bitfit on e2e: the decoder" in text
    assert all(line.count("|") == 15 for line in text.splitlines() if line.startswith("| full"))
    assert f"| {found['tasks']['e2e']['full']['loss']:.3f} |" in text
    pytest.importorskip("matplotlib")
    report.figure(found, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("of", "shown"),
    [
        (lambda low, centre, high: low / 3, "({:.2g})"),
        (lambda low, centre, high: low, "{:.2g}"),
        (lambda low, centre, high: high, "{:.2g}"),
        (lambda low, centre, high: high * 3, "({:.2g})"),
    ],
)
def test_a_rate_is_in_brackets_where_none_beyond_it_was_tried(finished, of, shown):
    found = report.summary(report.latest(records.Results(finished[0]), PLAN), PLAN)
    rate = of(*PLAN.row("full").rates)
    found["tasks"]["snips"]["full"]["rate"] = rate
    snips = report.table(found, PLAN).split("## snips")[1].splitlines()
    line = next(x for x in snips if x.startswith("| full"))
    assert line.split(" | ")[5] == shown.format(rate)


def test_the_command_says_what_data_it_lacks(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAXPEFT_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    protocol._task.cache_clear(), tasks.base.cache_clear()
    assert command.main("m", WHOLE, protocol.SHORT, arguments=["--cell", "probe", "snips"]) == 2
    assert "'minilm-l6', which is not in" in capsys.readouterr().err


def test_a_table_of_nothing_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command.main("m", WHOLE, protocol.SHORT, arguments=["--table"]) == 2
    assert f"'{tmp_path / 'm.jsonl'}' has no finished runs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_clone_than_the_one_installed_is_refused(monkeypatch, tmp_path, capsys):
    """Or its lines would hold the code of this one, and what that one computes."""
    monkeypatch.setattr(command, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        command.main("m", WHOLE, protocol.SHORT, arguments=["--table"])
    assert f"set PYTHONPATH={tmp_path}, or install" in capsys.readouterr().err


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["input 100, vocabulary", "input 20, text"])
def test_prompts_of_other_lengths_and_starts_are_rows_like_others(task, method):
    work = cell.Cell(task("e2e"), prompts.PLAN.row(method), steps=1)
    (rows,) = (x for path, x in work.untrained(0).adapter.items() if work.labels[path] == "adapter")
    assert rows.shape == (work.row.length, 16)


def test_claims_compare_rows_that_there_are():
    cells = {(task, row.name) for task, row in prompts.PLAN.cells()}
    for claim in prompts.CLAIMS:
        assert {(claim.task, claim.better), (claim.task, claim.worse)} <= cells


def test_a_claim_is_held_against_two_standard_errors():
    better, alike = prompts.CLAIMS[0], next(claim for claim in prompts.CLAIMS if claim.alike)
    verdicts = [prompts.judged(better, x, 1.0) for x in (2.1, 1.9, -2.1)]
    assert verdicts == ["as claimed", "no difference seen", "the other way round"]
    assert [prompts.judged(alike, x, 1.0) for x in (1.9, 2.1)] == ["as claimed", "otherwise"]
    assert prompts.claims([], prompts.PLAN).count("not run") == len(prompts.CLAIMS)
