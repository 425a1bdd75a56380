"""The LongLoRA benchmark on a decoder of one layer and texts of a few tokens."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import longlora  # noqa: E402

from jaxpeft.models import decoder  # noqa: E402

CONFIG = decoder.Config(13, 16, 16, 1, 2, 2, 8, tie_word_embeddings=True, max_position_embeddings=8)
PLAN = longlora.Plan(multiples=(1, 8), tokens=64, steps=6, rounds=1)
STREAM = np.arange(333, dtype=np.int32) % 11  # the next token follows from the last


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(sys.modules[longlora.blocked.__module__], "BLOCK", 32)
    with jax.enable_x64(False):
        yield


@functools.cache
def base():
    return longlora.Base(CONFIG, decoder.init(CONFIG, jax.random.key(0)))


@functools.cache
def cell(multiple, name):
    return longlora.Cell(base(), multiple, longlora.ARMS[name], PLAN)


# Texts -------------------------------------------------------------------------------------------


def test_windows_of_all_lengths_ask_for_the_same_tokens():
    asked = [longlora.windows(STREAM, t, longest=32)[:, 1:].ravel() for t in (8, 16, 32)]
    assert all(np.array_equal(asked[0], other) for other in asked)
    assert np.array_equal(asked[0], STREAM[1:321])  # ten windows of 32, and what is left over


def test_every_step_has_the_same_number_of_tokens_and_a_seed_its_own_batches():
    stream = np.arange(333)
    for length in (8, 32):
        steps = list(longlora.batches(stream, length, 64, 7, seed=0))  # more than an epoch
        assert {step.shape for step in steps} == {(64 // length, length + 1)} and len(steps) == 7
        assert all(np.all(np.diff(step) == 1) for step in steps)
    again, other = (list(longlora.batches(stream, 32, 64, 7, seed)) for seed in (0, 1))
    assert np.array_equal(steps, again) and not np.array_equal(steps, other)


def test_the_parts_of_the_demos_texts_share_no_module():
    pytest.importorskip("tokenizers", reason="the demo's tokenizer needs it")
    texts = longlora.demo_texts()
    modules = [np.count_nonzero(stream == 0) for stream in texts]  # an end before each
    assert modules == [37, 7, 10]
    runs = [{x.tobytes() for x in longlora.windows(stream, 32)} for stream in texts]
    assert not runs[0] & runs[1] and not (runs[0] | runs[1]) & runs[2]
    for stream in texts:
        assert len(stream) > longlora.WHOLE.tokens * 4


# Figures -----------------------------------------------------------------------------------------


def test_shifted_attention_takes_a_smaller_share_of_flops_and_bytes_the_longer_the_text():
    shares = {}
    for multiple in (1, 8):
        full, shifted = (cell(multiple, f"{kind}, longlora").step for kind in ("full", "shifted"))
        flops = shifted.cost_analysis()["flops"] / full.cost_analysis()["flops"]
        shares[multiple] = flops, longlora.peak(shifted) / longlora.peak(full)
    assert shares[8][0] < shares[1][0] < 1
    assert shares[8][1] < min(shares[1][1], 0.9)


def test_the_blocked_step_that_tunes_computes_what_the_measured_one_does():
    one = cell(8, "full, longlora")
    batch = next(longlora.batches(STREAM, 64, 64, 1, 0))
    found = []
    for step in one.step, one.tuner:
        state, frozen = one.start(0)
        found.append(step(state, frozen, batch, np.float32(1e-2)))
    (mine, metrics), (theirs, others) = found
    assert np.allclose(metrics.loss, others.loss, rtol=1e-6) and metrics.grad_norm > 0
    assert np.allclose(metrics.grad_norm, others.grad_norm, rtol=1e-5)
    moments = [jax.tree.leaves(state.opt_state[0].mu) for state in (mine, theirs)]
    for a, b in zip(*moments, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_positions_are_interpolated_by_the_multiple():
    assert base().at(1) == CONFIG
    config = base().at(4)
    assert config.max_position_embeddings == 32 and (config.rope.rope_type, config.rope.factor) == (
        "linear",
        4.0,
    )
    assert dataclasses.replace(config, rope=CONFIG.rope, max_position_embeddings=8) == CONFIG


def test_perplexity_is_that_of_the_plain_decoder_and_tuning_lowers_it():
    one, data = cell(8, "full, longlora"), longlora.windows(STREAM, 64)
    read = longlora.Reader(one.config, PLAN.tokens)
    logits = np.asarray(decoder.apply_fn(one.config)(base().params, data[:, :-1]), np.float64)
    every = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, data[:, 1:, None], -1)[..., 0]
    )
    before = read(base().params, data)
    assert before == pytest.approx(math.exp(every.mean()), rel=1e-5)
    assert read(one.run(STREAM, 0.0, seed=0), data) == pytest.approx(before, rel=1e-6)
    assert read(one.run(STREAM, 3e-2, seed=0), data) < 0.8 * before


def test_longlora_trains_the_embedding_and_norms_beside_the_factors():
    sizes = {}
    for name in ("full, lora", "full, longlora"):
        state, _ = jax.eval_shape(functools.partial(cell(8, name).start, 0))
        sizes[name] = sum(x.size for x in jax.tree.leaves(state.adapter))
    assert sizes["full, lora"] == 4 * longlora.RANK * (16 + 16)
    assert sizes["full, longlora"] - sizes["full, lora"] == 13 * 16 + 3 * 16


def test_steps_are_timed_in_turn_and_the_first_of_each_left_out():
    cells = {name: cell(8, name) for name in ("full, longlora", "shifted, longlora")}
    seconds = longlora.timed(cells, STREAM)
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys(cells, 1)
    assert all(found[0] > 0 for found in seconds.values())


def test_all_that_is_measured_at_one_length(monkeypatch):
    arms = {name: longlora.ARMS[name] for name in ("full, longlora", "blocked, longlora")}
    monkeypatch.setattr(longlora, "ARMS", arms)
    plan = dataclasses.replace(PLAN, multiples=(1,), steps=2)
    (result,) = longlora.measure(base(), longlora.Texts(STREAM, STREAM, STREAM[:100]), plan)
    (found,) = result["lengths"]
    full, blocked = found["arms"].values()
    assert all(full[f"{cost}_vs_full"] == 1 and full[cost] > 0 for cost in longlora.COSTS)
    for cost in set(longlora.COSTS) - {"seconds"}:
        assert blocked[f"{cost}_vs_full"] == blocked[cost] / full[cost]
    assert "perplexity" not in blocked and len(full["perplexity"]["runs"]) == 2
    assert full["perplexity_short"] == full["perplexity"]  # T is T0
    assert full["perplexity_vs_full"]["runs"] == [1, 1]
    assert found["base"]["interpolated"] == found["base"]["not interpolated"]
    assert json.loads(json.dumps(result)) | {"plan": 0} == result | {"plan": 0}
    assert longlora.table(result).count("| 8 | ") == 3


# Report ------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_every_length_and_way():
    def arm(name, length):
        row = {"trained": 1234}
        for i, cost in enumerate(longlora.COSTS, 1):
            row |= {cost: i * 1e9, f"{cost}_vs_full": length / 1000 + i}
        if longlora.ARMS[name].tuned:
            row["perplexity"] = longlora.spread([7.0, 9.0])
            row["perplexity_short"] = longlora.spread([10.5, 11.5])
        return row

    def of(length):
        arms = {name: arm(name, length) for name in longlora.ARMS}
        base = {"not interpolated": 55.55, "interpolated": 44.44}
        return {"length": length, "base": base, "arms": arms}

    result = {
        "jax": "1.2.3",
        "context": 8,
        "plan": dataclasses.asdict(PLAN),
        "tokens": {"held_out": 333},
        "rates": {"lora": 0.5, "longlora": 0.25},
        "lengths": [of(8), of(32)],
    }
    text = longlora.table(json.loads(json.dumps(result)))
    assert "the same 320 held-out tokens" in text and "rate 0.5 for `lora` and 0.25 for" in text
    row = (
        "| 32 | shifted, longlora | 1,234 | 1000 | 1.03 | 2000 | 2.03 | 3.0 | 3.03 | 4e+09 | 4.03 |"
    )
    assert row.replace("4e+09", f"{4e9:.2f}") in text
    assert "| 8 | 55.5 | 44.4 | " + " | ".join(["8.00 ± 1.00 (11.00)"] * 3) + " |" in text
    assert len([line for line in text.splitlines() if line.startswith("| 32 |")]) == 5
