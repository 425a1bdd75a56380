"""The comparisons named beforehand: what their arms train, and what is said of them."""

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the models' tokenizers need it")
pytest.importorskip("seqeval", reason="span F1 needs it: pip install 'jaxpeft[bench]'")
pytest.importorskip("sacrebleu", reason="BLEU needs it: pip install 'jaxpeft[bench]'")

import named  # noqa: E402
from comparison import protocol, sharing  # noqa: E402
from comparison.tuned import Tuned  # noqa: E402

import jaxpeft as jp  # noqa: E402

STEPS = 20


def test_every_arm_is_compared_and_every_comparison_has_its_arms():
    names = {row.name for row in named.PLAN.rows}
    compared = {row.name for n in named.NAMED for row in (n.better, n.worse)}
    assert compared == names - {"probe"} and len(names) == len(named.PLAN.rows)


def test_pruning_ends_at_its_sparsity_and_leaves_the_rest_trained(task):
    arm = named.PRUNED["movement", 90, "blocks"]
    cell = Tuned(task("snips"), arm, STEPS)
    before = cell.untrained(0).adapter
    after = cell.train(1e-3, 0).adapter
    kernels = [path for path in after if path.endswith("kernel") and "layers" in path]
    share = sum(int((after[p] != 0).sum()) for p in kernels) / sum(after[p].size for p in kernels)
    blocks = sum(after[p].size for p in kernels) // 16
    assert share <= 0.1 and share * blocks > 0.1 * blocks - 1 - len(kernels)
    for path in kernels:  # whole blocks
        x = np.asarray(after[path]) != 0
        tiles = x.reshape(len(x), x.shape[1] // 4, 4, x.shape[2] // 4, 4)
        assert (tiles.all((2, 4)) == tiles.any((2, 4))).all()
    assert all((after[path] != before[path]).any() for path in after)


def test_adalora_gives_ranks_up_until_the_budget_is_met(task):
    cell = Tuned(task("snips"), named.ADALORA, STEPS)
    adapter = cell.train(1e-2, 0).adapter
    left = sum(int(x.sum()) for x in jp.adapters.effective_ranks(adapter).values())
    matrices = sum(int(np.prod(x.shape[:-1])) for p, x in adapter.items() if p.endswith("/values"))
    assert left == named.RANK * matrices
    # The penalty is in the loss that is trained with.
    batch = next(cell.batches(0))
    frozen = cell.untrained(0).frozen
    far = {k: 3 * v if k.endswith("/a") else v for k, v in adapter.items()}
    total, weight = cell.loss(far, frozen, batch, None)
    plain, _ = super(Tuned, cell).loss(far, frozen, batch, None)
    np.testing.assert_allclose(
        (total - plain) / weight, 0.1 * jp.adapters.orthogonality_penalty(far), rtol=1e-4
    )


@pytest.mark.parametrize("score", ["magnitude", "snip", "grasp", "obs"])
def test_a_tenth_of_the_entries_is_chosen_by_a_score(task, score):
    named._masks.cache_clear()
    named._seen.cache_clear()
    cell = protocol.Cell(task("snips"), named.CHOSEN[score], STEPS)
    values = {k: v for k, v in cell.untrained(0).adapter.items() if k.endswith("/values")}
    masks = named._masks(score)
    total = sum(x.size for x in masks.values())
    assert sum(int(x.sum()) for x in masks.values()) == int(0.1 * total)
    assert values and {k.removesuffix("/values") for k in values} == {
        k for k, x in masks.items() if x.any()
    }
    named._masks.cache_clear()


def test_a_row_can_take_the_rate_of_another(task, tmp_path, monkeypatch):
    arm = named.PRUNED["magnitude", 97, "entries"]
    plan = protocol.Plan((named.PROBE, named.FULL, arm), {"snips": None}, 2, (0, 1), repeats=1)
    results = sharing.SharedResults(tmp_path / "named.jsonl")
    protocol.Protocol(plan, results, str).run(["full", arm.name])
    mine, full = (results.of(method=name, part="test") for name in (arm.name, "full"))
    assert {x["rate"] for x in mine} == {x["rate"] for x in full} and len(mine) == 2
    assert not results.of(method=arm.name, part="validation")
    assert arm.name in named.differences(results.lines, plan)


def test_an_interval_is_students():
    lines = lambda scores: [{"seed": i, "score": x} for i, x in enumerate(scores)]  # noqa: E731
    mean, half = named.interval(lines([3.0, 5, 4, 6, 2]), lines([1.0, 2, 2, 3, 2]))
    assert mean == pytest.approx(2)
    # scipy.stats.t.interval(0.95, 4, 2, scipy.stats.sem([2, 3, 2, 3, 0])) is (0.479, 3.521)
    assert half == pytest.approx(1.5207, abs=1e-3)
    arm = named.NAMED[0]
    assert named.judged(arm, mean, half) == "as said"
    assert named.judged(arm, -mean, half) == "the other way round"
    assert named.judged(arm, 1.0, half) == "no difference seen"
    same = named.NAMED[-1]
    assert (named.judged(same, 1.0, half), named.judged(same, mean, half)) == (
        "as said",
        "otherwise",
    )
