"""Comparisons that were named before they were run: python benchmarks/named.py --json

On SNIPS with MiniLM, five seeds, each arm against the other on the same batches, the difference
with its 95 % interval (Student's t over the seeds):

- AdaLoRA at its target budget against LoRA of the same rank everywhere.
- Movement against magnitude pruning, 90 and 97 % of the encoder's entries given up, single entries
  and blocks of 4 x 4, on one cubic schedule; full fine-tuning's rate.
- A tenth of the entries, chosen by each one-shot score and trained alone, against full fine-tuning.
  Scores are taken at the base with a trained head, on eight batches of 32.

Runs, rates, files and options are those of benchmarks/methods.py, in results/named.jsonl and, with
--table, named.md and named.png.
"""

import dataclasses
import functools
import os
import statistics
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax starts
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from comparison import report
from comparison.calibration import Calibration, calibration
from comparison.command import main
from comparison.places import Places
from comparison.protocol import WHOLE, Plan
from comparison.rows import FULL, PROBE, Row, adalora
from comparison.tasks import TASKS

import jaxpeft as jp
from jaxpeft import optim

RANK = 4  # of LoRA, and of AdaLoRA in the end
DENSITY = 0.1  # of entries that are trained alone
#: Two-sided 95 % of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


# AdaLoRA -----------------------------------------------------------------------------------------


UNIFORM = Row(
    "lora r=4", "Hu et al. 2021", "low rank", lambda p: jp.lora(RANK, p.kernels, alpha=2 * RANK)
)
ADALORA = adalora(RANK)
#: A further run. A step moves a value by the rate, and the matrix by that times the lengths of the
#: value's two vectors: 0.4 each, of 384 entries of deviation 0.02, and 1 at 0.05.
UNIT = dataclasses.replace(
    ADALORA,
    name="adalora, unit vectors",
    make=lambda p: jp.adalora(3 * RANK // 2, p.kernels, alpha=3 * RANK, init_std=0.05),
)


# Pruning while training --------------------------------------------------------------------------


def _pruned(criterion: Any, sparsity: int, structure: Any) -> Row:
    """Everything in the layers is trained, its kernels are pruned."""

    def wrap(tx: Any, p: Places, steps: int) -> Any:
        begin, end = steps // 10, steps * 7 // 10
        density = optax.polynomial_schedule(1.0, 1 - sparsity / 100, 3, end - begin, begin)
        return optim.scheduled_pruning(
            tx, p.kernels, density, criterion=criterion, structure=structure, update_every=5
        )

    kind = "entries" if structure == "entry" else "blocks"
    papers = {
        "movement": "Sanh et al. 2020",
        "magnitude": "Zhu and Gupta 2017",
        "taylor": "Molchanov et al. 2019",
    }
    make = lambda p: jp.unfreeze(p.sites.match("trunk/layers/*"))  # noqa: E731
    name = f"{criterion} {sparsity} % {kind}"
    return Row(name, papers[criterion], "weights", make, rate_of=FULL.name, wrap=wrap)


PRUNED = {
    (rule, sparsity, kind): _pruned(rule, sparsity, structure)
    for sparsity in (90, 97)
    for kind, structure in (("entries", "entry"), ("blocks", (4, 4)))
    for rule in ("magnitude", "movement")
}
#: A further run: movement without its sign. What moves to zero lies along one gradient, and given
#: up together it takes the outputs further than as many entries at random do.
TAYLOR = _pruned("taylor", 90, "entry")
#: A further run. Half of all entries go within the first 40 steps, by what they have moved by then.
LONG = {
    rule: dataclasses.replace(
        PRUNED[rule, 90, "entries"], name=f"{rule} 90 % entries, 8 times the steps", longer=8
    )
    for rule in ("magnitude", "movement")
}


# Chosen entries ----------------------------------------------------------------------------------


@functools.cache
def _seen() -> Calibration:
    """The base under which scores are taken; its head is trained once for all of them."""
    return calibration(TASKS["snips"]())


@functools.cache
def _masks(score: str, density: float = DENSITY) -> dict[str, jax.Array]:
    """This share of the entries, those with the largest scores of all matrices together."""
    seen = _seen()
    kernels = seen.probe.sites.match("trunk/layers/*kernel")
    if score == "random":
        found = {
            path: jax.random.uniform(jax.random.key(i), site.shape)
            for i, (path, site) in enumerate(kernels.items())
        }
    elif score == "magnitude":
        found = jp.sparsity.magnitude_scores(seen.params, kernels)
    elif score == "obs":
        moments = jp.calibration.input_moments(seen.forward, seen.params, kernels, seen.batches)
        found = jp.sparsity.obs_scores(seen.params, kernels, moments)
    else:
        about = (seen.loss, seen.params, kernels, seen.batches)
        found = jp.sparsity.saliency_scores(score, *about, key=jax.random.key(0))
    return jp.sparsity.topk_mask(found, kernels, density, allow_empty=True)


def _chosen(score: str) -> Row:
    papers = {
        "random": "Bhardwaj et al. 2024",
        "magnitude": "Han et al. 2015",
        "snip": "Lee et al. 2019",
        "taylor": "Molchanov et al. 2019",
        "fisher": "Sung et al. 2021",
        "obd": "LeCun et al. 1990",
        "grasp": "Wang et al. 2020",
        "obs": "Hassibi and Stork 1993",
    }

    def make(p: Places) -> Any:
        masks = _masks(score)
        sites = p.kernels.match(lambda site: bool(masks[site.path].any()))
        return jp.sparse_delta(masks, sites)

    return Row(f"a tenth by {score}", papers[score], "entries", make)


SCORES = ("random", "magnitude", "snip", "taylor", "fisher", "obd", "grasp", "obs")
CHOSEN = {score: _chosen(score) for score in SCORES}
#: A further run. Full fine-tuning trains embeddings, norms and biases too.
KERNELS = Row(
    "all kernels' entries", "Devlin et al. 2019", "weights", lambda p: jp.unfreeze(p.kernels)
)
#: A further run. A tenth may be too few.
HALF = Row(
    "half by random",
    "Bhardwaj et al. 2024",
    "entries",
    lambda p: jp.sparse_delta(_masks("random", 0.5), p.kernels),
)

PLAN = Plan(
    (
        PROBE,
        FULL,
        UNIFORM,
        ADALORA,
        *PRUNED.values(),
        *CHOSEN.values(),
        KERNELS,
        HALF,
        UNIT,
        TAYLOR,
        *LONG.values(),
    ),
    {"snips": None},
    seeds=(0, 1, 2, 3, 4),
    repeats=1,
)
SHORT = dataclasses.replace(PLAN, steps=20, seeds=(0, 1), sweep=False)


class Named(NamedTuple):
    """What was said beforehand of two arms: that the first is better, or that they are alike."""

    text: str
    better: Row
    worse: Row
    alike: bool = False


NAMED = [
    Named("ranks that move are worth more than equal ones", ADALORA, UNIFORM),
    Named("further run: they are behind since their vectors start short", UNIT, ADALORA),
    Named("further run: with vectors of unit length they are worth more", UNIT, UNIFORM),
    *(
        Named(
            f"movement beats magnitude at {sparsity} %, {kind}",
            PRUNED["movement", sparsity, kind],
            PRUNED["magnitude", sparsity, kind],
        )
        for sparsity in (90, 97)
        for kind in ("entries", "blocks")
    ),
    Named(
        "further run: movement is behind because of its sign, and better without",
        TAYLOR,
        PRUNED["movement", 90, "entries"],
    ),
    Named(
        "further run: without its sign it beats magnitude",
        TAYLOR,
        PRUNED["magnitude", 90, "entries"],
    ),
    Named("further run: movement needs more steps", LONG["movement"], LONG["magnitude"]),
    *(
        Named(f"a tenth, chosen by {score}, is as good as all", row, FULL, alike=True)
        for score, row in CHOSEN.items()
    ),
    Named("further run: full tuning gains by what is no kernel", FULL, KERNELS),
    *(
        Named(
            f"further run: a tenth by {score} is as good as all kernels", row, KERNELS, alike=True
        )
        for score, row in CHOSEN.items()
    ),
    Named("further run: a tenth is too few, half is more", HALF, CHOSEN["random"]),
    Named("further run: half, chosen by random, is as good as all", HALF, FULL, alike=True),
]


def interval(better: list[dict], worse: list[dict]) -> tuple[float, float] | None:
    """The mean difference over the seeds that both have, and half of its 95 % interval."""
    others = {line["seed"]: line["score"] for line in worse}
    gaps = [line["score"] - others[line["seed"]] for line in better if line["seed"] in others]
    if len(gaps) < 2:
        return None
    half = STUDENT[len(gaps) - 1] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.fmean(gaps), half


def differences(lines: list[dict[str, Any]], plan: Plan) -> str:
    """The comparisons and what was seen, in Markdown."""
    del plan
    rows = ["| said beforehand | compared | seen | |", "|---|---|---|---|"]
    for named in NAMED:
        pair = [report.on_test(lines, "snips", row.name) for row in (named.better, named.worse)]
        found = interval(*pair) if all(pair) else None
        seen, verdict = "not run", ""
        if found is not None:
            seen = f"{found[0]:+.2f} ± {found[1]:.2f} ({len(pair[0])} seeds)"
            verdict = judged(named, *found)
        compared = f"{named.better.name} - {named.worse.name}"
        rows.append(f"| {named.text} | {compared} | {seen} | {verdict} |")
    return "\n## Said beforehand and seen (95 % intervals)\n\n" + "\n".join(rows) + "\n"


def judged(named: Named, difference: float, half: float) -> str:
    """Whether a difference is what was said."""
    if named.alike:
        return "as said" if abs(difference) <= half else "otherwise"
    if difference > half:
        return "as said"
    return "the other way round" if difference < -half else "no difference seen"


if __name__ == "__main__":
    sys.exit(main("named", PLAN, SHORT, also={"methods": WHOLE.rows}, more=differences))
