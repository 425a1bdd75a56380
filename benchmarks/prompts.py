"""What papers claim of prompts, and what is seen here: python benchmarks/prompts.py --json

On E2E NLG with stories260k: prompts of 1, 5, 20 and 100 virtual tokens, and of 20 started at
random, small or as large as words, at the vocabulary and at a text; prefixes with and without the
network that makes them; prompts at the embedding alone against prompts in every layer. On SNIPS
with MiniLM: the last pair again. Runs, rates, seeds, files and options are those of
benchmarks/methods.py, in results/prompts.jsonl and, with --table, prompts.md and prompts.png; what
has run there is not run again, which leaves some 40 runs of a minute.
"""

import dataclasses
import os
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax starts
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from comparison import report
from comparison.command import main
from comparison.protocol import WHOLE, Plan
from comparison.rows import PROMPTS

PLAN = Plan(
    tuple(PROMPTS),
    {"e2e": None, "snips": ("probe", "prompt", "p-tuning v2")},
)
SHORT = dataclasses.replace(PLAN, steps=20, seeds=(0,), sweep=False, repeats=2)


class Claim(NamedTuple):
    """What a paper says of two methods: that the first is better, or that they are alike."""

    text: str
    source: str
    task: str
    better: str
    worse: str
    alike: bool = False


_LESTER, _LIANG = "Lester et al. 2021, 3.2", "Li and Liang 2021"
_DEEP = "Liu et al. 2021 (P-tuning v2), 4"
_ONE, _FIVE, _HUNDRED = (f"input {n}, vocabulary" for n in (1, 5, 100))
_TWENTY = "prompt"  # of twenty tokens, from the vocabulary
CLAIMS = [
    Claim("five tokens are better than one", _LESTER, "e2e", _FIVE, _ONE),
    Claim("twenty are better than one", _LESTER, "e2e", _TWENTY, _ONE),
    Claim("beyond twenty little is gained", _LESTER, "e2e", _HUNDRED, _TWENTY, alike=True),
    Claim("the vocabulary is a better start", _LESTER, "e2e", _TWENTY, "input 20, random"),
    Claim(
        "words are a better start", f"{_LIANG}, 7.4", "e2e", "input 20, text", "input 20, random"
    ),
    # A suspected cause of what is seen of the two before: a small row turns far in a step that
    # moves a large one little, and its direction is all that a normalization lets through.
    Claim(
        "small rows are a better start", "here", "e2e", "input 20, random", "input 20, random words"
    ),
    Claim("a network makes better prefixes", f"{_LIANG}, 4.3", "e2e", "prefix", "p-tuning v2"),
    Claim("every layer beats the embedding", f"{_LIANG}, 7.2", "e2e", "p-tuning v2", _TWENTY),
    Claim("also on tags, where inputs fail", _DEEP, "snips", "p-tuning v2", _TWENTY),
]


def claims(lines: list[dict[str, Any]], plan: Plan) -> str:
    """The claims and what was seen, in Markdown; a difference is one above two errors."""
    del plan
    rows = ["| claim | source | task | compared | seen | |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        better, worse = (
            report.on_test(lines, claim.task, name) for name in (claim.better, claim.worse)
        )
        difference, error = report.between(better, worse) if better and worse else (None, None)
        seen, verdict = "not run", ""
        if difference is not None and error is not None:
            seen = f"{difference:+.1f} ± {error:.1f}"
            verdict = judged(claim, difference, error)
        compared = f"{claim.better} - {claim.worse}"
        rows.append(
            f"| {claim.text} | {claim.source} | {claim.task} | {compared} | {seen} | {verdict} |"
        )
    return "\n## Claimed and seen\n\n" + "\n".join(rows) + "\n"


def judged(claim: Claim, difference: float, error: float) -> str:
    """Whether a difference is what the claim says."""
    if claim.alike:
        return "as claimed" if abs(difference) <= 2 * error else "otherwise"
    if difference > 2 * error:
        return "as claimed"
    return "the other way round" if difference < -2 * error else "no difference seen"


if __name__ == "__main__":
    sys.exit(main("prompts", PLAN, SHORT, also={"methods": WHOLE.rows}, more=claims))
